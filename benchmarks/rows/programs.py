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
    session: Session, names: Iterable[str], arguments: Callable[[str], list[str]], use: Callable[[Program, str], Values]
) -> dict[str, dict[str, list[float]]]:
    """Run a program for each name, some rounds, and return the samples of each value by name: {value: {name: [...]}}.

    The first name is ours. A program of the others that fails is skipped with a word.
    """
    samples: dict[str, dict[str, list[float]]] = defaultdict(dict)
    names = list(names)
    working = list(names)
    for number in range(1 if session.quick else ROUNDS):
        for name in list(working if number % 2 else reversed(working)):
            working.remove(name)
            with session.attempt(name, ours=name == names[0]), shielded():
                with closing(Program(*arguments(name))) as program:
                    found = use(program, name)
                for key, value in found.items():
                    samples[key].setdefault(name, []).append(value)
                working.append(name)
    return {key: {name: found[name] for name in names if name in found} for key, found in samples.items()}
