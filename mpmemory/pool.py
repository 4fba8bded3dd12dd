"""Pool: the API of `multiprocessing.pool.Pool`, on channels that carry descriptors and big payloads.

A worker that dies takes its task along, which fails, and nothing else. See `_scheduler` for how.
"""

from __future__ import annotations

import multiprocessing
import os
import warnings
from collections import deque
from collections.abc import Callable, Generator, Iterable
from multiprocessing import pool, util
from multiprocessing.pool import (  # type: ignore[attr-defined]
    INIT,
    RUN,
    IMapIterator,
    IMapUnorderedIterator,
    _helper_reraises_exception,
    mapstar,
)
from multiprocessing.pool import ThreadPool as ThreadPool  # so that this module stands in for multiprocessing.pool
from multiprocessing.process import BaseProcess
from types import GenericAlias, TracebackType
from typing import TYPE_CHECKING, Any, TypeVar

from . import _worker_main
from ._scheduler import Scheduler
from ._window import Window
from ._worker_main import Lifeline
from .connection import Connection

_S = TypeVar("_S")
_T = TypeVar("_T")

if TYPE_CHECKING:

    class _Iterator(IMapIterator[_T]): ...

else:

    class _Iterator(IMapIterator):
        __class_getitem__ = classmethod(GenericAlias)


BUFFER_PER_WORKER = 64
"""By default an imap is ahead of who takes its results by so many tasks for each worker."""


class Pool(pool.Pool):
    """A pool of worker processes, with the API of `multiprocessing.Pool`.

    Different from that one:

    - A worker that dies fails the task it was running, with WorkerLostError, and is replaced. All other
      tasks are done, and the pool goes on.
    - Handles, buffers and big arrays travel beside the pickle, as in a Connection. Arguments are pickled
      when the task is submitted; do not change big arrays until it is done.
    - `imap` and `imap_unordered` read their input only as far as results are taken: see `buffersize`.
    - What is not done when the pool is terminated, or breaks, fails with PoolError instead of never ending.
    - Any exception of a task is its result, but SystemExit: that ends the worker.

    Can be used from several threads, but not from a forked child.
    """

    def __init__(
        self,
        processes: int | None = None,
        initializer: Callable[..., object] | None = None,
        initargs: Iterable[Any] = (),
        maxtasksperchild: int | None = None,
        context: Any = None,
    ) -> None:
        """Start `processes` workers, as many as there are CPUs if None, by `context` (the default one if None).

        Each calls `initializer(*initargs)` first, and is replaced after `maxtasksperchild` tasks if that
        is given. Raises ValueError or TypeError for other arguments, and what starting a process raises.
        """
        if processes is None:
            count = getattr(os, "process_cpu_count", os.cpu_count)
            processes = count() or 1
        if processes < 1:
            raise ValueError(f"expected at least 1 process, found {processes}")
        tasks: object = maxtasksperchild  # whatever a program passes
        if tasks is not None and (not isinstance(tasks, int) or tasks <= 0):
            raise ValueError(f"maxtasksperchild must be a positive int or None, found {maxtasksperchild!r}")
        if initializer is not None and not callable(initializer):
            raise TypeError(f"initializer must be callable, found {initializer!r}")
        ctx = context or multiprocessing.get_context()
        create = self.Process

        def start(channel: Connection, lifeline: Lifeline) -> BaseProcess:
            arguments = channel, lifeline, initializer, initargs
            process = create(ctx, target=_worker_main.run, args=arguments)
            process.name = process.name.replace("Process", "PoolWorker")
            process.daemon = True
            process.start()
            return process

        self._scheduler = scheduler = Scheduler(start, processes, maxtasksperchild)
        # What multiprocessing's own methods work with, and programs look at.
        self._ctx = ctx
        self._processes = processes
        self._pool = scheduler.processes
        self._cache = scheduler.results
        self._taskqueue = scheduler
        self._terminate = util.Finalize(self, scheduler.terminate, exitpriority=15)

    @property
    def _state(self) -> str:
        scheduler = getattr(self, "_scheduler", None)
        return INIT if scheduler is None else scheduler.state

    def __del__(self, _warn: Callable[..., None] = warnings.warn, _run: str = RUN) -> None:
        if self._state == _run and self._scheduler.is_of_this_process():
            _warn(f"unclosed running multiprocessing pool {self!r}", ResourceWarning, source=self)

    def _check_owner(self) -> None:
        if not self._scheduler.is_of_this_process():
            raise ValueError("the pool belongs to another process: this one was forked from it")

    def _check_running(self) -> None:
        self._check_owner()
        if (error := self._scheduler.broken()) is not None:
            raise error
        if self._state != RUN:
            raise ValueError("Pool not running")

    def imap(
        self,
        func: Callable[[_S], _T],
        iterable: Iterable[_S],
        chunksize: int | None = 1,
        *,
        buffersize: int | None = None,
    ) -> Results[_T]:
        """Return an iterator over `func(item)` for each item, in their order.

        The iterable is read by a thread, which is ahead of who takes the results by `buffersize` tasks
        of `chunksize` items (64 tasks for each worker if None): endless ones work. That limit ends with
        `close`. What is never iterated over is done all the same; what is dropped halfway is not.

        Raises ValueError for other sizes than positive ones, or if the pool is not running.
        """
        return self._imap(IMapIterator, func, iterable, chunksize, buffersize)

    def imap_unordered(
        self,
        func: Callable[[_S], _T],
        iterable: Iterable[_S],
        chunksize: int | None = 1,
        *,
        buffersize: int | None = None,
    ) -> Results[_T]:
        """As `imap`, with results as they come."""
        return self._imap(IMapUnorderedIterator, func, iterable, chunksize, buffersize)

    def _imap(
        self,
        kind: type[IMapIterator[Any]],
        func: Callable[[_S], _T],
        iterable: Iterable[_S],
        chunksize: int | None,
        buffersize: int | None,
    ) -> Results[_T]:
        self._check_running()
        if chunksize is None:
            chunksize = 1
        elif chunksize < 1:
            raise ValueError(f"Chunksize must be 1+, not {chunksize!r}")
        if buffersize is None:
            buffersize = BUFFER_PER_WORKER * self._processes
        elif buffersize < 1:
            raise ValueError(f"buffersize must be 1+, not {buffersize!r}")
        iterator: Any = kind(self)
        window = Window(iterator, buffersize)
        job = iterator._job
        if chunksize == 1:
            tasks = self._guarded_task_generation(job, func, iterable)
        else:
            chunks = pool.Pool._get_tasks(func, iterable, chunksize)  # type: ignore[attr-defined]
            tasks = self._guarded_task_generation(job, mapstar, chunks)
        self._scheduler.feed(tasks, iterator._set_length, window)
        return Results(self._scheduler, iterator, window, chunked=chunksize > 1)

    def _guarded_task_generation(self, result_job: int, func: Any, iterable: Iterable[Any]) -> Generator[Any]:
        """As multiprocessing's, for any error of the iterable."""
        index = -1
        try:
            for index, item in enumerate(iterable):
                yield result_job, index, func, (item,), {}
        except GeneratorExit:
            raise
        except BaseException as error:
            yield result_job, index + 1, _helper_reraises_exception, (error,), {}

    def close(self) -> None:
        """Take no more tasks. The workers leave when all are done."""
        if self._scheduler.is_of_this_process():
            self._scheduler.close()

    def terminate(self) -> None:
        """End the workers now; what is not done fails with PoolError.

        They get SIGTERM, and SIGKILL a second later.
        """
        if self._scheduler.is_of_this_process():
            self._scheduler.terminate()  # not by the finalizer, which would do nothing after an interrupt
            self._terminate.cancel()

    def join(self) -> None:
        """Wait for the workers to leave. Raises ValueError unless `close` or `terminate` was called before."""
        self._check_owner()
        if self._state == RUN:
            raise ValueError("Pool is still running")
        self._scheduler.join()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.terminate()


class Results(_Iterator[_T]):
    """The results of an imap, as they are taken."""

    def __init__(self, scheduler: Scheduler, iterator: Any, window: Window, *, chunked: bool) -> None:
        self._scheduler = scheduler
        self._iterator = iterator
        self._window = window
        self._chunked = chunked
        self._items: deque[Any] = deque()

    def next(self, timeout: float | None = None) -> _T:
        """Return the next result, or raise the task's exception.

        Raises `multiprocessing.TimeoutError` if there is none within `timeout` seconds.
        """
        if self._items:
            return self._items.popleft()  # type: ignore[no-any-return]
        window = self._window
        window.started = True
        try:
            item = self._iterator.next(timeout)
        finally:
            if window.waited_for and window.is_half_open():
                window.waited_for = False
                self._scheduler.notify_feeders()
        if not self._chunked:
            return item  # type: ignore[no-any-return]
        self._items.extend(item)
        return self.next(timeout)

    __next__ = next

    def __del__(self) -> None:
        self._window.abandoned = True
        self._scheduler.notify_feeders()
