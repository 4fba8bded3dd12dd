"""Ways to die, and places to die at."""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import sys
from collections.abc import Callable
from typing import Any

resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


HOW: dict[str, Callable[[], object]] = {
    "SIGKILL": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "SIGSEGV": lambda: ctypes.string_at(0),
    "os._exit": lambda: os._exit(3),
    "SystemExit": lambda: sys.exit(4),
}

EXITCODES = {"SIGKILL": -signal.SIGKILL, "SIGSEGV": -signal.SIGSEGV, "os._exit": 3, "SystemExit": 4}

# What this process is to do, and where. Set in who is to die only.
_place: str | None = None
_action: Callable[[], object] = lambda: None  # noqa: E731


def die_at(place: str | None, action: Callable[[], object]) -> None:
    """Have this process do `action`, which ends it or another, when it gets to `place`; None is nowhere."""
    global _place, _action
    _place, _action = place, action


def awaits(place: str) -> bool:
    """Return whether this process is to do its action at `place`."""
    return place == _place


def at(place: str) -> None:
    """Say that this process is at `place`."""
    global _place
    if place == _place:
        _place = None
        _action()


class Trap:
    """Something to send: whoever pickles or unpickles it is in a callback then."""

    def __reduce__(self) -> Any:
        at("in a callback")
        return _spring, ()


def _spring() -> None:
    at("in a callback")
