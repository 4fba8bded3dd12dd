"""What was measured, as lines of text, as JSON, and as a page of Markdown."""

from __future__ import annotations

import datetime
import json
import math
import os
import platform
import re
import shlex
import statistics
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from .measure import ROUNDS, Measured, Target, holds, quantity, quartiles, times
from .peers.blocks import BLOCKS
from .peers.channels import CHANNELS
from .peers.pools import POOLS
from .rows import question, remarks
from .session import Session

PACKAGES = [
    "mpmemory",
    "numpy",
    "pandas",
    "joblib",
    "mpire",
    "multiprocess",
    "ray",
    "torch",
    "iceoryx2",
    "faster-fifo",
    "arrayqueues",
    "SharedArray",
    "posix_ipc",
]

HOW = f"""\
All sides of a comparison run in one process, in turn; a round has one sample of each, and every other round goes
backwards. A run is {ROUNDS} rounds, or fewer for what takes long. A slow side ends after 5 rounds, or 3 if these took
seconds each, and is compared with ours of the same rounds. A sample is the mean of as many calls as take about 5 ms. A
first round is dropped.

Before each sample there are two calls that do not count, if one takes less than a second: this is about what
is done again and again. What is done once, or after a pause of seconds, finds colder memory.

Each cell has the median. Below it, for peers: how many times as much it takes as ours, the median of the rounds, and in
brackets the quartiles. More than 1: ours is faster (or smaller). Times of two runs cannot be compared, factors can.
"Where we lose" lists all that is better than ours by more than a twentieth, by the median and both quartiles; but not
what nothing can beat, like memcpy."""


@dataclass
class Results:
    """All that one run has found."""

    machine: dict[str, Any]
    session: Session
    rows: dict[str, list[Measured]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    def add(self, row: str, measured: Measured) -> None:
        """Keep what was measured."""
        self.rows.setdefault(row, []).append(measured)

    def header(self) -> list[str]:
        """Say where this runs."""
        machine = self.machine
        lines = [
            f"{machine['cpu']}, {machine['cpus']} CPUs, {machine['memory']}; {machine['system']}; {machine['python']}",
            ", ".join(f"{name} {version}" for name, version in machine["packages"].items()),
        ]
        if self.session.quick:
            lines.append("A quick run, to see that it works: the numbers mean nothing.")
        if sys.dont_write_bytecode:
            lines.append("PYTHONDONTWRITEBYTECODE is set: new interpreters compile all modules again (import, start).")
        return lines


def machine() -> dict[str, Any]:
    """Describe the machine, the versions and the command."""
    found = re.search(r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    packages = {}
    for name in PACKAGES:
        try:
            packages[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return {
        "cpu": found[1] if found else platform.machine(),
        "cpus": len(os.sched_getaffinity(0)),
        "memory": f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.0f} GB",
        "system": f"{platform.system()} {platform.release().partition('-')[0]} {platform.machine()}",
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "packages": packages,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "command": shlex.join(["python", "-m", "benchmarks", *sys.argv[1:]]),
    }


def lines(row: str, measured: Measured) -> Iterator[str]:
    """Format what was measured as text, for a terminal."""
    for number, (side, samples) in enumerate(measured.samples.items()):
        if not samples:
            continue
        factor = ""
        if number:
            low, high = quartiles(measured.factors(side))
            factor = f"{times(statistics.median(measured.factors(side))):>8}  {times(low)} to {times(high)}"
        title = f"{row}: {measured.what}" if number == 0 else ""
        yield f"{title:<58} {side:<28} {quantity(statistics.median(samples), measured.unit):>9} {factor}".rstrip()


def _targets(results: Results) -> Iterator[tuple[str, Measured, Target, float]]:
    for row, found in results.rows.items():
        for measured in found:
            for target in measured.targets:
                reached = measured.reached(target) if measured.samples else None
                if reached is not None:
                    yield row, measured, target, reached


def _wanted(target: Target, unit: str) -> str:
    limit = target.limit
    return {
        "faster": f"{limit:g}x faster than {target.peer}" if limit != 1 else f"faster than {target.peer}",
        "within": f"within {limit:g}x of {target.peer}",
        "more": f"at most {quantity(limit, unit)} more than {target.peer}",
        "at most": f"at most {quantity(limit, unit)}",
        "at least": f"at least {quantity(limit, unit)}",
    }[target.kind]


def _reached(measured: Measured, target: Target, reached: float) -> str:
    if target.kind in {"faster", "within"}:
        assert target.peer
        low, high = quartiles(measured.factors(target.peer))
        if target.kind == "within":
            low, high = (1 / high if high else math.inf), (1 / low if low else math.inf)
        return f"{times(reached)} ({times(low)} to {times(high)})"
    return quantity(reached, measured.unit)


def verdicts(results: Results) -> Iterator[str]:
    """Format a table of all targets as Markdown: wanted, reached, held or not."""
    yield "| row | what | target | reached | |"
    yield "|---|---|---|---|---|"
    for row, measured, target, reached in _targets(results):
        verdict = "held" if holds(target, reached) else "**missed**"
        cells = (
            f"`{row}`",
            measured.what,
            _wanted(target, measured.unit),
            _reached(measured, target, reached),
            verdict,
        )
        yield f"| {' | '.join(cells)} |"


def write(results: Results, folder: Path, drawn: dict[str, dict[str, str]]) -> None:
    """Write results.json and results.md; `drawn` has the plots of rows: {row: {group: file name}}."""
    data = {
        "machine": results.machine,
        "quick": results.session.quick,
        "skipped": [{"peer": name, "reason": reason} for name, reason in results.session.skipped],
        "seconds": {row: round(seconds, 1) for row, seconds in results.seconds.items()},
        "rows": {row: [_as_json(measured) for measured in found] for row, found in results.rows.items()},
    }
    (folder / "results.json").write_text(json.dumps(data, indent=1, ensure_ascii=False) + "\n")
    (folder / "results.md").write_text("\n".join(_page(results, drawn)) + "\n")


def _as_json(measured: Measured) -> dict[str, Any]:
    sides: dict[str, Any] = {}
    for side, samples in measured.samples.items():
        sides[side] = {
            "samples": len(samples),
            "median": _number(statistics.median(samples)),
            "quartiles": [_number(value) for value in quartiles(samples)],
        }
        if side != measured.ours:
            factors = measured.factors(side)
            sides[side]["factor"] = _number(statistics.median(factors))
            sides[side]["factor_quartiles"] = [_number(value) for value in quartiles(factors)]
    targets = [
        {"kind": target.kind, "limit": target.limit, "peer": target.peer, "reached": _number(reached)}
        for target in measured.targets
        if measured.samples and (reached := measured.reached(target)) is not None
    ]
    return {
        "what": measured.what,
        "group": measured.group,
        "x": measured.x,
        "unit": measured.unit,
        "sides": sides,
        "targets": targets,
    }


def _number(value: float) -> float | None:
    """Round to what means something; None is for what never came."""
    return None if math.isinf(value) else float(f"{value:.4g}")


def _page(results: Results, drawn: dict[str, dict[str, str]]) -> Iterator[str]:
    machine = results.machine
    found = list(_targets(results))
    held = sum(holds(target, reached) for _, _, target, reached in found)
    yield from ("# Results", "", "<!-- Written by the command below: do not edit. -->", "")
    if results.session.quick:
        yield from ("**A quick run, to see that it works: the numbers mean nothing.**", "")
    yield from (f"    {machine['command']}", "")
    yield f"{machine['cpu']}, {machine['cpus']} CPUs, {machine['memory']}; {machine['system']}; {machine['python']};"
    yield f"{machine['date']}. " + ", ".join(f"{name} {version}" for name, version in machine["packages"].items()) + "."
    yield from ("", HOW, "")
    if results.session.skipped:
        reasons = "; ".join(f"{name} ({reason})" for name, reason in results.session.skipped)
        yield from (f"Skipped: {reasons}.", "")
    yield from ("## Targets", "", f"{held} of {len(found)} hold.", "", *verdicts(results), "")
    for row, measured in results.rows.items():
        yield from _section(row, measured, drawn.get(row, {}))
    yield from ("## Systems", "", "How each was used:", "")
    shown = {side for found in results.rows.values() for measured in found for side in measured.samples}
    for name, kind in (*POOLS.items(), *CHANNELS.items(), *BLOCKS.items()):
        if name in shown:
            yield f"- **{name}**: {(kind.__doc__ or '').partition(chr(10))[0]}"


def _section(row: str, found: list[Measured], drawn: dict[str, str]) -> Iterator[str]:
    yield from (f"## {row}", "", f"**{question(row)}**", "")
    if remarks(row):
        yield from (remarks(row), "")
    yield from (f"    python -m benchmarks {row}", "")
    for group in dict.fromkeys(measured.group for measured in found):
        if group in drawn:
            yield from (f"![{_capital(group)}]({drawn[group]})", "")
        yield from _table(group, [measured for measured in found if measured.group == group])
    losses = list(_losses(found))
    yield f"Where we lose: {'; '.join(losses) if losses else 'nowhere here'}."
    yield ""


def _table(group: str, found: list[Measured]) -> Iterator[str]:
    sides = list(dict.fromkeys(side for measured in found for side in measured.samples))
    yield f"| {group} | {' | '.join(sides)} |"
    yield f"|---|{'---:|' * len(sides)}"
    for measured in found:
        cells = (_cell(measured, side) if measured.samples.get(side) else "" for side in sides)
        yield f"| {measured.what} | {' | '.join(cells)} |"
    yield ""


def _cell(measured: Measured, side: str) -> str:
    text = quantity(measured.median(side), measured.unit)
    if side == measured.ours:
        return f"**{text}**"
    factors = measured.factors(side)
    low, high = quartiles(factors)
    middle = statistics.median(factors)
    if measured.unit == "" or math.isinf(middle):
        return text
    return f"{text}<br>{times(middle)} ({times(low)} to {times(high)})"


def _losses(found: list[Measured]) -> Iterator[str]:
    for measured in found:
        for peer in measured.peers:
            if peer in measured.floors or peer.startswith("mpmemory") or not measured.unit:
                continue
            factors = measured.factors(peer)
            if statistics.median(factors) < 0.95 and quartiles(factors)[1] < 1:
                yield f"{measured.what}: {peer} ({times(statistics.median(factors))})"


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
