"""RangeLock and RobustLock: locks that the kernel releases when their holder dies.

They are locks of open file descriptions on ranges of bytes (F_OFD_SETLK, fcntl(2)). Such a lock belongs to a
description, and whoever has a descriptor of that has the lock: a descriptor that was passed on, or inherited by
fork, shares it. So each lock that is held has a description of its own, opened through /proc/self/fd, which a
forked child gives up at once.

The kernel does not look for deadlocks among them. Whoever takes several takes them in the same order as others.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import threading
import time
import weakref
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self, SupportsIndex

from ._backends import platform
from ._fds import LostFd, OwnedFd
from .errors import failed
from .memory import Memory, check_range
from .reduction import Shareable

# How long an acquire with a timeout sleeps before it tries again, in seconds: the kernel waits for ever, or not at all.
_MIN_INTERVAL = 0.0001
_MAX_INTERVAL = 0.004

# So many descriptions that no lock uses are kept open for a memory.
_MAX_SPARES = 8


class RangeLock(Shareable):
    """A lock on a range of bytes of a memory, between all processes that have the memory, and all threads.

    Locks whose ranges do not overlap know nothing of each other. Where they do, a shared one (of a reader) goes
    with other shared ones; an exclusive one (of a writer) goes with none. Nobody is kept from reading and
    writing without the lock.

    An object is one holder. Several threads can use it as they would a threading.Lock; if it is shared, all of
    them hold it together. When its process ends, however that happens, or it is dropped, the lock is released.
    A forked child does not hold what its parent holds.

    Pickles through multiprocessing: the receiver has a lock on the same range, and does not hold it. Takes one
    descriptor for each thread that holds it or waits for it. Needs Linux, with /proc.
    """

    __slots__ = ("_held", "_length", "_memory", "_offset", "_shared", "_to_lock", "_to_unlock")

    _held: list[OwnedFd]  # the descriptions that have the lock: one at most if it is exclusive

    def __init__(
        self, memory: Memory, offset: SupportsIndex = 0, length: SupportsIndex | None = None, *, shared: bool = False
    ) -> None:
        """Make a lock on `length` bytes of `memory` from `offset` on. It is not acquired yet.

        Args:
            memory: the lock holds a handle of its own on it.
            offset: in bytes.
            length: in bytes; None is to the end, also when the memory grows.
            shared: whether several can hold it at the same time.

        Raises ValueError if the range is empty or not within the memory.
        """
        start, count = check_range(offset, length, memory.size)
        if length is not None and count == 0:
            raise ValueError(f"cannot lock 0 bytes of memory {memory.name!r}, at offset {start}")
        self._put(memory._share(), start, 0 if length is None else count, shared)

    def _put(self, memory: Memory, offset: int, length: int, shared: bool) -> None:
        self._memory = memory
        self._offset = offset
        self._length = length  # 0: to the end, as in fcntl(2)
        self._shared = shared
        self._to_lock = platform.flock(fcntl.F_RDLCK if shared else fcntl.F_WRLCK, offset, length)
        self._to_unlock = platform.flock(fcntl.F_UNLCK, offset, length)
        self._held = []
        _locks.add(self)

    @property
    def memory(self) -> Memory:
        """A handle on the memory, which is the lock's own."""
        return self._memory

    @property
    def offset(self) -> int:
        """Where the range starts in the memory, in bytes."""
        return self._offset

    @property
    def length(self) -> int | None:
        """The length of the range in bytes; None is to the end of the memory."""
        return self._length or None

    @property
    def shared(self) -> bool:
        """Whether several can hold it at the same time."""
        return self._shared

    def __repr__(self) -> str:
        kind = "shared" if self._shared else "exclusive"
        state = "held" if self._held else "not held"
        return f"<RangeLock {kind} offset={self._offset} length={self.length} of {self._memory!r}, {state}>"

    def acquire(self, blocking: bool = True, timeout: float = -1) -> bool:
        """Acquire the lock, and return whether that was possible.

        Args:
            blocking: whether to wait until others have released theirs.
            timeout: how long to wait at most, in seconds, as precise as some milliseconds; -1 is for ever.

        Raises:
            ValueError: a timeout without blocking, or a negative one that is not -1.
            HandleLostError: the memory did not arrive.
            OSError: no descriptor is left (EMFILE); ENOTSUP where there are no such locks.
        """
        deadline = _deadline(blocking, timeout)
        owner = self._memory._open()
        fd = _open_description(owner)
        try:
            if deadline is None:
                platform.ofd_lock(fd.fileno(), self._to_lock, wait=True)
            elif not self._try_until(deadline, fd):
                _give_back(owner, fd)
                return False
        except BaseException:
            # A signal may come when the lock is held already, and whoever handles its exception has this frame.
            fd.close()
            raise
        self._held += [fd]  # a call of append() could end in a signal, too
        return True

    def _try_until(self, deadline: float, fd: OwnedFd) -> bool:
        interval = _MIN_INTERVAL
        while True:
            try:
                platform.ofd_lock(fd.fileno(), self._to_lock)
            except BlockingIOError:
                pass
            else:
                return True
            left = deadline - time.monotonic()
            if left <= 0:
                return False
            time.sleep(min(interval, left))
            interval = min(interval * 1.5, _MAX_INTERVAL)

    def release(self) -> None:
        """Release the lock. Any thread may do that. Raises RuntimeError if it is not held."""
        try:
            fd = self._held.pop()
        except IndexError:
            raise RuntimeError("cannot release a lock that is not held") from None
        try:
            platform.ofd_lock(fd.fileno(), self._to_unlock)
        except BaseException:  # a signal, as above
            fd.close()
            raise
        _give_back(self._memory._fd, fd)

    def __enter__(self) -> Self:
        self.acquire()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    def _reduce(self) -> tuple[Callable[..., Self], tuple[Any, ...]]:
        return _rebuild_range_lock, (type(self), self._memory, self._offset, self._length, self._shared)


def _rebuild_range_lock(cls: type[RangeLock], memory: Memory, offset: int, length: int, shared: bool) -> Any:
    self = cls.__new__(cls)
    self._put(memory, offset, length, shared)
    return self


def _deadline(blocking: bool, timeout: float) -> float | None:
    """Return until when to try, on the monotonic clock; None is for ever. Raises as threading.Lock does."""
    if not blocking:
        if timeout != -1:
            raise ValueError("can't specify a timeout for a non-blocking call")
        return 0.0
    if timeout == -1:
        return None
    if not timeout >= 0:  # nan is not, either
        raise ValueError(f"timeout must not be negative, found {timeout}")
    return time.monotonic() + timeout


# --- descriptions ---------------------------------------------------------------------------------

_locks: weakref.WeakSet[RangeLock] = weakref.WeakSet()

# All that are open, and st_dev and st_ino of their memory. A forked child closes its copies, which would keep locks
# that its parent has, or comes to have.
_descriptions: weakref.WeakKeyDictionary[OwnedFd, tuple[int, int]] = weakref.WeakKeyDictionary()

# Nobody forks between the opening of a description and its coming into that set. Reentrant, for handlers of signals.
_opening = threading.RLock()


def _open_description(owner: OwnedFd | LostFd) -> OwnedFd:
    number = owner.fileno()
    if not platform.can_lease():
        raise OSError(errno.ENOTSUP, "locks on ranges of memory need Linux, with /proc")
    assert isinstance(owner, OwnedFd)
    with contextlib.suppress(IndexError):  # another thread has taken the last one
        while owner.spares:
            spare = owner.spares.pop()
            if spare.fileno() >= 0:  # not one that a fork, or a signal, has closed
                return spare
    try:
        with _opening:
            fd = OwnedFd(platform.reopen(number))
            _descriptions[fd] = _identity(fd)
    except OSError as error:
        raise failed("cannot open memory for a lock", error) from None
    return fd


def _identity(fd: OwnedFd) -> tuple[int, int]:
    status = os.fstat(fd.fileno())
    return status.st_dev, status.st_ino


def _give_back(owner: OwnedFd | LostFd | None, fd: OwnedFd) -> None:
    if not isinstance(owner, OwnedFd):  # the lock's memory has been closed
        return
    if owner.spares is None:
        owner.spares = []
    if len(owner.spares) < _MAX_SPARES:
        owner.spares.append(fd)


def _start_anew() -> None:
    """In a forked child: what is held is its parent's."""
    # Closed, not dropped: a thread that was acquiring, and is not here any more, has a reference for ever.
    for fd, identity in list(_descriptions.items()):
        with contextlib.suppress(OSError):
            # Another thread may have been about to close it: then the number is nobody's, or somebody else's.
            if _identity(fd) == identity:
                fd.close()
    _descriptions.clear()
    for lock in list(_locks):
        lock._held = []
    _opening.release()


os.register_at_fork(before=_opening.acquire, after_in_parent=_opening.release, after_in_child=_start_anew)


# --- RobustLock -----------------------------------------------------------------------------------


class RobustLock(Shareable):
    """A lock that survives its holder, and tells the next one that it died.

    As a RangeLock on memory of its own: between processes and threads, released by the kernel, not held by
    forked children, to be sent anywhere (a multiprocessing.Lock can be sent to a process that is being started,
    and at no other time). What the lock protects may be half changed when its holder dies, so look:

        with lock:
            if lock.owner_died:
                repair()
            change()

    If the one who repairs dies, too, the next one is told again. An exception that leaves the block is no death:
    the lock is released, and nobody is told.
    """

    __slots__ = ("_lock", "_owner_died", "_state")

    _state: memoryview[int] | None  # the process that holds it, or held it when it died; 0 is none

    def __init__(self) -> None:
        """Make a lock. Raises OSError if there is no descriptor (EMFILE), or no memory."""
        memory = Memory(_STATE_SIZE, name="robust-lock")
        self._put(RangeLock(memory, 0, _STATE_SIZE))

    def _put(self, lock: RangeLock) -> None:
        self._lock = lock
        self._owner_died = False
        self._state = None

    @property
    def owner_died(self) -> bool:
        """Whether the holder before this one ended, or dropped the lock, without having released it.

        Of the last `acquire` of this object that succeeded; False before.
        """
        return self._owner_died

    def __repr__(self) -> str:
        return f"<RobustLock {'held' if self._lock._held else 'not held'}>"

    def acquire(self, blocking: bool = True, timeout: float = -1) -> bool:
        """Acquire the lock, and return whether that was possible. Arguments and errors are those of RangeLock."""
        if not self._lock.acquire(blocking, timeout):
            return False
        try:
            if self._state is None:
                self._state = self._lock.memory.map().view("q")
            self._owner_died = self._state[0] != 0
            self._state[0] = os.getpid()
        except BaseException:
            self._lock.release()
            raise
        return True

    def release(self) -> None:
        """Release the lock. Any thread may do that. Raises RuntimeError if it is not held."""
        if self._lock._held:
            assert self._state is not None
            self._state[0] = 0
        self._lock.release()

    def __enter__(self) -> Self:
        self.acquire()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    def _reduce(self) -> tuple[Callable[..., Self], tuple[Any, ...]]:
        return _rebuild_robust_lock, (type(self), self._lock)


_STATE_SIZE = 8


def _rebuild_robust_lock(cls: type[RobustLock], lock: RangeLock) -> Any:
    self = cls.__new__(cls)
    self._put(lock)
    return self
