"""The pytest plugin of mpmemory: a fixture that checks that a test leaves nothing behind.

A module beside the package, since pytest imports it in every run where mpmemory is installed: it must not
take the package along until a test asks for it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest

_failed = pytest.StashKey[bool]()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> None:
    if call.when == "call" and call.excinfo is not None:
        item.stash[_failed] = True


@pytest.fixture
def no_memory_leaks(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fail the test with what it leaves behind; see `mpmemory.testing.assert_no_leaks`.

    A test that failed anyway is not checked: its error holds the variables of all functions that it came through.
    """
    from mpmemory.testing import assert_no_leaks

    with contextlib.ExitStack() as stack:
        stack.enter_context(assert_no_leaks())
        yield
        if request.node.stash.get(_failed, False):
            stack.pop_all()
