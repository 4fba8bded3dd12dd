"""The rows, by subject: each a generator of comparisons, whose docstring asks the question and says how and how far."""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import Any

from ..measure import Comparison, Measured
from ..session import Session
from . import arrays, channels, deaths, drop_ins, growth, locks, memory, processes, tasks

Row = Callable[[Session], Generator[Comparison | Measured, None, None] | Any]

ROWS: dict[str, Row] = {
    "echo": arrays.echo,
    "argument": arrays.argument,
    "result": arrays.result,
    "results-kept": arrays.results_kept,
    "shared": arrays.shared,
    "dataframe": arrays.dataframe,
    "small-arrays": arrays.small_arrays,
    "echo-pipe": channels.echo_pipe,
    "message": channels.message,
    "handle": channels.handle,
    "handle-pool": tasks.handle_pool,
    "noop": tasks.noop,
    "create": memory.create,
    "fill": memory.fill,
    "live": memory.live,
    "drop-ins": drop_ins.drop_ins,
    "lock": locks.lock,
    "worker-killed": deaths.worker_killed,
    "tree-killed": deaths.tree_killed,
    "start": processes.start,
    "import": processes.imports,
    "program": processes.program,
    "tasks": growth.many_tasks,
    "workers": growth.many_workers,
    "memories": growth.many_memories,
}

# They fork this process, which should be small then: they run before others have filled it.
FIRST = ("start", "lock")


def question(row: str) -> str:
    """Return what a row asks."""
    return (ROWS[row].__doc__ or "").partition("\n")[0]


def remarks(row: str) -> str:
    """Return how a row asks it, and what it cannot tell."""
    lines = (ROWS[row].__doc__ or "").splitlines()[1:]
    return "\n".join(line.strip() for line in lines).strip()
