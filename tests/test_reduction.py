"""How a handle pickles: what must hold whatever the channel."""

from __future__ import annotations

import contextlib
import copy
import gc
import multiprocessing
import os
import pickle
import signal
import sys
from multiprocessing import connection, reduction, resource_sharer
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import pytest
from conftest import START_METHODS, open_fds

from mpmemory import HandleLostError, Memory, SharedBuffer, _sharer, get_context
from mpmemory._fds import OwnedFd
from mpmemory.reduction import FORKSERVER_FDS, _launching


def dumps(obj: object) -> bytes:
    """Pickle as the stock Queue, Pipe and Pool do."""
    return bytes(ForkingPickler.dumps(obj))


# --- plain pickle and copy ---


@pytest.mark.parametrize("make", [lambda: Memory(10), lambda: SharedBuffer(10)])
@pytest.mark.parametrize("way", [pickle.dumps, copy.copy, copy.deepcopy, lambda obj: pickle.dumps([obj], protocol=2)])
def test_plain_pickle_and_copy_say_what_to_do_instead(make: Any, way: Any) -> None:
    obj = make()
    before = open_fds()
    with pytest.raises(TypeError, match=r"cannot pickle or copy a (Memory|SharedBuffer) .* Memory.dup\(\)"):
        way(obj)
    assert open_fds() == before


def test_a_closed_handle_cannot_be_pickled() -> None:
    memory, buffer = Memory(10, name="gone"), SharedBuffer(10)
    memory.close()
    buffer.close()
    with pytest.raises(ValueError, match="memory 'gone' is closed"):
        dumps(memory)
    with pytest.raises(ValueError, match="buffer is closed"):
        dumps(buffer)
    with get_context("spawn").Pool(1) as pool, pytest.raises(ValueError, match="memory 'gone' is closed"):
        pool.apply(len, (memory,))


# --- subclasses ---


class Named(Memory):
    """A subclass with attributes of its own."""

    def __init__(self, size: int, tags: list[str]) -> None:
        super().__init__(size)
        self.tags = tags


class Slotted(SharedBuffer):
    """A subclass with slots, which says itself what travels."""

    __slots__ = ("tag",)

    def __getstate__(self) -> object:
        return self.tag

    def __setstate__(self, state: object) -> None:
        self.tag = state


class Plain(Memory):
    """A subclass that travels in its own way."""

    def __reduce__(self) -> Any:
        return (str, (self.name,))


def describe(named: Named, slotted: Slotted, plain: object) -> tuple[Any, ...]:
    named.pwrite(b"seen")
    return type(named).__name__, named.tags, type(slotted).__name__, slotted.tag, slotted[0], plain


@pytest.mark.parametrize("method", START_METHODS)
def test_subclasses_come_back_as_themselves(method: str) -> None:
    named, slotted, plain = Named(10, ["a", "b"]), Slotted(10), Plain(10, name="by name")
    slotted.tag = {"x": 1}
    slotted[0] = 5
    with get_context(method).Pool(1) as pool:
        result = pool.apply(describe, (named, slotted, plain))
    assert result == ("Named", ["a", "b"], "Slotted", {"x": 1}, 5, "by name")
    assert named.pread(4) == b"seen"


# --- spawning ---


def touch_all(memories: list[Memory], buffers: list[SharedBuffer], results: Any) -> None:
    for index, memory in enumerate(memories):
        memory.pwrite(index.to_bytes(2, "little"))
    for index, buffer in enumerate(buffers):
        buffer.set_value("<H", 2, index)
    numbers = [memory.fileno() for memory in memories] + [buffer.memory.fileno() for buffer in buffers]
    inheritable = [number for number in numbers if os.get_inheritable(number)]
    # Closing each once must succeed: no two handles have the same descriptor.
    for handle in (*memories, *buffers):
        handle.close()
    results.send((len(set(numbers)), inheritable))


@pytest.mark.parametrize("method", START_METHODS)
def test_the_same_memory_twice_in_one_childs_arguments(method: str) -> None:
    memory = Memory(10)
    buffer = memory.map()
    ours, theirs = multiprocessing.Pipe()
    with ours, theirs:
        args = ([memory, memory.dup()], [buffer, memory.map()], theirs)
        child = get_context(method).Process(target=touch_all, args=args)
        child.start()
        distinct, inheritable = ours.recv()
        child.join()
        assert child.exitcode == 0
        del args
    if method != "fork":  # where the child has the very objects of the parent
        assert distinct == 4
    assert inheritable == []
    assert buffer.get_values("<2H", 0) == (1, 1)


@pytest.mark.parametrize("method", START_METHODS)
@pytest.mark.parametrize("count", [FORKSERVER_FDS - 1, FORKSERVER_FDS, FORKSERVER_FDS + 1, 300])
def test_many_handles_in_one_childs_arguments(method: str, count: int) -> None:
    memories = [Memory(10) for _ in range(count)]
    ours, theirs = multiprocessing.Pipe()
    with ours, theirs:
        child = get_context(method).Process(target=touch_all, args=(memories, [], theirs))
        child.start()
        assert ours.recv() == (count, [])
        child.join()
        assert child.exitcode == 0
    assert [int.from_bytes(memory.pread(2), "little") for memory in memories] == list(range(count))


def wait_for(conn: Any, _memory: Memory) -> None:
    conn.recv()


@pytest.mark.parametrize("method", ["forkserver", "spawn"])
def test_descriptors_for_a_launch_are_closed_after_it(method: str) -> None:
    """At the latest when a handle is closed or dropped, or another is shared."""
    memory, other = Memory(10), Memory(10)
    identity = memory.identity
    ours, theirs = multiprocessing.Pipe()
    with ours, theirs:
        child = get_context(method).Process(target=wait_for, args=(theirs, memory))
        child.start()
        other.close()
        copies = [
            fd for fd in open_fds() if os.fstat(fd)[:2] and (os.fstat(fd).st_dev, os.fstat(fd).st_ino) == identity
        ]
        assert copies == [memory.fileno()]
        second = get_context(method).Process(target=wait_for, args=(theirs, memory))
        second.start()
        assert len(_launching) == 1
        del memory
        gc.collect()
        assert len(_launching) == 0
        ours.send(None)
        ours.send(None)
        child.join()
        second.join()


def test_a_launch_that_fails_leaves_nothing() -> None:
    memory = Memory(10)
    before = open_fds()
    child = get_context("spawn").Process(target=print, args=(memory, lambda: None))
    with pytest.raises((pickle.PicklingError, AttributeError)):
        child.start()
    del child
    gc.collect()
    assert open_fds() == before


# --- the resource sharer ---


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


def assert_lost(handle: Memory, message: str) -> None:
    actions: list[Any] = [
        lambda: handle.size,
        lambda: handle.fileno(),
        lambda: handle.map(),
        lambda: handle.pread(1),
        lambda: handle.pwrite(b"x"),
        lambda: handle.dup(),
        lambda: dumps(handle),
    ]
    for action in actions:
        with pytest.raises(HandleLostError, match=message) as error:
            action()
        assert error.value.errno
    assert "lost" in repr(handle)
    assert not handle.closed
    handle.close()
    assert handle.closed


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
    if os.fork() == 0:  # has the listening socket too, and never answers there
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


def claim_with_another_key(conn: Any) -> None:
    multiprocessing.current_process().authkey = b"another"
    lost = pickle.loads(conn.recv_bytes())
    with pytest.raises(HandleLostError, match="could not be received: digest sent was rejected"):
        lost.pread(1)
    conn.send("rejected")


def test_a_claimant_needs_the_authkey(capfd: pytest.CaptureFixture[str]) -> None:
    message = dumps(Memory(10))
    ours, theirs = multiprocessing.Pipe()
    with ours, theirs:
        child = get_context("spawn").Process(target=claim_with_another_key, args=(theirs,))
        child.start()
        ours.send_bytes(message)
        assert ours.recv() == "rejected"
        child.join()
    assert pickle.loads(message).size == 10  # still there for who knows the key
    assert capfd.readouterr().err == ""


def test_another_user_is_not_answered() -> None:
    if os.geteuid() != 0:
        pytest.skip("needs to become another user")
    dumps(Memory(10))
    address = _sharer._sharer._address
    reader, writer = os.pipe()
    if (pid := os.fork()) == 0:
        os.setuid(65534)
        try:
            with connection.Client(address) as conn:
                conn.recv_bytes()
        except (EOFError, ConnectionError):
            os.write(writer, b"refused")
        finally:
            os._exit(0)
    os.close(writer)
    os.waitpid(pid, 0)
    assert os.read(reader, 100) == b"refused"
    os.close(reader)


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


# --- results outlive their worker ---


def make_many(index: int) -> tuple[Memory, SharedBuffer]:
    memory = Memory.from_bytes(str(index).encode())
    return memory, memory.map()


@pytest.mark.parametrize("method", START_METHODS)
def test_results_outlive_their_worker(method: str) -> None:
    with multiprocessing.get_context(method).Pool(2, maxtasksperchild=1) as pool:
        results = pool.map(make_many, range(40), chunksize=1)
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
    ctx = get_context(method)
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
        "import mpmemory as mp\n"
        "def consume(queue, ready):\n"
        "    ready.set()\n"
        "    for _ in range(20): print(queue.get().pread(5).decode(), flush=True)\n"
        "if __name__ == '__main__':\n"
        f"    ctx = mp.get_context({method!r})\n"
        "    queue, ready = ctx.Queue(), ctx.Event()\n"
        "    ctx.Process(target=consume, args=(queue, ready)).start()\n"
        "    ready.wait()\n"
        "    for index in range(20): queue.put(mp.Memory.from_bytes(b'%05d' % index))\n"
    )
    assert done.stdout.split() == [f"{index:05}" for index in range(20)]
    assert done.stderr == ""


LATE = """
import sys, time
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
    ctx = mp.get_context(sys.argv[1])
    queue, ready = ctx.Queue(), ctx.Event()
    ctx.Process(target=consume, args=(queue, ready)).start()
    ready.wait()
    queue.put(Late(mp.Memory.from_bytes(b"late"), mp.SharedBuffer.from_bytes(b"but in time")))
"""


@pytest.mark.parametrize("method", START_METHODS)
def test_handles_pickled_after_the_end_of_the_program(method: str, run_python: Any) -> None:
    done = run_python(LATE, method)
    assert (done.stdout, done.stderr) == ("late but in time\n", "")


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


def test_importing_changes_nothing_but_the_picklers_table(run_python: Any) -> None:
    run_python(
        "import multiprocessing, multiprocessing.reduction, threading, os\n"
        "import multiprocessing.connection, multiprocessing.context as context\n"
        "before = {m: dict(vars(m)) for m in (multiprocessing, multiprocessing.reduction, context)}\n"
        "table = set(multiprocessing.reduction.ForkingPickler._extra_reducers)\n"
        "fds = os.listdir('/proc/self/fd')\n"
        "import mpmemory\n"
        "for module, names in before.items():\n"
        "    for name, value in names.items():\n"
        "        assert vars(module)[name] is value, (module, name)\n"
        "new = set(multiprocessing.reduction.ForkingPickler._extra_reducers) - table\n"
        "assert {kind.__name__ for kind in new} == {'Memory', 'SharedBuffer'}, new\n"
        "assert threading.active_count() == 1 and os.listdir('/proc/self/fd') == fds\n"
        "assert multiprocessing.get_start_method(allow_none=True) is None\n"
    )


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
