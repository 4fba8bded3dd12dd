"""Many small writes against a large one: what costs time is the call, not the bytes.

    python examples/batch.py [--start-method {fork,forkserver,spawn}]

The same values are written into two buffers, and another process checks both.
"""

import argparse
import struct
import time

import mpmemory as mp

COUNT = 100_000
FORMAT = f"<{COUNT}q"
ITEM = "<q"
ITEM_SIZE = struct.calcsize(ITEM)


def expected_values() -> list[int]:
    return [number * number for number in range(COUNT)]


def verify(buffers: dict[str, mp.SharedBuffer]) -> None:
    for name, buffer in buffers.items():
        pairs = zip(buffer.get_values(FORMAT, 0), expected_values(), strict=True)
        for index, (found, expected) in enumerate(pairs):
            if found != expected:
                raise SystemExit(f"{name}: expected {expected} as value {index}, found {found}")
        print(f"Another process finds all {COUNT:,} values of {name}.")


def main() -> None:
    parser = argparse.ArgumentParser(description="Many small writes against a large one.")
    parser.add_argument("--start-method", choices=mp.get_all_start_methods(), default=mp.get_start_method())
    ctx = mp.get_context(parser.parse_args().start_method)

    values = expected_values()
    size = struct.calcsize(FORMAT)
    with mp.SharedBuffer(size) as small, mp.SharedBuffer(size) as large:
        # The first touch of a page costs a page fault. Not what is measured here.
        small.clear()
        large.clear()

        start = time.perf_counter()
        for index, value in enumerate(values):
            small.set_value(ITEM, index * ITEM_SIZE, value)
        small_time = time.perf_counter() - start
        print(f"{COUNT:,} calls of set_value, {ITEM_SIZE} bytes each: {small_time * 1e3:8.2f} ms")

        start = time.perf_counter()
        large.set_bytes(struct.pack(FORMAT, *values))
        large_time = time.perf_counter() - start
        print(f"struct.pack and one set_bytes of {size:,} bytes: {large_time * 1e3:8.2f} ms")
        print(f"Ratio: {small_time / large_time:.1f}. It is the price of Python calls; the bytes are the same.")

        process = ctx.Process(target=verify, args=({"small writes": small, "one write": large},), daemon=True)
        process.start()
        process.join()
        if process.exitcode != 0:
            raise SystemExit(f"verifying process: expected exit code 0, found {process.exitcode}")
    print("OK: both ways write the same.")


if __name__ == "__main__":
    main()
