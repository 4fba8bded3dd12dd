"""Cache lines: what two processes write often should not lie in the same one ("false sharing").

    python examples/alignment.py [--start-method {fork,forkserver,spawn}]

Two processes count, each its own counter: first both in one cache line, then each in a line of its own.

    one line     |counter 0|counter 1|                         |
    own lines    |counter 0|            |counter 1|            |
                 0         8            CACHE_LINE_SIZE
"""

import argparse
import os
import time
from multiprocessing.synchronize import Barrier

import mpmemory as mp

COUNT = 500_000
ROUNDS = 3
ITEM = 8  # bytes, of a counter ("Q") and of a time ("d")

# The two processes' times, far from the counters.
TIMES_AT = mp.PAGE_SIZE
SIZE = TIMES_AT + 2 * ITEM


def count(buffer: mp.SharedBuffer, number: int, offset: int, barrier: Barrier) -> None:
    counter = buffer.view("Q", 1, offset)
    barrier.wait(timeout=30)
    start = time.perf_counter()
    for _ in range(COUNT):
        counter[0] += 1
    buffer.set_value("d", TIMES_AT + number * ITEM, time.perf_counter() - start)


def measure(start_method: str, offsets: tuple[int, int]) -> float:
    """Return how many seconds two processes took to count, with their counters at `offsets`."""
    ctx = mp.get_context(start_method)
    with mp.SharedBuffer(SIZE) as buffer:
        barrier = ctx.Barrier(2)
        processes = [
            ctx.Process(target=count, args=(buffer, number, offset, barrier), daemon=True)
            for number, offset in enumerate(offsets)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join()

        exitcodes = [process.exitcode for process in processes]
        counts = [buffer.get_value("Q", offset) for offset in offsets]
        if exitcodes != [0, 0] or counts != [COUNT, COUNT]:
            raise SystemExit(f"expected exit codes [0, 0] and counts {[COUNT, COUNT]}, found {exitcodes} and {counts}")
        slowest: float = max(buffer.get_values("2d", TIMES_AT))
        return slowest


def main() -> None:
    parser = argparse.ArgumentParser(description="Counters in one cache line, against a line each.")
    parser.add_argument("--start-method", choices=mp.get_all_start_methods(), default=mp.get_start_method())
    method = parser.parse_args().start_method

    together, apart = (0, ITEM), (0, mp.align(ITEM))
    print(f"A cache line has {mp.CACHE_LINE_SIZE} bytes. Two processes count to {COUNT:,} each, {ROUNDS} times.")
    # Alternating, so that a slow moment of the machine meets both. The best time is the least disturbed.
    times = [(measure(method, together), measure(method, apart)) for _ in range(ROUNDS)]
    one_line, own_lines = (min(column) for column in zip(*times, strict=True))

    print(f"Counters in one cache line, offsets {together}:      {one_line * 1e3:7.1f} ms (best of {ROUNDS})")
    print(f"Counters in lines of their own, offsets {apart}: {own_lines * 1e3:7.1f} ms (best of {ROUNDS})")
    print(f"Ratio: {one_line / own_lines:.2f}")
    if os.cpu_count() == 1:
        print("There is one processor here: the two never write at the same time, so a shared line costs nothing.")
    print(
        "Take the ratio with care: Python spends far longer on each step of the loop than on the write itself,\n"
        "which can hide most or all of what a shared line costs (a compiled loop hides nothing). It also depends\n"
        "on where the system runs the two processes (hyperthreads of one core, cores, sockets), and on what else\n"
        "runs meanwhile. Below about 1.1, or if it changes from run to run, it says nothing."
    )
    print("OK: all counters are right, in either layout.")


if __name__ == "__main__":
    main()
