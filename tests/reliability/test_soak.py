"""Soaks: what is done a million times takes no more at the end than at the start."""

from __future__ import annotations

from typing import Any

import pytest
from supervise import Program

# How often, in the short run and in the long one.
TIMES = {"pool": (5_000, 1_000_000), "queue": (10_000, 1_000_000), "memory": (5_000, 100_000)}

# What may come and go, in bytes: a segment or two are kept for the next message, and the allocator keeps some, too.
PRIVATE = 8 << 20
SHARED = 8 << 20
DESCRIPTORS = 20


@pytest.mark.timeout(0)  # it is watched
@pytest.mark.parametrize("what", TIMES)
def test_a_soak(what: str, long: bool, record_figure: Any) -> None:
    times = TIMES[what][long]
    samples: list[list[int]] = []
    with Program("soak.py", what, str(times)) as program:
        for line in program.lines():
            samples = line.get("samples", samples)
    record_figure(f"soaks: {what}", times)
    record_figure(f"samples: {what}", samples)
    later = samples[len(samples) // 4 :]  # what is imported or kept for the first time comes before
    for column, margin in ((1, DESCRIPTORS), (2, PRIVATE), (3, SHARED)):
        values = [sample[column] for sample in later]
        half = len(values) // 2
        assert max(values[half:]) <= max(values[:half]) + margin, values
