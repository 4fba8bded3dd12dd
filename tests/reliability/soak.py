"""A soak: one thing done very often, while descriptors, private and shared memory are measured.

Arguments: what to do, how often. The last report has the samples: how often it was done, and what all processes of this
program had then in all: descriptors, bytes of private memory, bytes of shared memory.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from multiprocessing import forkserver, resource_tracker
from pathlib import Path
from typing import Any

import numpy as np
from supervise import failing_at_once, report, session, show_stacks_when_asked

import mpmemory
from mpmemory import Memory, SharedBuffer, testing

SAMPLES = 50
LIMIT = 30.0


def sample() -> tuple[int, int, int]:
    """Return descriptors, private bytes and shared bytes of all processes in the session."""
    count = private = 0
    shared: dict[tuple[int, int], int] = {}
    for pid in session(os.getsid(0)):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            for fd in os.listdir(f"/proc/{pid}/fd"):
                count += 1
                with contextlib.suppress(OSError):  # closed meanwhile
                    path = f"/proc/{pid}/fd/{fd}"
                    if "/memfd:" in os.readlink(path):
                        status = os.stat(path)
                        shared[status.st_dev, status.st_ino] = status.st_blocks * 512
            for line in Path(f"/proc/{pid}/status").read_text().splitlines():
                if line.startswith("RssAnon:"):
                    private += int(line.split()[1]) * 1024
    return count, private, sum(shared.values())


def work(x: Any) -> Any:
    """Return a number, or now and then an array or a handle that must be what was sent."""
    if isinstance(x, int):
        return x + 1
    return x + 1 if isinstance(x, np.ndarray) else Memory.from_bytes(x.pread(8))


def thing(number: int) -> Any:
    """Return what is sent: a number, an array of 80 KB, a handle."""
    if number % 1000 == 0:
        return Memory.from_bytes(number.to_bytes(8, "little"))
    return np.full(10_000, number) if number % 100 == 0 else number


def check(number: int, found: Any, more: int) -> None:
    if isinstance(found, Memory):
        with found:
            assert found.pread(8) == number.to_bytes(8, "little")
    else:
        assert np.all(found == number + more), number


def soak_pool(times: int) -> Iterator[int]:
    with mpmemory.get_context("forkserver").Pool(2) as pool:
        for number, result in enumerate(pool.imap(work, map(thing, range(times)))):
            check(number, result, 1)
            yield number
    pool.join()


def put_all(queue: Any, times: int) -> None:
    show_stacks_when_asked()
    for number in range(times):
        queue.put(thing(number))


def soak_queue(times: int) -> Iterator[int]:
    ctx = mpmemory.get_context("forkserver")
    queue = ctx.Queue(1000)
    child = ctx.Process(target=put_all, args=(queue, times))
    child.start()
    for number in range(times):
        check(number, queue.get(), 0)
        yield number
    child.join()
    queue.close()
    queue.join_thread()


def soak_memory(times: int) -> Iterator[int]:
    for number in range(times):
        buffer = SharedBuffer(1 << 16)
        buffer.set_value("<q", 0, number)
        assert buffer.memory.pread(8) == number.to_bytes(8, "little")
        yield number


SOAKS: dict[str, Callable[[int], Iterator[int]]] = {"pool": soak_pool, "queue": soak_queue, "memory": soak_memory}


def soak(what: str, times: int) -> list[tuple[int, ...]]:
    samples: list[tuple[int, ...]] = []
    for number in SOAKS[what](times):
        if (number + 1) % (times // SAMPLES) == 0:
            samples.append((number + 1, *sample()))
            report(done=number + 1)
    return samples


def main() -> None:
    show_stacks_when_asked()
    what, times = sys.argv[1], int(sys.argv[2])
    testing._SHM = "/dev/shm/not this one"  # see crash_program.py
    forkserver.set_forkserver_preload(["soak"])
    resource_tracker.ensure_running()
    forkserver.ensure_running()
    with testing.assert_no_leaks(timeout=LIMIT):
        samples = soak(what, times)
    report(samples=samples)


if __name__ == "__main__":
    with failing_at_once():
        main()
