"""The error vocabulary.

A failure of the operating system is an OSError with its errno, whose message says what was asked.
A wrong size, offset or length is a ValueError or IndexError, a wrong type a TypeError, and any use
after `close()` a ValueError, as for files. The classes here name what Python has no name for.
All of them pickle.
"""

from __future__ import annotations

import errno
import multiprocessing
import os
import resource
import signal


class MpMemoryError(Exception):
    """The base of this package's own errors."""


class HandleLostError(MpMemoryError, OSError):
    """A handle arrived without its memory; the message says why and names the sender's pid.

    Unpickling a handle never raises: an error there would end the thread that reads the results
    of a `multiprocessing.Pool`, and the pool would hang. Instead the handle is *lost*, and this
    is raised when it is used. `errno` is that of the failure, or ESTALE where there was none.
    """


class WorkerLostError(MpMemoryError, multiprocessing.ProcessError):
    """A worker process died while it ran a task.

    `pid` is the worker's; `exitcode` is that of `multiprocessing.Process`: the number of the
    signal that killed it, negated, or the status it exited with; 255 also if that is not known, since
    the fork server has died, or because several threads asked the fork server at once.
    """

    def __init__(self, pid: int, exitcode: int) -> None:
        super().__init__(pid, exitcode)
        self.pid = pid
        self.exitcode = exitcode

    def __str__(self) -> str:
        return f"worker {self.pid} {describe_exit(self.exitcode)} while it ran a task"


class PoolError(MpMemoryError, multiprocessing.ProcessError):
    """A pool cannot run a task (any more): it was terminated, or its workers end before they can take one."""


class SealedError(MpMemoryError, PermissionError):
    """A seal on the memory forbids what was asked."""


def describe_exit(exitcode: int) -> str:
    """Say in words how a process ended, given its `multiprocessing.Process.exitcode`."""
    if exitcode >= 0:
        return f"exited with status {exitcode}"
    try:
        return f"was killed by {signal.Signals(-exitcode).name}"
    except ValueError:
        return f"was killed by signal {-exitcode}"


def failed(asked: str, error: OSError) -> OSError:
    """Return `error` again, of the same errno, with a message that says what was asked."""
    number = error.errno or errno.EIO
    message = f"{asked}: {os.strerror(number)}"
    if number == errno.EMFILE:
        soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        message += f" (the limit of this process is {soft}, see `ulimit -n`)"
    return OSError(number, message)
