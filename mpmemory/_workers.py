"""Workers, as their pool sees them: the process, the channel to it, and what it has been given to do."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess

from ._backends import platform
from ._fds import OwnedFd
from ._messages import Datagram, Message
from ._worker_main import ABOUT_WORKER, Lifeline, interrupts_wait
from .connection import Connection, Pipe

#: The load of a worker that gets no more tasks: so many small ones, the running one included.
FULL = 64

#: A load that keeps a worker busy until its next answer is read.
FEW = 4

#: A small task counts once for each so many bytes.
SMALL = 2 << 10

#: The load of a big task: few are sent ahead, since their memory is in use meanwhile.
BIG = FULL // 2

#: How long terminated workers have for their own end until they are killed, in seconds.
GRACE = 1.0

StartWorker = Callable[[Connection, Lifeline], BaseProcess]


class Task:
    """Something to run: part `index` of the result of number `job`."""

    __slots__ = ("datagram", "index", "job", "load", "message", "tag")

    def __init__(self, tag: int, job: int, index: int, message: Message) -> None:
        self.tag = tag
        self.job = job
        self.index = index
        # Either is there until it is sent. What needs no segment can be packed at once.
        self.message: Message | None = message
        self.datagram: Datagram | None = None
        if message.is_big:
            self.load = BIG
        else:
            self.load = 1 + message.length // SMALL
            self.pack()

    def is_sent(self) -> bool:
        return self.message is None and self.datagram is None

    def pack(self) -> Datagram:
        """Return what is to be sent. Raises OSError."""
        if self.datagram is None:
            assert self.message is not None
            self.datagram = self.message.pack(self.tag)
            self.message = None
        return self.datagram


class Worker:
    """A worker process, seen from its pool."""

    def __init__(self, tasks: int | None) -> None:
        """Prepare one that will get so many tasks at most; None is any number. Raises OSError."""
        self.channel, self.far_end = Pipe()
        self.process: BaseProcess | None = None
        self.tasks: dict[int, Task] = {}  # not answered yet, in the order of sending
        # The difference is its load. Each is changed by one side only: who sends (locked), the scheduler's thread.
        self.given = 0
        self.done = 0
        self.sending = 0  # so many threads are just sending to it
        self.left = tasks
        self.ready = False
        self.leaving = False
        self.blocked = False  # its socket is full
        self.dead = False

    def start(self, start: StartWorker, lifeline: Lifeline) -> BaseProcess:
        """Start it. Raises what starting a process raises."""
        with interrupts_wait():
            self.process = process = start(self.far_end, lifeline)
        assert process.pid is not None
        self.pid = process.pid
        try:
            number = platform.open_pidfd(self.pid)
        except ProcessLookupError:  # dead already; the fork server has collected it
            number = -1
        self._pidfd = OwnedFd(number) if number >= 0 else None
        # Not the process's sentinel, if there is a choice: children of the worker may keep that from firing.
        self.death = self._pidfd.fileno() if self._pidfd else process.sentinel
        return process

    @property
    def load(self) -> int:
        return self.given - self.done

    def is_open(self) -> bool:
        """Return whether it takes tasks at all; how many is for its load to say."""
        return self.left != 0 and not (self.blocked or self.leaving or self.dead)

    def reserve(self, task: Task) -> None:
        """Note that the task will be sent. Locked."""
        self.tasks[task.tag] = task
        self.given += task.load
        if self.left is not None:
            self.left -= 1

    def unreserve(self, task: Task) -> None:
        """Note that the task was not sent, or was not read and taken back. Locked."""
        if self.tasks.pop(task.tag, None) is not None:
            self.given -= task.load
            if self.left is not None:
                self.left += 1

    def answered(self, tag: int) -> Task | None:
        """Note that an answer has come. In the scheduler's thread."""
        task = self.tasks.pop(tag, None)
        if task is not None:
            self.done += task.load
        self.blocked = False
        return task

    def take_back(self) -> Datagram | None:
        """Receive what it has not read yet, if there is anything."""
        try:
            return self.far_end.receive_datagram(wait=False)
        except BlockingIOError:
            return None

    def leave(self) -> None:
        """Tell it to leave when it has done what it got."""
        self.leaving = True
        with contextlib.suppress(OSError):
            self.channel.send_datagram(Message.of_object(None).pack(ABOUT_WORKER), wait=False)

    def collect(self) -> int:
        """Return the exit code of a worker that has ended; 255 if nobody knows, as multiprocessing says then."""
        assert self.process is not None
        deadline = time.monotonic() + GRACE
        self.process.join(GRACE)  # from the fork server it comes a moment later
        # Any thread that starts or lists processes collects all that have ended. Then join returns at once, and the
        # exit code is known as soon as that thread goes on.
        while (exitcode := self.process.exitcode) is None:
            if time.monotonic() > deadline:
                return 255
            time.sleep(0.001)
        return exitcode

    def forget(self) -> None:
        """Close what this process has of it. In a forked child that it is just starting in, it keeps its end."""
        self.channel.close()
        if self.process is not None:
            self.far_end.close()
            self._pidfd = None


def kill(workers: list[Worker]) -> None:
    """Terminate workers, kill those that are still there after a while, and collect them."""
    processes = [worker.process for worker in workers if worker.process is not None]
    left = {worker.death for worker in workers}
    deadline = time.monotonic() + GRACE
    for end in (BaseProcess.terminate, BaseProcess.kill):
        for process in processes:
            if process.exitcode is None:
                end(process)
        while left and (ended := platform.poll(list(left), max(0.0, deadline - time.monotonic()))):
            left -= ended
    for process in processes:
        process.join(GRACE)
