"""Connection: what it refuses, peers that have gone, broken messages, and no descriptors left."""

from __future__ import annotations

import contextlib
import errno
import multiprocessing
import os
import pickle
import socket
import struct
from multiprocessing.connection import wait
from typing import Any

import numpy as np
import pytest
from conftest import LIMITED

from mpmemory import HandleLostError, Memory, _messages
from mpmemory.connection import Connection, Pipe, _rebuild_connection
from mpmemory.reduction import share_fd
from mpmemory.testing import assert_no_leaks

# --- its API ---


def test_properties_and_errors_of_the_api() -> None:
    reader, writer = Pipe(duplex=False)
    with reader, writer:
        assert (reader.readable, reader.writable, writer.readable, writer.writable) == (True, False, False, True)
        for action in (lambda: reader.send(1), lambda: reader.send_bytes(b"")):
            with pytest.raises(OSError, match="read-only"):
                action()
        for action in (writer.recv, writer.recv_bytes, writer.poll, lambda: writer.recv_bytes_into(bytearray(1))):
            with pytest.raises(OSError, match="write-only"):
                action()
        assert not reader.poll()
        assert not reader.poll(0.01)
        writer.send_bytes(b"")
        assert reader.poll(None)
        assert wait([reader], 0) == [reader]
        assert reader.recv_bytes() == b""
        writer.send_bytes(b"12345")
        with pytest.raises(OSError, match="at most 3 bytes, found 5"):
            reader.recv_bytes(3)
        writer.send_bytes(b"12345")
        with pytest.raises(multiprocessing.BufferTooShort) as error:
            reader.recv_bytes_into(bytearray(4))
        assert error.value.args == (b"12345",)
        for bad in ((b"1", 2), (b"1", -1), (b"1", 0, 2), (b"1", 0, -1)):
            with pytest.raises(ValueError, match="are not within 1 bytes"):
                writer.send_bytes(*bad)
        writer.send({"a": 1})
        assert pickle.loads(reader.recv_bytes()) == {"a": 1}
    assert reader.closed
    assert "closed" in repr(reader)
    for action in (reader.recv, reader.fileno, lambda: writer.send(1)):
        with pytest.raises(OSError, match="closed"):
            action()
    reader.close()


def test_arguments_that_are_out_of_range(pipe: Any) -> None:
    left, right = pipe
    left.send_bytes(b"12345")
    with pytest.raises(ValueError, match="maxlength must not be negative, found -1"):
        right.recv_bytes(-1)
    for offset in (-1, 6):
        with pytest.raises(ValueError, match=f"offset {offset} is not within 5 bytes"):
            right.recv_bytes_into(bytearray(5), offset)
    assert right.recv_bytes() == b"12345"
    with pytest.raises(ValueError, match="at least one of `readable` and `writable`"):
        Connection(left.fileno(), readable=False, writable=False)


def test_what_is_no_connection() -> None:
    read, write = os.pipe()
    stream, other = socket.socketpair()
    with stream, other:
        for fd, message in ((read, "expected a socket"), (stream.fileno(), "expected a SEQPACKET Unix socket")):
            with pytest.raises(ValueError, match=message):
                Connection(fd)
            os.fstat(fd)
    os.close(read)
    os.close(write)


def test_a_descriptor_made_non_blocking_loses_nothing(pipe: Any) -> None:
    """As the stock connection does, ours says so when it cannot wait."""
    left, right = pipe
    os.set_blocking(left.fileno(), False)
    sent = 0
    with contextlib.suppress(BlockingIOError):
        while True:
            left.send(sent)
            sent += 1
    assert [right.recv() for _ in range(sent)] == list(range(sent))


def test_pickling_errors_send_nothing(pipe: Any) -> None:
    left, right = pipe
    with assert_no_leaks(), pytest.raises((pickle.PicklingError, AttributeError)):
        left.send([Memory(10), np.zeros(100_000), lambda: None])
    left.send("next")
    assert right.recv() == "next"


class Broken:
    """Cannot be unpickled."""

    def __reduce__(self) -> Any:
        return int, ("not a number",)


def test_unpickling_errors_are_of_that_message_only(pipe: Any) -> None:
    left, right = pipe
    with assert_no_leaks():
        left.send([Memory(10), np.zeros(100_000), Broken()])
        left.send("next")
        with pytest.raises(ValueError, match="not a number"):
            right.recv()
        assert right.recv() == "next"


def test_the_peer_is_gone() -> None:
    left, right = Pipe()
    with left:
        right.send("last")
        right.close()
        assert left.poll()
        assert left.recv() == "last"
        for receive in (left.recv, left.recv_bytes):
            with pytest.raises(EOFError):
                receive()
        for obj in (1, np.zeros(100_000), Memory(1)):
            with pytest.raises(BrokenPipeError):
                left.send(obj)


def test_the_peer_is_gone_with_messages_unread() -> None:
    left, right = Pipe()
    with left:
        left.send("unread")
        right.close()
        with pytest.raises(EOFError):
            left.recv()


def test_what_was_sent_before_the_peer_went_arrives_though_it_left_messages_unread() -> None:
    left, right = Pipe()
    with left:
        left.send("unread")
        right.send("first")
        right.send("last")
        right.close()
        assert (left.recv(), left.recv()) == ("first", "last")
        with pytest.raises(EOFError):
            left.recv()


# --- broken messages ---


HEADER = struct.Struct("<2sBxIQQQ")


@pytest.mark.parametrize(
    "datagram",
    [
        b"x",
        b"x" * 24,
        HEADER.pack(b"mM", 9, 0, 0, 0, 0),
        HEADER.pack(b"mM", 1, 0, 0, 100, 0) + b"short",
        HEADER.pack(b"mM", 1, 0, 0, 0, 5),
        HEADER.pack(b"mM", 1, 3, 0, 0, 0),
        HEADER.pack(b"mM", 1, 5000, 0, 0, 0),
        HEADER.pack(b"mM", 3, 0, 0, 10, 0),
        b"y" * 100_000,
    ],
)
def test_a_foreign_datagram_is_an_error_of_its_own(datagram: bytes, pipe: Any) -> None:
    left, right = pipe
    os.write(left.fileno(), datagram)
    left.send("next")
    with pytest.raises(OSError, match="expected a message of mpmemory") as error:
        right.recv()
    assert error.value.errno == errno.EBADMSG
    assert right.recv() == "next"


def send_with_one_fd(conn: Connection, datagram: bytes, fd: int) -> None:
    with socket.socket(fileno=os.dup(conn.fileno())) as sock:
        socket.send_fds(sock, [datagram], [fd])


@pytest.mark.parametrize("kind", ["a pipe", "a socket that waits", "a listening socket", "empty memory", "/dev/zero"])
@pytest.mark.parametrize("header", [HEADER.pack(b"mM", 3, 1, 0, 0, 0), HEADER.pack(b"mM", 1, 500, 0, 0, 0)])
def test_foreign_descriptors_are_an_error_of_that_message_only(kind: str, header: bytes, pipe: Any) -> None:
    left, right = pipe
    with contextlib.ExitStack() as stack:
        if kind == "a pipe":
            fd, other = os.pipe()
            stack.callback(os.close, fd)
            stack.callback(os.close, other)
        elif kind == "a socket that waits":
            here, _other = (stack.enter_context(each) for each in socket.socketpair())
            fd = here.fileno()
        elif kind == "a listening socket":
            server = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
            fd = server.fileno()
        elif kind == "empty memory":
            fd = stack.enter_context(Memory(0)).fileno()
        else:
            fd = os.open("/dev/zero", os.O_RDWR)
            stack.callback(os.close, fd)
        send_with_one_fd(left, header, fd)
        left.send("next")
        with pytest.raises(OSError, match="expected a message of mpmemory") as error:
            right.recv()
    assert error.value.errno == errno.EBADMSG
    assert right.recv() == "next"


class Disguised:
    """A memory that pickles as a connection."""

    def __reduce__(self) -> Any:
        return _rebuild_connection, (Connection, share_fd(Memory(10)._open()), True, True)


def test_a_connection_that_arrived_on_something_else_is_lost(pipe: Any) -> None:
    left, right = pipe
    left.send(Disguised())
    conn = right.recv()
    with pytest.raises(HandleLostError, match="the connection could not be opened: Socket operation on non-socket"):
        conn.recv()


def test_a_socket_that_goes_before_its_connection_goes_in_silence(pipe: Any) -> None:
    """As the garbage collector may have it. A warning would be an error here."""
    left, right = pipe
    left.send(right)
    for conn in (left, right.recv()):
        fd = conn.fileno()
        conn._sock = None
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(fd)


def test_a_handle_unpickled_apart_from_its_message_is_lost(pipe: Any) -> None:
    shared = _messages.Message.of_object(Memory(10))
    (piece,) = shared._pieces
    with pytest.raises(HandleLostError, match="apart from the message it travelled in"):
        pickle.loads(piece).fileno()


# --- limits ---


def test_out_of_descriptors(run_python: Any) -> None:
    run_python(
        LIMITED + "left, right = Pipe()\n"
        "memory, sock = Memory(10), socket.socket()\n"
        "array = np.zeros(100_000)\n"
        "for obj in (array, sock, left, SimpleQueue()):\n"
        "    expect_the_limit(lambda: left.send(obj))\n"
        "memories = [Memory(10) for _ in range(300)]\n"
        "expect_the_limit(lambda: left.send(memories))\n"
        "left.send(memories); left.send('next')\n"
        "expect_the_limit(right.recv)\n"
        "assert right.recv() == 'next'\n"
        "left.send(memories); left.send('next')\n"
        "spare = [os.dup(0) for _ in range(10)]\n"
        "def receive_with_few():\n"
        "    for fd in spare: os.close(fd)\n"
        "    right.recv()\n"
        "expect_the_limit(receive_with_few)\n"
        "assert right.recv() == 'next'\n"
        "for obj in (array, sock, left, memory):\n"
        "    left.send(obj); left.send('next')\n"
        "    expect_the_limit(right.recv)\n"
        "    assert right.recv() == 'next'\n"
        "    left.send(obj); right.recv()\n"
    )


def test_out_of_memory_for_what_must_be_copied(run_python: Any) -> None:
    """Segments of this backend cannot be sealed, so what they have is read."""
    run_python(
        "import errno, resource, numpy as np\n"
        "from mpmemory.connection import Pipe\n"
        "left, right = Pipe()\n"
        "left.send(np.ones(10_000_000)); left.send('next')\n"
        "soft, hard = resource.getrlimit(resource.RLIMIT_AS)\n"
        "pages = int(open('/proc/self/statm').read().split()[0])\n"
        "resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + (20 << 20), hard))\n"
        "try: right.recv()\n"
        "except OSError as error:\n"
        "    assert error.errno == errno.ENOMEM and 'cannot have 80000000 bytes' in str(error), error\n"
        "else: raise SystemExit('no error')\n"
        "assert right.recv() == 'next'\n"
        "resource.setrlimit(resource.RLIMIT_AS, (soft, hard))\n"
        "left.send(np.ones(10_000_000)); assert right.recv().sum() == 10_000_000\n",
        env={**os.environ, "MPMEMORY_BACKEND": "posix"},
    )
