"""Contexts: those of multiprocessing, with shared memory in them."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterable
from multiprocessing import context
from typing import Any, Literal, overload

from . import buffer, locks, memory
from ._backends.platform import messages_work

# As in multiprocessing, what not every process needs is imported when it is asked for.


class MemoryContext(context.BaseContext):
    """What our contexts have beyond those of multiprocessing."""

    # None depends on how processes are started. Classes, so that `ctx.Memory.from_bytes` works.
    Memory = memory.Memory
    SharedBuffer = buffer.SharedBuffer
    RobustLock = locks.RobustLock

    @property
    def SharedMemory(self) -> Any:
        """The class `mpmemory.shared_memory.SharedMemory`."""
        from .shared_memory import SharedMemory

        return SharedMemory

    @property
    def ShareableList(self) -> Any:
        """The class `mpmemory.shared_memory.ShareableList`."""
        from .shared_memory import ShareableList

        return ShareableList

    # Where messages cannot carry descriptors, or segments not be leased, these are the stock ones.

    def Pipe(self, duplex: bool = True) -> Any:
        """Return two connections to each other; see `mpmemory.connection`."""
        from .connection import Pipe

        return Pipe(duplex) if messages_work() else super().Pipe(duplex)

    def SimpleQueue(self) -> Any:
        """Return a queue without a limit to wait for; see `mpmemory.queues.SimpleQueue`."""
        from .queues import SimpleQueue

        return SimpleQueue() if messages_work() else super().SimpleQueue()

    def Queue(self, maxsize: int = 0) -> Any:
        """Return a queue for `maxsize` objects, or any number if it is not positive; see `mpmemory.queues.Queue`."""
        from .queues import Queue

        return Queue(maxsize) if messages_work() else super().Queue(maxsize)

    def JoinableQueue(self, maxsize: int = 0) -> Any:
        """Return a Queue that can be joined; see `mpmemory.queues.JoinableQueue`."""
        from .queues import JoinableQueue

        return JoinableQueue(maxsize) if messages_work() else super().JoinableQueue(maxsize)

    def Pool(
        self,
        processes: int | None = None,
        initializer: Callable[..., object] | None = None,
        initargs: Iterable[Any] = (),
        maxtasksperchild: int | None = None,
    ) -> Any:
        """Return a pool of worker processes; see `mpmemory.pool.Pool`."""
        if not messages_work():
            return super().Pool(processes, initializer, initargs, maxtasksperchild)
        from .pool import Pool

        return Pool(processes, initializer, initargs, maxtasksperchild, self.get_context())

    def get_context(self, method: str | None = None) -> Any:
        """Return this context, or ours of another start method. Raises ValueError for an unknown one."""
        return self if method is None else _concrete(method)


class ForkContext(MemoryContext, context.ForkContext):
    """Children are forks of this process."""


class SpawnContext(MemoryContext, context.SpawnContext):
    """Children are new interpreters."""


class ForkServerContext(MemoryContext, context.ForkServerContext):
    """Children are forks of a server process that is kept free of threads."""


class DefaultContext(MemoryContext, context.DefaultContext):
    """Follows the start method of multiprocessing, whenever it is set."""

    def __init__(self) -> None:
        """Nothing is kept here: the one default start method is multiprocessing's."""

    def get_context(self, method: str | None = None) -> Any:
        """Return our context of this start method, or multiprocessing's own. Raises ValueError for an unknown one."""
        return _concrete(method or self.get_start_method())

    def get_start_method(self, allow_none: bool = False) -> Any:
        """Return multiprocessing's start method; None if `allow_none`, and none is set yet."""
        return multiprocessing.get_start_method(allow_none)

    def set_start_method(self, method: str | None, force: bool = False) -> None:
        """Set multiprocessing's start method. Raises RuntimeError if it is set already, unless `force`."""
        multiprocessing.set_start_method(method, force)

    def get_all_start_methods(self) -> list[str]:
        """Return the start methods of this system, multiprocessing's default first."""
        return multiprocessing.get_all_start_methods()


_contexts: dict[str, ForkContext | SpawnContext | ForkServerContext] = {
    "fork": ForkContext(),
    "spawn": SpawnContext(),
    "forkserver": ForkServerContext(),
}

default_context = DefaultContext()
"""The context whose methods are this package's functions."""


def _concrete(method: str) -> ForkContext | SpawnContext | ForkServerContext:
    try:
        ctx = _contexts[method]
    except KeyError:
        raise ValueError(f"unknown start method {method!r}: expected one of {', '.join(_contexts)}") from None
    ctx._check_available()
    return ctx


@overload
def get_context(method: Literal["fork"]) -> ForkContext: ...
@overload
def get_context(method: Literal["spawn"]) -> SpawnContext: ...
@overload
def get_context(method: Literal["forkserver"]) -> ForkServerContext: ...
@overload
def get_context(method: str | None = None) -> ForkContext | SpawnContext | ForkServerContext: ...
def get_context(method: str | None = None) -> ForkContext | SpawnContext | ForkServerContext:
    """Return the context of a start method ("fork", "spawn", "forkserver"), or of multiprocessing's own if None.

    It is a `multiprocessing` context with `Memory` and `SharedBuffer` in it, and goes wherever such a
    one is asked for, as in `ProcessPoolExecutor(mp_context=...)`. Raises ValueError for an unknown method.
    """
    return default_context.get_context(method)  # type: ignore[no-any-return]
