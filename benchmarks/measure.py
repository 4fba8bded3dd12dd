"""Time the sides of a comparison in turn, so that a machine which speeds up or slows down hits all of them."""

from __future__ import annotations

import contextlib
import os
import platform
import signal
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing import resource_tracker
from time import perf_counter

ROUNDS = 31
QUICK_ROUNDS = 3
QUICK_CALLS = 2

_LINE = "{:<13} {:<40} {:>9}  {:<27} {:>9}  {:>6}  {:>14}  {:>10}"


@dataclass(frozen=True)
class Side:
    """One way to do the work."""

    name: str
    run: Callable[[], object]


@dataclass(frozen=True)
class Comparison:
    """The same work done by us and by peers; a sample is the mean of `calls` calls in a row."""

    calls: int
    ours: Side
    peers: tuple[Side, ...]


@dataclass(frozen=True)
class Result:
    """Seconds per call: one sample for each round, ours and the peer's taken next to each other."""

    ours: list[float]
    peer: list[float]

    @property
    def ratios(self) -> list[float]:
        return [mine / other for mine, other in zip(self.ours, self.peer, strict=True)]

    @property
    def differences(self) -> list[float]:
        return [mine - other for mine, other in zip(self.ours, self.peer, strict=True)]


def interleave(comparison: Comparison, *, quick: bool = False) -> dict[str, Result]:
    """Sample all sides in turn for some rounds, and return our samples with those of each peer, by its name.

    A first round is dropped: it fills caches, starts helpers and threads. Every other round runs
    backwards, so that no side always follows the same one.
    """
    rounds = QUICK_ROUNDS if quick else ROUNDS
    calls = min(comparison.calls, QUICK_CALLS) if quick else comparison.calls
    sides = [comparison.ours, *comparison.peers]
    samples: dict[str, list[float]] = {side.name: [] for side in sides}
    for number in range(rounds + 1):
        for side in sides if number % 2 else reversed(sides):
            seconds = _sample(side.run, calls)
            if number:
                samples[side.name].append(seconds)
    ours = samples[comparison.ours.name]
    return {peer.name: Result(ours, samples[peer.name]) for peer in comparison.peers}


def _sample(run: Callable[[], object], calls: int) -> float:
    with shielded():  # a claim or a child cut off in the middle would print tracebacks of its own
        start = perf_counter()
        for _ in range(calls):
            run()
        return (perf_counter() - start) / calls


@contextlib.contextmanager
def shielded() -> Iterator[None]:
    """Hold Ctrl-C back until the end of the block, and from processes started in it: only the main one reports it."""
    resource_tracker.ensure_running()  # now, since it unblocks SIGINT when it starts (seen in Python 3.11 to 3.13)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def header(*, quick: bool) -> str:
    """Say where this runs, and name the columns."""
    rounds = f"{QUICK_ROUNDS} rounds (a smoke test: the numbers mean nothing)" if quick else f"{ROUNDS} rounds"
    remarks = ["ratio: ours / against, below 1 is faster; difference: ours - against; all are medians"]
    if sys.dont_write_bytecode:
        remarks.append("PYTHONDONTWRITEBYTECODE is set: new interpreters may compile mpmemory again (start, import)")
    return "\n".join(
        [
            f"{platform.python_implementation()} {platform.python_version()}, {platform.system()} "
            f"{platform.release()} {platform.machine()}, {os.cpu_count()} CPUs, {rounds}",
            *remarks,
            "",
            _LINE.format("row", "ours", "median", "against", "median", "ratio", "min..max", "difference"),
        ]
    )


def lines(row: str, comparison: Comparison, results: dict[str, Result]) -> Iterator[str]:
    """Format one line of the table for each peer."""
    for peer, result in results.items():
        ratios = result.ratios
        yield _LINE.format(
            row,
            comparison.ours.name,
            duration(statistics.median(result.ours)),
            peer,
            duration(statistics.median(result.peer)),
            f"{statistics.median(ratios):.2f}",
            f"{min(ratios):.2f}..{max(ratios):.2f}",
            duration(statistics.median(result.differences)),
        )


def duration(seconds: float) -> str:
    """Format a duration with three digits or so, in µs or ms."""
    size = abs(seconds)
    number, unit = (seconds * 1e6, "µs") if size < 1e-3 else (seconds * 1e3, "ms")
    return f"{number:.{1 if abs(number) < 100 else 0}f} {unit}"
