"""Rows on pools: arrays and frames, as copies and by reference."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Sequence
from functools import partial
from multiprocessing.reduction import ForkingPickler
from multiprocessing.shared_memory import SharedMemory
from typing import Any

import numpy as np

from mpmemory import arrays

from .. import tasks
from ..measure import MEMCPY, Comparison, Side, Target
from ..peers.pools import POOLS, Executor, Joblib, Ours, Ray, Stock, Torch, Workers
from ..session import Session
from .channels import SIZES, copy_twice
from .memory import GB, KB, MB, size_of
from .tasks import pools

Array = np.ndarray[Any, Any]

FASTER_THAN_STOCK = {128 * KB: 3, MB: 25, 16 * MB: 30, 64 * MB: 35, 256 * MB: 40}
MAIN = [Ours.name, Stock.name, Executor.name, Joblib.name, Ray.name]


def echo(session: Session) -> Generator[Comparison, None, None]:
    """How long does an array take to a worker and back?

    The array is in private memory, and both sides own what they get, but with Ray and torch. joblib writes
    arguments of 1 MB and more to a file, which the worker maps. Ray copies them to its store; what comes back is a
    read-only array there. torch gets tensors, moves each to shared memory once, and sends it there and back by
    reference: one copy, and the result is shared with the worker. The limit is copying the array twice within one
    process, between warm buffers: once for each direction.
    """
    with contextlib.ExitStack() as stack:
        started = pools(session, stack, list(POOLS))
        for size in session.sizes(SIZES):
            array = np.ones(size // 8)
            targets = []
            if size in FASTER_THAN_STOCK:
                targets.append(Target("faster", FASTER_THAN_STOCK[size], Stock.name))
            if size >= MB:
                targets += [Target("faster", 10, Joblib.name), Target("faster", 2, Ray.name)]
            yield Comparison(
                f"{size_of(size)} there and back",
                [
                    *(Side(pool.name, partial(_echo, pool, array)) for pool in started),
                    Side(MEMCPY, partial(copy_twice, array, np.ones_like(array)), floor=True),
                ],
                "echo of an array through a pool",
                size,
                "size in bytes",
                targets=targets,
            )


def _echo(pool: Workers, array: Array) -> None:
    pool.apply(tasks.same, pool.give(array))


def argument(session: Session) -> Generator[Comparison, None, None]:
    """How long does an array take to a worker, which returns its length?

    As in `echo`; the limit is copying it once.
    """
    return _one_way(
        session, "an array as an argument", lambda pool, array: partial(pool.apply, tasks.length, pool.give(array))
    )


def result(session: Session) -> Generator[Comparison, None, None]:
    """How long does an array take from the worker that makes it (`numpy.ones`)?

    As in `echo`; the limit is copying it once. Making it is in all of the times, but in that of the limit.
    """
    return _one_way(session, "an array as a result", lambda pool, array: partial(pool.apply, tasks.ones, array.size))


def _one_way(
    session: Session, group: str, run: Callable[[Workers, Array], Callable[[], object]]
) -> Generator[Comparison, None, None]:
    with contextlib.ExitStack() as stack:
        started = pools(session, stack, MAIN)
        for size in session.sizes(SIZES):
            array = np.ones(size // 8)
            yield Comparison(
                size_of(size),
                [
                    *(Side(pool.name, run(pool, array)) for pool in started),
                    Side(MEMCPY, partial(np.copyto, np.ones_like(array), array), floor=True),
                ],
                group,
                size,
                "size in bytes",
            )


def results_kept(session: Session) -> Generator[Comparison, None, None]:
    """How long do 1,000 results of 600 KB take, by imap, that are all kept?

    So that ours cannot use the same memory again and again: beyond some results, it copies.
    """
    count = 10 if session.quick else 1000
    with contextlib.ExitStack() as stack:
        started = pools(session, stack, [Ours.name, Stock.name])
        yield Comparison(
            f"{count:,} of them",
            [Side(pool.name, partial(_keep, pool, count)) for pool in started],
            "results that are kept",
        )


def _keep(pool: Workers, count: int) -> None:
    kept = list(pool.imap(tasks.ones, [75_000] * count))
    assert len(kept) == count


def shared(session: Session) -> Generator[Comparison, None, None]:
    """What does it cost to give one array to 100 tasks, each of which looks at one number of it?

    Ours: an array of `mpmemory.arrays`. Ray: put into the store, once, before. torch: a tensor moved to shared
    memory, before. joblib: the array, which it writes to a file at each call ("memmapping"), as it does when one
    calls it. "by name": each task of a stock Pool attaches to a `SharedMemory`. "copies" are arrays in private
    memory, one for each task; they are here at 4 MB only, since it takes minutes at 1 GB.
    """
    large, middle, small = (4 * MB, 2 * MB, MB) if session.quick else (GB, 4 * MB, MB)
    with contextlib.ExitStack() as stack:
        started = pools(session, stack, [Ours.name, Stock.name, Joblib.name, Ray.name, Torch.name])
        ours, stock = started[0], started[1]
        references = {pool.name: pool for pool in started if pool is not stock}
        one = ours.share(np.ones(small // 8))
        for size in (large, middle):
            array = np.ones(size // 8)
            named = SharedMemory(create=True, size=size)
            stack.callback(named.unlink)
            stack.callback(named.close)
            sides = [Side(name, partial(_share, pool, pool.share(array))) for name, pool in references.items()]
            sides.append(Side("by name", partial(_map, stock, tasks.first_number_by_name, named.name)))
            targets = []
            if size == large:
                sides.append(Side(f"mpmemory, {size_of(small)}", partial(_share, ours, one)))
                targets = [Target("within", 1.2, sides[-1].name), Target("faster", 5, Joblib.name)]
            else:
                sides += [Side(f"copies, {pool.name}", partial(_share, pool, array)) for pool in (ours, stock)]
                sides.append(Side("nothing, mpmemory", partial(_map, ours, tasks.same, 0), floor=True))
            yield Comparison(
                f"{size_of(size)} to 100 tasks", sides, f"an array of {size_of(size)} for 100 tasks", targets=targets
            )


def _share(pool: Workers, item: Any) -> None:
    pool.map(tasks.first_number, [item] * 100)


def _map(pool: Workers, function: Callable[..., Any], item: Any) -> None:
    pool.map(function, [item] * 100)


def dataframe(session: Session) -> Generator[Comparison, None, None]:
    """How long does a pandas DataFrame take to a worker and back?

    100 MB: ten columns of floats, two of ints, one of categories.
    """
    with session.attempt("pandas"), contextlib.ExitStack() as stack:
        frame = _frame(10_000 if session.quick else 1_031_000)
        started = pools(session, stack, MAIN)
        nbytes = int(frame.memory_usage().sum())
        yield Comparison(
            f"{nbytes / 1e6:.0f} MB there and back",
            [Side(pool.name, partial(pool.apply, tasks.same, frame)) for pool in started],
            "echo of a DataFrame",
        )


def _frame(rows: int) -> Any:
    import pandas as pd

    numbers = np.arange(rows * 10, dtype="f8").reshape(rows, 10)
    return pd.DataFrame(
        {
            **{f"float{i}": column for i, column in enumerate(numbers.T)},
            **{f"int{i}": np.arange(rows) + i for i in range(2)},
            "kind": pd.Categorical.from_codes(np.arange(rows) % 3, ["a", "b", "c"]),
        }
    )


def small_arrays(session: Session) -> Generator[Comparison, None, None]:
    """What do 100 small shared arrays cost, and what do private ones pay for `mpmemory.arrays` when pickled?

    Small ones of ours share slabs. `mpmemory.arrays` looks at each array that multiprocessing pickles.
    """
    yield Comparison(
        "100 arrays of 100 numbers, made and dropped",
        [
            Side("mpmemory.arrays", partial(_make_100, partial(arrays.zeros, 100))),
            Side("in SharedMemory each", partial(_make_100, _array_in_shared_memory)),
            Side("in private memory", partial(_make_100, partial(np.zeros, 100)), floor=True),
        ],
        "small arrays",
    )
    kinds: Sequence[tuple[str, Array]] = (("", np.zeros(100)), (", not contiguous", np.zeros((20, 20))[:, ::2]))
    for remark, array in kinds:
        yield Comparison(
            f"pickling {array.size} private numbers{remark}",
            [
                Side("with mpmemory.arrays", partial(ForkingPickler.dumps, array)),
                Side("without", partial(_Without.dumps, array), floor=True),
            ],
            "pickling private arrays",
        )


class _Without(ForkingPickler):
    """The pickler of multiprocessing as it is if `mpmemory.arrays` is never imported."""

    _extra_reducers = {  # noqa: RUF012
        kind: reduce
        for kind, reduce in ForkingPickler._extra_reducers.items()  # type: ignore[attr-defined]
        if kind is not np.ndarray
    }


def _make_100(make: Callable[[], object]) -> None:
    kept = [make() for _ in range(100)]
    del kept


def _array_in_shared_memory() -> Any:
    memory = SharedMemory(create=True, size=800)
    array: Array = np.ndarray((100,), buffer=memory.buf)
    memory.unlink()
    return memory, array
