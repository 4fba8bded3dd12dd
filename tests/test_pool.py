"""Pool: what it shares with multiprocessing's, and how it ends.

Workers are in test_pool_workers.py, big objects and limits in test_pool_limits.py, deaths in test_pool_deaths.py,
imap in test_imap.py, moments between two lines in test_pool_races.py.
"""

from __future__ import annotations

import gc
import itertools
import multiprocessing
import os
import pickle
import threading
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.pool import IMapIterator, MaybeEncodingError
from typing import Any

import pytest

import mpmemory
from mpmemory import PoolError
from mpmemory.pool import Pool

PATIENCE = 30.0  # seconds until something that must happen counts as never happening


def square(x: int) -> int:
    return x * x


def add(x: int, y: int = 0) -> int:
    return x + y


def pid_of_worker(_: object = None) -> int:
    return os.getpid()


def fail(message: str) -> None:
    raise ValueError(message)


def wait_for(conn: Any) -> str:
    """Say that it runs, and wait until it may end."""
    conn.send(os.getpid())
    conn.recv()
    return "released"


def await_true(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline
        os.sched_yield()


# --- as multiprocessing's -------------------------------------------------------------------------


def test_the_api_of_multiprocessing(ctx: Any) -> None:
    with ctx.Pool(2) as pool:
        assert isinstance(pool, multiprocessing.pool.Pool)
        assert isinstance(pool, Pool)
        assert "state=RUN pool_size=2" in repr(pool)
        assert pool.apply(add, (1,), {"y": 2}) == 3
        assert pool.apply_async(add, (1, 2)).get(PATIENCE) == 3
        assert pool.map(square, range(100)) == [x * x for x in range(100)]
        assert pool.map(square, iter(range(10)), chunksize=3) == [x * x for x in range(10)]
        assert pool.map(square, []) == []
        assert pool.map_async(square, [3]).get(PATIENCE) == [9]
        assert pool.starmap(add, [(1, 2), (3, 4)]) == [3, 7]
        assert pool.starmap_async(add, [(1, 2)] * 9, chunksize=2).get(PATIENCE) == [3] * 9
        assert list(pool.imap(square, range(50))) == [x * x for x in range(50)]
        assert list(pool.imap(square, range(50), chunksize=7)) == [x * x for x in range(50)]
        assert sorted(pool.imap_unordered(square, range(50))) == [x * x for x in range(50)]
        assert sorted(pool.imap_unordered(square, range(50), chunksize=7)) == [x * x for x in range(50)]
        assert list(pool.imap(square, [])) == []
        assert isinstance(pool.imap(square, []), IMapIterator)


def test_exceptions_come_with_the_traceback_of_the_worker(ctx: Any) -> None:
    with ctx.Pool(1) as pool:
        result = pool.apply_async(fail, ("why",))
        with pytest.raises(ValueError, match="why") as raised:
            result.get(PATIENCE)
        assert "in fail" in str(raised.value.__cause__)
        assert result.ready()
        assert not result.successful()
        with pytest.raises(ValueError, match="one"):
            pool.map(fail, ["one"])
        results = pool.imap(fail, ["one", "two"])
        with pytest.raises(ValueError, match="one"):
            next(results)
        with pytest.raises(ValueError, match="two"):
            next(results)
        with pytest.raises(StopIteration):
            next(results)


def test_callbacks_are_called_in_a_thread_of_the_parent() -> None:
    called: list[Any] = []

    def callback(value: Any) -> None:
        called.append((value, threading.current_thread() is not threading.main_thread(), os.getpid()))

    with mpmemory.Pool(2) as pool:
        pool.apply_async(square, (3,), callback=callback).get(PATIENCE)
        pool.map_async(square, [1, 2], callback=callback).get(PATIENCE)
        with pytest.raises(ValueError, match="why"):
            pool.apply_async(fail, ("why",), error_callback=lambda error: callback(str(error))).get(PATIENCE)
        with pytest.raises(ValueError, match="why"):
            pool.map_async(fail, ["why"], error_callback=lambda error: callback(str(error))).get(PATIENCE)
    assert called == [(value, True, os.getpid()) for value in (9, [1, 4], "why", "why")]


def test_a_callback_may_use_the_pool() -> None:
    with mpmemory.Pool(1) as pool:
        results: list[Any] = []
        done = threading.Event()

        def again(value: int) -> None:
            results.append(value)
            if len(results) < 5:
                pool.apply_async(square, (value,), callback=again)
            else:
                pool.terminate()
                done.set()

        pool.apply_async(square, (2,), callback=again)
        assert done.wait(PATIENCE)
        assert results == [4, 16, 256, 65536, 65536**2]
        pool.join()


@pytest.mark.parametrize("call", ["apply_async", "map_async"])
def test_a_callback_that_fails_hangs_nobody(call: str, monkeypatch: pytest.MonkeyPatch) -> None:
    reported: list[Any] = []
    monkeypatch.setattr(threading, "excepthook", lambda args: reported.append(args.exc_type))
    with mpmemory.Pool(1) as pool:
        arguments = (square, (3,)) if call == "apply_async" else (square, [3])
        result = getattr(pool, call)(*arguments, callback=lambda value: 1 / 0)
        assert result.get(PATIENCE) in (9, [9])
        assert pool.apply(square, (4,)) == 16
        pool.close()
        pool.join()
    assert reported == [ZeroDivisionError]


def test_timeouts(ctx: Any) -> None:
    ours, theirs = ctx.Pipe()
    with ours, theirs, ctx.Pool(1) as pool:
        result = pool.apply_async(wait_for, (theirs,))
        with pytest.raises(multiprocessing.TimeoutError):
            result.get(0)
        assert not result.ready()
        with pytest.raises(ValueError, match="not ready"):
            result.successful()
        results = pool.imap(square, [3])
        with pytest.raises(multiprocessing.TimeoutError):
            results.next(0)
        ours.send("end")
        assert result.get(PATIENCE) == "released"
        assert results.next(PATIENCE) == 9


def test_close_and_join_drain(ctx: Any) -> None:
    with ctx.Pool(2) as pool:
        results = [pool.apply_async(square, (x,)) for x in range(100)]
        chunks = pool.map_async(square, range(100))
        iterator = pool.imap(square, iter(range(1000)), buffersize=5)
        with pytest.raises(ValueError, match="still running"):
            pool.join()
        pool.close()
        pool.join()
        assert [result.get(0) for result in results] == [x * x for x in range(100)]
        assert chunks.get(0) == [x * x for x in range(100)]
        assert list(iterator) == [x * x for x in range(1000)]
        for use in (
            lambda: pool.apply(square, (1,)),
            lambda: pool.map(square, [1]),
            lambda: pool.imap(square, [1]),
            lambda: pool.imap_unordered(square, [1]),
            pool.__enter__,
        ):
            with pytest.raises(ValueError, match="Pool not running"):
                use()
        pool.close()
        pool.join()


def test_wrong_arguments() -> None:
    for arguments, error in (
        ({"processes": 0}, ValueError),
        ({"processes": -1}, ValueError),
        ({"processes": 1, "maxtasksperchild": 0}, ValueError),
        ({"processes": 1, "maxtasksperchild": 1.5}, ValueError),
        ({"processes": 1, "initializer": 5}, TypeError),
    ):
        with pytest.raises(error):
            mpmemory.Pool(**arguments)
    with mpmemory.Pool(1) as pool:
        for wrong in ({"chunksize": 0}, {"chunksize": -1}, {"buffersize": 0}):
            with pytest.raises(ValueError, match=r"1\+"):
                pool.imap(square, [1], **wrong)
        with pytest.raises(TypeError):
            pool.map(square, 5)
        with pytest.raises(TypeError):
            next(pool.imap(square, 5))


def test_as_many_workers_as_processors() -> None:
    with mpmemory.Pool() as pool:
        assert len(multiprocessing.active_children()) == os.cpu_count() == pool._processes


def test_a_pool_does_not_pickle() -> None:
    with mpmemory.Pool(1) as pool, pytest.raises(NotImplementedError):
        pickle.dumps(pool)


def test_a_pool_that_is_collected_ends_with_a_warning() -> None:
    pool = mpmemory.Pool(1)
    pid = pool.apply(pid_of_worker)
    with pytest.warns(ResourceWarning, match="unclosed running"):
        del pool
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_a_pool_lives_as_long_as_its_results() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        assert mpmemory.Pool(1).map_async(square, range(10)).get(PATIENCE) == [x * x for x in range(10)]
        assert list(mpmemory.Pool(1).imap(square, range(10))) == [x * x for x in range(10)]
        gc.collect()


def test_several_threads() -> None:
    with mpmemory.Pool(2) as pool, ThreadPoolExecutor(8) as threads:

        def use(start: int) -> bool:
            numbers = range(start, start + 50)
            assert [pool.apply(square, (x,)) for x in numbers] == [x * x for x in numbers]
            assert pool.map(square, numbers) == [x * x for x in numbers]
            assert list(pool.imap(square, numbers)) == [x * x for x in numbers]
            return True

        assert all(threads.map(use, range(8)))


def use_a_pool(conn: Any, method: str) -> None:
    with mpmemory.get_context(method).Pool(1) as pool:
        conn.send(pool.map(square, range(5)))


def test_nested_in_a_process(ctx: Any) -> None:
    ours, theirs = ctx.Pipe()
    with ours, theirs:
        process = ctx.Process(target=use_a_pool, args=(theirs, ctx.get_start_method()))
        process.start()
        assert ours.recv() == [0, 1, 4, 9, 16]
        process.join()
        assert process.exitcode == 0


def test_what_cannot_be_pickled_is_the_error_of_its_task(ctx: Any) -> None:
    with ctx.Pool(2) as pool:
        good = pool.apply_async(square, (2,))
        bad = pool.apply_async(lambda: 1)  # does not raise here, as in multiprocessing
        with pytest.raises((pickle.PicklingError, AttributeError), match="lambda"):
            bad.get(PATIENCE)
        with pytest.raises(TypeError, match="pickle"):
            pool.map(square, [1, threading.Lock(), 2], chunksize=1)
        results = pool.imap(square, [1, threading.Lock(), 2])
        assert next(results) == 1
        with pytest.raises(TypeError, match="pickle"):
            next(results)
        assert next(results) == 4
        assert good.get(PATIENCE) == 4


def test_what_was_submitted_is_what_arrives() -> None:
    ours, theirs = mpmemory.Pipe()
    with ours, theirs, mpmemory.Pool(1) as pool:
        blocker = pool.apply_async(wait_for, (theirs,))
        argument = [1, 2]
        results = [pool.apply_async(sum, (argument,)) for _ in range(20)]  # more than are sent ahead
        argument.append(100)
        ours.send("end")
        assert [result.get(PATIENCE) for result in results] == [3] * 20
        blocker.get(PATIENCE)


def return_lock() -> object:
    return threading.Lock()


class Unfriendly:
    """Has a repr that raises."""

    def __repr__(self) -> str:
        raise RuntimeError

    def __reduce__(self) -> Any:
        raise TypeError("cannot pickle this")


class DoesNotUnpickle:
    def __reduce__(self) -> Any:
        return fail, ("of the unpickling",)


class OwnArguments(Exception):
    def __init__(self, one: int, two: int) -> None:
        super().__init__(f"{one} and {two}")


def raise_own_arguments() -> None:
    raise OwnArguments(1, 2)


def test_results_that_do_not_pickle_or_unpickle(ctx: Any) -> None:
    with ctx.Pool(1) as pool:
        with pytest.raises(MaybeEncodingError, match="lock") as raised:
            pool.apply(return_lock)
        assert "cannot pickle" in str(raised.value)
        with pytest.raises(MaybeEncodingError, match="cannot pickle this"):
            pool.apply(Unfriendly)
        with pytest.raises(ValueError, match="of the unpickling") as failed:
            pool.apply(DoesNotUnpickle)
        assert "while the result of a task" in failed.value.__notes__[0]
        with pytest.raises(MaybeEncodingError, match=r"OwnArguments.*1 and 2") as replaced:
            pool.apply(raise_own_arguments)
        assert "in raise_own_arguments" in str(replaced.value.__cause__)
        with pytest.raises(ValueError, match="of the unpickling"):
            pool.apply(square, (DoesNotUnpickle(),))
        assert pool.apply(square, (3,)) == 9


def istarmap(self: Any, func: Any, iterable: Any) -> Any:
    """The recipe for a lazy starmap, which uses the insides of multiprocessing's pool."""
    self._check_running()
    result = multiprocessing.pool.IMapIterator(self)
    batches = multiprocessing.pool.Pool._get_tasks(func, iterable, 2)  # type: ignore[attr-defined]
    starmapstar = multiprocessing.pool.starmapstar  # type: ignore[attr-defined]
    tasks = self._guarded_task_generation(result._job, starmapstar, batches)  # type: ignore[attr-defined]
    self._taskqueue.put((tasks, result._set_length))  # type: ignore[attr-defined]
    return (item for chunk in result for item in chunk)


def test_the_recipe_for_istarmap_works() -> None:
    with mpmemory.Pool(2) as pool:
        assert list(istarmap(pool, add, [(x, 1) for x in range(9)])) == list(range(1, 10))


# --- ends -----------------------------------------------------------------------------------------


def test_terminate_fails_what_is_not_done(ctx: Any) -> None:
    ours, theirs = ctx.Pipe()
    with ours, theirs:
        pool = ctx.Pool(1)
        running = pool.apply_async(wait_for, (theirs,))
        ours.recv()
        waiting = [pool.apply_async(square, (3,)) for _ in range(20)]
        chunks = pool.map_async(square, range(1000), chunksize=1)
        iterator = pool.imap(square, itertools.count())
        errors: list[BaseException] = []
        called = pool.apply_async(square, (3,), error_callback=errors.append)
        pool.terminate()
        for result in (running, *waiting, chunks, called):
            with pytest.raises(PoolError, match="terminated before the task was done"):
                result.get(PATIENCE)
        with pytest.raises(PoolError, match="terminated"):
            list(iterator)
        assert [type(error) for error in errors] == [PoolError]
        pool.terminate()
        pool.join()
        with pytest.raises(ValueError, match="Pool not running"):
            pool.apply(square, (1,))
        await_true(lambda: all(thread.name != "mpmemory-pool-feeder" for thread in threading.enumerate()))


def fork_and_use(pool: Any) -> None:
    """In a child made by a bare fork, the parent's pool is refused and left alone."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            with pytest.raises(ValueError, match="another process"):
                pool.apply(square, (1,))
            with pytest.raises(ValueError, match="another process"):
                pool.join()
            pool.close()
            pool.terminate()
            del pool
            gc.collect()
            status = 0
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
def test_a_forked_child_leaves_the_pool_alone() -> None:
    with mpmemory.Pool(2) as pool:
        fork_and_use(pool)
        assert pool.map(square, range(10)) == [x * x for x in range(10)]


def test_a_program_that_forgets_its_pool_ends(run_python: Any) -> None:
    done = run_python(
        "import mpmemory, warnings\n"
        "warnings.simplefilter('ignore', ResourceWarning)\n"
        "if __name__ == '__main__':\n"
        "    pool = mpmemory.Pool(2)\n"
        "    print(pool.map(abs, [-1, -2]))\n"
        "    results = pool.imap(abs, iter(int, 1))\n"
        "    print(next(results))\n"
    )
    assert done.stdout == "[1, 2]\n0\n"
    assert done.stderr == ""


def test_a_program_without_a_main_guard_ends_with_an_error(run_python: Any) -> None:
    done = run_python(
        "import mpmemory\n"
        "pool = mpmemory.get_context('spawn').Pool(2)\n"  # each worker imports this, and fails
        "print(pool.map(abs, [-1]))\n",
        check=False,
    )
    assert done.returncode == 1
    assert "PoolError: the pool is broken: 3 workers in a row ended before they could take a task" in done.stderr
