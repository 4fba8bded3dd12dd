"""What goes over a Connection: one datagram a message, with descriptors, and a segment for big payloads.

Layout of a datagram, numbers little-endian:

    0     "mM"    magic
    2     u8      kind: 0 bytes, 1 a pickle; + 2 if the payload is in a segment
    3     u8      0
    4     u32     number of descriptors, a lease of the segment included, as the last
    8     u64     length of the payload in bytes
    16    u64     number of out-of-band buffers (pickle protocol 5)
    24    ...     the payload, if it is not in a segment

Layout of a segment in use, offsets in bytes, all parts but the table aligned to 64:

    0             table: for each buffer u64 offset, u64 length (highest bit set: read-only)
    ...           payload
    ...           buffer, buffer ...

At most 253 descriptors fit a datagram (unix(7)). If there are more, its only descriptor is one end of a
socket pair in which all of them are waiting, in messages of up to 253.
"""

from __future__ import annotations

import copyreg
import errno
import os
import pickle
import socket
import struct
import time
from collections.abc import Sequence
from multiprocessing import connection, reduction
from typing import Any

from . import _segments
from ._fds import MAX_FDS, OwnedFd, borrow_socket, dup, recv_fds, send_fds
from ._segments import ALIGNMENT, Lease
from .errors import failed
from .reduction import MessageFd, in_message

#: A payload of up to so many bytes travels in the datagram itself.
INLINE_MAX = 32 << 10

#: A buffer of less bytes is copied into the pickle, which is cheaper than a place of its own.
BUFFER_MIN = 16 << 10

_HEADER = struct.Struct("<2sBxIQQ")
_ENTRY = struct.Struct("<QQ")
_MAGIC = b"mM"
_BYTES, _PICKLE, _IN_SEGMENT = 0, 1, 2
_READONLY = 1 << 63

# How long to wait before trying again when too many descriptors are under way, in seconds.
_RETRY_INTERVAL = 0.002


class _Pieces:
    """A file that keeps what is written to it in pieces, without copying."""

    def __init__(self) -> None:
        self.pieces: list[Any] = []

    def write(self, data: Any) -> None:
        self.pieces.append(data)


def _dup(owner: socket.socket | connection.Connection) -> MessageFd:
    return MessageFd(OwnedFd(dup(owner.fileno())))


def _reduce_socket(sock: socket.socket) -> tuple[Any, ...]:
    return reduction._rebuild_socket, (_dup(sock), sock.family, sock.type, sock.proto)  # type: ignore[attr-defined]


def _reduce_connection(conn: connection.Connection) -> tuple[Any, ...]:
    return connection.rebuild_connection, (_dup(conn), conn.readable, conn.writable)  # type: ignore[attr-defined]


class _Reducers(dict[type, Any]):
    """What ForkingPickler copies for each pickler, looked up when needed; and what travels in a message."""

    def __missing__(self, kind: type) -> Any:
        try:
            return reduction.ForkingPickler._extra_reducers[kind]  # type: ignore[attr-defined]
        except KeyError:
            return copyreg.dispatch_table[kind]


class _Pickler(pickle.Pickler):
    """Pickles for a message: descriptors travel in it, big buffers beside the pickle."""

    dispatch_table = _Reducers({socket.socket: _reduce_socket, connection.Connection: _reduce_connection})


class Message:
    """A message to send: what was pickled, or bytes as they are."""

    __slots__ = ("_buffers", "_fds", "_kind", "_length", "_pieces")

    def __init__(self, kind: int, pieces: list[Any], buffers: list[memoryview], fds: list[OwnedFd]) -> None:
        self._kind = kind
        self._pieces = pieces
        self._buffers = buffers
        self._fds = fds
        self._length = len(pieces[0]) if len(pieces) == 1 else sum(map(len, pieces))

    @classmethod
    def of_object(cls, obj: object) -> Message:
        """Pickle `obj`; its big buffers are not copied yet. Raises what pickling raises, or OSError."""
        file = _Pieces()
        buffers: list[memoryview] = []
        fds: dict[OwnedFd, int] = {}

        def take(buffer: pickle.PickleBuffer) -> bool:
            """Return whether the buffer is to go into the pickle."""
            try:
                raw = buffer.raw()
            except BufferError:  # not contiguous
                return True
            if raw.nbytes < BUFFER_MIN:
                return True
            buffers.append(raw)
            return False

        before, in_message.outgoing = in_message.outgoing, fds
        try:
            _Pickler(file, 5, buffer_callback=take).dump(obj)
        finally:
            in_message.outgoing = before
        return cls(_PICKLE, file.pieces, buffers, list(fds))

    @classmethod
    def of_bytes(cls, data: memoryview) -> Message:
        """Take `data` as it is, without a copy."""
        return cls(_BYTES, [data], [], [])

    def detach(self) -> None:
        """Copy what still belongs to the caller, so that the message can wait."""
        self._pieces = [bytes(piece) for piece in self._pieces]
        self._buffers = [_copy(buffer) for buffer in self._buffers]

    def send(self, sock: socket.socket, *, wait: bool = True) -> bool:
        """Send it, and return True; False if not `wait` and the socket's buffer is full. Raises OSError."""
        if self._length <= INLINE_MAX and not self._buffers:
            header = _HEADER.pack(_MAGIC, self._kind, len(self._fds), self._length, 0)
            return _send(sock, b"".join((header, *self._pieces)), self._fds, wait)
        parts, size = self._layout()
        segment = _segments.warm.take(size)
        try:
            segment.fill(parts)
            fds = [*self._fds, segment.lease()]
            header = _HEADER.pack(_MAGIC, self._kind | _IN_SEGMENT, len(fds), self._length, len(self._buffers))
            return _send(sock, header, fds, wait)
        finally:
            _segments.warm.give_back(segment)

    def _layout(self) -> tuple[list[tuple[int, memoryview]], int]:
        """Return what goes into a segment, each part with its offset, and how many bytes that takes."""
        end = _align(_ENTRY.size * len(self._buffers))
        parts = []
        for piece in self._pieces:
            parts.append((end, memoryview(piece).cast("B")))
            end += len(piece)
        table = bytearray()
        for buffer in self._buffers:
            end = _align(end)
            parts.append((end, buffer))
            table += _ENTRY.pack(end, len(buffer) | (_READONLY if buffer.readonly else 0))
            end += len(buffer)
        parts.append((0, memoryview(table)))
        return parts, end


def _copy(buffer: memoryview) -> memoryview:
    return memoryview(bytes(buffer) if buffer.readonly else bytearray(buffer))


class Received:
    """A message that has come, with what belongs to it; nothing is unpickled yet."""

    __slots__ = ("buffers", "fds", "is_pickle", "payload")

    def __init__(self, sock: socket.socket, flags: int = 0) -> None:
        """Receive a message. What belongs to a broken one is closed; it does not affect the next.

        Raises:
            EOFError: the peer is gone, and there is no message left.
            BlockingIOError: there is none, and it was not to wait.
            OSError: EBADMSG if what came is no message of ours; EMFILE if no descriptor is left; ENOMEM.
        """
        try:
            data, numbers = recv_fds(sock, _HEADER.size + INLINE_MAX, flags)
        except ConnectionResetError:
            raise EOFError("the peer is gone") from None
        fds = [OwnedFd(number) for number in numbers]
        if not data:
            raise EOFError("the peer is gone")
        if len(data) < _HEADER.size:
            raise _bad(f"{len(data)} bytes, less than a header")
        magic, kind, count, length, buffers = _HEADER.unpack_from(data)
        if magic != _MAGIC or kind > _PICKLE | _IN_SEGMENT:
            raise _bad(f"a header {data[: _HEADER.size]!r}")
        if count != len(fds):
            fds = _recv_waiting(fds, count)
        self.is_pickle = bool(kind & _PICKLE)
        self.fds = fds
        self.buffers: list[Any] = []
        if kind & _IN_SEGMENT:
            if not fds:
                raise _bad("no segment")
            self.payload, self.buffers = _open_segment(fds.pop(), length, buffers)
        else:
            self.payload = memoryview(data)[_HEADER.size :]
            if len(self.payload) != length or buffers:
                raise _bad(f"{len(self.payload)} bytes instead of {length}")

    def object(self) -> Any:
        """Unpickle it. Raises what unpickling raises."""
        before, in_message.incoming = in_message.incoming, self.fds
        try:
            return pickle.loads(self.payload, buffers=self.buffers)
        finally:
            in_message.incoming = before

    def bytes(self) -> memoryview:
        """Return what was sent by `send_bytes`, or the pickle of an object that consists of nothing else."""
        if self.is_pickle and (self.buffers or self.fds):
            raise OSError(errno.EBADMSG, "expected bytes, found an object with buffers or descriptors")
        return self.payload


def _open_segment(fd: OwnedFd, length: int, count: int) -> tuple[memoryview, list[Any]]:
    size = os.fstat(fd.fileno()).st_size
    start = _align(_ENTRY.size * count)
    if start + length > size:
        raise _bad(f"a segment of {size} bytes, of which {start + length} are used")
    keep = Lease.is_within_budget()
    lease = Lease(fd)
    with memoryview(lease.mapping) as view:
        entries = list(_ENTRY.iter_unpack(view[: _ENTRY.size * count]))
    parts: list[Any] = []
    for offset, marked in entries:
        nbytes = marked & ~_READONLY
        if offset + nbytes > size:
            raise _bad(f"a buffer of {nbytes} bytes at {offset} of a segment of {size} bytes")
        part: Any = lease.view(offset, nbytes)
        if not keep:
            part = bytearray(part)
        parts.append(memoryview(part).toreadonly() if marked & _READONLY else part)
    payload = lease.view(start, length)
    return (payload if keep else memoryview(bytes(payload))), parts


def _recv_waiting(ends: list[OwnedFd], count: int) -> list[OwnedFd]:
    """Receive `count` descriptors that wait in a socket pair, whose other end is closed; `ends` has the one end."""
    fds: list[OwnedFd] = []
    if len(ends) == 1 and count > MAX_FDS:
        with borrow_socket(ends[0].fileno()) as sock:
            while len(fds) < count:
                data, numbers = recv_fds(sock, 1)
                fds += [OwnedFd(number) for number in numbers]
                if not data:
                    break
    if len(fds) != count:
        raise _bad(f"{len(fds) or len(ends)} descriptors instead of {count}")
    return fds


def _send(sock: socket.socket, datagram: bytes, fds: Sequence[OwnedFd], wait: bool) -> bool:
    if len(fds) > MAX_FDS:
        try:
            here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        except OSError as error:
            raise failed(f"cannot send {len(fds)} descriptors in one message", error) from None
        with here:
            end = OwnedFd(there.detach())
            for first in range(0, len(fds), MAX_FDS):
                _send(here, b"\0", fds[first : first + MAX_FDS], wait)
        fds = [end]
    flags = 0 if wait else socket.MSG_DONTWAIT
    while True:
        try:
            if fds:
                send_fds(sock, datagram, [fd.fileno() for fd in fds], flags)
            else:
                sock.send(datagram, flags)
            return True
        except BlockingIOError:
            return False
        except OSError as error:
            # unix(7): this user has more descriptors under way than a process may have open. They will be received.
            if error.errno != errno.ETOOMANYREFS:
                raise
        time.sleep(_RETRY_INTERVAL)


def _align(offset: int) -> int:
    return -(-offset // ALIGNMENT) * ALIGNMENT


def _bad(found: str) -> OSError:
    return OSError(errno.EBADMSG, f"expected a message of mpmemory, found {found}")
