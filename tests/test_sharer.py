"""The way through the resource sharer: claims, what becomes of the lost, and the wait at exit."""

from __future__ import annotations

import contextlib
import errno
import multiprocessing
import os
import pickle
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import connection, reduction, resource_sharer
from pathlib import Path
from typing import Any

import pytest
from conftest import START_METHODS, assert_lost, dumps, open_fds

from mpmemory import HandleLostError, Memory, SharedBuffer, _sharer, get_context
from mpmemory._backends import platform
from mpmemory._fds import LostFd, OwnedFd

# --- claims ---


def test_a_thousand_messages_with_one_handle_take_one_descriptor() -> None:
    memory = Memory(10)
    messages = [dumps(memory)]
    before = len(open_fds())
    messages += [dumps(memory) for _ in range(1000)]
    assert len(open_fds()) == before
    assert len(_sharer._unclaimed) == 1001


def test_a_handle_may_be_closed_after_it_was_pickled() -> None:
    memory = Memory.from_bytes(b"later")
    message = dumps(memory)
    memory.close()
    arrived = pickle.loads(message)
    assert arrived.pread(5) == b"later"
    assert not os.get_inheritable(arrived.fileno())


def test_a_message_read_twice_gives_a_lost_handle() -> None:
    message = dumps(Memory(10))
    assert pickle.loads(message).size == 10
    assert_lost(pickle.loads(message), f"pid {os.getpid()}.* was claimed before")


def test_a_lost_buffer() -> None:
    message = dumps(SharedBuffer(10))
    pickle.loads(message)
    buffer = pickle.loads(message)
    assert not buffer.closed
    assert buffer.size == 10
    assert "lost" in repr(buffer)
    for action in (lambda: buffer[0], lambda: buffer.buf, lambda: buffer.set_bytes(b"x")):
        with pytest.raises(HandleLostError, match="claimed before"):
            action()
    assert_lost(buffer.memory, "claimed before")
    buffer.close()


def send_and_die(conn: Any, how: str) -> None:
    memory = Memory(10)
    conn.send_bytes(dumps([memory, memory.map()]))
    conn.recv()
    if how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    os._exit(0)


@pytest.mark.parametrize("how", ["kill", "exit"])
@pytest.mark.parametrize("method", START_METHODS)
def test_the_sender_was_killed_before_its_handle_was_claimed(method: str, how: str) -> None:
    ours, theirs = multiprocessing.Pipe()
    with ours:
        child = get_context(method).Process(target=send_and_die, args=(theirs, how))
        child.start()
        theirs.close()
        message = ours.recv_bytes()
        ours.send("die")
        child.join()
    memory, buffer = pickle.loads(message)
    assert_lost(memory, rf"the sender \(pid {child.pid}\) is gone")
    with pytest.raises(HandleLostError):
        buffer[0]


def fork_send_and_die(conn: Any, keep: Any) -> None:
    conn.send_bytes(dumps(Memory(10)))
    os.dup(_sharer._sharer._listener._socket.fileno())
    if os.fork() == 0:  # has the listening socket too (in a copy that nobody knows of), and never answers there
        with contextlib.suppress(EOFError):
            keep.recv()
        os._exit(0)
    conn.recv()
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_claim_does_not_wait_for_a_forked_childs_copy_of_the_socket() -> None:
    (ours, theirs), (release, keep) = multiprocessing.Pipe(), multiprocessing.Pipe()
    with ours, release:
        child = get_context("spawn").Process(target=fork_send_and_die, args=(theirs, keep))
        child.start()
        theirs.close()
        keep.close()
        message = ours.recv_bytes()
        ours.send("die")
        os.waitid(os.P_PID, child.pid or 0, os.WEXITED | os.WNOWAIT)  # its sentinel is with the grandchild, too
        assert_lost(pickle.loads(message), rf"pid {child.pid}\) is gone")
        release.send("exit")
        child.join()


def test_a_sender_that_does_not_answer_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_sharer, "CLAIM_TIMEOUT", 0.2)
    message = dumps(Memory(10))
    stalled = connection.Client(_sharer._sharer._address)  # says nothing: the one behind it has to wait
    with stalled:
        assert_lost(pickle.loads(message), f"from pid {os.getpid()} could not be received.*did not answer in time")


def test_a_claimant_that_stalls_is_sent_away(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_sharer, "CLAIMANT_TIMEOUT", 1)
    message = dumps(Memory(10))
    with connection.Client(_sharer._sharer._address):
        assert pickle.loads(message).size == 10


def test_out_of_descriptors_at_the_receiver(run_python: Any) -> None:
    run_python(
        "import multiprocessing.connection, os, pickle, resource, errno\n"
        "from multiprocessing.reduction import ForkingPickler\n"
        "import mpmemory\n"
        "message = bytes(ForkingPickler.dumps(mpmemory.Memory(10)))\n"
        "ours, theirs = mpmemory.Pipe()\n"
        "def child(conn):\n"
        "    resource.setrlimit(resource.RLIMIT_NOFILE, (32, 32))\n"
        "    fill = []\n"
        "    try:\n"
        "        while True: fill.append(os.dup(0))\n"
        "    except OSError: pass\n"
        "    lost = pickle.loads(message)\n"
        "    try: lost.size\n"
        "    except mpmemory.HandleLostError as error:\n"
        "        result = error.errno == errno.EMFILE\n"
        "    conn.send(result)\n"
        "process = mpmemory.get_context('fork').Process(target=child, args=(theirs,))\n"
        "process.start(); assert ours.recv(); process.join()\n"
    )


def test_it_works_with_a_default_timeout_for_sockets(monkeypatch: pytest.MonkeyPatch) -> None:
    import socket

    monkeypatch.setattr(socket, "_timeout", None, raising=False)
    socket.setdefaulttimeout(5)
    try:
        assert pickle.loads(dumps(Memory(10))).size == 10
    finally:
        socket.setdefaulttimeout(None)


def test_a_descriptor_that_is_opened_in_proc() -> None:
    memory = Memory.from_bytes(b"in proc")
    fd = memory._open()
    assert isinstance(fd, OwnedFd)
    try:
        shared = pickle.loads(pickle.dumps(_sharer.ProcFd(fd)))
        arrived = Memory._own(shared.claim(), "arrived")
        assert arrived.pwrite(b"IN") == 2
        assert memory.pread(7) == b"IN proc"
        assert not os.get_inheritable(arrived.fileno())
        shared._identity = (0, 0)
        assert_lost(Memory._own(shared.claim(), "x"), "another file has its place")
        shared._path = "/proc/1/fd/1000000"
        assert_lost(Memory._own(shared.claim(), "x"), "the sender of /proc/1/fd/1000000 is gone")
    finally:
        _sharer.ProcFd._kept.clear()


def test_forked_children_do_not_wait_for_their_parents_handles() -> None:
    message = dumps(Memory(10))
    child = get_context("fork").Process(target=check_nothing_inherited)
    child.start()
    child.join()
    assert child.exitcode == 0
    assert pickle.loads(message).size == 10


def check_nothing_inherited() -> None:
    assert _sharer._unclaimed == set()
    assert _sharer._sharer._address is None
    assert pickle.loads(dumps(Memory(10))).size == 10


def test_the_stock_resource_sharer_is_left_alone() -> None:
    before = resource_sharer._resource_sharer._address
    pickle.loads(dumps(Memory(10)))
    assert resource_sharer._resource_sharer._address is before
    assert reduction.DupFd.__module__ == "multiprocessing.reduction"


def test_abstract_names_leave_no_folder_behind(tmp_path: Path, run_python: Any) -> None:
    if sys.platform != "linux":
        pytest.skip("there are no abstract names")
    run_python(
        "import mpmemory as mp\n"
        "def make(_): return mp.Memory(10)\n"
        "if __name__ == '__main__':\n"
        "    with mp.get_context('spawn').Pool(2) as pool: pool.map(make, range(8))\n",
        env={**os.environ, "TMPDIR": str(tmp_path)},
    )
    assert [path.name for path in tmp_path.iterdir()] == ["program.py"]


OUT_OF_DESCRIPTORS = """
import contextlib, errno, logging, os, pickle, resource, sys, threading
from multiprocessing import connection, current_process
from multiprocessing.reduction import ForkingPickler
import mpmemory as mp
from mpmemory import _fds, _sharer

class Noted(logging.Handler):
    def emit(self, record):
        if "a claim of shared memory failed: OSError(24" in record.getMessage():
            claim_failed.set()

@contextlib.contextmanager
def no_descriptor_left():
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)

memory = mp.Memory.from_bytes(b"there")
with no_descriptor_left():
    try:
        ForkingPickler.dumps(memory)
    except OSError as error:
        assert error.errno == errno.EMFILE and "cannot start the resource sharer" in str(error), error
    else:
        raise SystemExit("no error")
assert not _sharer._unclaimed

# It runs out of them when a claimant is connected.
shared = _sharer.share_by_sharer(memory._open())
conn = connection.Client(shared._address)
assert conn.poll(None)
with no_descriptor_left():
    connection.answer_challenge(conn, current_process().authkey)
    connection.deliver_challenge(conn, current_process().authkey)
    conn.send((shared._key, os.getpid()))
    assert conn.poll(None)
with _fds.borrow_socket(conn.fileno()) as sock:
    assert mp.Memory._own(_fds.recv_fd(sock), "x").pread(5) == b"there"

# It has none when it goes to accept the next one.
message = bytes(ForkingPickler.dumps(memory))
claim_failed = threading.Event()
mp.get_logger().addHandler(Noted())
mp.get_logger().setLevel(logging.INFO)
first, second = (connection.Client(shared._address) for _ in range(2))
assert first.poll(None)
with no_descriptor_left():
    first.close()
    claim_failed.wait()
second.close()
assert pickle.loads(message).pread(5) == b"there"
"""


def test_out_of_descriptors_at_the_sender(run_python: Any) -> None:
    """Pickling is an error until there are some; claims are answered without, or wait for them."""
    run_python(OUT_OF_DESCRIPTORS)


def test_all_that_a_claim_needs_is_loaded_before(run_python: Any) -> None:
    """When it comes there may be no descriptor left to import a module with."""
    run_python(
        "import sys, mpmemory\n"
        "from multiprocessing.reduction import ForkingPickler\n"
        "ForkingPickler.dumps(mpmemory.Memory(1))\n"
        "assert 'hmac' in sys.modules\n"
    )


def test_a_sender_that_stops_in_the_middle_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_sharer, "CLAIM_TIMEOUT", 0.2)
    authkey = multiprocessing.current_process().authkey
    release = threading.Event()

    def serve() -> None:
        with listener.accept():
            release.wait()

    with connection.Listener(family="AF_UNIX", authkey=authkey) as listener:
        thread = threading.Thread(target=serve)
        thread.start()
        try:
            shared = _sharer.SharerFd(str(listener.address), 1, os.getpid())
            assert_lost(Memory._own(shared.claim(), "x"), "could not be received.*did not answer in time")
        finally:
            release.set()
            thread.join()


@contextlib.contextmanager
def crowd(address: str) -> Iterator[None]:
    """Connect to a listener until its queue is full."""
    with contextlib.ExitStack() as sockets:
        with contextlib.suppress(BlockingIOError):
            while True:
                sock = sockets.enter_context(socket.socket(socket.AF_UNIX))
                sock.setblocking(False)
                sock.connect(address)
        yield


def fork_and_be_killed(conn: Any, keep: Any) -> None:
    message = dumps(Memory(10))
    os.dup(_sharer._sharer._listener._socket.fileno())
    if os.fork() == 0:  # has the listening socket too (in a copy that nobody knows of), and never answers there
        with contextlib.suppress(EOFError):
            keep.recv()
        os._exit(0)
    conn.send((message, _sharer._sharer._address))
    conn.recv()
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_claim_does_not_wait_for_room_in_a_dead_senders_queue() -> None:
    (ours, theirs), (release, keep) = multiprocessing.Pipe(), multiprocessing.Pipe()
    with ours, release:
        child = get_context("spawn").Process(target=fork_and_be_killed, args=(theirs, keep))
        child.start()
        theirs.close()
        keep.close()
        message, address = ours.recv()
        ours.send("die")
        os.waitid(os.P_PID, child.pid or 0, os.WEXITED | os.WNOWAIT)
        with crowd(address):
            assert_lost(pickle.loads(message), rf"pid {child.pid}\) is gone")
        release.send("exit")
        child.join()


def test_a_claim_waits_for_room_in_the_senders_queue(monkeypatch: pytest.MonkeyPatch) -> None:
    found_no_room = threading.Event()
    wait = platform.ProcessWatch.wait

    def note_and_wait(self: platform.ProcessWatch, fds: list[int], deadline: float) -> bool:
        if not fds:
            found_no_room.set()
        return wait(self, fds, deadline)

    def claim() -> None:
        arrived.append(pickle.loads(message))
        found_no_room.set()

    monkeypatch.setattr(platform.ProcessWatch, "wait", note_and_wait)
    arrived: list[Memory] = []
    ours, theirs = multiprocessing.Pipe()
    with ours, theirs:
        child = get_context("spawn").Process(target=send_and_wait, args=(theirs,))
        child.start()
        message, address = ours.recv()
        os.kill(child.pid or 0, signal.SIGSTOP)
        os.waitid(os.P_PID, child.pid or 0, os.WSTOPPED | os.WNOWAIT)
        with crowd(address):
            thread = threading.Thread(target=claim)
            thread.start()
            found_no_room.wait()
        os.kill(child.pid or 0, signal.SIGCONT)
        thread.join()
        assert arrived[0].pread(5) == b"there"
        ours.send("seen")
        child.join()
        assert child.exitcode == 0


def send_and_wait(conn: Any) -> None:
    conn.send((dumps(Memory.from_bytes(b"there")), _sharer._sharer._address))
    conn.recv()


def test_signals_are_left_to_the_main_thread() -> None:
    dumps(Memory(10))
    status = Path(f"/proc/self/task/{_sharer._sharer._thread.native_id}/status").read_text()
    blocked = int(status.split("SigBlk:")[1].split()[0], 16)
    for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
        assert blocked & 1 << number - 1, number


NAMED = """
import sys
import mpmemory as mp
mp._backends.platform.ABSTRACT_SOCKETS = False

def send(conn):
    conn.send(mp.Memory.from_bytes(b"last words"))

if __name__ == "__main__":
    ctx = mp.get_context(sys.argv[1])
    ours, theirs = ctx.Pipe()
    ctx.Process(target=send, args=(theirs,)).start()
    print(ours.recv().pread(10).decode())
    with ctx.Pool(2) as pool:
        for memory in pool.map(mp.Memory.from_bytes, [b"a", b"b", b"c"]):
            print(memory.pread(1).decode())
        pool.close()  # a worker that is killed leaves its folder, as always with multiprocessing
        pool.join()
"""


@pytest.mark.parametrize("method", START_METHODS)
def test_listeners_with_names_in_a_folder(method: str, tmp_path: Path, run_python: Any) -> None:
    """As on systems other than Linux."""
    done = run_python(NAMED, method, env={**os.environ, "TMPDIR": str(tmp_path)})
    assert done.stdout.split() == ["last", "words", "a", "b", "c"]
    assert done.stderr == ""
    assert [path.name for path in tmp_path.iterdir()] == ["program.py"]


def test_a_claimant_that_leaves_in_the_middle_takes_the_handle_along() -> None:
    memory, other = Memory(10), dumps(Memory(10))
    shared = _sharer.share_by_sharer(memory._open())
    assert isinstance(shared, _sharer.SharerFd)
    with connection.Client(shared._address, authkey=multiprocessing.current_process().authkey) as conn:
        with socket.socket(fileno=os.dup(conn.fileno())) as sock:
            sock.shutdown(socket.SHUT_RD)  # as if it had just died: nothing can be sent to it any more
        conn.send((shared._key, os.getpid()))
        assert pickle.loads(other).size == 10  # served after it
    _sharer._sharer.stop(timeout=10)
    assert _sharer._unclaimed == set()


def test_each_sharer_has_an_address_of_its_own() -> None:
    """Also a second one of this process: what was pickled for the first is not claimed from it."""
    addresses = set()
    for _ in range(2):
        message = dumps(Memory(10))
        addresses.add(_sharer._sharer._address)
        _sharer._sharer.stop(timeout=10)
        assert_lost(pickle.loads(message), rf"the sender \(pid {os.getpid()}\) is gone, is of another user, or")
    assert len(addresses) == 2


def test_a_lost_handle_does_not_end_the_thread_of_an_executor() -> None:
    """Which ends silently at EPIPE, if that is what pickling raises."""
    lost = Memory._own(LostFd.because(BrokenPipeError(errno.EPIPE, "gone"), "lost"), "lost")
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as executor:
        with pytest.raises(HandleLostError):
            executor.submit(len, lost).result()
        assert executor.submit(abs, -2).result() == 2


def fork_and_send(conn: Any) -> None:
    pickle.loads(dumps(Memory(1)))  # the sharer runs
    ours = Memory.from_bytes(b"PARENT")
    reader, writer = os.pipe()
    released, release = os.pipe()
    if (pid := os.fork()) == 0:
        os.write(writer, dumps(Memory.from_bytes(b"CHILD!")))
        os.read(released, 1)
        os._exit(0)
    message = os.read(reader, 10_000)
    mine = dumps(ours)
    conn.send((pickle.loads(message).pread(6), pickle.loads(mine).pread(6)))
    os.write(release, b"x")
    os.waitpid(pid, 0)


def test_a_raw_fork_has_a_sharer_of_its_own() -> None:
    ours, theirs = multiprocessing.Pipe()
    with ours, theirs:
        child = get_context("spawn").Process(target=fork_and_send, args=(theirs,))
        child.start()
        assert ours.recv() == (b"CHILD!", b"PARENT")
        child.join()
        assert child.exitcode == 0
