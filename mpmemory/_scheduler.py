"""Who runs which task: the inside of a Pool.

Each worker has a channel of its own, a SEQPACKET socket pair of which the scheduler keeps both ends. A few
tasks are sent ahead, so that a worker need not wait for the next one; what a worker has not read yet can be
received at its end and sent to another, with everything that belongs to it.

A worker answers each task with one datagram. So when it dies, what it has neither answered nor left unread
is what it was running.

Tasks are sent by whoever submits them, so that no thread has to wake up first. One thread receives results,
calls back, watches, starts and buries workers. Nothing that is shared between processes is waited for.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import select
import sys
import threading
import traceback
import weakref
from collections import deque
from collections.abc import Callable, Iterable
from multiprocessing.pool import (  # type: ignore[attr-defined]
    CLOSE,
    RUN,
    TERMINATE,
    IMapIterator,
    MapResult,
    _helper_reraises_exception,
)
from multiprocessing.process import BaseProcess
from typing import Any

from ._fds import OwnedFd
from ._messages import Datagram, Message
from ._window import Window
from ._worker_main import ABOUT_WORKER, Lifeline
from ._workers import BIG, FEW, FULL, GRACE, StartWorker, Task, Worker, kill
from .errors import PoolError, WorkerLostError, describe_exit

#: Feeders wait while so many tasks wait for a worker with room.
PENDING = 64

#: So many workers that end before they are ready, one after the other, break the pool; not less than it has.
MAX_FAILED_STARTS = 3

# How often to try again to start a worker, and to send when no room is to be expected, in seconds.
_RETRY_STARTING = 0.5
_RETRY_SENDING = 0.01

# After CLOSE: all is done, and the workers are leaving.
PARTING = "PARTING"


class Scheduler:
    """Runs the tasks of one pool. Methods may be called in any thread, unless they say otherwise."""

    def __init__(self, start: StartWorker, processes: int, tasks_per_worker: int | None) -> None:
        """Start the workers. Raises what starting a process raises."""
        self.results: dict[int, Any] = {}  # by job: those not complete
        self.processes: list[BaseProcess] = []
        self.error: tuple[str, BaseException | None] | None = None  # why it is broken
        self._start = start
        self._tasks_per_worker = tasks_per_worker
        self._state = RUN
        # Reentrant, since a pool that is collected while the lock is held terminates.
        self._lock = threading.RLock()
        self._room = threading.Condition(self._lock)  # for feeders
        self._room_wanted = False  # a feeder waits until less is pending
        self._pending: deque[Task] = deque()  # no worker had room
        self._tags = itertools.count(ABOUT_WORKER + 1)
        self._workers: list[Worker] = []
        self._starting: Worker | None = None
        self._failed: deque[tuple[int, int | None, BaseException]] = deque()
        self._failed_starts = 0  # in a row
        self._last_end = ""
        self._start_error: BaseException | None = None
        self._stalled = False  # a socket took nothing, though there is nothing in it
        self._ending = threading.RLock()
        self._lifeline = Lifeline()
        self._wake_fd = OwnedFd(os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK))
        self._poller = select.poll()
        self._poller.register(self._wake_fd.fileno(), select.POLLIN)
        self._by_fd: dict[int, Worker] = {}
        self._owner = os.getpid()
        _schedulers.add(self)
        try:
            for index in range(processes):
                self._add_worker(index)
        except BaseException:
            self._end()
            raise
        self._thread = threading.Thread(target=self._run, name="mpmemory-pool", daemon=True)
        self._thread.start()

    @property
    def state(self) -> str:
        """RUN, CLOSE or TERMINATE, those of multiprocessing's pool."""
        return self._state

    def is_of_this_process(self) -> bool:
        return self._owner == os.getpid()

    # --- submitting ---

    def put(self, work: tuple[Iterable[tuple[Any, ...]], Callable[[int], None] | None]) -> None:
        """Take tasks `(job, index, func, args, kwds)`, as the task queue of multiprocessing's pool does.

        Those of a list are sent at once. Any other iterable is read by a thread of its own, as far as
        there is room for more; then the second part of `work` is called with their number.
        """
        tasks, set_length = work
        if isinstance(tasks, list):
            for task in tasks:
                try:
                    self.submit(*task)
                except BaseException:  # KeyboardInterrupt
                    self.results.pop(task[0], None)
                    raise
        else:
            self.feed(tasks, set_length)

    def submit(self, job: int, index: int, func: Any, args: Any, kwds: Any) -> None:
        """Send a task to a worker, or keep it until one has room. An error becomes its result."""
        try:
            message = Message.of_object((func, args, kwds))
        except Exception as error:
            self._fail(job, index, error)
            return
        task = Task(next(self._tags), job, index, message)
        try:
            with self._lock:
                ended, worker = self._state == TERMINATE, None
                # Of small ones only what keeps a worker busy is sent here. The scheduler's thread sends the rest,
                # many at a time, as answers come: sending lets other threads in between.
                limit = FULL if task.load >= BIG else FEW
                if not ended and (self._pending or (worker := self._reserve(task, self._workers, limit)) is None):
                    self._pending.append(task)
            if ended:
                self._refuse(job)
            elif worker is not None:
                self._send(worker, task)
                with self._lock:
                    # It may have looked for work for an idle worker just before this was sent to a busy one.
                    missed = len(worker.tasks) > 1 and not all(each.tasks for each in self._workers)
                if missed:
                    self._wake()
        except BaseException:
            self._withdraw(task)
            raise

    def feed(
        self, tasks: Iterable[tuple[Any, ...]], set_length: Callable[[int], None] | None, window: Window | None = None
    ) -> None:
        """Submit `tasks` from a thread, which waits while there is no room, or `window` is not open."""
        arguments = tasks, set_length, window
        try:
            threading.Thread(target=self._feed, args=arguments, name="mpmemory-pool-feeder", daemon=True).start()
        except RuntimeError:  # no thread can be started: the limit, or near the end of the process
            if window is not None:
                window.abandoned = True  # nobody can take results meanwhile
            self._feed(*arguments)

    def _feed(
        self, tasks: Iterable[tuple[Any, ...]], set_length: Callable[[int], None] | None, window: Window | None
    ) -> None:
        job, count, expected, granted = None, 0, 0, 0
        try:
            for job, index, func, args, kwds in tasks:
                if not count and isinstance(result := self.results.get(job), MapResult):
                    expected = result._number_left  # type: ignore[attr-defined]
                count += 1
                if func is _helper_reraises_exception:  # what the user's iterable raised
                    self._fail(job, index, args[0])
                    continue
                if window is not None and window.is_unwanted():
                    granted = 0
                if not granted and not (granted := self._wait_for_room(window)):
                    if self._state == TERMINATE:
                        self._refuse(job)
                        return
                    count -= 1
                    break
                granted -= 1
                self.submit(job, index, func, args, kwds)
                del func, args, kwds  # not kept while waiting for the next
            if count < expected:
                raise ValueError(f"the iterable gave less than its length: {count} chunks instead of {expected}")
            if set_length is not None:
                with self._ending:  # an iterator that has failed has its length
                    if window is None or window.job in self.results:
                        set_length(count)
        except BaseException as error:
            if job is not None:
                self._fail(job, None, error)
        finally:
            self._wake()  # that was perhaps all

    def _wait_for_room(self, window: Window | None) -> int:
        """Wait until there is room and the window is open; return for how many tasks, 0 if no more are wanted."""
        with self._room:
            while self._state != TERMINATE:
                if window is not None and window.is_unwanted():
                    return 0
                if (room := PENDING - len(self._pending)) > 0:
                    if window is None or self._state == CLOSE:
                        return room
                    window.waited_for = True  # before looking: who takes a result looks at it afterwards
                    if granted := window.open(room):
                        window.waited_for = False
                        return granted
                else:
                    self._room_wanted = True
                self._room.wait()
            return 0

    def notify_feeders(self) -> None:
        """Let feeders look again whether they may go on."""
        with self._room:
            self._room.notify_all()

    # --- sending ---

    def _reserve(self, task: Task, workers: list[Worker], limit: int) -> Worker | None:
        """Reserve a place for the task at the worker of the least load, if that is below `limit`. Locked."""
        best, least = None, limit
        for worker in workers:
            if (load := worker.load) < least and worker.is_open():
                best, least = worker, load
        if best is not None:
            best.reserve(task)
        return best

    def _send(self, worker: Worker, task: Task) -> None:
        """Send a task to the worker that it is reserved for."""
        sending = sent = False
        try:
            datagram = task.pack()
            try:
                with self._lock:
                    if not worker.dead:
                        worker.sending += 1
                        sending = True
                if sending:  # not with the lock, which the others want
                    sent = worker.channel.send_datagram(datagram, wait=False)
            finally:
                with self._lock:
                    worker.sending -= sending
                    if sent:
                        if task.datagram is datagram:  # else it was taken back meanwhile, and is to be sent again
                            task.datagram = None
                        if worker.left == 0 and all(task.is_sent() for task in list(worker.tasks.values())):
                            worker.leave()
            if not sent:
                with self._lock:
                    worker.unreserve(task)
                    self._pending.appendleft(task)
                    # Its next answer makes room. If it has none to give, it is tried again soon.
                    worker.blocked = True
                    if not worker.tasks:
                        worker.blocked = False
                        self._stalled = True
                self._wake()
        except Exception as error:
            with self._lock:
                worker.unreserve(task)
            self._fail(task.job, task.index, error)

    def _withdraw(self, task: Task) -> None:
        """Forget a task whose submission was interrupted, if it was not sent yet."""
        with self._lock:
            with contextlib.suppress(ValueError):
                self._pending.remove(task)
            for worker in self._workers:
                if not task.is_sent():
                    worker.unreserve(task)

    def _dispatch(self) -> None:
        """Give what is pending to workers with room, and to idle ones what others have not read yet."""
        # Many to one worker at a time, and only when it has done half of what it had: to wake up a worker
        # takes longer than to send a task.
        given: dict[Worker, list[Task]] = {}
        with self._lock:
            hungry = [worker for worker in self._workers if worker.load <= FULL // 2]
            self._stalled = False
            while self._pending and (chosen := self._reserve(self._pending[0], hungry, FULL)):
                given.setdefault(chosen, []).append(self._pending.popleft())
        for worker, tasks in given.items():
            for task in tasks:
                self._send(worker, task)
        with self._lock:
            moved = self._balance()
        for worker, task in moved:
            self._send(worker, task)
        with self._lock:
            if self._room_wanted and len(self._pending) <= PENDING // 4:
                self._room_wanted = False
                self._room.notify_all()

    def _balance(self) -> list[tuple[Worker, Task]]:
        """Take tasks back that have not been read yet, for workers that have nothing to do. Locked."""

        def unread(worker: Worker) -> int:
            # One that is ready runs the first of its tasks.
            return len(worker.tasks) - worker.ready

        idle = [worker for worker in self._workers if not worker.tasks and worker.is_open()]
        busy = [worker for worker in self._workers if unread(worker) > 0] if idle else []
        busy.sort(key=unread)
        moved = []
        while idle and busy:
            task = self._take_back(busy[-1])
            if task is None:
                busy.pop()
                continue
            thief = idle.pop()
            thief.reserve(task)
            moved.append((thief, task))
            busy.sort(key=unread)
        return moved

    def _take_back(self, worker: Worker) -> Task | None:
        """Take a task back that the worker has not read yet, if there is one."""
        while (datagram := worker.take_back()) is not None:
            if datagram.tag == ABOUT_WORKER:
                if worker.dead:
                    continue  # a task may be behind it, of a thread that was slower
                if worker.leaving:
                    worker.leave()
                return None
            task = worker.tasks.get(datagram.tag)
            if task is not None:  # else its submission was interrupted
                worker.unreserve(task)
                task.datagram = datagram
                return task
        return None

    def _fail(self, job: int, index: int | None, error: BaseException) -> None:
        """Let part `index` of a result fail, or if None all that is missing of it."""
        self._failed.append((job, index, error))
        self._wake()
        if self._state == TERMINATE:  # perhaps nobody reads that any more
            self._refuse(job)

    def _wake(self) -> None:
        fd = self._wake_fd  # held until it is written to: the pool may end meanwhile
        with contextlib.suppress(OSError, ValueError):  # over already; it is -1
            os.eventfd_write(fd.fileno(), 1)

    # --- the thread ---

    def _run(self) -> None:
        try:
            while self._state != TERMINATE:
                with self._lock:
                    if self._state == CLOSE and not self.results:
                        self._state = PARTING
                        for worker in self._workers:
                            worker.leave()
                if self._state == PARTING and not self._workers:
                    break
                self._turn()
        except BaseException as error:  # not expected: but nobody may wait for ever
            self._break(f"its scheduler failed: {error!r}", error)
        finally:
            self._end()

    def _turn(self) -> None:
        dead, ready = [], []
        for fd, _ in self._poller.poll(self._timeout()):
            worker = self._by_fd.get(fd)
            if worker is None:
                with contextlib.suppress(BlockingIOError):
                    os.eventfd_read(self._wake_fd.fileno())
            elif fd == worker.death:
                dead.append(worker)
            else:
                ready.append(worker)
        self._receive(ready)
        for worker in dead:
            self._bury(worker)
        while self._failed:
            job, index, error = self._failed.popleft()
            if index is None:
                self._abandon(job, error)
            else:
                self._set(job, index, (False, error))
        if self._is_short_of_workers():
            self._replace_dead()
        self._dispatch()

    def _timeout(self) -> float | None:
        """Return when there is something to try again, in milliseconds; None is never."""
        if self._stalled:
            return _RETRY_SENDING * 1000
        return _RETRY_STARTING * 1000 if self._is_short_of_workers() else None

    def _is_short_of_workers(self) -> bool:
        return self._state in (RUN, CLOSE) and len(self._workers) < len(self.processes)

    def _receive(self, workers: Iterable[Worker]) -> None:
        """Take what workers have sent."""
        # First all that is there, then what it means: each system call lets another thread run, and whom
        # a result wakes would go to sleep again after that one.
        received = []
        for worker in workers:
            with contextlib.suppress(BlockingIOError):
                while True:
                    received.append((worker, worker.channel.receive_datagram(wait=False)))
        for worker, datagram in received:
            task = worker.answered(datagram.tag)
            if task is not None:
                self._set(task.job, task.index, _open(datagram))
            elif datagram.tag == ABOUT_WORKER:
                if (outcome := _open(datagram)) is None:
                    worker.ready = True
                    self._failed_starts = 0
                else:
                    self._start_error = outcome[1]

    def _set(self, job: int, index: int, outcome: tuple[bool, Any]) -> None:
        result = self.results.get(job)
        if isinstance(result, IMapIterator):
            with self._ending:  # one that has failed takes no more
                if job in self.results:
                    result._set(index, outcome)  # type: ignore[attr-defined]
        elif result is not None:
            try:
                result._set(index, outcome)
            except BaseException:  # of a callback of the user's: multiprocessing's pool hangs
                self._callback_failed(result)

    def _callback_failed(self, result: Any) -> None:
        # As for a thread that ends by an error. What the callback kept from happening is made up for.
        threading.excepthook(threading.ExceptHookArgs((*sys.exc_info(), threading.current_thread())))
        result._event.set()
        self.results.pop(result._job, None)
        result._pool = None

    def _abandon(self, job: int, error: BaseException) -> None:
        """Let a whole result fail, whatever of it is still missing."""
        result = self.results.get(job)
        if isinstance(result, IMapIterator):
            with result._cond:  # type: ignore[attr-defined]
                missing = result._index + len(result._unsorted)  # type: ignore[attr-defined]
                result._items.extend(result._unsorted.values())  # type: ignore[attr-defined]
                result._unsorted.clear()  # type: ignore[attr-defined]
                result._items.append((False, error))  # type: ignore[attr-defined]
                result._index = result._length = missing + 1  # type: ignore[attr-defined]
                result._cond.notify_all()  # type: ignore[attr-defined]
            self.results.pop(job, None)
        elif result is not None:
            result._number_left = 1  # of a MapResult; others have no such number
            self._set(job, 0, (False, error))

    # --- workers ---

    def _add_worker(self, index: int) -> None:
        """Start the worker number `index`. Raises what starting a process raises."""
        self._starting = worker = Worker(self._tasks_per_worker)
        try:
            process = worker.start(self._start, self._lifeline)
        finally:
            self._starting = None
        with self._lock:
            self._workers.append(worker)
            self.processes[index : index + 1] = [process]
        for fd in (worker.channel.fileno(), worker.death):
            self._by_fd[fd] = worker
            self._poller.register(fd, select.POLLIN)

    def _replace_dead(self) -> None:
        alive = {worker.process for worker in self._workers}
        for index, process in enumerate(self.processes):
            if process in alive:
                continue
            if self._failed_starts >= max(MAX_FAILED_STARTS, len(self.processes)):
                reason = f"{self._failed_starts} workers in a row ended before they could take a task: "
                self._break(reason + self._last_end, self._start_error)
                return
            try:
                self._add_worker(index)
            except Exception as error:
                self._failed_starts += 1
                self._last_end = f"the last one could not be started: {error!r}"
                traceback.clear_frames(error.__traceback__)  # they hold what was made for that worker
                self._start_error = error
                return  # the others go on; it is tried again soon

    def _bury(self, worker: Worker) -> None:
        """Settle what a dead worker leaves: its last results, the tasks it has not read, the one it was running."""
        with self._lock:
            worker.dead = True
            if worker.sending:
                return  # they will be through at once; its death is seen again
        self._receive([worker])
        for fd in (worker.channel.fileno(), worker.death):
            self._poller.unregister(fd)
            del self._by_fd[fd]
        exitcode = worker.collect()
        with self._lock:
            self._workers.remove(worker)
            unread = []
            while (task := self._take_back(worker)) is not None:
                unread.append(task)
            self._pending.extendleft(reversed(unread))
            # One that is not sent is in the hands of its sender, who sees that the worker is dead.
            lost = [task for task in worker.tasks.values() if task.is_sent()]
        for task in lost:
            self._set(task.job, task.index, (False, WorkerLostError(worker.pid, exitcode)))
        if not worker.ready:
            self._failed_starts += 1
            self._last_end = f"the last one {describe_exit(exitcode)}"
        worker.forget()

    # --- the end ---

    def close(self) -> None:
        """Take no more tasks, and end when all are done."""
        with self._lock:
            if self._state == RUN:
                self._state = CLOSE
            self._room.notify_all()
        self._wake()

    def terminate(self) -> None:
        """End now: within seconds, whatever the workers do. What is not done fails."""
        with self._lock:
            self._state = TERMINATE
        self._wake()
        if threading.current_thread() is not self._thread:  # as in a callback; then the rest follows
            self._thread.join(5 * GRACE)
            self._end()  # also while a callback keeps the thread

    def join(self) -> None:
        """Wait for the end."""
        self._thread.join()

    def _break(self, reason: str, cause: BaseException | None) -> None:
        self.error = f"the pool is broken: {reason}", cause
        with self._lock:
            self._state = TERMINATE

    def _end(self) -> None:
        """Kill the workers, and fail what is not done. Once is enough, twice does no harm."""
        with self._lock:
            self._state = TERMINATE
            self._room.notify_all()
            workers, self._workers = self._workers, []
        kill(workers)
        for job in list(self.results):
            self._refuse(job)
        for worker in workers:
            worker.forget()
        # A pool that has ended keeps no descriptor, however long its object stays, but those of its Process objects.
        self._lifeline.close()
        self._wake_fd = OwnedFd(-1)

    def _refuse(self, job: int) -> None:
        """Fail what the pool cannot do any more. Its thread may be gone: any may do this, one at a time."""
        with self._ending:
            self._abandon(job, self.broken() or PoolError("the pool was terminated before the task was done"))

    def broken(self) -> PoolError | None:
        """Return a new error that says why the pool is broken, if it is."""
        if self.error is None:
            return None
        reason, cause = self.error
        error = PoolError(reason)
        error.__cause__ = cause
        return error

    def forget_parent(self) -> None:
        """In a forked child: close what is the parent's."""
        # What waits or is under way, too: its descriptors are leases of segments.
        self._pending.clear()
        for worker in [*self._workers, self._starting]:
            if worker is not None:
                worker.tasks.clear()
                worker.forget()
        self._lifeline.let_go()
        self._wake_fd = OwnedFd(-1)
        # Another thread of the parent may have held the lock. A child that drops an imap's results takes it.
        self._room = threading.Condition()


# Those of this process, for a child of whatever fork.
_schedulers: weakref.WeakSet[Scheduler] = weakref.WeakSet()


def _after_fork_in_child() -> None:
    for scheduler in list(_schedulers):
        scheduler.forget_parent()
    _schedulers.clear()


os.register_at_fork(after_in_child=_after_fork_in_child)


def _open(datagram: Datagram) -> Any:
    """Return the outcome that a worker has sent; if that cannot be unpickled, the error as the outcome."""
    try:
        return datagram.object()
    except BaseException as error:
        error.add_note("It was raised while the result of a task of a pool was unpickled.")
        return False, error
