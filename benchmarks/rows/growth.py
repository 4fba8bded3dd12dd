"""Rows on how costs grow: with the number of tasks, of workers, of live memories."""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Generator
from functools import partial
from typing import Any

from mpmemory import Memory

from .. import tasks
from ..measure import Comparison, Measured, Side, Target, interleave
from ..peers import blocks
from ..peers.pools import POOLS, Executor, Joblib, Ours, Stock
from ..session import Session
from .tasks import drain, pools

FLAT = 1.5  # the cost of one among the most, next to that of one among few: more than this is no noise


def many_tasks(session: Session) -> Generator[Measured, None, None]:
    """Does a task cost the same among 100 and among 1,000,000?

    Tasks that do nothing, by imap with chunksize 1 and two workers; the time is that of one task.
    ProcessPoolExecutor and joblib are left out above 100,000 and 10,000, since they take longer.
    """
    most = {Ours.name: 10**6, Stock.name: 10**6, Executor.name: 10**5, Joblib.name: 10**4}
    counts = (100, 1000) if session.quick else (100, 1000, 10_000, 100_000, 1_000_000)
    found = []
    with contextlib.ExitStack() as stack:
        started = pools(session, stack, list(most))
        for count in counts:
            comparison = Comparison(
                f"{count:,} tasks",
                [Side(pool.name, partial(_drain, pool, count)) for pool in started if count <= most[pool.name]],
                "time per task, of many",
                count,
                "tasks",
                rounds=max(1, min(15, 50_000 // count)),
            )
            measured = interleave(comparison, session)
            found.append(measured.scaled(1 / count))
            yield found[-1]
    yield _growth("a task among the most to one among 1,000", found[-1], found[1])


def _drain(pool: Any, count: int) -> None:
    drain(pool.imap(tasks.same, range(count)))


def _growth(what: str, last: Measured, first: Measured) -> Measured:
    """Return how much more one costs at the end than at the start."""
    samples = {
        name: [statistics.median(last.samples[name]) / statistics.median(first.samples[name])]
        for name in last.samples
        if name in first.samples
    }
    return Measured(what, samples, "growth", unit="", targets=[Target("at most", FLAT)])


def many_workers(session: Session) -> Generator[Measured, None, None]:
    """Does a worker cost the same among 1 and among 32: started, used by one task, and ended?

    The time is that of one worker. What workers cost in throughput is in `noop`.
    """
    found = []
    for count in (1, 2) if session.quick else (1, 2, 4, 8, 16, 32):
        comparison = Comparison(
            f"{count} worker{'s' * (count > 1)}",
            [Side(name, partial(_start, name, count)) for name in (Ours.name, Stock.name, Executor.name)],
            "time per worker of a pool",
            count,
            "workers",
            rounds=5,
        )
        measured = interleave(comparison, session)
        found.append(measured.scaled(1 / count))
        yield found[-1]
    yield _growth("a worker among the most to one of two", found[-1], found[1])


def _start(name: str, count: int) -> None:
    with contextlib.closing(POOLS[name](count)) as pool:
        pool.map(tasks.same, range(count))


def many_memories(session: Session) -> Generator[Measured, None, None]:
    """Does one more block of 4 KB cost the same among 10 and among 1,000 that are alive, and one more handle sent?

    The handle goes to a worker and back, and so have all others that are alive. 1,000 of ours are 2,000
    descriptors.
    """
    found: list[Measured] = []
    sent: list[Measured] = []
    kinds = (blocks.Ours, blocks.Stock)
    with contextlib.ExitStack() as stack:
        (pool,) = pools(session, stack, [Ours.name])
        handles = [stack.enter_context(Memory(4096))]
        alive: dict[str, list[blocks.Block]] = {kind.name: [] for kind in kinds}
        stack.callback(_free, alive)
        for count in (10, 20) if session.quick else (10, 100, 1000):
            for kind in kinds:
                while len(alive[kind.name]) < count:
                    alive[kind.name].append(kind(4096))
            handles += [stack.enter_context(Memory(4096)) for _ in range(count // 4 - len(handles))]
            pool.map(tasks.size, handles)
            one_more = Comparison(
                f"among {count:,} that are alive",
                [Side(kind.name, partial(_one_more, kind)) for kind in kinds],
                "one more block among many",
                count,
                "blocks that are alive",
            )
            found.append(interleave(one_more, session))
            yield found[-1]
            trip = Comparison(
                f"among {len(handles):,} that have been sent",
                [Side("mpmemory", partial(pool.apply, tasks.size, handles[-1]))],
                "a handle among many",
                len(handles),
                "handles that are alive",
            )
            sent.append(interleave(trip, session))
            yield sent[-1]
    yield _growth("a block among the most to one among 10", found[-1], found[0])
    yield _growth("a handle sent among the most to one among few", sent[-1], sent[0])


def _free(alive: dict[str, list[blocks.Block]]) -> None:
    for block in (block for each in alive.values() for block in each):
        block.free()


def _one_more(kind: type[blocks.Block]) -> None:
    block = kind(4096)
    block.view[0] = 1
    block.free()
