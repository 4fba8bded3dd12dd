"""The command line: `python -m benchmarks [--quick] [--output FOLDER] [row ...]`.

Workers may import this file, too: what is heavy is imported by `main`.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import sys
import time
from pathlib import Path


def main() -> int:
    from . import plots, report
    from .measure import Comparison, interleave
    from .rows import FIRST, ROWS, question
    from .session import Session

    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Measure mpmemory next to its peers.")
    parser.add_argument("--quick", action="store_true", help="run all of it a few times only, to see that it works")
    parser.add_argument("--list", action="store_true", help="say what each row asks")
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="write results.json, results.md and plots there")
    parser.add_argument("rows", nargs="*", metavar="row", help="which to run: all if none; see --list")
    arguments = parser.parse_args()
    unknown = [row for row in arguments.rows if row not in ROWS]
    if unknown:
        parser.error(f"unknown row {unknown[0]!r}: expected one of {', '.join(ROWS)}")
    if arguments.list:
        print(*(f"{row:<14} {question(row)}" for row in ROWS), sep="\n")
        return 0

    session = Session(quick=arguments.quick)
    results = report.Results(report.machine(), session)
    rows = list(dict.fromkeys(arguments.rows)) or list(ROWS)
    print(*results.header(), sep="\n", flush=True)
    try:
        for number, row in enumerate(sorted(rows, key=lambda row: row not in FIRST)):
            session.begin(row, number, len(rows))
            start = time.monotonic()
            with contextlib.closing(ROWS[row](session)) as comparisons:
                for each in comparisons:
                    measured = interleave(each, session) if isinstance(each, Comparison) else each
                    results.add(row, measured)
                    session.wipe()
                    print(*report.lines(row, measured), sep="\n", flush=True)
            results.seconds[row] = time.monotonic() - start
            gc.collect()
    except KeyboardInterrupt:
        session.say("interrupted")
        return 130  # as a shell has it: 128 + SIGINT
    finally:
        session.wipe()
    results.rows = {row: results.rows[row] for row in rows}
    print("", *report.verdicts(results), "", f"{sum(results.seconds.values()):.0f} seconds in all", sep="\n")
    if arguments.output:
        arguments.output.mkdir(parents=True, exist_ok=True)
        drawn = plots.draw(results, arguments.output)
        report.write(results, arguments.output, drawn)
    return 0


if __name__ == "__main__":
    sys.exit(main())
