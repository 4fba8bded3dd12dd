"""Locks whose holders are interrupted: held or free then, never in between."""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

import pytest
from conftest import is_free
from test_locks_processes import is_waiting, start

from mpmemory import Memory, RangeLock, RobustLock, locks
from mpmemory.connection import Pipe

INTERRUPTED = """
import os, sys
from mpmemory import Memory
memory = Memory.from_fd(int(sys.argv[1]))
lock, held = memory.lock(0, 10), memory.lock(20, 10)
held.acquire()
print("ready", flush=True)
try:
    lock.acquire({timeout})
except KeyboardInterrupt:
    print("interrupted", flush=True)
held.release()
sys.stdin.read()
assert lock.acquire(False)
"""


@pytest.mark.parametrize("timeout", ["", "timeout=60"])
def test_ctrl_c_ends_the_wait(timeout: str) -> None:
    memory = Memory(100)
    with memory.lock(0, 10):
        program = start(INTERRUPTED.format(timeout=timeout), memory)
        assert program.stdout
        assert program.stdout.readline() == "ready\n"
        while not is_waiting(program.pid):
            os.sched_yield()
        program.send_signal(signal.SIGINT)
        assert program.stdout.readline() == "interrupted\n"
    assert program.communicate(timeout=30) == ("", None)
    assert program.returncode == 0


def test_an_interrupt_leaves_no_lock_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = Memory(100)
    lock = memory.lock()
    original = locks.platform.ofd_lock

    def interrupted(*args: Any, **options: Any) -> None:
        original(*args, **options)
        if options:  # those that wait
            raise KeyboardInterrupt

    monkeypatch.setattr(locks.platform, "ofd_lock", interrupted)
    with pytest.raises(KeyboardInterrupt) as error:
        lock.acquire()
    monkeypatch.undo()
    assert error.traceback  # the frame is alive
    assert is_free(memory.lock())
    assert is_free(lock)


class Interrupt(Exception):
    pass


def interrupt_at(number: int, action: Any) -> bool:
    """Do `action`, and raise where the exception of a signal can come, there for the given time; return whether it was.

    That is on entry to a function in Python, and after a call of one in C.
    """
    left = number

    def profile(frame: Any, event: str, argument: Any) -> None:
        nonlocal left
        if event in ("call", "c_return") and "/mpmemory/" in frame.f_code.co_filename:
            # Not where a number is all there is of a descriptor, which then stays open: os.open is no better.
            left -= frame.f_code.co_name not in {"reopen", "__init__", "__del__"}
            if left == 0:
                sys.setprofile(None)
                raise Interrupt

    sys.setprofile(profile)
    try:
        action()
    finally:
        sys.setprofile(None)
    return left <= 0


@pytest.mark.parametrize("spares", [False, True])
@pytest.mark.parametrize("make", [lambda: Memory(9).lock(), lambda: Memory(9).lock(shared=True), RobustLock])
def test_an_interrupt_at_any_point_leaves_it_held_or_free(make: Any, spares: bool) -> None:
    """Never in between, where nobody could acquire it nor release it."""
    lock = make()
    pair = Pipe()
    with pair[0], pair[1]:
        pair[0].send(lock)
        other = pair[1].recv()
    with lock:
        pass

    def use() -> None:
        assert lock.acquire(timeout=10)
        lock.release()

    number, finished = 0, False
    while not finished:
        number += 1
        if not spares:
            (lock if isinstance(lock, RangeLock) else lock._lock)._memory._open().spares = None
        try:
            interrupt_at(number, use)
            finished = True
        except Interrupt:
            if "not held" not in repr(lock):
                lock.release()
            assert is_free(lock)
            assert is_free(other)
    assert number > 10
