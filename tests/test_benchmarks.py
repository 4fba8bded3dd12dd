"""The benchmarks run, and say what they skip; nothing here is about speed."""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks import measure
from benchmarks.measure import NEVER, Comparison, Measured, Side, Target, holds, quantity, quartiles
from benchmarks.processes import Program, pss, tree
from benchmarks.rows import ROWS, question
from benchmarks.session import Session

ROOT = Path(__file__).parent.parent

# What the test extra does not bring: missing here in any case, so that a run takes seconds.
PEERS = ["joblib", "mpire", "multiprocess", "torch", "ray", "iceoryx2", "faster_fifo", "arrayqueues", "SharedArray"]
ABSENT = [*PEERS, "posix_ipc", "matplotlib"]

GROUPS = [
    ["echo", "argument", "result", "results-kept", "shared", "dataframe", "small-arrays"],
    ["echo-pipe", "message", "handle", "handle-pool", "noop", "create", "fill", "live", "drop-ins", "lock"],
    ["worker-killed", "tree-killed", "start", "import", "program", "tasks", "workers", "memories"],
]


@pytest.fixture
def without_peers(tmp_path: Path) -> dict[str, str]:
    """Return an environment in which no peer, nor matplotlib, can be imported."""
    folder = tmp_path / "absent"
    folder.mkdir()
    for name in ABSENT:
        text = f"raise ModuleNotFoundError('No module named {name!r}', name={name!r})\n"
        (folder / f"{name}.py").write_text(text.replace("'No module", '"No module').replace("', name", '", name'))
    return {**os.environ, "PYTHONPATH": f"{folder}{os.pathsep}{ROOT}"}


def run(*arguments: object, env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "benchmarks", *map(str, arguments)],
        cwd=ROOT,
        env=env,
        text=True,
        capture_output=True,
        check=False,
        timeout=110,
    )


def test_all_rows_are_run_here() -> None:
    assert sorted(row for group in GROUPS for row in group) == sorted(ROWS)


@pytest.mark.parametrize("rows", GROUPS, ids=lambda rows: rows[0])
def test_the_rows_run_and_are_written_down(rows: list[str], without_peers: dict[str, str], tmp_path: Path) -> None:
    output = tmp_path / "results"
    done = run("--quick", "--output", output, *rows, env=without_peers)
    assert done.returncode == 0, done.stderr
    said = done.stderr.splitlines()
    assert all(line.startswith("skipped: ") for line in said), done.stderr  # no tracebacks, no bar: it is no terminal
    assert len(said) == len(set(said))
    assert "skipped: plots: matplotlib is not installed" in said

    data = json.loads((output / "results.json").read_text())
    assert list(data["rows"]) == rows
    assert data["machine"]["command"].startswith("python -m benchmarks --quick")
    assert {skipped["peer"] for skipped in data["skipped"]} >= {
        line.split(": ")[1] for line in said if "plots" not in line
    }
    for found in data["rows"].values():
        assert found
        for measured in found:
            assert measured["sides"], measured
            assert all(side["samples"] >= 1 for side in measured["sides"].values()), measured

    page = (output / "results.md").read_text()
    assert page.index("## Targets") < page.index(f"## {rows[0]}")
    for row in rows:
        assert f"**{question(row)}**" in page
    assert page.count("Where we lose: ") == len(rows)
    assert "the numbers mean nothing" in page


def test_missing_peers_are_skipped_with_a_word(without_peers: dict[str, str]) -> None:
    done = run("--quick", "echo", "program", env=without_peers)
    assert done.returncode == 0, done.stderr
    for name in ("joblib", "mpire", "multiprocess", "torch", "ray"):
        assert done.stderr.count(f"skipped: {name}: {name} is not installed\n") == 1, done.stderr
    assert "mpmemory" in done.stdout


def test_an_unknown_row() -> None:
    done = run("ehco", env=dict(os.environ))
    assert done.returncode == 2
    assert "unknown row 'ehco': expected one of echo, " in done.stderr
    assert "Traceback" not in done.stderr


def test_the_list_of_questions() -> None:
    done = run("--list", env=dict(os.environ))
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert [line.split()[0] for line in lines] == list(ROWS)
    assert all(line.endswith("?") for line in lines)


def test_ctrl_c_leaves_nothing(without_peers: dict[str, str]) -> None:
    with subprocess.Popen(
        [sys.executable, "-m", "benchmarks", "--quick", "echo", "shared", "noop"],
        cwd=ROOT,
        env=without_peers,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as program:
        assert program.stdout
        assert program.stderr
        while not program.stdout.readline().startswith("echo: "):
            assert program.poll() is None
        members = tree(program.pid)
        assert len(members) > 1  # the workers
        os.killpg(program.pid, signal.SIGINT)  # as a terminal does
        program.stdout.read()
        said = program.stderr.read()
        assert program.wait(60) == 130
    assert said.splitlines()[-1] == "interrupted"
    assert "Traceback" not in said
    assert not [pid for pid in members if Path(f"/proc/{pid}").exists() and pss(pid)]


def test_plots(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    done = run("--quick", "--output", tmp_path, "create", env=dict(os.environ))
    assert done.returncode == 0, done.stderr
    picture = (tmp_path / "create.svg").read_text()
    assert "mpmemory.SharedBuffer" in picture
    assert "](create.svg)" in (tmp_path / "results.md").read_text()


# --- measuring ------------------------------------------------------------------------------------


def compare(*sides: Side, quick: bool = True) -> tuple[Measured, Session]:
    session = Session(quick=quick)
    return measure.interleave(Comparison("something", sides), session), session


def test_sides_are_sampled_in_turn() -> None:
    order: list[str] = []
    found, _ = compare(Side("ours", lambda: order.append("ours")), Side("peer", lambda: order.append("peer")))
    assert order == ["ours", "peer", "peer", "ours", "ours", "peer"]  # the first round is dropped
    assert {side: len(samples) for side, samples in found.samples.items()} == {"ours": 2, "peer": 2}


def failing(after: int) -> Callable[[], None]:
    calls = iter(range(after))

    def fail() -> None:
        if next(calls, None) is None:
            raise RuntimeError("no more\nthan that")

    return fail


@pytest.mark.parametrize("after", [0, 1, 2])
def test_a_peer_that_fails_is_skipped(after: int, capsys: pytest.CaptureFixture[str]) -> None:
    found, session = compare(
        Side("ours", lambda: None), Side("bad", failing(after)), Side("floor", lambda: None, floor=True)
    )
    assert list(found.samples) == ["ours", "floor"]
    assert found.floors == ["floor"]
    assert session.skipped == [("bad", "RuntimeError: no more")]
    assert capsys.readouterr().err == "skipped: bad: RuntimeError: no more\n"


def test_ours_must_not_fail() -> None:
    with pytest.raises(RuntimeError, match="no more"):
        compare(Side("ours", failing(0)), Side("peer", lambda: None))


MEASURED = Measured("something", {"ours": [1.0, 2.0, 4.0, 8.0], "peer": [4.0, 6.0, 16.0], "never": [NEVER] * 4})


@pytest.mark.parametrize(
    ("target", "reached", "held"),
    [
        (Target("faster", 4, "peer"), 4, True),
        (Target("faster", 4.1, "peer"), 4, False),
        (Target("faster", 100, "never"), math.inf, True),
        (Target("within", 0.25, "peer"), 0.25, True),
        (Target("within", 0.2, "peer"), 0.25, False),
        (Target("more", -4, "peer"), -4, True),
        (Target("more", -5, "peer"), -4, False),
        (Target("at most", 3), 3, True),
        (Target("at most", 2.9), 3, False),
        (Target("at least", 3), 3, True),
        (Target("at least", 3.1), 3, False),
        (Target("faster", 1, "not measured"), None, False),
    ],
)
def test_targets(target: Target, reached: float | None, held: bool) -> None:
    assert MEASURED.reached(target) == reached
    assert reached is None or holds(target, reached) == held


def test_quartiles_and_quantities() -> None:
    assert quartiles([5, 1, 4, 2, 3]) == (2, 4)
    assert quartiles([1, NEVER]) == (1, NEVER)
    assert [quantity(value, "s") for value in (2e-7, 1.5e-5, 0.0123, 4.5, NEVER)] == [
        "200 ns",
        "15.0 µs",
        "12.3 ms",
        "4.50 s",
        "never",
    ]
    assert [quantity(value, "B") for value in (0, 1500, 1e8)] == ["0 B", "1.50 KB", "100 MB"]


@pytest.fixture
def program() -> Iterator[Callable[..., Program]]:
    with contextlib.ExitStack() as stack:

        def start(*arguments: str) -> Program:
            return stack.enter_context(contextlib.closing(Program(*arguments)))

        yield start


def test_memory_is_that_of_the_tree(program: Any) -> None:
    started = program("pool", "multiprocessing")
    started.hear()
    assert len(tree(started.pid)) >= 4  # itself, the fork server and two workers; the resource tracker
    small = sum(pss(pid) for pid in tree(started.pid))
    assert started.peak_of(str(64 << 20)) > small + (64 << 20)


def test_a_program_that_cannot_start(program: Any) -> None:
    with pytest.raises(RuntimeError, match="KeyError: 'no such pool'"):
        program("pool", "no such pool").hear()
