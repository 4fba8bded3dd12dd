"""Pool.imap: how far it reads, and how it ends."""

from __future__ import annotations

import gc
import itertools
import os
import signal
import threading
from collections import deque
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
from test_pool import PATIENCE, await_true, square
from test_pool_limits import store

import mpmemory
from mpmemory import Memory, PoolError
from mpmemory.pool import BUFFER_PER_WORKER


def test_imap_reads_no_further_than_its_buffer() -> None:
    def numbers(read: list[int]) -> Iterator[int]:
        for number in itertools.count(1):
            read.append(number)
            yield number

    with mpmemory.Pool(2) as pool:
        for imap in (pool.imap, pool.imap_unordered):
            for chunksize in (1, 3):
                read: list[int] = []
                results = imap(square, numbers(read), chunksize, buffersize=10)
                for taken in range(1, 200):
                    next(results)
                    assert len(read) <= taken + 12 * chunksize
                # It does read so far, with nobody taking results.
                await_true(partial(lambda read, least: len(read) >= least, read, 199 + 5 * chunksize))
        read = []
        results = pool.imap(square, numbers(read))
        assert [next(results) for _ in range(500)] == [x * x for x in range(1, 501)]
        assert len(read) <= 500 + 2 * BUFFER_PER_WORKER + 1


def test_imap_dropped_halfway_reads_no_more() -> None:
    stopped = threading.Event()

    def numbers() -> Iterator[int]:
        try:
            yield from itertools.count()
        finally:
            stopped.set()

    with mpmemory.Pool(2) as pool:
        for _ in pool.imap(square, numbers()):
            break
        assert stopped.wait(PATIENCE)
        pool.close()
        pool.join()


def test_imap_that_nobody_iterates_over_is_done() -> None:
    with Memory(1000) as memory, mpmemory.Pool(2) as pool:
        pool.imap_unordered(store, ((memory, index) for index in range(1000)), buffersize=3)
        pool.close()
        pool.join()
        assert memory.pread(1000) == b"x" * 1000


def test_imap_of_an_iterable_that_waits_for_results() -> None:
    more: list[int] = [2]

    def numbers() -> Iterator[int]:
        for _ in range(4):
            await_true(lambda: more)
            yield more.pop()

    with mpmemory.Pool(1) as pool:
        seen = []
        for result in pool.imap(square, numbers()):
            seen.append(result)
            more.append(result)
            assert pool.apply(square, (3,)) == 9  # nobody waits for that iterable but its own reader
    assert seen == [4, 16, 256, 65536]


def test_errors_of_an_iterable() -> None:
    def broken(error: BaseException) -> Iterator[int]:
        yield 1
        yield 2
        raise error

    class Short:
        """Has less items than it says."""

        def __len__(self) -> int:
            return 10

        def __iter__(self) -> Iterator[int]:
            return iter([1, 2])

    with mpmemory.Pool(2) as pool:
        for error in (ValueError("of mine"), SystemExit("of mine")):
            results = pool.imap(square, broken(error))
            assert [next(results), next(results)] == [1, 4]
            with pytest.raises(type(error), match="of mine"):
                next(results)
            with pytest.raises(StopIteration):
                next(results)
        with pytest.raises(ValueError, match="of mine"):
            pool.map(square, broken(ValueError("of mine")))
        # multiprocessing's pool waits for the rest for ever.
        with pytest.raises(ValueError, match="less than its length"):
            pool.map_async(square, Short()).get(PATIENCE)
        assert pool.apply(square, (3,)) == 9


def test_an_imap_ends_that_is_terminated_while_its_iterable_ends() -> None:
    ending = threading.Event()

    def numbers() -> Iterator[int]:
        yield 1
        ending.wait(PATIENCE)

    with mpmemory.Pool(1) as pool:
        results = pool.imap(square, numbers())
        assert next(results) == 1
        pool.terminate()
    ending.set()
    await_true(lambda: all(thread.name != "mpmemory-pool-feeder" for thread in threading.enumerate()))
    with pytest.raises(PoolError, match="terminated"):
        results.next(PATIENCE)
    with pytest.raises(StopIteration):
        results.next(PATIENCE)


def test_a_result_that_is_taken_while_the_feeder_looks() -> None:
    """The feeder has just seen that it may not go on when the last result is taken: somebody must tell it."""
    first_is_done, looking, taken = threading.Event(), threading.Event(), threading.Event()
    consumer = threading.current_thread()

    class Items(deque[Any]):
        def __len__(self) -> int:
            count = super().__len__()
            if threading.current_thread() is not consumer and not taken.is_set():
                looking.set()
                taken.wait(PATIENCE)
            return count

        def popleft(self) -> Any:
            item = super().popleft()
            taken.set()
            return item

    def numbers() -> Iterator[int]:
        yield 1
        first_is_done.wait(PATIENCE)
        yield 2

    with mpmemory.Pool(1) as pool:
        results: Any = pool.imap(square, numbers(), buffersize=1)
        await_true(lambda: results._iterator._items)
        # So that nothing else wakes the feeder: the turn with the first result is over.
        assert pool.apply(square, (3,)) == 9
        results._iterator._items = Items(results._iterator._items)
        first_is_done.set()
        assert looking.wait(PATIENCE)
        assert results.next(PATIENCE) == 1
        assert results.next(PATIENCE) == 4


def test_a_dropped_imap_takes_no_more_of_its_iterable() -> None:
    dropped, ended, given = threading.Event(), threading.Event(), []

    def numbers() -> Iterator[int]:
        try:
            for number in range(20):
                if number == 3:  # there is room for more
                    dropped.wait(PATIENCE)
                given.append(number)
                yield number
        finally:
            ended.set()

    with mpmemory.Pool(1) as pool:
        results = pool.imap(square, numbers(), buffersize=10)
        assert next(results) == 0
        del results
        dropped.set()
        assert ended.wait(PATIENCE)
        assert given == [0, 1, 2, 3]


def test_an_imap_without_a_thread_for_it() -> None:
    """As near the end of the process, or at the limit of threads."""
    with mpmemory.Pool(1) as pool:
        before = threading.stack_size(1 << 46)  # more than there is
        try:
            results = pool.imap(square, range(100), buffersize=1)
        finally:
            threading.stack_size(before)
        assert list(results) == [x * x for x in range(100)]


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
def test_a_child_forked_while_the_pool_is_locked_drops_results() -> None:
    with mpmemory.Pool(1) as pool:
        results = pool.imap(square, range(3))
        assert next(results) == 0
        locked, forked = threading.Event(), threading.Event()

        def hold() -> None:
            with pool._scheduler._lock:  # type: ignore[attr-defined]
                locked.set()
                forked.wait(PATIENCE)

        holder = threading.Thread(target=hold)
        holder.start()
        assert locked.wait(PATIENCE)
        pid = os.fork()
        if pid == 0:
            signal.alarm(10)
            del results
            gc.collect()
            os._exit(0)
        forked.set()
        holder.join()
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        assert list(results) == [1, 4]
