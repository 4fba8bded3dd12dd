"""Workers that die, in every way and at every moment; and what ends pools."""

from __future__ import annotations

import functools
import multiprocessing
import os
import random
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import START_METHODS
from test_pool import PATIENCE, await_true, pid_of_worker, square, wait_for
from test_pool_limits import echo
from test_pool_workers import keep_global, once

import mpmemory
from mpmemory import Memory, PoolError, WorkerLostError
from mpmemory.pool import Pool


def segfault() -> None:
    signal.signal(signal.SIGSEGV, signal.SIG_DFL)  # no report of pytest's
    os.kill(os.getpid(), signal.SIGSEGV)


DEATHS: dict[str, tuple[Callable[[], object], int]] = {
    "SIGKILL": (functools.partial(signal.raise_signal, signal.SIGKILL), -signal.SIGKILL),
    "SIGSEGV": (segfault, -signal.SIGSEGV),
    "os._exit": (functools.partial(os._exit, 3), 3),
    "sys.exit": (functools.partial(sys.exit, 4), 4),
}


def die(how: str, memory: Memory) -> Any:
    """End this worker, and leave its pid in the memory."""
    memory.pwrite(os.getpid().to_bytes(4, "little"))
    return DEATHS[how][0]()


class DiesUnpickled:
    """Ends the worker that unpickles it."""

    def __init__(self, how: str, memory: Memory) -> None:
        self.arguments = how, memory

    def __reduce__(self) -> Any:
        return die, self.arguments


class DiesPickled(DiesUnpickled):
    """Ends the worker that pickles it."""

    def __reduce__(self) -> Any:
        return die(*self.arguments)


MOMENTS: dict[str, Callable[..., Any]] = {
    "in the task": lambda pool, how, memory: pool.apply_async(die, (how, memory)),
    "unpickling the task": lambda pool, how, memory: pool.apply_async(echo, (DiesUnpickled(how, memory),)),
    "pickling the result": lambda pool, how, memory: pool.apply_async(DiesPickled, (how, memory)),
}


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("how", DEATHS)
def test_only_what_a_dead_worker_was_running_fails(ctx: Any, how: str, moment: str) -> None:
    with Memory(4) as memory, ctx.Pool(2) as pool:
        before = [pool.apply_async(square, (x,)) for x in range(20)]
        arrays = [pool.apply_async(echo, (np.full(20_000, x),)) for x in range(5)]
        lost = MOMENTS[moment](pool, how, memory)
        after = [pool.apply_async(square, (x,)) for x in range(20)]
        more = [pool.apply_async(echo, (np.full(20_000, x),)) for x in range(5)]

        with pytest.raises(WorkerLostError) as raised:
            lost.get(PATIENCE)
        assert raised.value.pid == int.from_bytes(memory.pread(4), "little")
        exitcode = DEATHS[how][1]
        assert raised.value.exitcode == exitcode
        assert (how if exitcode < 0 else f"status {exitcode}") in str(raised.value)

        for results in (before, after):
            assert [result.get(PATIENCE) for result in results] == [x * x for x in range(20)]
        for results in (arrays, more):
            assert all((result.get(PATIENCE) == x).all() for x, result in enumerate(results))
        pids = set(pool.map(pid_of_worker, range(20)))
        assert raised.value.pid not in pids
        assert len(pool._pool) == 2


def die_once(path: str, how: str) -> None:
    if once(path):
        DEATHS[how][0]()


@pytest.mark.parametrize("how", DEATHS)
def test_a_death_in_an_initializer_fails_no_task(ctx: Any, how: str, tmp_path: Path) -> None:
    with ctx.Pool(2, die_once, (str(tmp_path / "once"), how)) as pool:
        assert pool.map(square, range(50), chunksize=1) == [x * x for x in range(50)]
        await_true(lambda: (tmp_path / "once").exists())
        assert len(pool._pool) == 2


class ProcessThatHasEnded(multiprocessing.context.ForkServerProcess):
    def start(self) -> None:
        super().start()
        wait([self.sentinel])


class PoolOfTheDead(Pool):
    @staticmethod
    def Process(ctx: Any, *args: Any, **kwds: Any) -> Any:
        return ProcessThatHasEnded(*args, **kwds)


def test_a_worker_that_has_ended_before_anybody_looks() -> None:
    """The fork server has collected it: the number is nobody's, or somebody else's soon."""
    context = mpmemory.get_context("forkserver")
    with PoolOfTheDead(1, os._exit, (7,), context=context) as pool, pytest.raises(PoolError, match="status 7"):
        pool.apply_async(square, (3,)).get(PATIENCE)


def raise_it(error: BaseException) -> None:
    raise error


class RaisesUnpickled:
    def __init__(self, error: BaseException) -> None:
        self.error = error

    def __reduce__(self) -> Any:
        return raise_it, (self.error,)


@pytest.mark.parametrize("error", [MemoryError("of the task"), KeyboardInterrupt("of the task")])
def test_errors_that_are_not_ordinary_are_those_of_the_task(ctx: Any, error: BaseException) -> None:
    with ctx.Pool(1) as pool:
        pid = pool.apply(pid_of_worker)
        with pytest.raises(type(error), match="of the task"):
            pool.apply(raise_it, (error,))
        with pytest.raises(type(error), match="of the task"):
            pool.apply(echo, (RaisesUnpickled(error),))
        with pytest.raises(type(error), match="of the task"):  # here, in this process
            pool.apply(RaisesUnpickled, (error,))
        assert pool.apply(pid_of_worker) == pid


def raise_always() -> None:
    raise LookupError("no data file")


@pytest.mark.parametrize("initializer", [raise_always, functools.partial(os._exit, 5)])
def test_an_initializer_that_keeps_failing_breaks_the_pool(
    ctx: Any, initializer: Callable[[], object], capfd: pytest.CaptureFixture[str]
) -> None:
    with ctx.Pool(2, initializer) as pool:
        results = [pool.apply_async(square, (x,)) for x in range(30)]
        for result in results:
            with pytest.raises(PoolError, match=r"\d workers in a row .* the last one exited with status") as broken:
                result.get(PATIENCE)
        if initializer is raise_always:
            assert isinstance(broken.value.__cause__, LookupError)
            assert "in raise_always" in str(broken.value.__cause__.__cause__)
        with pytest.raises(PoolError, match="the pool is broken"):
            pool.apply(square, (1,))
        pool.join()
    assert capfd.readouterr().err.count("Traceback") <= 4


def test_a_worker_that_is_killed_while_it_is_idle(ctx: Any) -> None:
    with ctx.Pool(2) as pool:
        for _ in range(10):
            pids = set(pool.map(pid_of_worker, range(20), chunksize=1))
            victim = pids.pop()
            os.kill(victim, signal.SIGKILL)
            assert pool.map(square, range(20), chunksize=1) == [x * x for x in range(20)]
            await_true(lambda: victim not in [process.pid for process in pool._pool])  # noqa: B023


def test_a_map_with_a_death_in_it(ctx: Any) -> None:
    with Memory(4) as memory, ctx.Pool(2) as pool:
        with pytest.raises(WorkerLostError):
            pool.starmap(die, [("SIGKILL", memory)] * 2, chunksize=1)
        results = pool.imap(functools.partial(die_at, 5, memory), range(10))
        seen = []
        for _ in range(10):
            try:
                seen.append(next(results))
            except WorkerLostError as error:
                seen.append(error.exitcode)
        assert seen == [0, 1, 2, 3, 4, -signal.SIGKILL, 6, 7, 8, 9]


def die_at(index: int, memory: Memory, x: int) -> int:
    if x == index:
        die("SIGKILL", memory)
    return x


def test_a_storm_of_kills() -> None:
    choice = random.Random(4)
    with mpmemory.get_context("fork").Pool(4) as pool:
        pool.map(square, range(10))
        waiting = {x: pool.apply_async(square_array, (x,)) for x in range(5000)}
        done: dict[int, Any] = {}
        killed: set[int] = set()
        retries = 0
        while waiting:
            # A kill for each 25 results: until all have been, while there are tasks.
            if len(killed) < 200 and len(done) >= len(killed) * 24:
                # Not one that is still starting: a pool whose workers all end before they are ready breaks.
                while (
                    not (pids := [worker.pid for worker in pool._scheduler._workers if worker.ready])
                    or (pid := choice.choice(pids)) in killed
                ):
                    os.sched_yield()
                os.kill(pid, signal.SIGKILL)
                killed.add(pid)
            x = next(iter(waiting))
            try:
                done[x] = waiting.pop(x).get(PATIENCE)
            except WorkerLostError:
                waiting[x] = pool.apply_async(square_array, (x,))
                retries += 1
        assert len(killed) == 200
        assert retries <= 200
        for x, (number, array) in done.items():
            assert number == x * x
            assert array is None or (array == x).all()
        assert pool.map(square, range(100)) == [x * x for x in range(100)]


def square_array(x: int) -> Any:
    return x * x, np.full(10_000, x) if x % 50 == 0 else None


# --- ends of pools --------------------------------------------------------------------------------


def stop_here(conn: Any) -> None:
    conn.send(os.getpid())
    os.kill(os.getpid(), signal.SIGSTOP)


def ignore_and_wait(conn: Any) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    wait_for(conn)


@pytest.mark.parametrize("task", [stop_here, ignore_and_wait])
def test_terminate_is_bounded(ctx: Any, task: Callable[..., None]) -> None:
    ours, theirs = ctx.Pipe()
    with ours, theirs, ctx.Pool(2) as pool:
        result = pool.apply_async(task, (theirs,))
        pid = ours.recv()
        pool.terminate()
        with pytest.raises(PoolError):
            result.get(0)
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
        pool.join()


PARENT = """
import os, signal, sys, time
import numpy as np
import mpmemory
from test_pool_deaths import burn, stop_here
from test_pool import pid_of_worker, wait_for

if __name__ == "__main__":
    ctx = mpmemory.get_context(sys.argv[1])
    ours, theirs = ctx.Pipe()
    pool = ctx.Pool(4)
    shared = mpmemory.SharedBuffer(1 << 20, name="of-the-killed-parent")
    results = [pool.apply_async(task, (theirs,)) for task in (wait_for, stop_here, burn)]
    pids = [ours.recv() for _ in results]
    print(*pids, flush=True)
    time.sleep(100)
"""


def burn(conn: Any) -> None:
    """Keep the interpreter's lock for longer than anybody waits."""
    import re

    conn.send(os.getpid())
    re.match(r"(a*)*b", "a" * 60)


def start(source: str, method: str, folder: Path, **options: Any) -> subprocess.Popen[str]:
    """Start a program that may import what is here."""
    program = folder / "program.py"
    program.write_text(source)
    environment = {**os.environ, "PYTHONPATH": os.path.dirname(__file__)}
    command = [sys.executable, str(program), method]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment, **options)


@pytest.mark.parametrize("method", START_METHODS)
def test_workers_go_with_their_parent(method: str, tmp_path: Path) -> None:
    with start(PARENT, method, tmp_path) as parent:
        assert parent.stdout is not None
        watches = [os.pidfd_open(int(pid)) for pid in parent.stdout.readline().split()]
        try:
            assert len(watches) == 3
            parent.kill()
            parent.wait()
            deadline = time.monotonic() + 2
            for watch in watches:
                assert select.select([watch], [], [], max(0, deadline - time.monotonic()))[0]
        finally:
            for watch in watches:
                os.close(watch)


INTERRUPTED = """
import sys
import mpmemory
from test_pool import wait_for, pid_of_worker

if __name__ == "__main__":
    ctx = mpmemory.get_context(sys.argv[1])
    ours, theirs = ctx.Pipe()
    with ctx.Pool(3) as pool:
        if ctx.get_start_method() != "fork":
            # There the interpreter starts without us: wait for all.
            while len(set(pool.map(pid_of_worker, range(30), chunksize=1))) < 3:
                pass
        results = [pool.apply_async(wait_for, (theirs,)) for _ in range(2)]
        for _ in results:
            ours.recv()
        print("ready", flush=True)
        results[0].get()
"""


@pytest.mark.parametrize("method", START_METHODS)
def test_ctrl_c_gives_one_traceback(method: str, tmp_path: Path) -> None:
    with start(INTERRUPTED, method, tmp_path, stderr=subprocess.PIPE, process_group=0) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
        os.killpg(child.pid, signal.SIGINT)  # as a terminal does
        _, errors = child.communicate(timeout=PATIENCE)
        assert child.returncode == -signal.SIGINT
    assert errors.count("Traceback") == 1, errors
    assert errors.rstrip().endswith("KeyboardInterrupt")


def test_an_idle_worker_does_not_mind_an_interrupt(ctx: Any) -> None:
    with ctx.Pool(2) as pool:
        pids = set(pool.map(pid_of_worker, range(50), chunksize=1))
        for _ in range(50):
            for pid in pids:
                os.kill(pid, signal.SIGINT)
        assert pool.map(square, range(50), chunksize=1) == [x * x for x in range(50)]
        assert {process.pid for process in pool._pool} >= pids


def test_an_interrupt_while_arrays_are_copied_takes_no_room() -> None:
    def interrupt(frame: Any, event: str, _: object) -> None:
        if frame.f_code is mpmemory._messages.Message.pack.__code__:  # type: ignore[attr-defined]
            raise KeyboardInterrupt

    with mpmemory.Pool(1) as pool:
        for _ in range(10):
            before = sys.gettrace()
            sys.settrace(interrupt)
            try:
                with pytest.raises(KeyboardInterrupt):
                    pool.apply_async(echo, (np.ones(1 << 17),))
            finally:
                sys.settrace(before)
        assert pool.apply_async(square, (3,)).get(PATIENCE) == 9
        pool.close()
        pool.join()


def test_a_task_behind_the_word_to_leave_is_not_lost() -> None:
    """Of two threads that send the last two tasks of a worker, the slower one sends after the faster one's word."""
    ours, theirs = mpmemory.Pipe()
    with ours, theirs, mpmemory.Pool(1) as pool:
        running = pool.apply_async(wait_for, (theirs,))
        pid = ours.recv()
        (worker,) = pool._scheduler._workers  # type: ignore[attr-defined]
        worker.leave()
        worker.leaving = False
        behind = pool.apply_async(square, (3,))
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(WorkerLostError):
            running.get(PATIENCE)
        assert behind.get(PATIENCE) == 9


@pytest.mark.parametrize("method", ["forkserver", "spawn"])
def test_workers_that_cannot_be_started_any_more_break_the_pool(method: str) -> None:
    memory = Memory.from_bytes(b"data")
    with mpmemory.get_context(method).Pool(1, keep_global, (memory,), maxtasksperchild=1) as pool:
        assert pool.map(square, range(3), chunksize=1) == [0, 1, 4]
        memory.close()  # the next worker would get it
        with pytest.raises(PoolError, match=r"could not be started: ValueError.*closed") as broken:
            pool.map(square, range(10), chunksize=1)
        assert isinstance(broken.value.__cause__, ValueError)
