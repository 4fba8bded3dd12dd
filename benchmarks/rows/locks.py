"""The row on locks."""

from __future__ import annotations

import fcntl
import multiprocessing
import os
import struct
from collections.abc import Generator
from functools import partial
from typing import Any

import mpmemory
from mpmemory import CACHE_LINE_SIZE, PAGE_SIZE, Memory, SharedBuffer

from ..measure import Comparison, Measured, Side, interleave, shielded
from ..session import Session

PROCESSES = 4
TURNS = 2000


def lock(session: Session) -> Generator[Comparison | Measured, None, None]:
    """What do `RangeLock` and `RobustLock` cost, by one process alone and fought for by four, and how fair are they?

    Ours are system calls, also when nobody else wants the lock; `multiprocessing.Lock` is a semaphore in memory,
    which stays locked for ever when its holder dies. "bare fcntl" is the system calls behind RangeLock. Fairness is
    the least share of a process to the greatest: 1 is fair.
    """
    memory = Memory(PAGE_SIZE)
    stock = multiprocessing.get_context("fork").Lock()
    locks = {"RangeLock": memory.lock(0, 8), "RobustLock": mpmemory.RobustLock(), "multiprocessing.Lock": stock}
    description = os.open(f"/proc/self/fd/{memory.fileno()}", os.O_RDWR | os.O_CLOEXEC)
    try:
        yield Comparison(
            "acquired and released, alone",
            [
                *(Side(name, partial(_lock, each)) for name, each in locks.items()),
                Side("bare fcntl", partial(_lock_bare, description), floor=True),
            ],
            "locks",
        )
    finally:
        os.close(description)
    fairness: dict[str, list[float]] = {name: [] for name in locks}
    contended = Comparison(
        f"fought for by {PROCESSES} processes, {TURNS:,} turns",
        [Side(name, partial(_contend, each, fairness[name])) for name, each in locks.items()],
        "locks",
    )
    yield interleave(contended, session)
    yield Measured("fairness, of 1", fairness, "locks", unit="")


def _lock(lock: Any) -> None:
    lock.acquire()
    lock.release()


_WRITE_LOCK, _NO_LOCK = (struct.pack("hhqqi4x", kind, os.SEEK_SET, 0, 8, 0) for kind in (fcntl.F_WRLCK, fcntl.F_UNLCK))


def _lock_bare(fd: int) -> None:
    fcntl.fcntl(fd, 37, _WRITE_LOCK)  # F_OFD_SETLK
    fcntl.fcntl(fd, 37, _NO_LOCK)


def _contend(lock: Any, fairness: list[float]) -> None:
    """Have processes take turns until they have had the lock so often, and note how evenly."""
    counts = SharedBuffer((PROCESSES + 1) * CACHE_LINE_SIZE)
    fork = multiprocessing.get_context("fork")
    with shielded():
        children = [fork.Process(target=_take, args=(lock, counts, index)) for index in range(PROCESSES)]
        for child in children:
            child.start()
    for child in children:
        child.join()
    shares = counts.view("q")[:: CACHE_LINE_SIZE // 8].tolist()[:PROCESSES]
    fairness.append(min(shares) / max(shares))


def _take(lock: Any, counts: SharedBuffer, index: int) -> None:
    numbers = counts.view("q")
    mine, total = index * CACHE_LINE_SIZE // 8, PROCESSES * CACHE_LINE_SIZE // 8
    while numbers[total] < TURNS:
        with lock:
            numbers[total] += 1
        numbers[mine] += 1
