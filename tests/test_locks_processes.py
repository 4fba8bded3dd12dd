"""Locks between processes: wherever they come from, when their holder dies, and when it forks."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import random
import subprocess
import sys
import threading
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from conftest import is_free

from mpmemory import Memory, RobustLock, SharedBuffer, get_context, locks
from mpmemory.connection import Pipe

# --- children -------------------------------------------------------------------------------------


def increment(buffer: SharedBuffer, counters: int, times: int, seed: int) -> None:
    def work(seed: int) -> None:
        numbers = buffer.view("q")
        order = random.Random(seed)
        for _ in range(times):
            index = order.randrange(counters)
            with buffer.lock(8 * index, 8):
                numbers[index] += 1

    threads = [threading.Thread(target=work, args=(4 * seed + index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


@pytest.mark.parametrize(("method", "times"), [("fork", 6250), ("forkserver", 200), ("spawn", 200)])
def test_no_increment_is_lost(method: str, times: int) -> None:
    ctx = get_context(method)
    buffer = SharedBuffer(8 * 16)
    children = [ctx.Process(target=increment, args=(buffer, 16, times, seed)) for seed in range(4)]
    for child in children:
        child.start()
    for child in children:
        child.join()
    assert sum(buffer.view("q")) == 16 * times


def hold(lock: Any, conn: Any, then: str = "wait") -> None:
    with lock:
        conn.send(getattr(lock, "owner_died", None))
        conn.recv()
        if then == "exit":
            os._exit(0)


@pytest.mark.parametrize("stock", [False, True])
@pytest.mark.parametrize("make", [lambda: Memory(100).lock(5, 5), RobustLock])
def test_a_lock_travels_anywhere_and_excludes_there(make: Any, stock: bool, ctx: Any) -> None:
    chosen = multiprocessing.get_context(ctx.get_start_method()) if stock else ctx
    lock = make()
    left, right = Pipe()
    with left, right:
        child = chosen.Process(target=hold, args=(lock, right))
        child.start()
        left.recv()
        assert not is_free(lock)
        left.send("release it")
        assert lock.acquire(timeout=30)
        lock.release()
        child.join()
    with chosen.Pool(1) as pool:
        with lock:
            assert pool.map(is_free, [lock, lock]) == [False, False]
        again = pool.apply(give_back, (lock,))
        pool.close()
        pool.join()
    with again:
        assert not is_free(lock)
    with ProcessPoolExecutor(1, mp_context=chosen) as executor:
        assert executor.submit(is_free, lock).result()
    queue = chosen.SimpleQueue()
    queue.put(lock)
    with lock:
        assert not is_free(queue.get())
    queue.close()


def give_back(lock: Any) -> Any:
    assert lock.acquire(False)  # held, when it is sent: the receiver does not hold it
    return lock


@pytest.mark.parametrize("then", ["kill", "exit"])
@pytest.mark.parametrize("make", [lambda: Memory(100).lock(5, 5), RobustLock])
def test_the_lock_of_a_dead_process_is_free(make: Any, then: str, ctx: Any) -> None:
    lock = make()
    left, right = Pipe()
    with left, right:
        child = ctx.Process(target=hold, args=(lock, right, then))
        child.start()
        left.recv()
        waiting = threading.Thread(target=lock.acquire)  # for ever, in the kernel
        waiting.start()
        if then == "kill":
            child.kill()
        else:
            left.send("exit")
        waiting.join(30)
        assert not waiting.is_alive()
        child.join()
    if isinstance(lock, RobustLock):
        assert lock.owner_died
        lock.release()
        with lock:
            assert not lock.owner_died
    else:
        lock.release()


def test_whoever_dies_repairing_is_told_of_too(ctx: Any) -> None:
    lock = RobustLock()
    assert not lock.owner_died
    told = []
    for _ in range(3):
        left, right = Pipe()
        with left, right:
            child = ctx.Process(target=hold, args=(lock, right))
            child.start()
            told.append(left.recv())
            child.kill()
            child.join()
    assert told == [False, True, True]
    with lock:
        assert lock.owner_died


# --- forks ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [lambda: Memory(100).lock(5, 5), lambda: Memory(9).lock(shared=True), RobustLock])
def test_a_forked_child_does_not_hold_what_its_parent_holds(make: Any) -> None:
    lock = make()
    with lock:
        pid = os.fork()
        if pid == 0:
            with contextlib.suppress(RuntimeError):
                lock.release()
                os._exit(1)
            os._exit(0 if lock.acquire(False) == getattr(lock, "shared", False) else 2)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert lock.acquire(False)  # whatever the child did
    lock.release()


def exit_code_of_fork(action: Any) -> int:
    """Return the truth of what `action` returns in a forked child: 1, or 0; 2 if it raises."""
    pid = os.fork()
    if pid == 0:
        try:
            os._exit(bool(action()))
        finally:
            os._exit(2)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def test_a_forked_child_uses_no_spare_of_its_parent() -> None:
    memory = Memory(100)
    lock = memory.lock()
    with lock:
        pass
    assert memory._open().spares
    assert exit_code_of_fork(lock.acquire) == 1


def test_a_forked_child_closes_no_number_that_is_somebody_elses() -> None:
    """Another thread may have closed a description just now, and the number be in use again."""
    memory = Memory(100)
    with memory.lock() as lock:
        description = lock._held[0]  # the other thread has it, too
        number = description.fileno()
        other = os.open(os.devnull, os.O_RDONLY)
        os.dup2(other, number, inheritable=False)
        os.close(other)
        assert exit_code_of_fork(lambda: os.stat(number).st_rdev == os.stat(os.devnull).st_rdev) == 1
        lock._held[0] = locks._open_description(memory._open())
        assert description.fileno() == number


def start(source: str, memory: Memory) -> subprocess.Popen[str]:
    """Start a program that is no relative, and gets the number of a descriptor of `memory`."""
    return subprocess.Popen(
        [sys.executable, "-c", source, str(memory.fileno())],
        pass_fds=[memory.fileno()],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


FORKED = """
import os, sys
from mpmemory import Memory
memory = Memory.from_fd(int(sys.argv[1]))
lock = memory.lock()
lock.acquire()
if os.fork() == 0:
    print("ready", flush=True)
    sys.stdin.read()
    os._exit(0)
os.kill(os.getpid(), 9)
"""


def test_a_lock_does_not_live_on_in_a_forked_child() -> None:
    memory = Memory(100)
    program = start(FORKED, memory)
    with program:
        assert program.stdout
        assert program.stdout.readline() == "ready\n"
        assert memory.lock().acquire(timeout=30)


FORKED_WHILE_WAITING = """
import os, sys, threading
from pathlib import Path
from mpmemory import Memory
memory = Memory.from_fd(int(sys.argv[1]))
lock = memory.lock()
def work():
    print(threading.get_native_id(), flush=True)
    lock.acquire()
    print("acquired", flush=True)
threading.Thread(target=work, daemon=True).start()
sys.stdin.readline()
if os.fork() == 0:
    assert not lock.acquire(timeout=0.01)
    print("forked", flush=True)
    sys.stdin.read()
    os._exit(0)
threading.Event().wait()
"""


def is_waiting(pid: int, thread: int | None = None) -> bool:
    """Return whether a thread waits in the kernel: for the lock, since nothing else is there to wait for."""
    return " S " in Path(f"/proc/{pid}/task/{thread or pid}/stat").read_text().partition(")")[2]


def test_a_fork_while_another_thread_acquires() -> None:
    """The child has not got the thread, but could have the description that it waits with."""
    memory = Memory(100)
    lock = memory.lock()
    lock.acquire()
    program = start(FORKED_WHILE_WAITING, memory)
    with program:
        assert program.stdout
        assert program.stdin
        thread = int(program.stdout.readline())
        while not is_waiting(program.pid, thread):
            os.sched_yield()
        print("fork", file=program.stdin, flush=True)
        assert program.stdout.readline() == "forked\n"
        lock.release()
        assert program.stdout.readline() == "acquired\n"
        program.kill()
        program.wait()
        assert lock.acquire(timeout=30)
        lock.release()


def test_a_child_forked_at_any_time_has_no_description_of_a_lock(run_python: Any) -> None:
    run_python(
        "import os, threading, warnings\n"
        "from mpmemory import Memory, locks\n"
        "warnings.simplefilter('ignore', DeprecationWarning)\n"  # 3.12: a fork with threads
        "locks._MAX_SPARES = 0\n"  # each acquire opens one
        "memory = Memory(10)\n"
        "stop = threading.Event()\n"
        "def work(index):\n"
        "    while not stop.is_set():\n"
        "        with memory.lock(index, 1): pass\n"
        "def is_of_memory(number):\n"
        "    try: return os.fstat(number).st_ino == memory.identity[1]\n"
        "    except OSError: return False\n"
        "threads = [threading.Thread(target=work, args=(index,), daemon=True) for index in range(3)]\n"
        "for thread in threads: thread.start()\n"
        "for _ in range(100):\n"
        "    pid = os.fork()\n"
        "    if pid == 0: os._exit(sum(map(is_of_memory, range(50))))\n"
        "    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 1\n"
        "stop.set()\n"
        "for thread in threads: thread.join()\n"
    )
