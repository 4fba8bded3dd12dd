"""A program that uses everything once, and prints what came of it, as JSON: "done", or the error. It never hangs."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from typing import Any

import numpy as np

import mpmemory
from mpmemory import arrays

MANY = 300


def add(values: Any) -> Any:
    return values + 1


def upper(handle: mpmemory.Memory) -> mpmemory.Memory:
    with handle.map() as buffer:
        buffer[:] = buffer.get_bytes().upper()
    return handle


def memory() -> None:
    with mpmemory.Memory(100_000) as handle, handle.map() as buffer:
        buffer.clear(7)
        handle.grow(200_000)
        assert handle.pread(1, 99_999) == b"\7"


def memory_of_all_kinds() -> None:
    kept = [mpmemory.SharedBuffer(4096) for _ in range(MANY)]
    for buffer in kept:
        buffer[0] = 1


def queue() -> None:
    ours = mpmemory.Queue()
    try:
        for _ in range(3):
            ours.put(np.ones(100_000))
        assert sum(ours.get(timeout=30).sum() for _ in range(3)) == 300_000
    finally:
        ours.close()
        ours.join_thread()


def handles_in_a_pipe() -> None:
    left, right = mpmemory.Pipe()
    with left, right, mpmemory.Memory.from_bytes(b"text") as handle:
        left.send([handle] * 5)
        assert [each.pread(4) for each in right.recv()] == [b"text"] * 5


def pool() -> None:
    with mpmemory.Pool(2) as workers:
        assert sum(each.sum() for each in workers.map(add, [np.zeros(50_000)] * 6)) == 300_000
        with mpmemory.Memory.from_bytes(b"text") as handle:
            assert workers.apply(upper, (handle,)).pread(4) == b"TEXT"
        workers.close()
        workers.join()


def shared_arrays() -> None:
    shared = arrays.zeros(100_000)
    with mpmemory.Pool(2) as workers:
        assert sum(each.sum() for each in workers.map(add, [shared[part::4] for part in range(4)])) == 100_000
        workers.close()
        workers.join()


def shared_memory() -> None:
    block = mpmemory.SharedMemory(create=True, size=10_000)
    try:
        other = mpmemory.SharedMemory(block.name)
        other.buf[9_999] = 5
        assert block.buf[9_999] == 5
        other.close()
    finally:
        block.unlink()


def locks() -> None:
    with mpmemory.RobustLock():
        pass


def mapped() -> None:
    mpmemory.SharedBuffer(1 << 30)


def reserved() -> None:
    mpmemory.Memory(100 << 20, reserve=True)


TOUR: list[Callable[[], None]] = [
    memory,
    memory_of_all_kinds,
    queue,
    handles_in_a_pipe,
    pool,
    shared_arrays,
    shared_memory,
    locks,
    mapped,
    reserved,
]


def main() -> None:
    wanted = sys.argv[1:]
    found = {}
    for action in TOUR:
        if wanted and action.__name__ not in wanted:
            continue
        try:
            action()
        except (OSError, mpmemory.MpMemoryError, MemoryError) as error:
            found[action.__name__] = f"{type(error).__name__}: {error}"
            del error
        else:
            found[action.__name__] = "done"
    print(json.dumps(found))
    # And after all that nothing has stayed open but what is kept for the next use.
    assert len(os.listdir("/proc/self/fd") if os.path.exists("/proc/self/fd") else ()) < 60


if __name__ == "__main__":
    main()
