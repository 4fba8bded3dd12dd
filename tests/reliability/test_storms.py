"""Storms: processes that send, receive, grow, lock and die at random; see storm.py for what must hold all the same."""

from __future__ import annotations

import os
from typing import Any

import pytest
from crash_cells import METHODS
from supervise import Program


@pytest.mark.timeout(0)  # it is watched
@pytest.mark.parametrize("method", METHODS)
def test_a_storm(method: str, long: bool, record_figure: Any, request: pytest.FixtureRequest) -> None:
    """Of a second or two, or of a minute with --long, or of --storm-seconds; another seed each time, unless short."""
    seconds = request.config.getoption("storm_seconds") or (60.0 if long else 2.0)
    seed = os.environ.get("STORM_SEED") or (os.urandom(4).hex() if seconds > 10 else "a squall")
    print(f"to have this one again: STORM_SEED={seed!r}")
    counted: dict[str, int] = {}
    with Program("storm.py", method, seed, str(seconds)) as program:
        for line in program.lines():
            counted = line
    record_figure("deaths survived", counted["deaths"])
    record_figure("messages received in storms, and right", counted["messages"])
    record_figure("bytes in these messages, checked", counted["bytes"])
    record_figure("tasks in storms", counted["tasks"])
