"""File descriptors: who owns one, and how one travels over a Unix socket."""

from __future__ import annotations

import array
import contextlib
import errno
import os
import resource
import socket
from collections.abc import Callable, Iterator, Sequence
from typing import NoReturn

from ._backends.platform import MSG_CMSG_CLOEXEC
from .errors import HandleLostError, failed

# Linux lets 253 descriptors travel in one message (SCM_MAX_FD, unix(7)).
MAX_FDS = 253

# Plain ints: comparing members of an enum.IntFlag takes longer than receiving.
_MSG_CTRUNC = int(socket.MSG_CTRUNC)
_CONTROL_SIZE = socket.CMSG_SPACE(MAX_FDS * array.array("i").itemsize)
_SCM_PIDFD = 4  # Linux 6.5, unix(7): a descriptor of the sending process; not in Python's socket module
_INT_SIZE = array.array("i").itemsize


class OwnedFd:
    """A file descriptor with one owner: closed when this object goes.

    Handles, mappings and messages under way that need the same descriptor share this object, so that
    none can close it under another (a number that is closed too early is soon somebody else's file).
    That makes it safe to use from several threads, too: who is using it holds it.

    After fork the child has an object and a descriptor of its own.
    """

    __slots__ = ("__weakref__", "_number", "spares")

    spares: list[OwnedFd] | None  # other descriptions of the file that no lock uses now; see `mpmemory.locks`

    def __init__(self, number: int) -> None:
        """Take over `number`, which nobody else may close from now on."""
        self._number = number
        self.spares = None

    def fileno(self) -> int:
        return self._number

    def dup(self) -> OwnedFd:
        """Return a new, close-on-exec descriptor of the same file description. Raises OSError."""
        return OwnedFd(dup(self._number))

    def close(self) -> None:
        """Close it now, whoever else has this object; its number is -1 from then on."""
        number, self._number = self._number, -1
        if number >= 0:
            os.close(number)

    # Bound early: at interpreter exit the module's globals may be gone.
    def __del__(self, _close: Callable[[int], None] = os.close) -> None:
        if (number := getattr(self, "_number", -1)) >= 0:  # a signal may come before it is set
            _close(number)


class LostFd:
    """Stands where an OwnedFd should be: the descriptor did not arrive. Using it raises HandleLostError."""

    __slots__ = ("_errno", "_reason")

    def __init__(self, error: HandleLostError) -> None:
        self._errno = error.errno
        self._reason = error.strerror

    @classmethod
    def because(cls, error: Exception, what: str) -> LostFd:
        """Return one for which `error` is the reason; `what` says what it means."""
        if isinstance(error, OSError):
            number, detail = error.errno or errno.ESTALE, error.strerror or str(error)
            if number == errno.EPIPE:
                # The thread of an executor's queue ends silently if pickling a lost handle raises just this.
                number = errno.ESTALE
        else:
            number, detail = errno.ESTALE, str(error) or type(error).__name__
        return cls(HandleLostError(number, f"{what}: {detail}"))

    def fileno(self) -> NoReturn:
        # A new one at each use: a raised exception collects its traceback.
        raise HandleLostError(self._errno, self._reason)

    def dup(self) -> NoReturn:
        self.fileno()


def budget() -> int:
    """Return how many descriptors one purpose may take in this process: a quarter of its limit, and 256 at most."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return 256 if soft == resource.RLIM_INFINITY else min(256, soft // 4)


def dup(number: int) -> int:
    """Return a new, close-on-exec descriptor of the file description of `number`. Raises OSError."""
    try:
        return os.dup(number)
    except OSError as error:
        raise failed(f"cannot duplicate file descriptor {number}", error) from None


def send_fds(sock: socket.socket, data: bytes, fds: Sequence[int], flags: int = 0) -> None:
    """Send `fds` with `data`, which must not be empty, over a Unix socket (SCM_RIGHTS, unix(7)).

    Keep `data` to one byte on a stream socket: only the first byte is sure to go with the descriptors.
    Raises OSError.
    """
    sock.sendmsg([data], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))], flags)


def recv_message(sock: socket.socket, size: int, flags: int = 0) -> tuple[bytes, list[int], bool]:
    """Receive one message of up to `size` bytes and its descriptors, which the caller then owns.

    They are close-on-exec. At the end of the stream all parts are empty. The last part tells whether
    descriptors are missing because this process is at its limit; those that came are then closed.
    Raises OSError as recvmsg(2).
    """
    # Room for as many as can come, so that a truncation has one cause only.
    data, control, found, _ = sock.recvmsg(size, _CONTROL_SIZE, flags | MSG_CMSG_CLOEXEC)
    truncated = bool(found & _MSG_CTRUNC)
    if not control:
        return data, [], truncated
    fds = array.array("i")
    for level, kind, content in control:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds.frombytes(content[: len(content) - len(content) % _INT_SIZE])
        elif level == socket.SOL_SOCKET and kind == _SCM_PIDFD:
            close_all(array.array("i", content))  # nobody here asks for it; a socket from elsewhere may be set to
    if truncated:
        close_all(fds)
        return data, [], True
    if not MSG_CMSG_CLOEXEC:
        for fd in fds:
            os.set_inheritable(fd, False)
    return data, list(fds), False


def recv_fds(sock: socket.socket, size: int, flags: int = 0) -> tuple[bytes, list[int]]:
    """As `recv_message`, but raise OSError (EMFILE) if descriptors are missing."""
    data, fds, truncated = recv_message(sock, size, flags)
    if truncated:
        raise truncation()
    return data, fds


def truncation() -> OSError:
    """Return the error for descriptors that could not be received."""
    return failed("cannot receive a file descriptor", OSError(errno.EMFILE, ""))


def recv_fd(sock: socket.socket) -> OwnedFd:
    """Receive one descriptor that travels with one byte of data, whatever that byte is.

    The form is that of `multiprocessing.reduction.send_handle` and of Ruby's `UNIXSocket#send_io`.

    Raises:
        EOFError: the peer has closed the socket.
        ValueError: a message came without a descriptor, or with more than one (they are closed).
        OSError: as `recv_fds`.
    """
    data, fds = recv_fds(sock, 1)
    if len(fds) == 1:
        return OwnedFd(fds[0])
    close_all(fds)
    if not data and not fds:
        raise EOFError("the peer closed the socket before it sent a file descriptor")
    raise ValueError(f"expected one message with one file descriptor, found {len(fds)} descriptors with {data!r}")


@contextlib.contextmanager
def borrow_socket(fd: int) -> Iterator[socket.socket]:
    """Give a socket object for `fd`, which stays its owner's. Raises OSError(ENOTSOCK) if it is none."""
    blocking = os.get_blocking(fd)
    sock = socket.socket(fileno=fd)
    try:
        sock.setblocking(blocking)  # socket.setdefaulttimeout() may have made it non-blocking just now
        yield sock
    finally:
        sock.detach()


def close_all(fds: Sequence[int]) -> None:
    for fd in fds:
        os.close(fd)
