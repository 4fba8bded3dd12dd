"""What a message goes through in the crash matrix: each channel with the same few methods."""

from __future__ import annotations

import contextlib
import hashlib
import multiprocessing
import pickle
import time
from multiprocessing.connection import wait
from queue import Empty
from typing import Any

from deaths import at

from mpmemory import Memory, RobustLock, SharedMemory
from mpmemory.errors import HandleLostError

Item = tuple[Any, ...]


class Timeout(Exception):
    """Nothing came."""


# --- items: a number, its sender, and contents that tell whether they are right ------------------------


def content(sender: str, number: int, length: int) -> bytes:
    return hashlib.shake_128(f"{sender} {number}".encode()).digest(length)


def make_item(sender: str, number: int, *, big: bool, trap: object = None) -> Item:
    """Return an item: with a handle, and with bytes that go beside the pickle if they are `big`."""
    body = content(sender, number, 40_000 if big and number % 3 == 0 else 100)
    return sender, number, body, Memory.from_bytes(content(sender, number, 50)), trap


def check_item(item: Item, dead: str | None = None) -> tuple[str, int, int]:
    """Check what came; return sender, number and how many bytes were right.

    The handle of a `dead` sender may be lost: then it says so when it is used.
    """
    sender, number, body, memory, _ = item
    if body is None:
        assert sender == dead, "its name is gone, and its sender lives"
        body = b""
    assert body == content(sender, number, len(body)), "wrong bytes"
    with memory:
        try:
            found = memory.pread(50)
        except HandleLostError:
            if sender != dead:
                raise
            return sender, number, len(body)
    assert found == content(sender, number, 50), "wrong memory"
    return sender, number, len(body) + 50


# --- channels -------------------------------------------------------------------------------------


class PipeRoad:
    """Our Pipe: any number of processes share its ends."""

    shared = True  # by several senders, and several receivers
    exact = True  # what was sent arrives, whoever dies
    big = True
    ends = True  # when nobody can put any more

    def __init__(self, ctx: Any) -> None:
        self._reader, self._writer = ctx.Pipe(duplex=False)

    def put(self, item: Item) -> None:
        self._writer.send(item)

    def flush(self) -> None:
        """Wait until all that was put is on its way. Nothing is put here any more."""

    def get(self, timeout: float) -> Item:
        if not self._reader.poll(timeout):
            raise Timeout
        return self._reader.recv()  # type: ignore[no-any-return]

    def done(self) -> None:
        """Say that what came is done."""

    def only_get(self) -> None:
        """Give up sending here."""
        self._writer.close()

    def close(self) -> None:
        self._reader.close()
        self._writer.close()


class StockPipeRoad(PipeRoad):
    """One for each process: their ends are not to be shared."""

    shared = False
    exact = False
    big = False

    def __init__(self, ctx: Any) -> None:
        stock = multiprocessing.get_context(ctx.get_start_method())
        self._reader, self._writer = stock.Pipe(duplex=False)


class SimpleQueueRoad(PipeRoad):
    def __init__(self, ctx: Any) -> None:
        self._queue = ctx.SimpleQueue()

    def put(self, item: Item) -> None:
        self._queue.put(item)

    def get(self, timeout: float) -> Item:
        if not wait([self._queue._reader], timeout):
            raise Timeout
        return self._queue.get()  # type: ignore[no-any-return]

    def only_get(self) -> None:
        self._queue._writer.close()

    def close(self) -> None:
        self._queue.close()


class QueueRoad(PipeRoad):
    ends = False

    def __init__(self, ctx: Any) -> None:
        self._queue = ctx.Queue()

    def put(self, item: Item) -> None:
        self._queue.put(item)

    def flush(self) -> None:
        self._queue.close()
        self._queue.join_thread()

    def get(self, timeout: float) -> Item:
        try:
            return self._queue.get(timeout=timeout)  # type: ignore[no-any-return]
        except Empty:
            raise Timeout from None

    def only_get(self) -> None:
        pass

    def close(self) -> None:
        self.flush()


class JoinableQueueRoad(QueueRoad):
    def __init__(self, ctx: Any) -> None:
        self._queue = ctx.JoinableQueue()

    def done(self) -> None:
        self._queue.task_done()

    def join(self, lost: int) -> None:
        """Wait until all is done, after having done so for what was lost."""
        for _ in range(lost):
            self._queue.task_done()
        self._queue.join()


class StockQueueRoad(QueueRoad):
    """One for each process: who is killed may have its lock."""

    shared = False
    exact = False
    big = False

    def __init__(self, ctx: Any) -> None:
        self._queue = multiprocessing.get_context(ctx.get_start_method()).Queue()

    def only_get(self) -> None:
        self._queue._writer.close()

    def flush(self) -> None:
        if not self._queue._writer.closed:
            super().flush()


class SharedMemoryRoad(SimpleQueueRoad):
    """A block for each item, which its receiver attaches to by name, and unlinks."""

    exact = False  # a name ends with its creator

    def __init__(self, ctx: Any) -> None:
        super().__init__(ctx)
        self._blocks: list[SharedMemory] = []

    def put(self, item: Item) -> None:
        sender, number, body, memory, trap = item
        block = SharedMemory(create=True, size=len(body))
        block.buf[:] = body  # type: ignore[index]
        self._blocks.append(block)
        super().put((sender, number, block.name, memory, trap))

    def get(self, timeout: float) -> Item:
        sender, number, name, memory, trap = super().get(timeout)
        try:
            block = SharedMemory(name)
        except FileNotFoundError:
            return sender, number, None, memory, trap
        body = bytes(block.buf or b"")
        block.close()
        block.unlink()
        return sender, number, body, memory, trap

    def close(self) -> None:
        for block in self._blocks:
            block.close()
            with contextlib.suppress(FileNotFoundError):  # its receiver has done that
                block.unlink()
        super().close()


class RangeLockRoad(PipeRoad):
    """A mailbox in shared memory, under a lock: how many were put and taken, 8 bytes each, then 256 for each item.

    No handle fits in. A trap goes off under the lock, before anything counts.
    """

    SLOT = 256
    big = False
    ends = False

    def __init__(self, ctx: Any) -> None:
        self._memory = Memory(self.SLOT * 256)
        self._lock: Any = self._memory.lock()

    def _count(self, which: int) -> int:
        return int.from_bytes(self._memory.pread(8, 8 * which), "little")

    def _set_count(self, which: int, count: int) -> None:
        self._memory.pwrite(count.to_bytes(8, "little"), 8 * which)

    def put(self, item: Item) -> None:
        sender, number, body, memory, trap = item
        memory.close()
        with self._lock:
            count = self._count(0)
            slot = pickle.dumps((sender, number, body, trap is not None))
            self._memory.pwrite(slot.ljust(self.SLOT), (count + 1) * self.SLOT)
            if trap is not None:
                at("in a callback")
            self._set_count(0, count + 1)

    def get(self, timeout: float) -> Item:
        deadline = time.monotonic() + timeout
        while True:
            with self._lock:
                count = self._count(1)
                if count < self._count(0):
                    slot = self._memory.pread(self.SLOT, (count + 1) * self.SLOT)
                    sender, number, body, trapped = pickle.loads(slot)
                    if trapped:
                        at("in a callback")
                    self._set_count(1, count + 1)
                    return sender, number, body, Memory.from_bytes(content(sender, number, 50)), None
            if time.monotonic() > deadline:
                raise Timeout
            time.sleep(0.001)

    def only_get(self) -> None:
        pass

    def close(self) -> None:
        self._memory.close()


class RobustLockRoad(RangeLockRoad):
    def __init__(self, ctx: Any) -> None:
        super().__init__(ctx)
        self._lock = RobustLock()


ROADS: dict[str, type[PipeRoad]] = {
    "Pipe": PipeRoad,
    "SimpleQueue": SimpleQueueRoad,
    "Queue": QueueRoad,
    "JoinableQueue": JoinableQueueRoad,
    "stock Pipe": StockPipeRoad,
    "stock Queue": StockQueueRoad,
    "SharedMemory": SharedMemoryRoad,
    "RangeLock": RangeLockRoad,
    "RobustLock": RobustLockRoad,
}
