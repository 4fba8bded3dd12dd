"""The way of a descriptor through multiprocessing's resource sharer, made trustworthy.

The resource sharer is a thread of the sender, listening on a Unix socket. What is pickled is its address
and a key; unpickling claims the descriptor there, once. Beyond what multiprocessing has:

- a claim never raises, and waits only while the sender lives: another process may have the sender's
  listening socket open, too, so that after the sender's death a connection is made, and never answered;
- a process that exits normally first waits until what it sent has been claimed;
- a claimant that stalls or dies in the middle stops nobody else;
- a forked child starts anew, also one of a plain `os.fork()`.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import itertools
import os
import signal
import socket
import struct
import threading
import time
from multiprocessing import connection, process, reduction, util
from multiprocessing.resource_sharer import _ResourceSharer  # type: ignore[attr-defined]
from typing import ClassVar

from ._backends import platform
from ._fds import LostFd, OwnedFd, borrow_socket, recv_fd, send_fds
from .errors import failed

#: A claim gives up after so many seconds, if the sender lives but does not answer.
CLAIM_TIMEOUT = 60.0

#: A claimant that says nothing for so many seconds is sent away.
CLAIMANT_TIMEOUT = 5

#: A process that exits waits so many seconds, at most, until what it sent has been claimed.
EXIT_TIMEOUT = 10.0

# How often an exiting process looks whether its parent still lives, in seconds.
_PARENT_INTERVAL = 0.1

# When a process exits, multiprocessing first runs the finalizers from 0 on, next joins the children,
# then runs the rest: at -5 queues join the threads that pickle what was put, at -100 its folder goes.
_AWAIT_PRIORITY = -50
_UNLINK_PRIORITY = -60

# Tokens of what this process has given to the resource sharer and nobody has claimed yet. set.discard
# is atomic: the sharer's thread uses it, and a forked child, where a lock might never be released.
_unclaimed: set[int] = set()
_tokens = itertools.count()

# Set by the sharer's thread at each claim, for a process that is exiting. Not a pipe: no descriptor may be left.
_claim_notice: threading.Event | None = None


class _Listener:
    """What the resource sharer needs of `multiprocessing.connection.Listener`, but reachable to the end.

    That one gives up its name as the first thing when its process exits, so that children which are
    joined next, or whoever reads what a queue's thread is still writing, would claim in vain.

    The name is in the abstract namespace where there is one (unix(7)): nothing of it is left when the
    process is killed, as a Pool kills its workers. As in a folder of one's own, only processes of the
    same user are answered; and all have to know the authkey.
    """

    def __init__(self) -> None:
        abstract = platform.ABSTRACT_SOCKETS
        self.address: str = (
            f"\0mpmemory-{os.urandom(16).hex()}" if abstract else connection.arbitrary_address("AF_UNIX")  # type: ignore[attr-defined]
        )
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._socket.setblocking(True)
            self._socket.bind(self.address)
            self._socket.listen(128)
        except BaseException:
            self._socket.close()
            raise
        self._unlink = (
            None if abstract else util.Finalize(self, os.unlink, (self.address,), exitpriority=_UNLINK_PRIORITY)
        )

    def accept(self) -> connection.Connection:
        sock, _ = self._socket.accept()
        sock.setblocking(True)
        # One claimant is served after the other: none may keep the rest waiting for long.
        _limit(sock, socket.SO_RCVTIMEO, CLAIMANT_TIMEOUT)
        uid = platform.peer_uid(sock)
        conn = connection.Connection(sock.detach())
        try:
            if uid not in {None, 0, os.geteuid()}:
                raise PermissionError(errno.EPERM, f"a process of user {uid} tried to claim memory")
            authkey = process.current_process().authkey
            connection.deliver_challenge(conn, authkey)
            connection.answer_challenge(conn, authkey)
        except BaseException:
            conn.close()
            raise
        return conn

    def close(self) -> None:
        self._socket.close()
        if self._unlink is not None:
            self._unlink()  # does nothing in a forked child


class _Sharer(_ResourceSharer):  # type: ignore[misc]
    """The resource sharer of multiprocessing, on our listener, and with a thread that no claimant can stop."""

    def _start(self) -> None:
        import hmac  # noqa: F401  # now: multiprocessing imports it at a claim, when no descriptor may be left

        self._listener = listener = _Listener()
        thread = threading.Thread(target=self._serve, name="mpmemory-sharer", daemon=True)
        try:
            thread.start()
        except BaseException:
            listener.close()
            raise
        self._thread = thread
        self._address = listener.address  # by this the base class tells that it is running

    def _serve(self) -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())  # they are the main thread's
        while True:
            try:
                if not self._answer():
                    return
            except Exception as error:
                # The claimant went away, is none of ours, or asks for what was claimed before. It sees the
                # connection end; who gave the handle away could do nothing about it.
                util.info("a claim of shared memory failed: %r", error)
                if isinstance(error, OSError) and error.errno in {errno.EMFILE, errno.ENFILE}:
                    time.sleep(0.02)  # the claim is still waiting: do not spin until a descriptor is free

    def _answer(self) -> bool:
        """Serve one claimant, and return whether to go on. Apart, so that nothing of it is held till the next."""
        with self._listener.accept() as conn:
            request = conn.recv()
            if request is None:  # from stop()
                return False
            key, pid = request
            send, close = self._cache.pop(key)
            try:
                send(conn, pid)
            finally:
                close()
        return True


_sharer = _Sharer()


class SharerFd:
    """A descriptor that the sender's resource sharer hands out."""

    def __init__(self, address: str, key: int, sender: int) -> None:
        self._address = address
        self._key = key
        self._sender = sender

    def claim(self) -> OwnedFd | LostFd:
        try:
            return self._fetch()
        except (ConnectionError, EOFError, FileNotFoundError, ProcessLookupError) as error:
            return LostFd.because(
                error,
                f"the sender (pid {self._sender}) is gone, is of another user, or the handle was claimed before. "
                "A process that is killed, "
                f"or waits in vain for {EXIT_TIMEOUT:.0f} s when it exits, takes along what nobody has received: "
                "receive handles before you join their sender",
            )
        except Exception as error:
            return LostFd.because(error, f"the handle from pid {self._sender} could not be received")

    def _fetch(self) -> OwnedFd:
        """Do as `multiprocessing.resource_sharer.DupFd.detach`, but hang on nobody, and keep the fd close-on-exec."""
        deadline = time.monotonic() + CLAIM_TIMEOUT
        with platform.ProcessWatch(self._sender) as watch:
            sock = _connect(self._address, watch, deadline)
            with _ClaimConnection(sock.detach(), watch, deadline) as claim:
                authkey = process.current_process().authkey
                connection.answer_challenge(claim, authkey)
                connection.deliver_challenge(claim, authkey)
                claim.send((self._key, os.getpid()))
                watch.wait_readable(claim.fileno(), deadline)
                with borrow_socket(claim.fileno()) as sock:
                    fd = recv_fd(sock)
                    if reduction.ACKNOWLEDGE:  # macOS: send_handle waits for it
                        sock.send(b"A")
                return fd


class _ClaimConnection(connection.Connection):
    """A connection that waits for a message only while its peer lives."""

    def __init__(self, handle: int, watch: platform.ProcessWatch, deadline: float) -> None:
        super().__init__(handle)
        self._watch = watch
        self._deadline = deadline

    def recv_bytes(self, maxlength: int | None = None) -> bytes:
        self._watch.wait_readable(self.fileno(), self._deadline)
        return super().recv_bytes(maxlength)


def _connect(address: str, watch: platform.ProcessWatch, deadline: float) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.setblocking(True)
        # connect() blocks while the listener's queue is full. With a time limit in the kernel it is
        # EAGAIN after that time (unix(7)); with one of Python's, the socket would not wait at all.
        _limit(sock, socket.SO_SNDTIMEO, 1)
        while True:
            try:
                sock.connect(address)
            except BlockingIOError:
                watch.wait([], deadline)
            else:
                _limit(sock, socket.SO_SNDTIMEO, 0)
                return sock
    except BaseException:
        sock.close()
        raise


def _limit(sock: socket.socket, option: int, seconds: int) -> None:
    """Set how long the kernel lets a call on the blocking socket wait (socket(7)); 0 is without limit."""
    sock.setsockopt(socket.SOL_SOCKET, option, struct.pack("@ll", seconds, 0))  # struct timeval


class ProcFd:
    """A descriptor that the receiver opens anew in /proc: for a sender that can start no thread any more."""

    # What was given away so stays open to the end of the process, which is near.
    _kept: ClassVar[list[OwnedFd]] = []

    def __init__(self, fd: OwnedFd) -> None:
        self._kept.append(fd)
        number = fd.fileno()
        status = os.fstat(number)
        self._path = f"/proc/{os.getpid()}/fd/{number}"
        self._identity = status.st_dev, status.st_ino
        self._mode = fcntl.fcntl(number, fcntl.F_GETFL) & os.O_ACCMODE

    def claim(self) -> OwnedFd | LostFd:
        what = f"the sender of {self._path} is gone, or did not wait"
        try:
            fd = OwnedFd(os.open(self._path, self._mode | os.O_CLOEXEC))
            status = os.fstat(fd.fileno())
        except OSError as error:
            return LostFd.because(error, what)
        if (status.st_dev, status.st_ino) != self._identity:  # the number was used again
            return LostFd.because(FileNotFoundError(errno.ENOENT, "another file has its place"), what)
        return fd


def share_by_sharer(fd: OwnedFd) -> SharerFd | ProcFd:
    """Give `fd` to this process's resource sharer, and return what the receiver claims it with.

    Raises OSError, or RuntimeError if no thread can be started.
    """
    token = next(_tokens)

    # These hold `fd` itself, not a duplicate: a thousand messages with one handle take one descriptor.
    def send(conn: connection.Connection, pid: int) -> None:
        # Not reduction.send_handle: that needs one more descriptor, and there may be none left.
        with borrow_socket(conn.fileno()) as sock:
            send_fds(sock, b"\x01", [fd.fileno()])
            if reduction.ACKNOWLEDGE and sock.recv(1) != b"A":
                raise RuntimeError("the claimant did not acknowledge the descriptor")

    _unclaimed.add(token)
    try:
        address, key = _sharer.register(send, functools.partial(_claimed, token))
    except BaseException as error:
        _unclaimed.discard(token)
        if isinstance(error, OSError):
            raise failed("cannot start the resource sharer that hands out memory", error) from None
        if isinstance(error, RuntimeError) and util.is_exiting():
            # From Python 3.12 on no thread can be started when the main program has ended, but its queues'
            # threads still pickle what it put last; and children, which read it, will be joined.
            return ProcFd(fd)
        raise
    return SharerFd(address, key, os.getpid())


def _claimed(token: int) -> None:
    """Note that a handle was claimed, or is no longer ours to give: called by the sharer when it closes it."""
    _unclaimed.discard(token)
    if _claim_notice is not None:
        _claim_notice.set()


def _await_claims() -> None:
    """Wait until all that was sent has been claimed, for `EXIT_TIMEOUT` at most, and while the parent lives.

    A process without a multiprocessing parent does not wait: by then its children have been joined,
    so that hardly anybody is left who could claim.
    """
    parent = process.parent_process()
    if parent is None or parent.pid is None:
        return
    # Before Python 3.13 multiprocessing joins the other threads only after this, and they may still send.
    # It will join this one, too.
    others = [each for each in threading.enumerate() if not each.daemon and each is not threading.current_thread()]
    if others:
        threading.Thread(target=_await, args=(parent.pid, others)).start()
    elif _unclaimed:
        _await(parent.pid, [])


def _await(parent: int, threads: list[threading.Thread]) -> None:
    global _claim_notice
    for thread in threads:
        thread.join()
    deadline = time.monotonic() + EXIT_TIMEOUT
    _claim_notice = notice = threading.Event()
    with contextlib.suppress(ProcessLookupError, TimeoutError), platform.ProcessWatch(parent) as watch:
        while _unclaimed:
            notice.clear()
            watch.wait([], deadline)
            if _unclaimed:
                notice.wait(_PARENT_INTERVAL)


def _register_exit(_: object = None) -> None:
    util.Finalize(None, _await_claims, exitpriority=_AWAIT_PRIORITY)


# Early, since a finalizer that is registered while finalizers run is forgotten; and again in each
# child that multiprocessing forks, which starts with none.
_register_exit()
util.register_after_fork(_register_exit, _register_exit)


def _after_fork_in_child() -> None:
    """Start anew, whoever forked: what was given away is the parent's to give, and its locks may be held for ever."""
    global _claim_notice
    _claim_notice = None
    _sharer._afterfork()
    _unclaimed.clear()  # also what was being given away, or claimed, just then
    ProcFd._kept.clear()


os.register_at_fork(after_in_child=_after_fork_in_child)
