"""How a handle pickles: its file descriptor travels, by the way that fits who is pickling.

=====================================  =============================================================
being pickled                          the descriptor travels
=====================================  =============================================================
in a message of our Connection         inside the message (SCM_RIGHTS)
for a child that is being spawned      by inheritance (`multiprocessing.reduction.DupFd`); from
                                       `FORKSERVER_FDS` on, by the resource sharer
by any stock multiprocessing object    through `multiprocessing.resource_sharer`: a thread of the
                                       sender hands it to whoever unpickles
by plain pickle, or copy               not at all: TypeError
=====================================  =============================================================

Unpickling never raises. `multiprocessing.pool` ends its result thread at an OSError from unpickling, and
every later `get()` hangs. A descriptor that cannot be had gives a lost handle instead, which raises
HandleLostError when it is used.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable, Sequence
from multiprocessing import context, reduction
from typing import Any, Protocol, Self

from ._fds import LostFd, OwnedFd, dup
from ._sharer import share_by_sharer

#: So many descriptors one forkserver child inherits, at most; the rest go through the resource sharer.
#: 253 fit one message (unix(7)), 4 are the fork server's own; sockets and pipes of the user need some.
FORKSERVER_FDS = 200


class Popen(Protocol):
    """The part of `multiprocessing.popen_spawn_posix.Popen` and `popen_forkserver.Popen` used here."""

    method: str
    finalizer: object | None  # None until the child has been launched
    _fds: list[int]


class Shareable:
    """Base of what multiprocessing pickles as a descriptor, and nobody else.

    Subclasses define `_reduce` and pickle as their own class; with a `__reduce__` next to it, they pickle
    outside of multiprocessing, too. What a subclass of theirs adds to `__dict__` travels along;
    `__getstate__` and `__setstate__` have their usual meaning.
    """

    __slots__ = ("__weakref__",)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        # A pickler's dispatch table goes by exact type. A subclass with a reduction of its own keeps it.
        ours: Any = next(base for base in cls.__mro__ if "_reduce" in vars(base))
        if cls.__reduce__ is ours.__reduce__ and cls.__reduce_ex__ is object.__reduce_ex__:
            reduction.ForkingPickler.register(cls, _reduce_shareable)

    def _reduce(self) -> tuple[Callable[..., Self], tuple[Any, ...]]:
        """Return a function that rebuilds this object, and its arguments. It must never raise."""
        raise NotImplementedError

    def __getstate__(self) -> object:
        return getattr(self, "__dict__", None) or None

    def __reduce__(self) -> str | tuple[Any, ...]:
        kind = type(self).__name__
        raise TypeError(
            f"cannot pickle or copy a {kind} by itself: its file descriptor travels only through multiprocessing. "
            f"Pass the {kind} as an argument or result of a Process, Pool or ProcessPoolExecutor, put it into a "
            "Queue or Pipe, or use Memory.send() on a Unix socket; Memory.dup() gives a second handle here"
        )


def _reduce_shareable(obj: Shareable) -> tuple[Any, ...]:
    return (*obj._reduce(), obj.__getstate__())


class SharedFd(Protocol):
    """A descriptor under way: pickled by the sender, claimed once by the receiver."""

    def claim(self) -> OwnedFd | LostFd:
        """Return the descriptor, or what stands for a lost one. Never raises an Exception."""


def share_fd(fd: OwnedFd | LostFd) -> SharedFd:
    """Return what stands for `fd` in the pickle that this thread is making.

    Raises:
        HandleLostError: `fd` is that of a lost handle.
        OSError: no descriptor is left.
        RuntimeError: the thread of the resource sharer cannot be started.
    """
    if isinstance(fd, LostFd):
        fd.fileno()  # raises
    if in_message.outgoing is not None:
        return MessageFd.add(fd)
    popen: Any = context.get_spawning_popen()
    if popen is None or (popen.method == "forkserver" and len(popen._fds) >= FORKSERVER_FDS):
        return share_by_sharer(fd)
    return _InheritedFd(popen, fd)


# --- inside a message -----------------------------------------------------------------------------


class InMessage(threading.local):
    """The descriptors of the message that this thread is pickling or unpickling."""

    outgoing: dict[OwnedFd, int] | None = None  # with their places
    incoming: Sequence[OwnedFd] = ()


in_message = InMessage()


class MessageFd:
    """A descriptor that travels inside the message which is being pickled; the same one only once."""

    def __init__(self, index: int) -> None:
        self._index = index

    @classmethod
    def add(cls, fd: OwnedFd) -> MessageFd:
        """Have `fd` travel in the message that this thread is pickling."""
        outgoing = in_message.outgoing
        assert outgoing is not None
        return cls(outgoing.setdefault(fd, len(outgoing)))

    def __reduce__(self) -> tuple[Any, ...]:  # half the time of what object does
        return MessageFd, (self._index,)

    def claim(self) -> OwnedFd | LostFd:
        try:
            return in_message.incoming[self._index]
        except IndexError:
            error = ValueError(f"expected descriptor {self._index} of {len(in_message.incoming)}")
            return LostFd.because(error, "the handle was unpickled apart from the message it travelled in")

    def detach(self) -> int:
        """Return a descriptor for whoever closes it himself, as `multiprocessing.reduction.DupFd` gives."""
        return dup(self.claim().fileno())


# --- by inheritance -------------------------------------------------------------------------------

# The duplicates that a launch is passing on must stay open until the child has been started, and
# multiprocessing tells nobody when that is. So they are looked through whenever a handle is shared
# or closed, and go with their Popen at the latest. A plain dict, since whether it is empty is asked often.
_launching: dict[weakref.ref[Popen], list[OwnedFd]] = {}


def _forget(popen: weakref.ref[Popen]) -> None:
    _launching.pop(popen, None)


class _InheritedFd:
    """A descriptor that the child being spawned inherits."""

    def __init__(self, popen: Popen, fd: OwnedFd) -> None:
        release_launched()
        # A number of its own for each handle: spawn passes on the number itself, where the same one
        # twice is refused (python/cpython#87308), and two owners in the child would close it twice.
        dup = fd.dup()
        _launching.setdefault(weakref.ref(popen, _forget), []).append(dup)
        self._wrapper = reduction.DupFd(dup.fileno())

    def claim(self) -> OwnedFd | LostFd:
        try:
            number = self._wrapper.detach()
            os.set_inheritable(number, False)
        except Exception as error:
            return LostFd.because(error, "the memory was not inherited")
        return OwnedFd(number)


def release_launched(launching: dict[weakref.ref[Popen], list[OwnedFd]] = _launching) -> None:
    """Close the duplicates made for children that have been started since."""
    if launching:
        for reference in list(launching):  # made atomically: any thread may be spawning
            popen = reference()
            if popen is not None and popen.finalizer is not None:
                launching.pop(reference, None)


# The child's copies: a fork may come in the middle of another thread's launch.
os.register_at_fork(after_in_child=_launching.clear)
