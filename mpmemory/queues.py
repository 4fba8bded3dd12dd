"""SimpleQueue, Queue and JoinableQueue on Connection.

A queue is a one-way Pipe whose ends all its users share: a message is one datagram, so that writers and
readers need no lock. What is counted (free places, unfinished tasks) is an eventfd(2), as a semaphore:
the kernel's, so that nothing stays locked when its user is killed. All of it travels in messages, too.
"""

from __future__ import annotations

import contextlib
import errno
import os
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable
from multiprocessing import util
from queue import Empty, Full
from typing import Any, Self

from ._backends import platform
from ._fds import LostFd, OwnedFd
from ._messages import Message
from .connection import Connection, Pipe
from .reduction import Shareable, share_fd

# More than anybody puts: what a queue without maxsize counts down from.
_UNBOUNDED = 2**31 - 1

# How often join() looks again, in seconds: a process that is killed between counting down to zero and
# saying so wakes nobody.
_JOIN_INTERVAL = 1.0

# Out of descriptors: what waits to be sent goes on waiting, and is tried again so often, in seconds.
_NO_DESCRIPTOR = {errno.EMFILE, errno.ENFILE}
_RETRY_INTERVAL = 0.02


class SimpleQueue(Shareable):
    """A queue between processes, with the API of `multiprocessing.SimpleQueue`.

    `put` pickles at once, and waits while the receivers have too much to read. What is put is what
    arrives; handles, arrays, sockets and whatever a Connection carries. Can be used from several threads
    and processes. Pickles through multiprocessing.

    Making one raises OSError (EMFILE) if no descriptor is left. Any use after `close` is an OSError, too.
    """

    __slots__ = ("_reader", "_rlock", "_writer")

    def __init__(self) -> None:
        self._set_up(*Pipe(duplex=False))

    def _set_up(self, reader: Connection, writer: Connection) -> None:
        self._reader = reader
        self._writer = writer
        # multiprocessing.pool takes it when it terminates, to keep workers from reading. Here nobody needs it.
        self._rlock = threading.Lock()

    def put(self, obj: object) -> None:
        """Put an object into the queue. Raises what pickling raises (then nothing was put), or OSError."""
        self._writer.send(obj)

    def get(self) -> Any:
        """Wait for an object, and return it. Raises what unpickling raises, EOFError if nobody can put any more."""
        return self._reader.recv()

    def empty(self) -> bool:
        """Return whether there is nothing to get now."""
        return not self._reader.poll()

    def close(self) -> None:
        """Close this process's ends."""
        self._reader.close()
        self._writer.close()

    def _reduce(self) -> tuple[Callable[..., Self], tuple[Any, ...]]:
        return _rebuild_simple_queue, (type(self), self._reader, self._writer)


def _rebuild_simple_queue(cls: type[SimpleQueue], reader: Connection, writer: Connection) -> Any:
    self = cls.__new__(cls)
    self._set_up(reader, writer)
    return self


class Counter(Shareable):
    """A number from 0 on that processes share: an eventfd(2) of the semaphore kind."""

    __slots__ = ("_fd",)

    _fd: OwnedFd | LostFd

    def __init__(self, value: int) -> None:
        self._fd = OwnedFd(os.eventfd(value, os.EFD_CLOEXEC | os.EFD_NONBLOCK | os.EFD_SEMAPHORE))

    def add(self) -> None:
        """Count up by one."""
        os.eventfd_write(self._fd.fileno(), 1)

    def take(self, deadline: float | None) -> bool:
        """Count down by one and return True, or False if it stays 0 until `deadline` (monotonic; None: ever)."""
        while True:
            with contextlib.suppress(BlockingIOError):
                os.eventfd_read(self._fd.fileno())
                return True
            if not self.wait(deadline):
                return False

    def wait(self, deadline: float | None) -> bool:
        """Wait until it is more than 0, and return whether it is."""
        timeout = None if deadline is None else max(0.0, deadline - time.monotonic())
        return bool(platform.poll([self._fd.fileno()], timeout))

    def value(self) -> int:
        """Return the number. Raises OSError without /proc."""
        with open(f"/proc/self/fdinfo/{self._fd.fileno()}") as lines:
            for line in lines:
                if line.startswith("eventfd-count:"):
                    return int(line.split()[1], 16)  # proc(5): hexadecimal
        raise OSError(errno.ENOSYS, "the system does not tell the count of an eventfd")

    def _reduce(self) -> tuple[Callable[..., Self], tuple[Any, ...]]:
        return _rebuild_counter, (type(self), share_fd(self._fd))


def _rebuild_counter(cls: type[Counter], shared: Any) -> Any:
    self = cls.__new__(cls)
    self._fd = shared.claim()
    return self


class Queue(Shareable):
    """A queue between processes, with the API of `multiprocessing.Queue`.

    `put` pickles at once, in the caller: what you put is what arrives, errors are raised where the mistake
    is, and a handle may be closed afterwards. It never waits for readers (only for a free place, if the
    queue has a `maxsize`): what the socket does not take now, a thread sends later. That thread is
    joined when the process ends, unless `cancel_join_thread` was called.

    Can be used from several threads and processes. Pickles through multiprocessing; each process has a
    thread and unsent messages of its own. After `close`, `put` and `get` raise ValueError.
    """

    __slots__ = (
        "_changed",
        "_closed",
        "_join_cancelled",
        "_maxsize",
        "_places",
        "_reader",
        "_sender",
        "_sender_joiner",
        "_unsent",
        "_writer",
    )

    def __init__(self, maxsize: int = 0) -> None:
        """Create a queue for `maxsize` objects, or any number if it is not positive. Raises OSError (EMFILE)."""
        reader, writer = Pipe(duplex=False)
        maxsize = maxsize if maxsize > 0 else _UNBOUNDED
        self._set_up(reader, writer, maxsize, Counter(maxsize))

    def _set_up(self, reader: Connection, writer: Connection, maxsize: int, places: Counter) -> None:
        self._reader = reader
        self._writer = writer
        self._maxsize = maxsize
        self._places = places
        self._closed = False
        self._start_anew()
        _queues.add(self)

    def _start_anew(self) -> None:
        """Begin with nothing to send: also in a forked child, for what was put before is the parent's to send."""
        # Re-entrant: a signal handler, or what the garbage collector finalizes, may put something in the middle.
        self._changed = threading.RLock()
        self._unsent: deque[Message] = deque()
        self._sender: threading.Thread | None = None
        self._sender_joiner: util.Finalize | None = None
        self._join_cancelled = False

    def put(self, obj: object, block: bool = True, timeout: float | None = None) -> None:
        """Put an object into the queue, and wait for a free place if `block`.

        Raises `queue.Full` if there is none now, or within `timeout` seconds (None is for ever); what pickling raises;
        ValueError if the queue was closed. Then nothing was put.
        """
        self._check_open()
        message = Message.of_object(obj)
        if not self._places.take(_deadline(block, timeout)):
            raise Full
        try:
            self._post(message)
        except BaseException:
            self._places.add()
            raise

    def _post(self, message: Message) -> None:
        with self._changed:
            self._check_open()  # again: close() may have come meanwhile
            if not self._unsent and self._writer.send_message(message, wait=False):
                return
            message.detach()
            self._unsent.append(message)
            if self._sender is None:
                self._sender = threading.Thread(target=self._send_unsent, name="mpmemory-queue", daemon=True)
                try:
                    self._sender.start()
                except RuntimeError:  # no thread can be started
                    self._sender = None
                    self._unsent.remove(message)
                    raise
                self._arrange_exit()

    def _send_unsent(self) -> None:
        while True:
            with self._changed:
                if not self._unsent:
                    self._end_sender()
                    return
                message = self._unsent[0]
            try:
                self._writer.send_message(message)
            except BrokenPipeError:  # nobody can read any more
                with self._changed:
                    self._unsent.clear()
                    self._end_sender()
                return
            except Exception as error:
                if isinstance(error, OSError) and error.errno in _NO_DESCRIPTOR and not util.is_exiting():
                    time.sleep(_RETRY_INTERVAL)
                    continue
                print(f"mpmemory: cannot send what was put into a queue: {error}", file=sys.stderr)
                self._give_back_place()
            with self._changed:
                self._unsent.popleft()

    def _give_back_place(self) -> None:
        """Make up for a message that nobody will get."""
        self._places.add()

    def _end_sender(self) -> None:
        self._sender = None
        if self._sender_joiner is not None:
            self._sender_joiner.cancel()
        if self._closed:
            self._writer.close()

    def _arrange_exit(self) -> None:
        """Have what is left be sent before the process ends; in the order of multiprocessing's own queues."""
        if not self._join_cancelled:
            self._sender_joiner = util.Finalize(
                self,
                _join_sender,
                (weakref.ref(self._sender),),
                exitpriority=-5,
            )

    def get(self, block: bool = True, timeout: float | None = None) -> Any:
        """Return an object, and wait until there is one if `block`.

        Raises `queue.Empty` if there is none now, or within `timeout` seconds (None is for ever); what unpickling
        raises, or OSError (EMFILE) if no descriptor is left for what it carries (the object is gone then);
        ValueError if the queue was closed; EOFError if nobody can put any more.
        """
        self._check_open()
        if block and timeout is None:
            datagram = self._reader.receive_datagram()
        else:
            deadline = _deadline(block, timeout)
            assert deadline is not None
            while True:
                # Somebody else may be faster than we are.
                if not self._reader.poll(max(0.0, deadline - time.monotonic())):
                    raise Empty
                with contextlib.suppress(BlockingIOError):
                    datagram = self._reader.receive_datagram(wait=False)
                    break
        if datagram.is_ours:  # what somebody else has sent here took no place
            self._places.add()  # before anything can go wrong with it
        return datagram.object()

    def put_nowait(self, obj: object) -> None:
        """`put(obj, False)`."""
        self.put(obj, False)

    def get_nowait(self) -> Any:
        """`get(False)`."""
        return self.get(False)

    def qsize(self) -> int:
        """Return how many objects are in the queue, those not sent yet included. Raises OSError without /proc."""
        return self._maxsize - self._places.value()

    def empty(self) -> bool:
        """Return whether there is nothing to get now."""
        return not self._reader.poll()

    def full(self) -> bool:
        """Return whether there is no free place now."""
        return not self._places.wait(0.0)

    def close(self) -> None:
        """Say that this process will neither put nor get any more; what was put is still sent."""
        with self._changed:
            self._closed = True
            self._reader.close()
            if not self._unsent:
                self._writer.close()

    def join_thread(self) -> None:
        """Wait until all that this process has put is sent. Only after `close`, otherwise AssertionError."""
        assert self._closed, f"Queue {self!r} not closed"
        sender = self._sender
        if sender is not None and not self._join_cancelled:
            sender.join()
        if self._sender_joiner is not None:
            self._sender_joiner.cancel()

    def cancel_join_thread(self) -> None:
        """Wait neither at exit nor in `join_thread` until all is sent: what is left at exit is lost."""
        self._join_cancelled = True
        if self._sender_joiner is not None:
            self._sender_joiner.cancel()

    def _check_open(self) -> None:
        if self._closed:
            raise ValueError(f"Queue {self!r} is closed")

    def _reduce(self) -> tuple[Callable[..., Self], tuple[Any, ...]]:
        return _rebuild_queue, (type(self), self._reader, self._writer, self._maxsize, self._places)


def _rebuild_queue(cls: type[Queue], *parts: Any) -> Any:
    self = cls.__new__(cls)
    self._set_up(*parts)
    return self


def _deadline(block: bool, timeout: float | None) -> float | None:
    """Return when to give up, on the monotonic clock; None is never."""
    if not block:
        return time.monotonic()
    return None if timeout is None else time.monotonic() + max(timeout, 0.0)


def _join_sender(reference: weakref.ref[threading.Thread]) -> None:
    sender = reference()
    if sender is not None:
        sender.join()


# Those of this process, for a child of whatever fork.
_queues: weakref.WeakSet[Queue] = weakref.WeakSet()


def _after_fork_in_child() -> None:
    for queue in list(_queues):
        queue._start_anew()


os.register_at_fork(after_in_child=_after_fork_in_child)


class JoinableQueue(Queue):
    """A Queue that knows how many of its objects are not done yet, as `multiprocessing.JoinableQueue`.

    An object that `get` could not receive or unpickle is one of them: call `task_done` for it, too.
    """

    __slots__ = ("_idle", "_unfinished")

    def __init__(self, maxsize: int = 0) -> None:
        super().__init__(maxsize)
        self._unfinished = Counter(0)
        self._idle = Counter(0)  # above 0 if somebody counted the unfinished down to 0, and nobody has seen it

    def _set_up(self, *parts: Any) -> None:
        super()._set_up(*parts[:4])
        if len(parts) > 4:
            self._unfinished, self._idle = parts[4:]

    def _post(self, message: Message) -> None:
        self._unfinished.add()
        try:
            super()._post(message)
        except BaseException:
            self._unfinished.take(0.0)
            raise

    def _give_back_place(self) -> None:
        super()._give_back_place()
        self.task_done()

    def task_done(self) -> None:
        """Say that an object from `get` is done. Raises ValueError if this was said more often than `put`."""
        if not self._unfinished.take(0.0):
            raise ValueError("task_done() called too many times")
        if not self._unfinished.wait(0.0):
            self._idle.add()

    def join(self) -> None:
        """Wait until all objects put into the queue are done."""
        while self._unfinished.wait(0.0):
            if self._idle.take(time.monotonic() + _JOIN_INTERVAL) and not self._unfinished.wait(0.0):
                self._idle.add()  # for others that wait

    def _reduce(self) -> tuple[Callable[..., Self], tuple[Any, ...]]:
        function, arguments = super()._reduce()
        return function, (*arguments, self._unfinished, self._idle)
