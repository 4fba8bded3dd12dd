"""How rows measure whole programs: a fresh one for each sample, in turn."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from contextlib import closing

from ..measure import shielded
from ..processes import Program
from ..session import Session

Values = dict[str, float]

ROUNDS = 3


def gather(
    session: Session, names: Iterable[str], arguments: Callable[[str], list[str]], use: Callable[[Program], Values]
) -> dict[str, dict[str, list[float]]]:
    """Run a program for each name, some rounds, and return the samples of each value by name: {value: {name: [...]}}.

    A program that fails is skipped with a word.
    """
    samples: dict[str, dict[str, list[float]]] = defaultdict(dict)
    names, failed = list(names), set()
    for number in range(1 if session.quick else ROUNDS):
        for name in names if number % 2 else reversed(names):
            if name not in failed:
                failed.add(name)
                with session.attempt(name), shielded(), closing(Program(*arguments(name))) as program:
                    for key, value in use(program).items():
                        samples[key].setdefault(name, []).append(value)
                    failed.remove(name)
    return {key: {name: found[name] for name in names if name in found} for key, found in samples.items()}
