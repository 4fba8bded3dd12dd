"""A program that uses everything once, and prints what came of it, as JSON: "done", or the error. It never hangs.

The start method is that of the environment, START_METHOD. Nothing is asserted, so that `python -O` checks the same.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
from collections.abc import Callable
from multiprocessing.pool import MaybeEncodingError  # type: ignore[attr-defined]
from typing import Any

import mpmemory

try:
    from mpmemory import arrays
except ImportError:  # no NumPy for this interpreter
    arrays = None  # type: ignore[assignment]

MANY = 300


def add(values: Any) -> Any:
    return values + 1


def add_byte(data: bytes) -> bytes:
    return data + b"x"


def check(found: object, expected: object) -> None:
    if found != expected:
        raise ValueError(f"expected {expected!r}, found {found!r}")


def upper(handle: mpmemory.Memory) -> mpmemory.Memory:
    with handle.map() as buffer:
        buffer[:] = buffer.get_bytes().upper()
    return handle


def memory() -> None:
    with mpmemory.Memory(100_000) as handle, handle.map() as buffer:
        buffer.clear(7)
        handle.grow(200_000)
        check(handle.pread(1, 99_999), b"\7")


def memory_of_all_kinds() -> None:
    kept = [mpmemory.SharedBuffer(4096) for _ in range(MANY)]
    for buffer in kept:
        buffer[0] = 1


def queue() -> None:
    ours = mpmemory.Queue()
    try:
        for _ in range(3):
            ours.put(bytes(800_000))
        check([len(ours.get(timeout=30)) for _ in range(3)], [800_000] * 3)
    finally:
        ours.close()
        ours.join_thread()


def handles_in_a_pipe() -> None:
    left, right = mpmemory.Pipe()
    with left, right, mpmemory.Memory.from_bytes(b"text") as handle:
        left.send([handle] * 5)
        check([each.pread(4) for each in right.recv()], [b"text"] * 5)


def pool() -> None:
    with mpmemory.Pool(2) as workers:
        check(workers.map(add_byte, [bytes(400_000)] * 6), [bytes(400_000) + b"x"] * 6)
        with mpmemory.Memory.from_bytes(b"text") as handle:
            check(workers.apply(upper, (handle,)).pread(4), b"TEXT")
        workers.close()
        workers.join()


def shared_arrays() -> None:
    shared = arrays.zeros(100_000)
    with mpmemory.Pool(2) as workers:
        check(sum(each.sum() for each in workers.map(add, [shared[part::4] for part in range(4)])), 100_000)
        workers.close()
        workers.join()


def shared_memory() -> None:
    block = mpmemory.SharedMemory(create=True, size=10_000)
    try:
        other = mpmemory.SharedMemory(block.name)
        other.buf[9_999] = 5
        check(block.buf[9_999], 5)
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
    if method := os.environ.get("START_METHOD"):
        multiprocessing.set_start_method(method)
    wanted = sys.argv[1:]
    found = {}
    for action in TOUR:
        if (wanted and action.__name__ not in wanted) or (action is shared_arrays and arrays is None):
            continue
        try:
            action()
        except (OSError, mpmemory.MpMemoryError, MemoryError, MaybeEncodingError) as error:
            found[action.__name__] = f"{type(error).__name__}: {error}"
            del error
        else:
            found[action.__name__] = "done"
    print(json.dumps(found))
    # And after all that nothing has stayed open but what is kept for the next use.
    if os.path.exists("/proc/self/fd") and len(os.listdir("/proc/self/fd")) > 60:
        raise SystemExit("descriptors are left open")


if __name__ == "__main__":
    main()
