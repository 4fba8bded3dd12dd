"""Pool: what may happen while a task is being sent, made to happen."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from test_pool import PATIENCE, pid_of_worker, square, wait_for

import mpmemory
from mpmemory import PoolError, WorkerLostError, _workers
from mpmemory.connection import Connection

Action = Callable[[Connection], None]


@pytest.fixture
def pool() -> Iterator[Any]:
    with mpmemory.Pool(2) as pool:
        yield pool


@pytest.fixture
def release(pool: Any) -> Iterator[Action]:
    """Give both workers something to do; return what ends that of the one that a task is not just being sent to."""
    with contextlib.ExitStack() as stack:
        busy = {}
        for _ in range(2):
            ours, theirs = (stack.enter_context(end) for end in mpmemory.Pipe())
            pool.apply_async(wait_for, (theirs,))
            busy[ours.recv()] = ours

        def release_other(channel: Connection) -> None:
            (other,) = (worker for worker in pool._scheduler._workers if worker.channel is not channel)
            busy[other.pid].send("end")

        yield release_other


@pytest.fixture
def square_while(pool: Any, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Return what has the pool square a number, and acts just before or after it is sent, with another method of it."""

    def square_while(
        method: str, replacement: Callable[..., Any], *, before: Action | None = None, after: Action | None = None
    ) -> None:
        send_datagram = Connection.send_datagram
        sender, once = threading.current_thread(), iter([True])

        def send(self: Connection, datagram: Any, *, wait: bool) -> bool:
            is_it = threading.current_thread() is sender and next(once, False)
            if is_it and before:
                before(self)
            sent = send_datagram(self, datagram, wait=wait)
            if is_it and after:
                after(self)
            return sent

        with monkeypatch.context() as patched:
            patched.setattr(pool._scheduler, method, replacement)
            patched.setattr(Connection, "send_datagram", send)
            assert pool.apply_async(square, (5,)).get(PATIENCE) == 25

    return square_while


def test_a_task_that_is_taken_back_before_its_sender_has_noted_that_it_was_sent(
    pool: Any, release: Action, square_while: Callable[..., None]
) -> None:
    send = pool._scheduler._send
    sender = threading.current_thread()
    taken_back, noted = threading.Event(), threading.Event()

    def send_task(worker: Any, task: Any) -> None:
        if threading.current_thread() is sender:
            send(worker, task)
            noted.set()
        else:  # the scheduler has taken it back, for the other worker
            taken_back.set()
            assert noted.wait(PATIENCE)
            send(worker, task)

    def let_it_be_taken_back(channel: Connection) -> None:
        release(channel)
        assert taken_back.wait(PATIENCE)

    square_while("_send", send_task, after=let_it_be_taken_back)


def test_a_task_that_is_sent_just_after_work_for_an_idle_worker_was_looked_for(
    pool: Any, release: Action, square_while: Callable[..., None]
) -> None:
    balance, looked = pool._scheduler._balance, threading.Event()

    def look() -> Any:
        moved = balance()
        if not all(worker.tasks for worker in pool._scheduler._workers):
            looked.set()
        return moved

    def let_the_other_be_idle(channel: Connection) -> None:
        release(channel)
        assert looked.wait(PATIENCE)

    square_while("_balance", look, before=let_the_other_be_idle)


def test_a_worker_that_dies_while_a_task_is_sent_to_it(pool: Any, square_while: Callable[..., None]) -> None:
    bury, seen = pool._scheduler._bury, threading.Event()
    pool.map(square, range(4))  # both are there

    def bury_and_tell(worker: Any) -> None:
        bury(worker)
        seen.set()

    def kill(channel: Connection) -> None:
        (worker,) = (worker for worker in pool._scheduler._workers if worker.channel is channel)
        os.kill(worker.pid, signal.SIGKILL)
        assert seen.wait(PATIENCE)

    square_while("_bury", bury_and_tell, before=kill)


def test_the_word_to_leave_is_given_back() -> None:
    ours, theirs = mpmemory.Pipe()
    with ours, theirs, mpmemory.Pool(1) as pool:
        busy = pool.apply_async(wait_for, (theirs,))
        pid = ours.recv()
        scheduler: Any = pool._scheduler  # type: ignore[attr-defined]
        (worker,) = scheduler._workers
        with scheduler._lock:
            worker.leave()
            assert scheduler._take_back(worker) is None
        ours.send("end")
        assert busy.get(PATIENCE) == "released"
        assert pool.apply_async(pid_of_worker).get(PATIENCE) != pid


@pytest.mark.parametrize("argument", [3, lambda: None], ids=["number", "what does not pickle"])
def test_a_pool_that_ends_just_before_it_is_given_a_task(
    argument: Any, pool: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    check = pool._check_running

    def check_and_end() -> None:
        check()
        pool.terminate()

    monkeypatch.setattr(pool, "_check_running", check_and_end)
    with pytest.raises(PoolError, match="terminated"):
        pool.apply_async(square, (argument,)).get(PATIENCE)


def test_a_scheduler_that_fails_hangs_nobody(pool: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: object) -> None:
        raise RuntimeError("not expected")

    monkeypatch.setattr(pool._scheduler, "_receive", fail)
    with pytest.raises(PoolError, match="its scheduler failed: RuntimeError"):
        pool.apply_async(square, (5,)).get(PATIENCE)


def test_a_dead_worker_that_another_thread_is_just_collecting(monkeypatch: pytest.MonkeyPatch) -> None:
    """As `multiprocessing.active_children()` does, and `Process.start()`."""
    monkeypatch.setattr(_workers, "GRACE", PATIENCE)
    held, joined = threading.Event(), threading.Event()
    ours, theirs = mpmemory.Pipe()
    with ours, theirs, mpmemory.get_context("fork").Pool(1) as pool:
        (process,) = pool._pool
        join = process.join

        def join_and_tell(timeout: float) -> None:
            join(timeout)
            joined.set()

        pool.apply_async(square, (5,), callback=lambda _: held.wait(PATIENCE))
        result = pool.apply_async(wait_for, (theirs,))
        assert ours.recv() == process.pid
        process.join = join_and_tell
        os.kill(process.pid, signal.SIGKILL)
        _, status = os.waitpid(process.pid, 0)  # the scheduler's thread is held, and does not see it yet
        held.set()
        assert joined.wait(PATIENCE)
        process._popen.returncode = os.waitstatus_to_exitcode(status)
        with pytest.raises(WorkerLostError, match="killed by SIGKILL"):
            result.get(PATIENCE)
