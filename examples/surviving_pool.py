"""A pool that loses workers and goes on: what dies is the error of one task.

    python examples/surviving_pool.py [--start-method {fork,forkserver,spawn}]

Workers sum up pieces of a big shared buffer. Some pieces are poisoned: whoever looks at one is killed, as by
the kernel when memory runs out. The pool of multiprocessing would wait for such a piece for ever.
"""

import argparse
import os
import signal

import mpmemory as mp

PIECES = 200
PIECE_SIZE = 10_000
POISONED = {17, 101, 102}


def total(memory: mp.Memory, piece: int) -> int:
    data = memory.pread(PIECE_SIZE, piece * PIECE_SIZE)
    if 0 in data:
        os.kill(os.getpid(), signal.SIGKILL)
    return sum(data)


def main() -> None:
    parser = argparse.ArgumentParser(description="A pool that loses workers and goes on.")
    parser.add_argument("--start-method", choices=mp.get_all_start_methods(), default=mp.get_start_method())
    ctx = mp.get_context(parser.parse_args().start_method)

    with mp.SharedBuffer(PIECES * PIECE_SIZE) as buffer, ctx.Pool(2) as pool:
        buffer.clear(1)
        for piece in POISONED:
            buffer[piece * PIECE_SIZE] = 0

        tasks = [pool.apply_async(total, (buffer.memory, piece)) for piece in range(PIECES)]
        lost, totals = set(), []
        for piece, task in enumerate(tasks):
            try:
                totals.append(task.get(timeout=60))
            except mp.WorkerLostError as error:
                print(f"piece {piece}: {error}")
                lost.add(piece)

        if lost != POISONED:
            raise SystemExit(f"expected to lose {sorted(POISONED)}, lost {sorted(lost)}")
        if totals != [PIECE_SIZE] * (PIECES - len(POISONED)):
            raise SystemExit(f"wrong totals: {totals}")
    print(f"OK: {len(totals)} pieces are summed up, {len(lost)} took a worker along, and the pool went on.")


if __name__ == "__main__":
    main()
