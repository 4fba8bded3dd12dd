"""What a process has sent outlives it: the wait at exit."""

from __future__ import annotations

import multiprocessing
import pickle
import resource
import signal
import threading
from multiprocessing import util
from typing import Any

import pytest
from conftest import START_METHODS, assert_lost, dumps

from mpmemory import Memory, SharedBuffer, _sharer, get_context


def make_many(index: int) -> tuple[Memory, SharedBuffer]:
    memory = Memory.from_bytes(str(index).encode())
    return memory, memory.map()


@pytest.mark.parametrize("method", START_METHODS)
def test_results_outlive_their_worker(method: str) -> None:
    with multiprocessing.get_context(method).Pool(2, maxtasksperchild=1) as pool:
        results = pool.map(make_many, range(12), chunksize=1)
        pool.close()
        pool.join()
    for index, (memory, buffer) in enumerate(results):
        assert memory.pread(memory.size) == buffer.get_bytes() == str(index).encode()


def test_a_fork_server_may_have_imported_mpmemory_before(run_python: Any) -> None:
    """Its children must wait for claims all the same: multiprocessing clears the finalizers they inherit."""
    done = run_python(
        "import sys, mpmemory as mp\n"
        "def make(index):\n"
        "    return mp.Memory.from_bytes(b'%05d' % index)\n"
        "if __name__ == '__main__':\n"
        "    ctx = mp.get_context('forkserver')\n"
        "    ctx.set_forkserver_preload(['mpmemory'])\n"
        "    with ctx.Pool(2, maxtasksperchild=1) as pool:\n"
        "        made = pool.map(make, range(20), chunksize=1)\n"
        "        pool.close(); pool.join()\n"
        "    print(*(memory.pread(5).decode() for memory in made))\n"
    )
    assert done.stdout.split() == [f"{index:05}" for index in range(20)]


def put_and_leave(queue: Any, ready: Any) -> None:
    queue.put(Memory.from_bytes(b"last words"))
    ready.set()


@pytest.mark.parametrize("method", START_METHODS)
def test_a_process_that_exits_waits_until_its_handles_are_claimed(method: str) -> None:
    ctx = multiprocessing.get_context(method)
    queue, ready = ctx.Queue(), ctx.Event()
    child = ctx.Process(target=put_and_leave, args=(queue, ready))
    child.start()
    ready.wait()
    # It is about to exit, or waiting already; either way it must still be there for the claim.
    assert queue.get().pread(10) == b"last words"
    child.join()
    assert child.exitcode == 0
    queue.close()
    queue.join_thread()


@pytest.mark.parametrize("method", START_METHODS)
def test_handles_put_by_a_program_that_ends_reach_its_children(method: str, run_python: Any) -> None:
    """The children are joined at exit, and what a queue's thread writes then must be to be had."""
    done = run_python(
        "import multiprocessing, mpmemory as mp\n"
        "def consume(queue, ready):\n"
        "    ready.set()\n"
        "    for _ in range(20): print(queue.get().pread(5).decode(), flush=True)\n"
        "if __name__ == '__main__':\n"
        f"    ctx = multiprocessing.get_context({method!r})\n"
        "    queue, ready = ctx.Queue(), ctx.Event()\n"
        "    ctx.Process(target=consume, args=(queue, ready)).start()\n"
        "    ready.wait()\n"
        "    for index in range(20): queue.put(mp.Memory.from_bytes(b'%05d' % index))\n"
    )
    assert done.stdout.split() == [f"{index:05}" for index in range(20)]
    assert done.stderr == ""


LATE = """
import multiprocessing, sys, time
from multiprocessing import util
import mpmemory as mp

class Late:
    # Pickled by the queue's thread, when the main program has ended: no thread can be started any more.
    def __init__(self, *handles):
        self.handles = handles

    def __reduce__(self):
        while not util.is_exiting():
            time.sleep(0.001)
        return Late, self.handles

def consume(queue, ready):
    ready.set()
    memory, buffer = queue.get().handles
    print(memory.pread(4).decode(), buffer.get_string())

if __name__ == "__main__":
    ctx = multiprocessing.get_context(sys.argv[1])
    queue, ready = ctx.Queue(), ctx.Event()
    ctx.Process(target=consume, args=(queue, ready)).start()
    ready.wait()
    queue.put(Late(mp.Memory.from_bytes(b"late"), mp.SharedBuffer.from_bytes(b"but in time")))
"""


@pytest.mark.parametrize("method", START_METHODS)
def test_handles_pickled_after_the_end_of_the_program(method: str, run_python: Any) -> None:
    done = run_python(LATE, method)
    assert (done.stdout, done.stderr) == ("late but in time\n", "")


def leave_unclaimed(conn: Any) -> None:
    _sharer.EXIT_TIMEOUT = 0.3
    conn.send_bytes(dumps(Memory(10)))


def test_the_wait_at_exit_is_bounded() -> None:
    assert _sharer.EXIT_TIMEOUT == 10
    ours, theirs = multiprocessing.Pipe()
    with ours:
        child = get_context("spawn").Process(target=leave_unclaimed, args=(theirs,))
        child.start()
        theirs.close()
        message = ours.recv_bytes()
        child.join()
        assert child.exitcode == 0
    assert_lost(pickle.loads(message), "receive handles before you join their sender")


def test_the_wait_at_exit_ends_with_the_parent(run_python: Any) -> None:
    """The child's timeout is far beyond that of this test: it must notice that its parent is gone."""
    done = run_python(
        "import os, signal, sys, mpmemory as mp\n"
        "from multiprocessing.reduction import ForkingPickler\n"
        "def child(conn):\n"
        "    mp._sharer.EXIT_TIMEOUT = 1000\n"
        "    ForkingPickler.dumps(mp.Memory(10))\n"
        "    conn.send('leaving')\n"
        "if __name__ == '__main__':\n"
        "    ours, theirs = mp.Pipe()\n"
        "    mp.get_context('spawn').Process(target=child, args=(theirs,)).start()\n"
        "    ours.recv()\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n",
        check=False,
    )
    # The child has the same standard output: run() returns when it is closed by all.
    assert done.returncode == -signal.SIGKILL
    assert done.stderr == ""


def leave_many(conn: Any) -> None:
    _sharer.EXIT_TIMEOUT = 1000  # far beyond that of the test
    util.Finalize(None, conn.send, ("waiting",), exitpriority=_sharer._AWAIT_PRIORITY + 1)
    conn.send([dumps(Memory.from_bytes(b"%02d" % index)) for index in range(20)])


@pytest.mark.parametrize("method", START_METHODS)
def test_the_wait_at_exit_ends_with_the_last_claim(method: str) -> None:
    ours, theirs = multiprocessing.Pipe()
    with ours, theirs:
        child = get_context(method).Process(target=leave_many, args=(theirs,))
        child.start()
        messages = ours.recv()
        assert ours.recv() == "waiting"
        assert [pickle.loads(message).pread(2) for message in messages] == [b"%02d" % index for index in range(20)]
        child.join()
        assert child.exitcode == 0


def test_a_program_of_its_own_does_not_wait_for_claims(run_python: Any) -> None:
    run_python(
        "import mpmemory as mp\n"
        "from multiprocessing.reduction import ForkingPickler\n"
        "mp._sharer.EXIT_TIMEOUT = 1000\n"
        "ForkingPickler.dumps(mp.Memory(10))\n"
    )


def leave_at_once() -> None:
    assert not _sharer._unclaimed


def test_a_child_forked_while_handles_are_claimed_waits_for_none() -> None:
    """What is just being claimed in the parent, or given away, is not the child's to wait for."""
    stop = threading.Event()

    def traffic() -> None:
        while not stop.is_set():
            pickle.loads(dumps(Memory(1)))

    threads = [threading.Thread(target=traffic) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(100):
            child = get_context("fork").Process(target=leave_at_once)
            child.start()
            child.join()
            assert child.exitcode == 0
    finally:
        stop.set()
        for thread in threads:
            thread.join()


def send_by_a_thread(conn: Any) -> None:
    def send() -> None:
        conn.recv()
        conn.send(Memory.from_bytes(b"by a thread"))

    threading.Thread(target=send).start()


@pytest.mark.parametrize("method", START_METHODS)
def test_what_other_threads_send_at_the_end_is_waited_for(method: str) -> None:
    """Before Python 3.13 a process joins its threads after all else that it does at exit."""
    ours, theirs = multiprocessing.Pipe()
    with ours:
        child = get_context(method).Process(target=send_by_a_thread, args=(theirs,))
        child.start()
        theirs.close()
        ours.send("go")
        message = ours.recv_bytes()
        assert pickle.loads(message).pread(11) == b"by a thread"
        child.join()
        assert child.exitcode == 0


def leave_without_descriptors(conn: Any) -> None:
    conn.send_bytes(dumps(Memory.from_bytes(b"at the limit")))
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
    util.Finalize(None, conn.send, ("waiting",), exitpriority=_sharer._AWAIT_PRIORITY + 1)


def test_the_wait_at_exit_needs_no_descriptor(capfd: pytest.CaptureFixture[str]) -> None:
    ours, theirs = multiprocessing.Pipe()
    with ours:
        child = get_context("fork").Process(target=leave_without_descriptors, args=(theirs,))
        child.start()
        theirs.close()
        message = ours.recv_bytes()
        assert ours.recv() == "waiting"
        # To answer it does need one: it has them again.
        resource.prlimit(child.pid or 0, resource.RLIMIT_NOFILE, resource.getrlimit(resource.RLIMIT_NOFILE))
        assert pickle.loads(message).pread(12) == b"at the limit"
        child.join()
        assert child.exitcode == 0
    assert capfd.readouterr().err == ""
