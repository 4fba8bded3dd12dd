"""Time the sides of a comparison in turn, so that a machine which speeds up or slows down hits all of them."""

from __future__ import annotations

import contextlib
import math
import signal
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from multiprocessing import resource_tracker
from time import perf_counter
from typing import Protocol

ROUNDS = 31
LEAST_ROUNDS = 5
LEAST_ROUNDS_OF_THE_SLOWEST = 3
QUICK_ROUNDS = 2
SIDE_SECONDS = 0.5  # a side that has taken more than this is left out of further rounds, once it has had the least
SLOWEST_SECONDS = 5.0  # and the least is less for one that has taken more than this
SAMPLE_SECONDS = 0.005  # a sample is the mean of as many calls as take about this long
MOST_CALLS = 1000
WARM_SECONDS = 1.0  # before each sample there are calls that do not count, unless one takes more than this
WARM_CALLS = 2  # so many: what is sent back may arrive before the memory it came in is free again

NEVER = math.inf  # the sample of what did not end

MEMCPY = "memcpy"  # the side that is the limit of what can be reached: plots draw it apart


@dataclass(frozen=True)
class Side:
    """One way to do the work; the first one of a comparison is ours."""

    name: str
    run: Callable[[], object]
    floor: bool = False  # no rival, but what it takes at least


@dataclass(frozen=True)
class Target:
    """What ours must reach.

    - "faster": the peer takes at least `limit` times as long as ours.
    - "within": ours takes at most `limit` times as long as the peer.
    - "more": ours takes at most `limit` more than the peer.
    - "at most", "at least": what ours is at the median; without a peer.
    """

    kind: str
    limit: float
    peer: str | None = None


@dataclass(frozen=True)
class Comparison:
    """The same work done by us and by peers.

    `group` names the table (and the plot) it belongs to, `x` is its place there, and `axis` says what that is.
    """

    what: str
    sides: Sequence[Side]
    group: str = ""
    x: float | None = None
    axis: str = ""
    targets: Sequence[Target] = ()
    rounds: int = ROUNDS


@dataclass(frozen=True)
class Measured:
    """The samples of each side, in the order of rounds: those of a slow side end earlier.

    They are times ("s"), bytes ("B") or just numbers ("").
    """

    what: str
    samples: dict[str, list[float]]
    group: str = ""
    x: float | None = None
    axis: str = ""
    unit: str = "s"
    targets: Sequence[Target] = ()
    floors: Sequence[str] = ()

    @property
    def ours(self) -> str:
        return next(iter(self.samples))

    @property
    def peers(self) -> list[str]:
        return list(self.samples)[1:]

    def median(self, side: str) -> float:
        return statistics.median(self.samples[side])

    def factors(self, peer: str) -> list[float]:
        """How many times as much as ours the peer takes, round by round."""
        return [
            _divide(theirs, mine) for mine, theirs in zip(self.samples[self.ours], self.samples[peer], strict=False)
        ]

    def scaled(self, factor: float) -> Measured:
        """Return the same with all samples multiplied by `factor`."""
        return replace(self, samples={side: [value * factor for value in each] for side, each in self.samples.items()})

    def reached(self, target: Target) -> float | None:
        """Return what compares to the limit of `target`, or None if its peer was not measured."""
        if target.peer is None:
            return self.median(self.ours)
        if target.peer not in self.samples:
            return None
        if target.kind == "more":
            pairs = zip(self.samples[self.ours], self.samples[target.peer], strict=False)
            return statistics.median(mine - theirs for mine, theirs in pairs)
        factor = statistics.median(self.factors(target.peer))
        return factor if target.kind == "faster" else _divide(1, factor)


def holds(target: Target, reached: float) -> bool:
    """Tell whether what was reached is what is wanted."""
    return reached >= target.limit if target.kind in {"faster", "at least"} else reached <= target.limit


def quartiles(values: Sequence[float]) -> tuple[float, float]:
    """Return the lower and the upper quartile, which are samples: `NEVER` can be among them."""
    ordered = sorted(values)
    return ordered[(len(ordered) - 1) // 4], ordered[-1 - (len(ordered) - 1) // 4]


def _divide(a: float, b: float) -> float:
    if b == 0 or a == b:  # nothing next to nothing; never next to never
        return 1.0 if a == b else math.inf
    return a / b


class Watcher(Protocol):
    """Who is told how it goes."""

    quick: bool

    def tick(self, part: float) -> None:
        """Take note that so much of a comparison is done, from 0 to 1."""

    def attempt(self, name: str, *, ours: bool) -> contextlib.AbstractContextManager[None]:
        """Suppress and note what the side `name` raises in the block, if it is not ours."""


def interleave(comparison: Comparison, watcher: Watcher) -> Measured:
    """Sample all sides in turn, every other round backwards, so that no side always follows the same one.

    A first round is dropped: it fills caches, starts helpers and threads, and tells how many calls make a sample.
    Before each sample there are calls that do not count, so that what keeps memory warm for some seconds finds it
    so, however long the others take: this is about what is done again and again.
    A side that is slow is left out of the later rounds, and one that fails of all; but what ours raises is raised.
    """
    quick = watcher.quick
    rounds = min(comparison.rounds, QUICK_ROUNDS) if quick else comparison.rounds
    least = min(LEAST_ROUNDS, rounds)
    sides = list(comparison.sides)
    ours = sides[0]
    samples: dict[str, list[float]] = {side.name: [] for side in sides}
    spent = dict.fromkeys(samples, 0.0)
    calls = dict.fromkeys(samples, 1)
    warm = dict.fromkeys(samples, False)

    def sample(side: Side) -> float:
        """Take a sample; a peer that fails is forgotten."""
        start, seconds = perf_counter(), math.nan
        with watcher.attempt(side.name, ours=side is ours):
            if warm[side.name]:
                _time(side.run, WARM_CALLS)
            seconds = _time(side.run, calls[side.name])
        spent[side.name] += perf_counter() - start
        if math.isnan(seconds):
            sides.remove(side)
            del samples[side.name], spent[side.name]
        return seconds

    for side in list(sides) if rounds > 1 else []:
        first = sample(side)
        if side in sides and not quick:
            seconds = first if first > SAMPLE_SECONDS else sample(side)
            calls[side.name] = max(1, min(MOST_CALLS, int(SAMPLE_SECONDS / seconds)))
            warm[side.name] = seconds < WARM_SECONDS
    spent = dict.fromkeys(spent, 0.0)
    for number in range(rounds):
        watcher.tick(number / rounds)
        for side in list(sides if number % 2 else reversed(sides)):
            # Ours is in all rounds, as the measure of the others.
            if side is ours or number < _least(least, spent[side.name]) or spent[side.name] < SIDE_SECONDS:
                seconds = sample(side)
                if side in sides:
                    samples[side.name].append(seconds)
        if number + 1 >= least and min(spent.values()) > SIDE_SECONDS:
            break
    return Measured(
        comparison.what,
        samples,
        comparison.group,
        comparison.x,
        comparison.axis,
        targets=comparison.targets,
        floors=[side.name for side in sides if side.floor],
    )


def _least(rounds: int, spent: float) -> int:
    return min(rounds, LEAST_ROUNDS_OF_THE_SLOWEST) if spent > SLOWEST_SECONDS else rounds


def _time(run: Callable[[], object], calls: int) -> float:
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


def quantity(value: float, unit: str) -> str:
    """Format a sample with three digits or so."""
    if value == NEVER:
        return "never"
    if unit == "s":
        steps = (1e-6, "ns", 1e9), (1e-3, "µs", 1e6), (1.0, "ms", 1e3), (math.inf, "s", 1.0)
    elif unit == "B":
        steps = (1e3, "B", 1.0), (1e6, "KB", 1e-3), (1e9, "MB", 1e-6), (math.inf, "GB", 1e-9)
    else:
        return f"{value:,.0f}" if value == int(value) else f"{value:.2f}"
    name, scale = next((name, scale) for below, name, scale in steps if abs(value) < below)
    number = value * scale
    digits = 0 if abs(number) >= 100 or name == "B" else 1 if abs(number) >= 10 else 2
    return f"{number:.{digits}f} {name}"


def times(factor: float) -> str:
    """Format a factor."""
    if factor == math.inf:
        return "∞"
    if factor >= 20:
        return f"{factor:.0f}x"
    return f"{factor:.1f}x" if factor >= 2 else f"{factor:.2f}x" if factor >= 0.1 or factor == 0 else f"{factor:.1g}x"
