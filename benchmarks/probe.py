"""Fresh programs for what cannot be measured in one that has done other things: `python -m benchmarks.probe`.

A program says a line of JSON; it lasts until its standard input ends. This file is also imported by the workers
of the pools that it starts, so it imports next to nothing.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import closing
from typing import Any

from . import tasks

PATIENCE = 3.0  # seconds: what has not come by then never comes
TASKS = 10


def say(**values: Any) -> None:
    print(json.dumps(values), flush=True)


def pool(name: str) -> None:
    """Start two workers, tell when the first result is there, and then send back arrays of the sizes that are asked."""
    from .peers.pools import POOLS

    with closing(POOLS[name](2)) as workers:
        say(result=workers.apply(tasks.same, 1))
        for line in sys.stdin:
            import numpy as np

            array = np.ones(int(line) // 8)
            for _ in range(3):
                workers.apply(tasks.same, workers.give(array))
            say(echoed=array.nbytes)


def deaths(name: str) -> None:
    """Have a worker killed among other tasks: say how soon its error comes, and how many of the others are done."""
    from .peers.pools import POOLS

    with tempfile.NamedTemporaryFile("r") as note, closing(POOLS[name](2)) as workers:
        workers.apply(tasks.same, 1)
        before = [workers.submit(tasks.sleep, 0.01) for _ in range(TASKS // 2)]
        killed = workers.submit(tasks.die, note.name)
        others = [*before, *_submitted(workers, TASKS - len(before))]
        seconds = None
        try:
            killed(PATIENCE)
        except Exception as error:
            if not _is_timeout(error):
                seconds = time.monotonic() - float(note.read())
        say(seconds=seconds, others=_finished(others), after=_finished(_submitted(workers, TASKS)))


def _submitted(workers: Any, count: int) -> list[Any]:
    waits = []
    for _ in range(count):
        try:
            waits.append(workers.submit(tasks.sleep, 0.01))
        except Exception:  # the pool is broken
            break
    return waits


def _finished(waits: list[Any]) -> int:
    end = time.monotonic() + PATIENCE
    count = 0
    for wait in waits:
        try:
            wait(max(0.01, end - time.monotonic()))
        except Exception:
            continue
        count += 1
    return count


def _is_timeout(error: Exception) -> bool:
    return "Timeout" in type(error).__name__  # each package has its own


def live(name: str, count: str, size: str) -> None:
    """Make many blocks and keep them: say what they take in time, descriptors and memory."""
    import resource

    from .peers.blocks import BLOCKS
    from .processes import pss

    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    kind, data = BLOCKS[name], b"\xa5" * int(size)
    kind(len(data)).free()
    before = len(os.listdir("/proc/self/fd")), pss(os.getpid())
    start = time.perf_counter()
    blocks = []
    for _ in range(int(count)):
        blocks.append(kind(len(data)))
        blocks[-1].fill(data)
    seconds = time.perf_counter() - start
    fds, memory = len(os.listdir("/proc/self/fd")) - before[0], pss(os.getpid()) - before[1]
    start = time.perf_counter()
    while blocks:
        blocks.pop().free()
    say(seconds=seconds, fds=fds, memory=memory, freed=time.perf_counter() - start)


def hold(name: str, size: str, label: str) -> None:
    """Fill shared memory, and wait to be killed, along with a child that has it, too."""
    if name == "joblib":
        _hold_joblib(int(size))
    from .peers.blocks import BLOCKS

    block = BLOCKS[name](int(size), label)
    block.fill(b"\xa5" * int(size))
    if os.fork():
        say(ready=True)
    while True:
        time.sleep(60)


def _hold_joblib(size: int) -> None:
    import threading

    import numpy as np
    from joblib import Parallel, delayed

    array = np.ones(size // 8)
    Parallel(n_jobs=2)(delayed(len)(array) for _ in range(2))
    threading.Timer(1, say, kwargs={"ready": True}).start()  # by then the array is in its file
    Parallel(n_jobs=2)(delayed(tasks.first_number_and_sleep)(array) for _ in range(2))


PROGRAMS: dict[str, Callable[..., None]] = {"pool": pool, "deaths": deaths, "live": live, "hold": hold}

if __name__ == "__main__":
    PROGRAMS[sys.argv[1]](*sys.argv[2:])
