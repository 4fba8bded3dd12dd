"""The command line: `python -m benchmarks [--quick] [row ...]`."""

from __future__ import annotations

import argparse
import contextlib
import sys

from .measure import header, interleave, lines
from .rows import ROWS


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Measure mpmemory next to its peers.")
    parser.add_argument("--quick", action="store_true", help="run all of it a few times only, to see that it works")
    parser.add_argument("rows", nargs="*", metavar="row", help=f"which to run, all if none: {', '.join(ROWS)}")
    arguments = parser.parse_args()
    unknown = [row for row in arguments.rows if row not in ROWS]
    if unknown:
        parser.error(f"unknown row {unknown[0]!r}: expected one of {', '.join(ROWS)}")

    print(header(quick=arguments.quick), flush=True)
    try:
        for row in arguments.rows or ROWS:
            with contextlib.closing(ROWS[row]()) as comparisons:
                for comparison in comparisons:
                    results = interleave(comparison, quick=arguments.quick)
                    print(*lines(row, comparison, results), sep="\n", flush=True)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130  # as a shell has it: 128 + SIGINT
    return 0


if __name__ == "__main__":
    sys.exit(main())
