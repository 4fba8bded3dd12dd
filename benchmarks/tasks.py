"""What the workers do. They import this file, so it imports next to nothing."""

from __future__ import annotations

import os
import signal
import time
from typing import Any


def same(item: Any) -> Any:
    """Return what came."""
    return item


def length(item: Any) -> int:
    """Take something, and return next to nothing."""
    return len(item)


def size(item: Any) -> int:
    """Take a handle, and return its size in bytes."""
    return int(item.size)


def ones(count: int) -> Any:
    """Make an array of float64."""
    import numpy as np

    return np.ones(count)


def first_number(array: Any) -> float:
    """Look at one number of an array."""
    return float(array[0])


def first_number_by_name(name: str) -> float:
    """Attach to a SharedMemory, and look at one number of it."""
    from multiprocessing.shared_memory import SharedMemory

    memory = SharedMemory(name)
    assert memory.buf is not None
    try:
        return float(memory.buf[0])
    finally:
        memory.close()


def sleep(seconds: float) -> int:
    """Take some time, and return the process's id."""
    time.sleep(seconds)
    return os.getpid()


def first_number_and_sleep(array: Any) -> None:
    """Look at an array, and take a minute."""
    first_number(array)
    time.sleep(60)


def die(note: str | None = None) -> None:
    """Be killed, and write down when."""
    if note:
        with open(note, "w") as file:
            file.write(str(time.monotonic()))
    os.kill(os.getpid(), signal.SIGKILL)
