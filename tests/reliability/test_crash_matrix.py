"""Whoever dies, however and whenever: those who are left go on, or are told, and nothing leaks."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterable
from typing import Any

import pytest
from crash_cells import Cell, all_cells, is_possible, pairwise
from deaths import HOW
from supervise import Failed, Program


def run(cells: Iterable[Cell], record_figure: Callable[[str, Any], None]) -> None:
    """Run cells, in one program; go on in a new one behind each that fails."""
    # While a tracker lives, it cleans up behind killed owners of stock queues and pools: at the end it must be alive.
    left = sorted(cells, key=lambda cell: cell.who != "resource tracker")
    failures = []
    while left:
        begun = 0
        try:
            with Program("crash_program.py", json.dumps(left)) as program:
                for line in program.lines():
                    if "begin" in line:
                        begun += 1
                        continue
                    record_figure("deaths survived", 1)
                    record_figure("messages received around a death, and right", line["messages"])
                    record_figure("bytes in these messages, checked", line["bytes"])
            assert begun == len(left)
            break
        except Failed as error:
            begun = max(begun, 1)  # none, if the program fails before
            failures.append(f"{left[begun - 1]}\n{error}")
            left = left[begun:]
    assert not failures, "\n\n".join([f"{len(failures)} failures", *failures])


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "cells" not in metafunc.fixturenames:
        return
    long = metafunc.config.getoption("long")
    groups: dict[str, list[Cell]] = {}
    for cell in all_cells() if long else pairwise(all_cells()):
        groups.setdefault(f"{cell.method}-{cell.channel if long else cell.who}", []).append(cell)
    metafunc.parametrize("cells", groups.values(), ids=groups.keys())


@pytest.mark.timeout(0)  # the program is watched
def test_the_matrix(cells: list[Cell], record_figure: Any) -> None:
    """With --long all that is possible; otherwise each pair of who, how, when, channel, start method once at least."""
    run(cells, record_figure)


def test_the_few_have_all_pairs() -> None:
    cells = all_cells()
    assert all(map(is_possible, cells))
    assert {cell.how for cell in cells} == set(HOW)

    def pairs(some: Iterable[Cell]) -> set[Any]:
        return {pair for cell in some for pair in itertools.combinations(enumerate(cell), 2)}

    few = pairwise(cells)
    assert pairs(few) == pairs(cells)
    assert len(few) < 100


def test_a_hang_is_told_with_its_stacks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("supervise.PATIENCE", 1.0)
    with Program("hang.py") as program:
        lines = program.lines()
        assert next(lines) == {"begin": "to hang"}
        with pytest.raises(Failed, match="nothing happened") as failure:
            next(lines)
    assert str(failure.value).count("in wait_for_ever") == 2


def test_a_process_that_stays_behind_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("supervise.SOON", 0.1)
    with Program("hang.py", "orphan") as program, pytest.raises(Failed, match="are left behind"):
        list(program.lines())
