"""Rows on starting things: a process with handles, the import, a whole program."""

from __future__ import annotations

import contextlib
import multiprocessing
import subprocess
import sys
import time
from collections.abc import Generator, Sequence
from functools import partial

import mpmemory
from mpmemory import Memory

from ..measure import Comparison, Measured, Side, Target
from ..peers.pools import POOLS
from ..processes import Program, pss, tree
from ..session import Session
from .programs import Values, gather

MODULES = "multiprocessing's modules"


def start(session: Session) -> Generator[Comparison, None, None]:
    """How much longer do start and end of a process take if 1 or 100 handles are among its arguments?

    Against no handle, and no handle in a child that imports `mpmemory` all the same, since any handle makes it do
    so. The child calls `len()`, and the page cache is warm. A child of a program that imports more takes longer,
    with handles or without.
    """
    with contextlib.ExitStack() as stack:
        handles = [stack.enter_context(Memory(4096)) for _ in range(100)]
        for method in multiprocessing.get_all_start_methods():
            items: dict[str, Sequence[object]] = {
                "1 handle": handles[:1],
                "100 handles": handles,
                "none": [],
                "none, but the import": [Memory],
            }
            yield Comparison(
                method,
                [Side(name, partial(_start, method, each), floor="none" in name) for name, each in items.items()],
                "start and end of a process",
            )


def _start(method: str, items: Sequence[object]) -> None:
    # A built-in as the target: the child imports nothing but what its arguments need.
    process = mpmemory.get_context(method).Process(target=len, args=(items,))
    process.start()
    process.join()
    if process.exitcode != 0:
        raise RuntimeError(f"the {method} child ended with {process.exitcode}")


def imports(session: Session) -> Generator[Comparison, None, None]:
    """How much longer does `import mpmemory` take than the modules of multiprocessing behind it?

    In a fresh interpreter, with compiled modules. With PYTHONDONTWRITEBYTECODE set, or in a folder that cannot be
    written to, each interpreter compiles the package again.
    """
    programs = {
        "import mpmemory": "import mpmemory",
        MODULES: "import multiprocessing.context, multiprocessing.pool, multiprocessing.connection",
        "no import": "pass",
    }
    yield Comparison(
        "python -c",
        [Side(name, partial(_python, code), floor="mpmemory" not in name) for name, code in programs.items()],
        "a fresh interpreter",
        targets=[Target("more", 0.015, MODULES)],
    )


def _python(code: str) -> None:
    subprocess.run([sys.executable, "-c", code], check=True)


def program(session: Session) -> Generator[Measured, None, None]:
    """What does a whole program take that starts a pool of two: time until the first result, and memory?

    The time is from the start of the interpreter until the first result is printed, imports included. Memory is the
    proportional set size (PSS) of the program and all that descends from it: with the workers idle after the first
    task, and its peak while an array of 64 MB goes to a worker and back three times, looked at every 20 ms. Pages
    of shared memory that no process has mapped are not in it. mpire, in this use, has one pool for each kind of
    call.
    """
    size = 1 << 20 if session.quick else 64 << 20

    def use(program: Program, _: str) -> Values:
        program.hear()
        seconds = time.perf_counter() - program.started
        idle = sum(pss(pid) for pid in tree(program.pid))
        return {"seconds": seconds, "idle": idle, "peak": program.peak_of(str(size))}

    samples = gather(session, POOLS, lambda name: ["pool", name], use)
    group = "a program with a pool of two"
    yield Measured("time from the start to the first result", samples["seconds"], group)
    yield Measured("memory after it (PSS of the tree)", samples["idle"], group, unit="B")
    yield Measured(f"peak while {size >> 20} MB go there and back", samples["peak"], group, unit="B")
