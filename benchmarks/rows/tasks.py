"""Rows on pools: tasks that do nothing, and handles."""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Iterator
from functools import partial
from typing import Any

from mpmemory import Memory

from .. import tasks
from ..measure import Comparison, Side, Target, shielded
from ..peers.pools import POOLS, Ours, Stock, Torch, Workers
from ..session import Session

COUNT = 1000


def pools(session: Session, stack: contextlib.ExitStack, names: list[str], workers: int = 2) -> list[Workers]:
    """Start pools, and let all of their workers work."""
    working: list[Workers] = []
    for pool in session.start(stack, [POOLS[name] for name in names], workers):
        with session.attempt(pool.name, ours=not working), shielded():
            pool.map(tasks.same, range(10 * workers))
            working.append(pool)
    return working


def noop(session: Session) -> Generator[Comparison, None, None]:
    """What does a task cost that does nothing: one at a time (apply), 1,000 by map, 1,000 by imap, with 1 to 8 workers?

    Tasks go one by one: chunksize 1 (joblib: batch_size 1). Chunks make all of them cheaper; then it is the chunk
    that costs this. torch is not here: its Pool is the stock one. With more workers than processors it is the
    scheduler that is measured.
    """
    names = [name for name in POOLS if name != Torch.name]
    count = COUNT // 10 if session.quick else COUNT
    for workers in (1, 2) if session.quick else (1, 2, 4, 8):
        with contextlib.ExitStack() as stack:
            started = pools(session, stack, names, workers)
            for what, group, target in (
                ("apply", "latency of a task that does nothing", 2.0),
                ("map", f"{COUNT:,} tasks that do nothing, by map", None),
                ("imap", f"{COUNT:,} tasks that do nothing, by imap", 1.5),
            ):
                targets = [Target("faster", target, Stock.name)] if target and workers == 2 else []
                yield Comparison(
                    f"{what}, {workers} worker{'s' * (workers > 1)}",
                    [Side(pool.name, _noops(what, pool, count)) for pool in started],
                    group,
                    workers,
                    "workers",
                    targets=targets,
                )


def _noops(what: str, pool: Workers, count: int) -> Any:
    if what == "apply":
        return partial(pool.apply, tasks.same, 1)
    return partial(_map if what == "map" else _imap, pool, count)


def _map(pool: Workers, count: int) -> None:
    assert len(pool.map(tasks.same, range(count))) == count


def _imap(pool: Workers, count: int) -> None:
    assert drain(pool.imap(tasks.same, range(count))) == count


def drain(results: Iterator[Any]) -> int:
    """Count results, and keep none."""
    return sum(1 for _ in results)


def handle_pool(session: Session) -> Generator[Comparison, None, None]:
    """What does it cost to send a handle through a pool and back, next to an int?

    In the stock pool, handles are handed out by a thread of their sender (multiprocessing's resource sharer).
    """
    with contextlib.ExitStack() as stack:
        ours, stock = pools(session, stack, [Ours.name, Stock.name])
        memory = stack.enter_context(Memory(4096))
        yield Comparison(
            "there and back",
            [
                Side("a handle, mpmemory", partial(_echo_handle, ours, memory)),
                Side("an int, mpmemory", partial(ours.apply, tasks.same, 1), floor=True),
                Side("a handle, multiprocessing", partial(_echo_handle, stock, memory)),
                Side("an int, multiprocessing", partial(stock.apply, tasks.same, 1), floor=True),
            ],
            "handles through a pool",
            targets=[Target("within", 1.3, "an int, mpmemory")],
        )


def _echo_handle(pool: Workers, memory: Memory) -> None:
    pool.apply(tasks.same, memory).close()
