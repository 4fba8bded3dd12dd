"""Locks: between threads, between processes, wherever they come from, and when their holder dies."""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from conftest import LIMITED, dumps, open_fds
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from mpmemory import HandleLostError, Memory, RangeLock, RobustLock, Seal, SharedBuffer, get_context, locks
from mpmemory.connection import Connection, Pipe


def is_free(lock: RangeLock | RobustLock) -> bool:
    """Return whether it can be acquired now, by a holder of its own."""
    if acquired := lock.acquire(blocking=False):
        lock.release()
    return acquired


# --- as threading.Lock ----------------------------------------------------------------------------


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


# --- between processes ----------------------------------------------------------------------------


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


def test_a_robust_lock_that_cannot_be_mapped_is_not_held(monkeypatch: pytest.MonkeyPatch) -> None:
    lock = RobustLock()

    def fail(memory: Memory) -> None:
        raise OSError(12, "no room")

    monkeypatch.setattr(Memory, "map", fail)
    with pytest.raises(OSError, match="no room"):
        lock.acquire()
    monkeypatch.undo()
    assert is_free(lock)


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


def is_waiting(pid: int, thread: int | None = None) -> bool:
    """Return whether a thread waits in the kernel: for the lock, since nothing else is there to wait for."""
    return " S " in Path(f"/proc/{pid}/task/{thread or pid}/stat").read_text().partition(")")[2]


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


# --- a model --------------------------------------------------------------------------------------

SIZE = 8
RANGES = [(0, 4), (2, 4), (4, 4), (0, 8), (7, 1)]


def obey(memory: Memory, conn: Connection) -> None:
    mine: dict[Any, RangeLock] = {}
    while True:
        action, key = conn.recv()
        if action == "acquire":
            start, length, shared = key
            lock = mine.get(key) or mine.setdefault(key, memory.lock(start, length, shared=shared))
            conn.send(lock.acquire(blocking=False))
        else:
            mine[key].release()
            conn.send(True)


class Exclusion(RuleBasedStateMachine):
    """Processes that acquire, release and are killed, next to a list of who holds what."""

    def __init__(self) -> None:
        super().__init__()
        self.memory = Memory(SIZE)
        self.processes: list[tuple[Any, Any]] = []
        self.held: list[tuple[int, Any]] = []

    @initialize()
    def start(self) -> None:
        self.processes = [self.new() for _ in range(3)]

    def new(self) -> tuple[Any, Any]:
        left, right = Pipe()
        with right:
            child = get_context("fork").Process(target=obey, args=(self.memory, right), daemon=True)
            child.start()
        return child, left

    def ask(self, who: int, *message: Any) -> Any:
        conn = self.processes[who][1]
        conn.send(message)
        return conn.recv()

    def in_the_way(self, key: Any) -> list[Any]:
        start, length, shared = key
        return [
            (who, other)
            for who, other in self.held
            if other[0] < start + length and start < other[0] + other[1] and not (shared and other[2])
        ]

    @rule(who=st.integers(0, 2), place=st.sampled_from(RANGES), shared=st.booleans())
    def acquire(self, who: int, place: Any, shared: bool) -> None:
        key = (*place, shared)
        expected = not self.in_the_way(key)
        assert self.ask(who, "acquire", key) == expected
        if expected:
            self.held.append((who, key))

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def release(self, data: Any) -> None:
        who, key = self.held.pop(data.draw(st.integers(0, len(self.held) - 1)))
        assert self.ask(who, "release", key)

    @rule(who=st.integers(0, 2))
    def kill(self, who: int) -> None:
        child, conn = self.processes[who]
        conn.close()
        child.kill()
        child.join()
        child.close()
        self.processes[who] = self.new()
        self.held = [(holder, key) for holder, key in self.held if holder != who]

    @invariant()
    def what_is_free_here_is_free_in_the_model(self) -> None:
        for start, length in RANGES:
            for shared in (False, True):
                expected = not self.in_the_way((start, length, shared))
                assert is_free(self.memory.lock(start, length, shared=shared)) == expected

    def teardown(self) -> None:
        for child, conn in self.processes:
            conn.close()
            child.kill()
            child.join()
            child.close()


TestExclusion = Exclusion.TestCase
TestExclusion.settings = settings(max_examples=25, stateful_step_count=20, deadline=None)


@pytest.fixture(autouse=True)
def _collected() -> Iterator[None]:
    yield
    gc.collect()
    assert not [lock for lock in locks._locks if lock._held]
