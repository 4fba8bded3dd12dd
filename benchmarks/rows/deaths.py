"""Rows on processes that are killed."""

from __future__ import annotations

import os
import shutil
from collections.abc import Generator
from pathlib import Path

from ..measure import NEVER, Measured, Target
from ..peers import blocks
from ..peers.pools import POOLS, Torch
from ..probe import PATIENCE, TASKS
from ..processes import Program, still_held
from ..session import Session
from .programs import Values, gather

GROUP = "a worker is killed"


def worker_killed(session: Session) -> Generator[Measured, None, None]:
    """A worker is killed: how soon does its task fail, are the other tasks done, and does the pool go on?

    Two workers have 10 tasks of 10 ms, and one among them that kills its worker; the time is from then to the
    error. What has not come after 3 seconds never does: a stock Pool waits for ever. Then 10 more tasks are given
    to the same pool; joblib's users get new workers then without asking.
    """
    assert (TASKS, PATIENCE) == (10, 3)
    samples = gather(session, [name for name in POOLS if name != Torch.name], lambda name: ["deaths", name], _deaths)
    yield Measured("time to the error", samples["seconds"], GROUP, targets=[Target("at most", 0.05)])
    yield Measured("others done, of 10", samples["others"], GROUP, unit="", targets=[Target("at least", TASKS)])
    yield Measured("done afterwards, of 10", samples["after"], GROUP, unit="", targets=[Target("at least", TASKS)])


def _deaths(program: Program, _: str) -> Values:
    return {key: NEVER if value is None else value for key, value in program.hear().items()}


def tree_killed(session: Session) -> Generator[Measured, None, None]:
    """A program and all of its children are killed (SIGKILL) while they share 100 MB: how much of it is left?

    Files in /dev/shm, and anonymous memory that some process still holds. What is left stays until somebody removes
    it, or the machine is started anew. Helpers like the resource tracker are killed, too, as at a container's end;
    where only the program is killed, the tracker removes what `SharedMemory` left. joblib is killed while an array
    of 100 MB is with its workers. Ray is not here, since its processes are not of the program's session.
    """
    size = 2_000_000 if session.quick else 100_000_000
    names = [name for name in blocks.BLOCKS if name != blocks.Bare.name] + ["joblib"]

    def arguments(name: str) -> list[str]:
        return ["hold", name, str(size), _label(name)]

    samples = gather(session, names, arguments, _kill)
    yield Measured("left behind", samples["left"], "the whole tree is killed", unit="B", targets=[Target("at most", 0)])


def _label(name: str) -> str:
    return f"mpmemory-benchmark-{os.getpid()}-{name.replace(' ', '-')}"


def _kill(program: Program, name: str) -> Values:
    program.hear()
    mapped = program.mapped()
    program.kill()
    files = [path for path in mapped if path.exists()]
    left = sum(path.stat().st_size for path in (*files, *still_held(_label(name))))
    for path in files:
        path.unlink()
    for folder in Path("/dev/shm").glob(f"joblib_memmapping_folder_{program.pid}_*"):
        shutil.rmtree(folder)
    return {"left": left}
