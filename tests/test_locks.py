"""Locks within a process: as threading.Lock, and on ranges of bytes."""

from __future__ import annotations

import gc
import threading
import time
from typing import Any

import pytest
from conftest import LIMITED, dumps, is_free, open_fds

from mpmemory import HandleLostError, Memory, RobustLock, Seal, locks
from mpmemory.connection import Pipe


@pytest.mark.parametrize("make", [lambda: Memory(100).lock(10, 20), RobustLock])
def test_it_behaves_as_a_threading_lock(make: Any) -> None:
    lock = make()
    reference = threading.Lock()
    for each in (lock, reference):
        with pytest.raises(RuntimeError):
            each.release()
        assert each.acquire() is True
        assert each.acquire(False) is False
        assert each.acquire(blocking=False) is False
        assert each.acquire(timeout=0.01) is False
        assert each.acquire(True, 0) is False
        each.release()
        with pytest.raises(RuntimeError):
            each.release()
        with each:
            assert each.acquire(False) is False
        for arguments in ((False, 1), (True, -2), (True, float("nan"))):
            with pytest.raises(ValueError, match=r"timeout|NaN"):
                each.acquire(*arguments)
        assert each.acquire(timeout=5) is True
        thread = threading.Thread(target=each.release)  # any thread may
        thread.start()
        thread.join()
        assert each.acquire(False) is True
        each.release()
    assert "not held" in repr(lock)


def test_a_range_must_be_within_the_memory() -> None:
    memory = Memory(100)
    for arguments in ((0, 101), (100, 1), (-1, 5), (5, -1)):
        with pytest.raises(ValueError, match="not within a size of 100 bytes"):
            memory.lock(*arguments)
    with pytest.raises(ValueError, match="cannot lock 0 bytes of memory 'mpmemory', at offset 5"):
        memory.lock(5, 0)
    with pytest.raises(ValueError, match="not within a size of 10 bytes"):
        memory.map(10, 50).lock(5, 6)
    lock = memory.lock(10, 20, shared=True)
    assert (lock.offset, lock.length, lock.shared, lock.memory.identity) == (10, 20, True, memory.identity)
    assert memory.lock().length is None
    assert "shared offset=10 length=20" in repr(lock)


def test_what_a_lock_is_travels(pipe: Any) -> None:
    for lock in (Memory(100).lock(10, 20, shared=True), Memory(100).lock(5), Memory(100).map(50, 20).lock(3)):
        pipe[0].send(lock)
        again = pipe[1].recv()
        assert (again.offset, again.length, again.shared) == (lock.offset, lock.length, lock.shared)
        with lock, again.memory.lock(0, 1):
            assert is_free(again) == lock.shared


@pytest.mark.parametrize(
    ("first", "second", "apart"),
    [
        ((0, 10), (10, 10), True),
        ((0, 10), (9, 1), False),
        ((5, 1), (0, 100), False),
        ((0, 1), (1, None), True),
        ((50, 10), (0, None), False),
        ((99, 1), (0, 99), True),
    ],
)
def test_ranges_that_do_not_overlap_know_nothing_of_each_other(first: Any, second: Any, apart: bool) -> None:
    memory = Memory(100)
    with memory.lock(*first):
        assert is_free(memory.lock(*second)) == apart
        assert is_free(memory.lock(*second, shared=True)) == apart
    with memory.lock(*first, shared=True):
        assert is_free(memory.lock(*second)) == apart
        assert is_free(memory.lock(*second, shared=True))
    assert is_free(memory.lock(*second))


def test_the_lock_of_a_buffer_is_on_its_own_range() -> None:
    memory = Memory(100)
    buffer = memory.map(20, 40)
    with buffer.lock():
        assert is_free(memory.lock(0, 40))
        assert not is_free(memory.lock(40, 1))
        assert not is_free(memory.lock(59, 1))
        assert is_free(memory.lock(60))
    with buffer.lock(5, 5):
        assert not is_free(memory.lock(45, 1))
        assert is_free(memory.lock(50))


def test_threads_share_a_shared_lock() -> None:
    memory = Memory(100)
    lock = memory.lock(shared=True)
    with lock:
        with lock:
            assert not is_free(memory.lock())
        assert not is_free(memory.lock())
    assert is_free(memory.lock())


def test_a_lock_to_the_end_covers_what_grows() -> None:
    memory = Memory(100)
    with memory.lock(50):
        memory.grow(200)
        assert not is_free(memory.lock(150, 10))


def test_it_holds_its_memory() -> None:
    memory = Memory(100)
    lock, other = memory.lock(), memory.lock()
    memory.close()
    with lock:
        assert not is_free(other)


def test_a_dropped_lock_is_released() -> None:
    memory = Memory(100)
    lock = memory.lock()
    lock.acquire()
    del lock
    gc.collect()
    assert is_free(memory.lock())


def test_memory_that_can_only_be_read() -> None:
    memory = Memory(100)
    memory.seal(Seal.FUTURE_WRITE)
    with memory.as_readonly().lock():
        assert not is_free(memory.lock())


def test_all_backends(backend: str) -> None:
    memory = Memory(100)
    with memory.lock(5, 5):
        assert not is_free(memory.lock(9, 1))
        assert is_free(memory.lock(10, 1))


def test_descriptors_are_few(run_python: Any) -> None:
    run_python(
        LIMITED + "memory = Memory(10_000)\n"
        "locks = [memory.lock(index, 1) for index in range(10_000)]\n"
        "for lock in locks:\n"
        "    with lock: pass\n"
        "with contextlib.ExitStack() as stack:\n"
        "    for lock in locks[:100]: stack.enter_context(lock)\n"
        "count = len(os.listdir('/proc/self/fd'))\n"
        "assert count < 30, count\n"
        "other = Memory(10).lock()\n"
        "expect_the_limit(other.acquire)\n"
        "with other: pass\n"
    )


def test_nothing_stays_open() -> None:
    before = open_fds()
    memory = Memory(100)
    held = [memory.lock(index, 1) for index in range(20)]
    for lock in held:
        lock.acquire()
    assert len(open_fds()) == len(before) + 21
    for lock in held:
        lock.release()
    assert len(open_fds()) == len(before) + 1 + locks._MAX_SPARES
    del lock, held, memory
    gc.collect()
    assert open_fds() == before


def test_a_dropped_robust_lock_was_not_released() -> None:
    lock = RobustLock()
    other = Pipe()
    with other[0], other[1]:
        other[0].send(lock)
        again = other[1].recv()
    lock.acquire()
    del lock
    gc.collect()
    with again:
        assert again.owner_died


def test_a_robust_lock_that_cannot_be_mapped_is_not_held(monkeypatch: pytest.MonkeyPatch) -> None:
    lock = RobustLock()

    def fail(memory: Memory) -> None:
        raise OSError(12, "no room")

    monkeypatch.setattr(Memory, "map", fail)
    with pytest.raises(OSError, match="no room"):
        lock.acquire()
    monkeypatch.undo()
    assert is_free(lock)


def test_a_thread_that_waits_for_ever_does_not_hinder_one_with_a_timeout() -> None:
    memory = Memory(100)
    for lock in (memory.lock(), memory.lock(shared=True)):
        with memory.lock():
            thread = threading.Thread(target=lock.acquire)
            thread.start()
            assert not lock.acquire(timeout=0.01)
            assert not lock.acquire(False)
        thread.join()
        lock.release()
        assert is_free(lock)


def test_its_memory_can_be_closed_while_it_is_held() -> None:
    memory = Memory(100)
    lock = memory.lock()
    lock.acquire()
    lock.memory.close()
    lock.release()
    assert is_free(memory.lock())
    with pytest.raises(ValueError, match="is closed"):
        lock.acquire()


def test_a_timeout_is_waited_for() -> None:
    memory = Memory(100)
    with memory.lock():
        start = time.monotonic()
        assert not memory.lock().acquire(timeout=0.2)
        assert time.monotonic() - start >= 0.2
        lock = memory.lock()
        assert not lock.acquire(timeout=0)


def test_a_lost_lock_says_so_when_it_is_used() -> None:
    import pickle

    for lock in (Memory(100).lock(), RobustLock()):
        data = dumps(lock)
        pickle.loads(data)
        lost = pickle.loads(data)  # what a sender gives out once
        with pytest.raises(HandleLostError):
            lost.acquire()
        with pytest.raises(RuntimeError):
            lost.release()
