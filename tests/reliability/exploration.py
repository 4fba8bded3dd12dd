"""How many examples are tried: few, and always the same, in a usual run; many, and new ones, with `--long`."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st


def effort(long: bool, short: int, full: int) -> settings:
    """Return settings for `short` examples, or `full` ones."""
    return settings(
        max_examples=full if long else short,
        derandomize=not long,
        database=None,
        deadline=None,
        print_blob=True,
        suppress_health_check=list(HealthCheck),
    )


def explore(test: Callable[[Any], None], strategy: st.SearchStrategy[Any], effort: settings) -> int:
    """Call `test` with examples of `strategy`, and return with how many."""
    count = 0

    def counted(example: Any) -> None:
        nonlocal count
        count += 1
        test(example)

    effort(given(strategy)(counted))()
    return count


def count_fds() -> int:
    return len(os.listdir("/proc/self/fd"))


@contextmanager
def no_fd_lost() -> Iterator[None]:
    before = count_fds()
    yield
    assert count_fds() <= before  # fewer: something that was there before was given up meanwhile
