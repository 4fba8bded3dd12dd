"""Connection and Pipe: messages that carry descriptors and big payloads.

One `socketpair(AF_UNIX, SOCK_SEQPACKET)`. A message is one datagram, sent and received as a whole: any
number of writers and readers, in threads and processes, need no lock, and one that is killed in the
middle leaves nothing locked and nothing half.
"""

from __future__ import annotations

import errno
import operator
import socket
from collections.abc import Callable
from multiprocessing import BufferTooShort
from multiprocessing.connection import wait
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, SupportsIndex

from ._fds import LostFd, OwnedFd, borrow_socket, dup
from ._messages import Datagram, Message
from .memory import flat_view
from .reduction import Shareable, release_launched, share_fd

if TYPE_CHECKING:
    from typing_extensions import Buffer  # collections.abc.Buffer, from 3.12 on


class _Socket(socket.socket):
    """A socket that is closed when it goes, without a warning."""

    # Not left to the Connection: if both are garbage, in a cycle, either may be finalized first.
    def __del__(self) -> None:
        if self.fileno() >= 0:  # not if it was none, and never set up
            self.close()


class Connection(Shareable):
    """One end of a Pipe, with the API of `multiprocessing.connection.Connection`.

    Carries what can be pickled, of any size, and besides memory, buffers, sockets and connections. Big
    buffers of pickle protocol 5, such as NumPy arrays, travel beside the pickle, in shared memory: what
    arrives belongs to the receiver, is writable (or read-only where it was), and nobody else writes there.

    Can be used from several threads and processes at the same time. Pickles through multiprocessing. Any use
    after `close` is an OSError, as is receiving from an end that is only `writable`, or the other way round.
    """

    __slots__ = ("_lost", "_readable", "_sock", "_writable")

    _sock: socket.socket | None  # the owner of the descriptor; None once closed, or if lost
    _lost: LostFd | None

    def __init__(self, handle: SupportsIndex, readable: bool = True, writable: bool = True) -> None:
        """Take over `handle`, a descriptor of a connected SEQPACKET socket, to be `readable`, `writable` or both.

        Raises ValueError if it is none (it is left as it was), or if neither direction is wanted.
        """
        number = operator.index(handle)
        if not readable and not writable:
            raise ValueError("at least one of `readable` and `writable` must be True")
        try:
            sock = _Socket(fileno=number)
        except OSError as error:
            raise ValueError(f"expected a socket, found file descriptor {number}: {error.strerror}") from None
        if sock.family != socket.AF_UNIX or sock.type != socket.SOCK_SEQPACKET:
            sock.detach()
            raise ValueError(f"expected a SEQPACKET Unix socket, found {sock.family.name}, {sock.type.name}")
        self._set_up(sock, None, readable, writable)

    def _set_up(self, sock: socket.socket | None, lost: LostFd | None, readable: bool, writable: bool) -> None:
        if sock is not None:
            sock.setblocking(True)
        self._sock = sock
        self._lost = lost
        self._readable = readable
        self._writable = writable

    # --- what it is ---

    def fileno(self) -> int:
        """Return the file descriptor, which stays this connection's."""
        return self._open().fileno()

    @property
    def readable(self) -> bool:
        """Whether messages can be received here."""
        return self._readable

    @property
    def writable(self) -> bool:
        """Whether messages can be sent here."""
        return self._writable

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._sock is None and self._lost is None

    def __repr__(self) -> str:
        state = "lost" if self._lost else "closed" if self._sock is None else f"fd={self._sock.fileno()}"
        return f"<{type(self).__name__} {state}>"

    # --- sending ---

    def send(self, obj: object) -> None:
        """Send an object, waiting while the other side has too much to read.

        What is sent is the object as it is now. Raises what pickling raises, BrokenPipeError if the peer
        is gone, or OSError; then nothing was sent.
        """
        self._check_writable()
        self.send_message(Message.of_object(obj))

    def send_bytes(self, buf: Buffer, offset: SupportsIndex = 0, size: SupportsIndex | None = None) -> None:
        """Send `size` bytes of `buf` from `offset` on (to the end if None).

        Raises as `send`; ValueError if they are not within `buf`.
        """
        self._check_writable()
        view = flat_view(buf)
        start = operator.index(offset)
        count = len(view) - start if size is None else operator.index(size)
        if start < 0 or count < 0 or start + count > len(view):
            raise ValueError(f"offset {start} and size {count} are not within {len(view)} bytes")
        self.send_message(Message.of_bytes(view[start : start + count]))

    def send_message(self, message: Message, *, wait: bool = True) -> bool:
        """Send what was pickled before; False if not `wait`, and there is too much to read for the other side."""
        try:
            return self.send_datagram(message.pack(), wait=wait)
        except OSError as error:
            if error.errno != errno.EMSGSIZE or message.is_big:
                raise
        # The socket's buffer is smaller than this message.
        return self.send_datagram(message.pack(inline=False), wait=wait)

    def send_datagram(self, datagram: Datagram, *, wait: bool = True) -> bool:
        """Send what was packed before; see `Datagram.send`."""
        try:
            return datagram.send(self._check_writable(), wait=wait)
        except ConnectionResetError:
            raise BrokenPipeError("the peer is gone") from None

    # --- receiving ---

    def recv(self) -> Any:
        """Wait for a message, and return its object.

        Raises EOFError if the peer is gone; what unpickling raises; OSError (EBADMSG) if it is no message of
        ours, or (EMFILE) if no descriptor is left for what it carries. Other messages are not affected.
        """
        return self.receive_datagram().object()

    def recv_bytes(self, maxlength: SupportsIndex | None = None) -> bytes:
        """Wait for a message, and return its bytes: those of `send_bytes`, or of a pickle without big buffers.

        Raises as `recv`; OSError if it is longer than `maxlength`, as multiprocessing does, but of that
        message only; ValueError if `maxlength` is negative.
        """
        if maxlength is not None and operator.index(maxlength) < 0:
            raise ValueError(f"maxlength must not be negative, found {maxlength}")
        payload = self.receive_datagram().bytes()
        if maxlength is not None and len(payload) > operator.index(maxlength):
            raise OSError(f"expected a message of at most {maxlength} bytes, found {len(payload)}")
        return bytes(payload)

    def recv_bytes_into(self, buf: Buffer, offset: SupportsIndex = 0) -> int:
        """Wait for a message of `send_bytes`, write it into `buf` at `offset`, and return its length in bytes.

        Raises as `recv`; `multiprocessing.BufferTooShort`, with the message as its argument, if it does not fit;
        ValueError if `offset` is not within `buf`.
        """
        with memoryview(buf).cast("B") as target:
            start = operator.index(offset)
            if not 0 <= start <= len(target):
                raise ValueError(f"offset {start} is not within {len(target)} bytes")
            payload = self.receive_datagram().bytes()
            if start + len(payload) > len(target):
                raise BufferTooShort(bytes(payload))
            target[start : start + len(payload)] = payload
            return len(payload)

    def poll(self, timeout: float | None = 0.0) -> bool:
        """Return whether there is something to receive, or the peer is gone, within `timeout` seconds (None: ever)."""
        return bool(wait([self._check_readable()], timeout))

    def receive_datagram(self, *, wait: bool = True) -> Datagram:
        """Receive a message, not unpickled yet; see `Datagram.receive`."""
        return Datagram.receive(self._check_readable(), wait=wait)

    # --- its end ---

    def close(self) -> None:
        """Close this end. Closing twice is fine."""
        sock, self._sock, self._lost = self._sock, None, None
        if sock is not None:
            sock.close()
            release_launched()  # what is still open for a child would keep the peer from seeing the end

    # Bound early: at interpreter exit the module's globals may be gone.
    def __del__(self, _release: Callable[[], None] = release_launched) -> None:
        sock = getattr(self, "_sock", None)
        if sock is not None:
            sock.close()
            _release()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # --- inside ---

    def _open(self) -> socket.socket:
        if self._sock is None:
            if self._lost is not None:
                self._lost.fileno()  # raises
            raise OSError("the connection is closed")  # as in multiprocessing
        return self._sock

    def _check_readable(self) -> socket.socket:
        sock = self._sock or self._open()
        if not self._readable:
            raise OSError("the connection is write-only")
        return sock

    def _check_writable(self) -> socket.socket:
        sock = self._sock or self._open()
        if not self._writable:
            raise OSError("the connection is read-only")
        return sock

    def _reduce(self) -> tuple[Callable[..., Self], tuple[Any, ...]]:
        shared = share_fd(OwnedFd(dup(self.fileno())))
        return _rebuild_connection, (type(self), shared, self._readable, self._writable)


def _rebuild_connection(cls: type[Connection], shared: Any, readable: bool, writable: bool) -> Any:
    self = cls.__new__(cls)
    fd = shared.claim()
    sock = None
    if isinstance(fd, OwnedFd):
        try:
            with borrow_socket(fd.fileno()):  # finds out whether it is one
                sock = _Socket(fileno=dup(fd.fileno()))
        except OSError as error:
            fd = LostFd.because(error, "the connection could not be opened")
    self._set_up(sock, None if sock else fd, readable, writable)
    return self


def Pipe(duplex: bool = True) -> tuple[Connection, Connection]:  # as in multiprocessing
    """Return two connections to each other; if not `duplex`, the first receives only and the second sends only.

    Raises OSError (EMFILE) if no descriptors are left.
    """
    left, right = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    return Connection(left.detach(), True, duplex), Connection(right.detach(), duplex, True)
