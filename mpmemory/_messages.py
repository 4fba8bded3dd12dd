"""What goes over a Connection: one datagram a message, with descriptors, and a segment for big payloads.

Layout of a datagram, numbers little-endian:

    0     "mM"    magic
    2     u8      kind: 0 bytes, 1 a pickle; + 2 if the payload is in a segment
    3     u8      0
    4     u32     number of descriptors, a lease of the segment included, as the last
    8     u64     tag: whatever the sender wants to know it by
    16    u64     length of the payload in bytes
    24    u64     number of out-of-band buffers (pickle protocol 5)
    32    ...     the payload, if it is not in a segment

Layout of a segment in use, offsets in bytes, all parts but the table aligned to 64:

    0             table: for each buffer u64 offset, u64 length
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
import threading
import time
from collections.abc import Sequence
from multiprocessing import connection, reduction
from typing import Any

from . import _segments
from ._backends import platform
from ._fds import MAX_FDS, OwnedFd, borrow_socket, dup, recv_fds, recv_message, send_fds, truncation
from ._segments import ALIGNMENT, Lease
from .errors import failed
from .reduction import MessageFd, in_message

#: A payload of up to so many bytes travels in the datagram itself.
INLINE_MAX = 64 << 10

#: A buffer of less bytes is copied into the pickle, which is cheaper than a place of its own. Not more than
#: 64 KB: what is larger, the pickler hands over without a copy, as an object without a length.
BUFFER_MIN = 60 << 10

_HEADER = struct.Struct("<2sBxIQQQ")
_TAG = struct.Struct("<8xQ")
_ENTRY = struct.Struct("<QQ")
_MAGIC = b"mM"
_BYTES, _PICKLE, _IN_SEGMENT = 0, 1, 2
_DONTWAIT = int(socket.MSG_DONTWAIT)

# How long to wait before trying again when too many descriptors are under way, in seconds.
_RETRY_INTERVAL = 0.002


class _Pieces(list[Any]):
    """A file that keeps what is written to it in pieces, without copying."""

    __slots__ = ()
    write = list.append


def _dup(owner: socket.socket | connection.Connection) -> MessageFd:
    return MessageFd.add(OwnedFd(dup(owner.fileno())))


def _reduce_socket(sock: socket.socket) -> tuple[Any, ...]:
    return reduction._rebuild_socket, (_dup(sock), sock.family, sock.type, sock.proto)  # type: ignore[attr-defined]


def _reduce_connection(conn: connection.Connection) -> tuple[Any, ...]:
    return connection.rebuild_connection, (_dup(conn), conn.readable, conn.writable)  # type: ignore[attr-defined]


class _Reducers(dict[type, Any]):
    """What ForkingPickler copies for each pickler, looked up when needed; and what travels in a message."""

    def __missing__(self, kind: type) -> Any:
        reducer = reduction.ForkingPickler._extra_reducers.get(kind)  # type: ignore[attr-defined]
        return copyreg.dispatch_table[kind] if reducer is None else reducer


class _Pickler(pickle.Pickler):
    """Pickles for messages, one after the other: descriptors travel in them, big buffers beside the pickle."""

    dispatch_table = _Reducers({socket.socket: _reduce_socket, connection.Connection: _reduce_connection})

    def __init__(self) -> None:
        self._pieces = _Pieces()
        self._buffers: list[memoryview] = []
        super().__init__(self._pieces, 5, buffer_callback=self._take)

    def _take(self, buffer: pickle.PickleBuffer) -> bool:
        """Return whether the buffer is to go into the pickle."""
        raw = buffer.raw()  # contiguous: the pickler refuses others
        if raw.nbytes < BUFFER_MIN:
            return True
        self._buffers.append(raw)
        return False

    def take_apart(self, obj: object) -> tuple[list[Any], list[memoryview]]:
        """Return the pickle in pieces, and the buffers beside it. Not to be used again if that raises."""
        self.dump(obj)
        self.clear_memo()
        pieces, buffers = self._pieces[:], self._buffers[:]
        self._pieces.clear()
        self._buffers.clear()
        return pieces, buffers


class _Spare(threading.local):
    """A thread's pickler that is not in use: to make one takes as long as a small pickle."""

    pickler: _Pickler | None = None


_spare = _Spare()


class Message:
    """A message to send: what was pickled, or bytes as they are."""

    __slots__ = ("_buffers", "_fds", "_kind", "_pieces", "length")

    def __init__(self, kind: int, pieces: list[Any], buffers: list[memoryview], fds: list[OwnedFd]) -> None:
        self._kind = kind
        self._pieces = pieces
        self._buffers = buffers
        self._fds = fds
        self.length = len(pieces[0]) if len(pieces) == 1 else sum(map(len, pieces))

    @classmethod
    def of_object(cls, obj: object) -> Message:
        """Pickle `obj`; its big buffers are not copied yet. Raises what pickling raises, or OSError."""
        fds: dict[OwnedFd, int] = {}
        pickler = _spare.pickler or _Pickler()
        _spare.pickler = None  # a reducer may send messages of its own
        before, in_message.outgoing = in_message.outgoing, fds
        try:
            pieces, buffers = pickler.take_apart(obj)
        finally:
            in_message.outgoing = before
        _spare.pickler = pickler
        return cls(_PICKLE, pieces, buffers, list(fds))

    @classmethod
    def of_bytes(cls, data: memoryview) -> Message:
        """Take `data` as it is, without a copy."""
        return cls(_BYTES, [data], [], [])

    @property
    def is_big(self) -> bool:
        """Whether it needs a segment."""
        return self.length > INLINE_MAX or bool(self._buffers)

    def detach(self) -> None:
        """Copy what still belongs to the caller, so that the message can wait."""
        self._pieces = [bytes(piece) for piece in self._pieces]
        self._buffers = [memoryview(bytes(buffer)) for buffer in self._buffers]

    def pack(self, tag: int = 0, *, inline: bool = True) -> Datagram:
        """Return what is to be sent; big payloads, or any if not `inline`, are copied into a segment now.

        Raises OSError.
        """
        if inline and not self.is_big:
            header = _HEADER.pack(_MAGIC, self._kind, len(self._fds), tag, self.length, 0)
            return Datagram(header + (self._pieces[0] if len(self._pieces) == 1 else b"".join(self._pieces)), self._fds)
        parts, size = self._layout()
        segment = _segments.warm.take(size)
        try:
            segment.fill(parts)
            fds = [*self._fds, segment.lease()]
        finally:
            _segments.warm.give_back(segment)
        header = _HEADER.pack(_MAGIC, self._kind | _IN_SEGMENT, len(fds), tag, self.length, len(self._buffers))
        return Datagram(header, fds)

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
            table += _ENTRY.pack(end, len(buffer))
            end += len(buffer)
        parts.append((0, memoryview(table)))
        return parts, end


class Datagram:
    """What travels: a header, perhaps a payload, and descriptors. Who received it can send it on as it is."""

    __slots__ = ("_data", "_fds", "_truncated")

    def __init__(self, data: bytes, fds: list[OwnedFd], truncated: bool = False) -> None:
        self._data = data
        self._fds = fds
        self._truncated = truncated

    @classmethod
    def receive(cls, sock: socket.socket, *, wait: bool = True) -> Datagram:
        """Receive a datagram.

        Raises:
            EOFError: the peer is gone, and there is nothing left to receive.
            BlockingIOError: there is nothing, and it was not to wait.
            OSError: as recvmsg(2).
        """
        arguments = sock, _HEADER.size + INLINE_MAX, 0 if wait else _DONTWAIT
        try:
            data, numbers, truncated = recv_message(*arguments)
        except ConnectionResetError:
            # The peer went without reading all of ours. The kernel says so once, ahead of what the peer had sent.
            data, numbers, truncated = recv_message(*arguments)
        if not data and not numbers:
            raise EOFError("the peer is gone")
        return cls(data, [OwnedFd(number) for number in numbers] if numbers else [], truncated)

    @property
    def is_ours(self) -> bool:
        """Whether it looks like a message of this package."""
        return len(self._data) >= _HEADER.size and self._data.startswith(_MAGIC)

    @property
    def tag(self) -> int:
        """What it was packed with. Of those only that are ours."""
        return int(_TAG.unpack_from(self._data)[0])

    def send(self, sock: socket.socket, *, wait: bool = True) -> bool:
        """Send it, and return True; False if not `wait` and the socket's buffer is full. Raises OSError."""
        if self._truncated:
            raise truncation()
        flags = 0 if wait else _DONTWAIT
        try:
            if self._fds:
                return _send_with_fds(sock, self._data, self._fds, flags)
            sock.send(self._data, flags)
            return True
        except BlockingIOError:
            if wait:  # somebody has made the descriptor non-blocking
                raise
            return False

    def object(self) -> Any:
        """Unpickle what came. Raises what unpickling raises, and as `bytes`."""
        _, payload, buffers, fds = self._parse()
        if not fds:
            return pickle.loads(payload, buffers=buffers)
        before, in_message.incoming = in_message.incoming, fds
        try:
            return pickle.loads(payload, buffers=buffers)
        finally:
            in_message.incoming = before

    def bytes(self) -> memoryview:
        """Return what was sent by `send_bytes`, or the pickle of an object that consists of nothing else.

        Raises OSError: EBADMSG if it is no message of ours, or more than bytes; EMFILE if no descriptor was
        left for what it carries; ENOMEM.
        """
        kind, payload, buffers, fds = self._parse()
        if kind & _PICKLE and (buffers or fds):
            raise OSError(errno.EBADMSG, "expected bytes, found an object with buffers or descriptors")
        return payload

    def _parse(self) -> tuple[int, memoryview, list[Any], list[OwnedFd]]:
        """Return the kind, the payload, and the buffers and descriptors that belong to it."""
        if self._truncated:
            raise truncation()
        data, fds = self._data, self._fds
        if len(data) < _HEADER.size:
            raise _bad(f"{len(data)} bytes, less than a header")
        magic, kind, count, _, length, buffers = _HEADER.unpack_from(data)
        if magic != _MAGIC or kind > _PICKLE | _IN_SEGMENT:
            raise _bad(f"a header {data[: _HEADER.size]!r}")
        if count != len(fds):
            fds = _recv_waiting(fds, count)
        if kind & _IN_SEGMENT:
            if not fds:
                raise _bad("no segment")
            payload, parts = _open_segment(fds[-1], length, buffers)
            return kind, payload, parts, fds[:-1]
        payload = memoryview(data)[_HEADER.size :]
        if len(payload) != length or buffers:
            raise _bad(f"{len(payload)} bytes instead of {length}")
        return kind, payload, [], fds


def _open_segment(fd: OwnedFd, length: int, count: int) -> tuple[memoryview, list[Any]]:
    status = os.fstat(fd.fileno())
    size = status.st_size
    fixed = platform.has_fixed_size(fd.fileno())
    if fixed or platform.is_in_memory(fd.fileno()):
        size = min(size, status.st_blocks * 512)  # a hole takes no memory of the sender, and all of it here
    start = _align(_ENTRY.size * count)
    if start + length > size or not size:  # a pipe or a device has no size, and opening it may do anything
        raise _bad(f"a segment of {size} bytes, of which {start + length} are used")
    keep = Lease.is_within_budget()
    # Who could shrink what is mapped here would kill this process with it. So what has not been sealed is read,
    # and through the very descriptor that came, which may do no more than its sender may.
    lease = Lease(fd) if fixed else None

    def take(offset: int, nbytes: int) -> Any:
        if lease is None:
            return _read(fd, offset, nbytes)
        part = lease.view(offset, nbytes)
        return part if keep else bytearray(part)

    parts: list[Any] = []
    end = start + length
    table = memoryview(lease.mapping)[: _ENTRY.size * count] if lease else _read(fd, 0, _ENTRY.size * count)
    for offset, nbytes in _ENTRY.iter_unpack(table):
        if offset < end or offset + nbytes > size:
            raise _bad(f"a buffer of {nbytes} bytes at {offset} of a segment of {size} bytes")
        end = offset + nbytes
        # Writable: the pickle itself says which are to be read-only.
        parts.append(take(offset, nbytes))
    return memoryview(take(start, length)), parts


def _read(fd: OwnedFd, offset: int, nbytes: int) -> bytearray:
    try:
        part = bytearray(nbytes)
        platform.read_all(fd.fileno(), memoryview(part), offset)
    except MemoryError:
        raise OSError(errno.ENOMEM, f"cannot have {nbytes} bytes for a message: {os.strerror(errno.ENOMEM)}") from None
    except OSError as error:
        raise failed(f"cannot read {nbytes} bytes of a segment", error) from None
    return part


def _recv_waiting(ends: list[OwnedFd], count: int) -> list[OwnedFd]:
    """Receive `count` descriptors that wait in a socket pair, whose other end is closed; `ends` has the one end."""
    fds: list[OwnedFd] = []
    if len(ends) == 1 and count > MAX_FDS:
        try:
            with borrow_socket(ends[0].fileno()) as sock:
                numbers = [-1]
                while numbers and len(fds) < count:
                    # Never wait: all of them were there before this end was sent.
                    _, numbers = recv_fds(sock, 1, socket.MSG_DONTWAIT)
                    fds += [OwnedFd(number) for number in numbers]
        except OSError as error:
            if error.errno == errno.EMFILE:
                raise
            # Otherwise it is no socket, or it has fewer.
    if len(fds) != count:
        raise _bad(f"{len(fds) or len(ends)} descriptors instead of {count}")
    return fds


def _send_with_fds(sock: socket.socket, datagram: bytes, fds: Sequence[OwnedFd], flags: int) -> bool:
    while True:
        try:
            carried = fds if len(fds) <= MAX_FDS else [_line_up(fds)]
            send_fds(sock, datagram, [fd.fileno() for fd in carried], flags)
            return True
        except OSError as error:
            # unix(7): this user has more descriptors under way than a process may have open. They will be received.
            if error.errno != errno.ETOOMANYREFS:
                raise
        if flags & _DONTWAIT:
            return False
        carried = ()  # none of ours is under way meanwhile: two senders would wait for each other
        time.sleep(_RETRY_INTERVAL)


def _line_up(fds: Sequence[OwnedFd]) -> OwnedFd:
    """Return one end of a socket pair in which `fds` wait. Raises OSError."""
    try:
        here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    except OSError as error:
        raise failed(f"cannot send {len(fds)} descriptors in one message", error) from None
    with here:
        end = OwnedFd(there.detach())
        for first in range(0, len(fds), MAX_FDS):
            numbers = [fd.fileno() for fd in fds[first : first + MAX_FDS]]
            try:
                send_fds(here, b"\0", numbers, socket.MSG_DONTWAIT)
            except BlockingIOError:  # for ever: nobody reads yet
                raise OSError(errno.EMSGSIZE, f"cannot send {len(fds)} descriptors in one message") from None
    return end


def _align(offset: int) -> int:
    return -(-offset // ALIGNMENT) * ALIGNMENT


def _bad(found: str) -> OSError:
    return OSError(errno.EBADMSG, f"expected a message of mpmemory, found {found}")
