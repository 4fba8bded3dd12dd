"""What a worker process of a Pool does: receive a task, run it, send the result."""

from __future__ import annotations

import contextlib
import os
import reprlib
import signal
import sys
from collections.abc import Callable, Iterator
from multiprocessing.pool import ExceptionWithTraceback, MaybeEncodingError  # type: ignore[attr-defined]
from types import FrameType
from typing import Any, Self

from ._backends import platform
from ._fds import LostFd, OwnedFd
from ._messages import Datagram, Message
from .connection import Connection
from .reduction import Shareable, share_fd

#: The tag of a message that is about the worker, not about a task: to it "leave", from it "ready", or why not.
ABOUT_WORKER = 0


class Lifeline(Shareable):
    """Ends who holds on to it when its maker has ended, whatever he is doing then.

    A pipe that only the maker could write to. The kernel sends the signal when the last writing end is
    closed: also to a process that is stopped, or busy in C code, and without a thread that would wait.
    """

    __slots__ = ("_reader", "_writer")

    _reader: OwnedFd | LostFd
    _writer: OwnedFd | None

    def __init__(self) -> None:
        reader, writer = os.pipe()
        self._reader, self._writer = OwnedFd(reader), OwnedFd(writer)

    def hold(self) -> None:
        """Have this process killed when the maker has ended. Raises OSError."""
        platform.kill_at_hangup(self._reader.fileno())

    def let_go(self) -> None:
        """Close the writing end, in a forked child: it is the maker's alone."""
        self._writer = None

    def close(self) -> None:
        """Close both ends, in the maker: all is over, and nobody will hold on to it any more."""
        self.let_go()
        self._reader = OwnedFd(-1)

    def _reduce(self) -> tuple[Callable[..., Self], tuple[Any, ...]]:
        return _rebuild_lifeline, (type(self), share_fd(self._reader))


def _rebuild_lifeline(cls: type[Lifeline], shared: Any) -> Any:
    self = cls.__new__(cls)
    self._reader, self._writer = shared.claim(), None
    return self


def run(channel: Connection, lifeline: Lifeline, initializer: Callable[..., object] | None, initargs: Any) -> None:
    """Run tasks from `channel` until told to leave."""
    lifeline.hold()
    interrupts = _Interrupts()
    if initializer is not None:
        try:
            interrupts.call(initializer, initargs, {})
        except KeyboardInterrupt:
            sys.exit(1)  # Ctrl-C is for the parent; a traceback from each worker helps nobody
        except Exception as error:
            channel.send_datagram(_failure(ABOUT_WORKER, error))
            raise
    channel.send_datagram(Message.of_object(None).pack(ABOUT_WORKER))
    with contextlib.suppress(EOFError, BrokenPipeError):  # the pool is gone
        while True:
            task = _next_task(channel)
            if task.tag == ABOUT_WORKER:
                return
            answer = _run_task(task, interrupts)
            # Before the answer goes: then the pool may want to use the memory of the arguments again.
            del task
            channel.send_datagram(answer)
            del answer  # nothing is kept while the worker waits for the next


def _next_task(channel: Connection) -> Datagram:
    while True:
        try:
            return channel.receive_datagram(wait=False)
        except BlockingIOError:
            # Not waiting in recvmsg(2), where a process that is just being killed may still take a task along.
            platform.poll([channel.fileno()], None)


def _run_task(task: Datagram, interrupts: _Interrupts) -> Datagram:
    """Return the result, packed. Raises SystemExit only: that ends the worker, and its task fails."""
    try:
        func, args, kwds = task.object()
        value = interrupts.call(func, args, kwds)
    except SystemExit:
        raise
    except BaseException as error:
        return _failure(task.tag, error)
    try:
        return Message.of_object((True, value)).pack(task.tag)
    except SystemExit:
        raise
    except BaseException as error:
        return _failure(task.tag, MaybeEncodingError(error, _Shortened(value)))


def _failure(tag: int, error: BaseException) -> Datagram:
    """Return `error` as a result, with its traceback in words."""
    trace = error.__traceback__
    try:
        packed = Message.of_object((False, ExceptionWithTraceback(error, trace))).pack(tag)
        # Exceptions with arguments of their own often pickle, but do not unpickle.
        packed.object()
        return packed
    except Exception as problem:
        replaced = MaybeEncodingError(problem, _Shortened(error))
        return Message.of_object((False, ExceptionWithTraceback(replaced, trace))).pack(tag)


class _Shortened:
    """Has the repr of an object, which is perhaps very long, or raises."""

    def __init__(self, shown: object) -> None:
        self._shown = shown

    def __repr__(self) -> str:
        if isinstance(self._shown, BaseException):
            with contextlib.suppress(Exception):
                return repr(self._shown)
        return reprlib.repr(self._shown)


@contextlib.contextmanager
def interrupts_wait() -> Iterator[None]:
    """Start a worker in this context: until it is ready for a SIGINT, none comes (where the mask is inherited)."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class _Interrupts:
    """Lets SIGINT interrupt the user's code only, not what sends and receives.

    A program that has its own idea of SIGINT, or whose initializer has, keeps it.
    """

    def __init__(self) -> None:
        self._allowed = False
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, self._interrupt)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        if self._allowed:
            signal.default_int_handler(number, frame)

    def call(self, func: Callable[..., Any], args: Any, kwds: Any) -> Any:
        """Call the user's function."""
        self._allowed = True
        try:
            return func(*args, **kwds)
        finally:
            self._allowed = False
