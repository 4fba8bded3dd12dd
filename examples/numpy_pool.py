"""Share a NumPy array between processes: a pool normalises the rows of a large matrix, in place.

    python examples/numpy_pool.py [--size ROWSxCOLUMNS] [--workers N] [--start-method {fork,forkserver,spawn}]

The matrix is a plain numpy.ndarray in shared memory. Slices of it are the tasks: they travel by reference, and
workers write into them. The same is done in one process, and by the Pool of multiprocessing, which sends rows
there and back. There are two kinds of work, since it depends on that what is faster: one takes little longer
than copying the rows, the other a lot longer. All results are compared.
"""

import argparse
import functools
import multiprocessing
import os
import re
import time
from collections.abc import Callable
from multiprocessing.pool import Pool
from typing import Any

import mpmemory as mp

try:
    from mpmemory import arrays
except ImportError as error:
    raise SystemExit(str(error)) from None

import numpy as np
from numpy.typing import NDArray

Matrix = NDArray[np.float64]
Work = Callable[[Matrix], None]

MAX_ITEMS = 50_000_000
MAX_WORKERS = 64


def standardise(rows: Matrix) -> None:
    """Give each row mean 0 and standard deviation 1."""
    rows -= rows.mean(axis=1, keepdims=True)
    rows /= rows.std(axis=1, keepdims=True)


def standardise_robustly(rows: Matrix) -> None:
    """Give each row median 0 and median absolute deviation 1, which a few wild values do not spoil."""
    rows -= np.median(rows, axis=1, keepdims=True)
    rows /= np.median(np.abs(rows), axis=1, keepdims=True)


WORKS: dict[str, Work] = {"mean and deviation": standardise, "medians": standardise_robustly}


def cut(matrix: Matrix, parts: int) -> list[Matrix]:
    """Cut `matrix` into at most so many slices of rows: views, not copies."""
    step = -(-len(matrix) // parts)
    return [matrix[i : i + step] for i in range(0, len(matrix), step)]


# --- three ways to do it --------------------------------------------------------------------------


def in_one_process(slices: list[Matrix], work: Work) -> None:
    for rows in slices:
        work(rows)


def by_reference(pool: Pool, slices: list[Matrix], work: Work) -> None:
    """Have workers change the shared rows themselves."""
    pool.map(work, slices, chunksize=1)


def by_copy(pool: Pool, slices: list[Matrix], work: Work) -> None:
    """Send copies of the rows to workers, and put what comes back into their place."""
    for rows, changed in zip(slices, pool.imap(functools.partial(there_and_back, work), slices), strict=True):
        rows[:] = changed


def there_and_back(work: Work, rows: Matrix) -> Matrix:
    work(rows)
    return rows


# --- measuring them -------------------------------------------------------------------------------


def start_pool(ctx: Any, workers: int) -> Pool:
    """Return a pool whose workers have something behind them, so that their start is not measured."""
    pool: Pool = ctx.Pool(workers)
    pool.map(time.sleep, [0.1] * workers, chunksize=1)
    return pool


def measure(
    way: Callable[[list[Matrix], Work], None], matrix: Matrix, parts: int, original: Matrix, expected: dict[str, Matrix]
) -> dict[str, float]:
    """Do each kind of work in this way, each time on the original numbers. Return the seconds.

    Results are compared with those `expected`, or become these if there are none yet.
    """
    seconds = {}
    for name, work in WORKS.items():
        matrix[:] = original
        start = time.perf_counter()
        way(cut(matrix, parts), work)
        seconds[name] = time.perf_counter() - start
        if name not in expected:
            expected[name] = matrix.copy()
        if not np.array_equal(matrix, expected[name]):
            row, column = np.argwhere(matrix != expected[name])[0]
            raise SystemExit(
                f"{name}: expected {expected[name][row, column]} at row {row}, column {column}, "
                f"found {matrix[row, column]}"
            )
    return seconds


def print_table(table: dict[str, dict[str, float]]) -> None:
    """Print the seconds of each way, and how many times as fast as the first one it is."""
    first = next(iter(table.values()))
    print(f"{'':32}" + "".join(f"{name:>30}" for name in first))
    for way, seconds in table.items():
        print(f"{way:32}" + "".join(f"{t:21.3f} s {first[name] / t:5.2f}x" for name, t in seconds.items()))


def explain(table: dict[str, dict[str, float]], megabytes: float) -> None:
    """Say what is the fastest here, and why."""
    one, copies, shared = table
    print(f"By copy, {megabytes:,.0f} MB are pickled, go through pipes and are unpickled: there, and back again.")
    print("By reference, what is sent of a slice is where it is: some hundred bytes, however large it is.")
    for name in WORKS:
        fastest = min(table, key=lambda way: table[way][name])
        reason = {
            one: "there is too little work, or there are too few free processors, for others to help",
            copies: "which should not be: by reference it does less. Were the processors busy?",
            shared: "nothing but the work is left to do, and it is shared",
        }[fastest]
        print(f"Fastest for {name}: {fastest}; {reason}.")


def size_of_matrix(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"([0-9]{1,9})x([0-9]{1,9})", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"expected ROWSxCOLUMNS, as in 10000x1000, found {text!r}")
    rows, columns = int(match[1]), int(match[2])
    if rows < 1 or columns < 2:
        raise argparse.ArgumentTypeError(f"expected 1 row and 2 columns at least, found {text!r}")
    if rows * columns > MAX_ITEMS:
        raise argparse.ArgumentTypeError(f"expected {MAX_ITEMS:,} numbers at most, found {rows * columns:,}")
    return rows, columns


def number_of_workers(text: str) -> int:
    if not re.fullmatch("[0-9]{1,9}", text) or not 1 <= int(text) <= MAX_WORKERS:
        raise argparse.ArgumentTypeError(f"expected a number from 1 to {MAX_WORKERS}, found {text!r}")
    return int(text)


def main() -> None:
    parser = argparse.ArgumentParser(description="Share a NumPy array between processes.")
    parser.add_argument(
        "--size",
        type=size_of_matrix,
        default=(10_000, 1_000),
        metavar="ROWSxCOLUMNS",
        help="of the matrix; up to five times its memory is needed (default: 10000x1000, which takes 80 MB)",
    )
    parser.add_argument("--workers", type=number_of_workers, default=min(os.cpu_count() or 1, 8), metavar="N")
    parser.add_argument("--start-method", choices=mp.get_all_start_methods(), default=mp.get_start_method())
    args = parser.parse_args()
    ctx, stock = mp.get_context(args.start_method), multiprocessing.get_context(args.start_method)

    original = np.random.default_rng(seed=1).standard_normal(args.size)
    megabytes = original.nbytes / 1e6
    print(f"A matrix of {len(original):,} rows and {original.shape[1]:,} columns: {megabytes:,.1f} MB")
    print(f"Workers: {args.workers}, started by {args.start_method}. Processors: {os.cpu_count()}")

    parts = 8 * args.workers  # several slices for each worker even out their speed
    expected: dict[str, Matrix] = {}
    private = np.empty_like(original)
    table = {"one process": measure(in_one_process, private, parts, original, expected)}
    with start_pool(stock, args.workers) as pool:
        way = functools.partial(by_copy, pool)
        table["multiprocessing.Pool, by copy"] = measure(way, private, parts, original, expected)
    del private
    with start_pool(ctx, args.workers) as pool:
        shared = arrays.empty_like(original)  # a plain array: all that is special is where it is
        way = functools.partial(by_reference, pool)
        table["mpmemory.Pool, by reference"] = measure(way, shared, parts, original, expected)

    print_table(table)
    explain(table, megabytes)
    print("OK: all results are the same.")


if __name__ == "__main__":
    main()
