"""Connection and Pipe: what messages carry, between processes and between threads."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import random
import signal
import socket
import threading
from typing import Any

import numpy as np
import pytest
from conftest import START_METHODS, open_fds, skip_unless_available
from hypothesis import given, settings
from hypothesis import strategies as st

from mpmemory import Memory, SharedBuffer, _segments, get_context
from mpmemory._messages import BUFFER_MIN, INLINE_MAX
from mpmemory.connection import Connection, Pipe
from mpmemory.queues import JoinableQueue, Queue, SimpleQueue

THRESHOLDS = [BUFFER_MIN, INLINE_MAX, _segments.MIN_SIZE]
sizes = st.sampled_from([0, 1, 7, *(size + step for size in THRESHOLDS for step in (-1, 0, 1)), 200_000])
arrays = st.builds(
    lambda size, dtype, order, step, readonly: make_array(size, dtype, order, step, readonly),
    sizes,
    st.sampled_from(["u1", "i2", ">i4", "f8", "c16", "S5", "U3", "M8[s]", "?", "i4,f8"]),
    st.sampled_from("CF"),
    st.sampled_from([1, 2, -1]),
    st.booleans(),
)
leaves = (
    arrays
    | st.builds(lambda size: np.arange(size, dtype="u1"), sizes)
    | st.none()
    | st.integers()
    | st.text(max_size=20)
    | st.builds(lambda size, kind: kind(np.arange(size, dtype="u1")), sizes, st.sampled_from([bytes, bytearray]))
)
containers = st.recursive(
    leaves, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3)
)


def make_array(size: int, dtype: str, order: Any, step: int, readonly: bool) -> np.ndarray:
    kind = np.dtype(dtype)
    rows = max(size // kind.itemsize // 4, 1) if size else 0
    data = np.arange(rows * 4 * kind.itemsize, dtype="u1")
    if kind.kind == "U":
        data[:] = 0
    array = np.asarray(data.view(kind).reshape(rows, 4), order=order)[::step]
    array.flags.writeable = not readonly
    return array


def same(sent: Any, found: Any) -> bool:
    if isinstance(sent, np.ndarray):
        return (
            isinstance(found, np.ndarray)
            and (sent.dtype, sent.shape, sent.flags.writeable) == (found.dtype, found.shape, found.flags.writeable)
            and sent.tobytes() == found.tobytes()
        )
    if isinstance(sent, list):
        return len(sent) == len(found) and all(map(same, sent, found))
    if isinstance(sent, dict):
        return list(sent) == list(found) and all(same(sent[key], found[key]) for key in sent)
    return type(sent) is type(found) and bool(sent == found)


@settings(max_examples=150, deadline=None)
@given(containers)
def test_what_is_sent_arrives(obj: Any) -> None:
    left, right = Pipe()
    with left, right:
        left.send(obj)
        # NumPy itself changes the byte order of some arrays when they are pickled.
        assert same(pickle.loads(pickle.dumps(obj, 5)), right.recv())
    _segments.warm.release(float("inf"))


@settings(max_examples=50, deadline=None)
@given(sizes, st.integers(0, 50))
def test_bytes(size: int, offset: int) -> None:
    data = os.urandom(size + offset)
    left, right = Pipe()
    with left, right:
        left.send_bytes(data, offset)
        assert right.recv_bytes() == data[offset:]
        left.send_bytes(data, offset, size // 2)
        target = bytearray(size + 3)
        assert right.recv_bytes_into(target, 3) == size // 2
        assert target[3 : 3 + size // 2] == data[offset : offset + size // 2]
    _segments.warm.release(float("inf"))


def test_pickles_around_the_size_of_a_datagram(pipe: Any) -> None:
    left, right = pipe
    for size in range(INLINE_MAX - 50, INLINE_MAX + 2):
        left.send(bytes(size))
        assert right.recv() == bytes(size)


def test_a_small_socket_buffer_takes_what_a_large_one_takes(pipe: Any) -> None:
    left, right = pipe
    with socket.socket(fileno=os.dup(left.fileno())) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)  # the kernel makes it some 4 KB
    for size in (0, 1000, INLINE_MAX - 100, INLINE_MAX + 1):
        left.send("x" * size)
        assert right.recv() == "x" * size
        left.send_bytes(b"x" * size)
        assert right.recv_bytes() == b"x" * size


@pytest.mark.parametrize("letter", [b"x", "x"], ids=["bytes", "str"])
def test_many_megabytes(letter: bytes | str, pipe: Any) -> None:
    left, right = pipe
    data = letter * (1 << 26)
    left.send(data)
    assert right.recv() == data


@pytest.mark.xdist_group("shared memory of the machine")
def test_more_than_four_gigabytes(pipe: Any) -> None:
    skip_unless_available(7 << 30)
    left, right = pipe
    size = (1 << 32) + (1 << 20)
    array = np.zeros(size, "u1")  # costs no memory
    marks = [0, 1, (1 << 31) - 1, 1 << 31, (1 << 32) - 1, 1 << 32, size - 1]
    array[marks] = range(1, len(marks) + 1)
    left.send(["before", array, array[-70_000:]])
    before, found, end = right.recv()
    assert (before, found.shape, found[marks].tolist()) == ("before", (size,), list(range(1, len(marks) + 1)))
    assert np.count_nonzero(found[:: 1 << 16]) == 3
    assert (end == array[-70_000:]).all()


def test_arrays_arrive_writable_or_readonly_as_they_were(pipe: Any) -> None:
    left, right = pipe
    writable, readonly = np.zeros(100_000), np.zeros(100_000)
    readonly.flags.writeable = False
    left.send((writable, readonly, bytes(100_000), bytearray(100_000)))
    first, second, third, fourth = right.recv()
    assert first.flags.writeable
    assert not second.flags.writeable
    assert (type(third), type(fourth)) == (bytes, bytearray)


def test_what_arrives_is_the_receivers_own(pipe: Any) -> None:
    left, right = pipe
    array = np.ones(100_000)
    kept = []
    for _ in range(5):
        left.send(array)
        kept.append(right.recv())
    kept[0][:] = 7
    assert [found.sum() for found in kept] == [700_000.0] + [100_000.0] * 4
    assert array.sum() == 100_000.0


def test_overlapping_and_repeated_arrays(pipe: Any) -> None:
    left, right = pipe
    array = np.arange(100_000)
    left.send([array, array, array[::-1]])
    first, second, third = right.recv()
    assert first is second
    assert (third == first[::-1]).all()


class Picture:
    """Whatever pickles its content as a buffer of protocol 5."""

    def __init__(self, pixels: Any) -> None:
        self.pixels = pixels

    def __reduce_ex__(self, protocol: Any) -> Any:
        return Picture, (pickle.PickleBuffer(self.pixels),)


@pytest.mark.parametrize("size", [0, BUFFER_MIN - 1, BUFFER_MIN, 100_000])
def test_objects_with_buffers_of_their_own(size: int, pipe: Any) -> None:
    left, right = pipe
    left.send([Picture(bytes(size)), Picture(bytearray(size))])
    first, second = right.recv()
    assert (bytes(first.pixels), bytes(second.pixels)) == (bytes(size), bytes(size))
    assert (memoryview(first.pixels).readonly, memoryview(second.pixels).readonly) == (True, False)
    assert len(_segments.Lease._held) == (size >= BUFFER_MIN)
    with pytest.raises((BufferError, pickle.PicklingError), match="contiguous"):
        left.send(Picture(memoryview(bytearray(100_000))[::2]))
    left.send("next")
    assert right.recv() == "next"


def test_handles_and_buffers(pipe: Any) -> None:
    left, right = pipe
    memory = Memory(10, name="parcel")
    buffer = memory.map(4, 3)
    before = len(open_fds())
    left.send([memory, buffer, memory])
    first, second, third = right.recv()
    assert first is third
    assert (first.identity, first.name, second.offset) == (memory.identity, "parcel", 3)
    assert not os.get_inheritable(first.fileno())
    # One descriptor for all that share one (and one in each mapping before Python 3.13).
    second.buf[0] = 9
    assert memory.pread(1, 3) == b"\x09"
    assert len(open_fds()) <= before + 2


def test_a_thousand_handles_in_one_message(pipe: Any) -> None:
    left, right = pipe
    memories = [Memory.from_bytes(index.to_bytes(2, "big")) for index in range(1000)]
    queue = Queue()
    for send, receive in ((left.send, right.recv), (queue.put, queue.get)):
        send((memories, np.zeros(100_000)))
        found, _ = receive()
        assert [int.from_bytes(memory.pread(2), "big") for memory in found] == list(range(1000))
        assert len({memory.fileno() for memory in found}) == 1000
        del found


def test_sockets_connections_and_queues(pipe: Any) -> None:
    left, right = pipe
    here, there = socket.socketpair()
    ours, theirs = Pipe()
    stock_ours, stock_theirs = multiprocessing.Pipe()
    simple, queue, joinable = SimpleQueue(), Queue(3), JoinableQueue()
    left.send((there, theirs, stock_theirs, simple, queue, joinable))
    sock, conn, stock, simple2, queue2, joinable2 = right.recv()
    with here, there, ours, theirs, stock_ours, stock_theirs, sock, conn, stock:
        here.send(b"1")
        ours.send(2)
        stock_ours.send(3)
        simple.put(4)
        queue.put(5)
        joinable.put(6)
        assert (sock.recv(1), conn.recv(), stock.recv()) == (b"1", 2, 3)
        assert (simple2.get(), queue2.get(), joinable2.get()) == (4, 5, 6)
        joinable2.task_done()
        joinable.join()


def answer_in_each(requests: Any) -> None:
    sock, *conns, simple, queue, joinable = requests.get()
    with sock:
        sock.send(b"answer")
    for conn in conns:
        conn.send("answer")
    for each in (simple, queue, joinable):
        each.put("answer")


@pytest.mark.parametrize("method", START_METHODS)
def test_sockets_connections_and_queues_reach_a_child_inside_a_message(method: str) -> None:
    ctx = get_context(method)
    requests = ctx.Queue()
    child = ctx.Process(target=answer_in_each, args=(requests,))
    child.start()
    here, there = socket.socketpair()
    ours, theirs = ctx.Pipe()
    stock_ours, stock_theirs = multiprocessing.Pipe()
    mine = (ctx.SimpleQueue(), ctx.Queue(1), ctx.JoinableQueue())
    with here, there, ours, theirs, stock_ours, stock_theirs:
        requests.put((there, theirs, stock_theirs, *mine))
        assert (here.recv(6), ours.recv(), stock_ours.recv()) == (b"answer", "answer", "answer")
        assert [queue.get() for queue in mine] == ["answer"] * 3
    child.join()
    assert child.exitcode == 0


def send_for_ever(conn: Connection) -> None:
    number = 0
    while True:
        number += 1
        conn.send((number, np.full(500_000, number), Memory.from_bytes(b"%d" % number)))


@pytest.mark.parametrize("method", START_METHODS)
def test_a_sender_killed_while_it_sends(method: str) -> None:
    """What had been sent is whole, and then comes the end."""
    chosen = random.Random(method)
    for _ in range(3):
        left, right = Pipe()
        with left:
            child = get_context(method).Process(target=send_for_ever, args=(right,), daemon=True)
            child.start()
            right.close()
            last = 0
            stop = chosen.randrange(1, 50)
            with contextlib.suppress(EOFError):
                while True:
                    number, array, memory = left.recv()
                    assert number == last + 1
                    assert (array == number).all()
                    assert memory.pread(memory.size) == b"%d" % number
                    last = number
                    if number == stop:
                        child.kill()
            child.join()
            assert last >= stop


def send_and_kill(conn: Connection) -> None:
    conn.send([Memory.from_bytes(b"left behind"), np.full(100_000, 3)])
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("method", START_METHODS)
def test_a_message_outlives_its_sender(method: str) -> None:
    left, right = Pipe()
    with left:
        child = get_context(method).Process(target=send_and_kill, args=(right,))
        child.start()
        right.close()
        child.join()
        assert child.exitcode == -signal.SIGKILL
        memory, array = left.recv()
        assert memory.pread(11) == b"left behind"
        assert array.sum() == 300_000
        with pytest.raises(EOFError):
            left.recv()


def test_threads_share_a_connection(pipe: Any) -> None:
    left, right = pipe
    found: list[int] = []

    def send(index: int) -> None:
        for step in range(100):
            left.send((index * 100 + step, np.full(5000 * (step % 3), index)))

    def receive() -> None:
        for _ in range(100):
            number, array = right.recv()
            assert (array == number // 100).all()
            found.append(number)

    threads = [threading.Thread(target=send, args=(index,)) for index in range(4)]
    threads += [threading.Thread(target=receive) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(found) == list(range(400))


def echo(conn: Connection) -> None:
    while (obj := conn.recv()) is not None:  # no end of stream: a forked child has the other end, too
        conn.send(obj)


@pytest.mark.parametrize("method", START_METHODS)
def test_echo_by_a_child(method: str) -> None:
    left, right = Pipe()
    with left:
        child = get_context(method).Process(target=echo, args=(right,))
        child.start()
        right.close()
        buffer = SharedBuffer.from_bytes(b"abc")
        for obj in (1, "text", np.arange(300_000), buffer):
            left.send(obj)
            found = left.recv()
            assert found[0:3] == b"abc" if obj is buffer else same(obj, found)
        left.send(None)
        child.join()
        assert child.exitcode == 0
