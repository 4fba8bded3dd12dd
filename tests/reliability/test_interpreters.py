"""Every Python that is here, in the modes that find most: warnings as errors, development mode, without assertions."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import START_METHODS

HERE = Path(__file__).parent
TOUR = HERE / "tour.py"
VERSIONS = ["3.11", "3.12", "3.13", "3.14"]
MODES = {"-X dev": ["-X", "dev"], "-W error": [], "PYTHONOPTIMIZE=2": ["-OO"]}

# Python 3.12 on warns of any fork of a process with threads, such as that of a pool's new workers.
FORK_IS_WARNED_OF = "ignore:This process:DeprecationWarning"


def interpreter(version: str) -> str:
    """Return the path of a Python of this version, if there is one that runs."""
    if sys.version_info[:2] == tuple(map(int, version.split("."))):
        return sys.executable
    path = shutil.which(f"python{version}")
    if path is None or subprocess.run([path, "-c", ""], check=False, capture_output=True).returncode != 0:
        pytest.skip(f"there is no Python {version}")
    return path


def run_tour(python: str, mode: str, method: str) -> None:
    # The package is found here, if it is not installed for that Python.
    env = {**os.environ, "START_METHOD": method, "PYTHONPATH": str(HERE.parent.parent)}
    done = subprocess.run(
        [python, "-W", "error", "-W", FORK_IS_WARNED_OF, *MODES[mode], str(TOUR)],
        env=env,
        text=True,
        capture_output=True,
        timeout=100,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert set(json.loads(done.stdout).values()) == {"done"}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("method", START_METHODS)
def test_this_python(method: str, mode: str) -> None:
    run_tour(sys.executable, mode, method)


@pytest.mark.parametrize("version", VERSIONS)
def test_other_pythons(version: str, long: bool, record_figure: Callable[[str, Any], None]) -> None:
    python = interpreter(version)
    for method in START_METHODS if long else START_METHODS[1:2]:
        for mode in MODES if long else ["-X dev"]:
            run_tour(python, mode, method)
    record_figure(f"Python {version}", 1)
