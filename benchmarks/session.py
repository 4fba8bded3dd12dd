"""What a run is told, and what it says meanwhile: on stderr."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

from .measure import shielded

Peer = TypeVar("Peer")

_WIDTH = 24


class Session:
    """One run: whether it is a quick one, which peers were skipped and why, and how far it is."""

    def __init__(self, *, quick: bool) -> None:
        self.quick = quick
        self.skipped: list[tuple[str, str]] = []  # peer and reason
        self._shown = False
        self._row, self._done, self._rows = "", 0, 1

    def sizes(self, sizes: Sequence[int], most: int = 1 << 20) -> Sequence[int]:
        """Return the sizes of a full run, or the first two that are small enough for a quick one."""
        return [size for size in sizes if size <= most][:2] if self.quick else sizes

    def start(self, stack: contextlib.ExitStack, kinds: Iterable[Callable[..., Peer]], *args: Any) -> list[Peer]:
        """Start ours, which comes first, and the peers; `stack` closes them.

        Peers that are not installed or fail are skipped with a word.
        """
        started: list[Peer] = []
        for kind in kinds:
            with self.attempt(str(getattr(kind, "name", kind)), ours=not started), shielded():
                peer: Any = kind(*args)
                stack.callback(peer.close)
                started.append(peer)
        return started

    @contextlib.contextmanager
    def attempt(self, name: str, *, ours: bool = False) -> Iterator[None]:
        """Skip the peer `name` if it is not installed, or fails, in the block; what ours raises is raised."""
        try:
            yield
        except Exception as error:
            if ours:
                raise
            self._skip_for(name, error)

    def _skip_for(self, name: str, error: Exception) -> None:
        if isinstance(error, ModuleNotFoundError) and error.name:
            self.skip(name, f"{error.name.partition('.')[0]} is not installed")
        else:
            self.skip(name, f"{type(error).__name__}: {error}".splitlines()[0])

    def skip(self, name: str, reason: str) -> None:
        """Say once that a peer is left out."""
        if (name, reason) not in self.skipped:
            self.skipped.append((name, reason))
            self.say(f"skipped: {name}: {reason}")

    def say(self, text: str) -> None:
        """Print a line to stderr, above the bar."""
        self.wipe()
        print(text, file=sys.stderr, flush=True)

    def begin(self, row: str, done: int, rows: int) -> None:
        """Have the bar be about a row; so many of all rows are done."""
        self._row, self._done, self._rows = row, done, rows
        self.tick(0)

    def tick(self, part: float) -> None:
        """Draw the bar, if there is a terminal to draw it on; `part` of the current comparison is done."""
        if sys.stderr.isatty():
            done = self._done / self._rows
            text = f"{self._row}{'.' * int(part * 4)}"
            bar = "#" * int(done * _WIDTH)
            print(f"\r\x1b[K[{bar:.<{_WIDTH}}] {done:4.0%} {text}", end="", file=sys.stderr, flush=True)
            self._shown = True

    def wipe(self) -> None:
        """Take the bar away."""
        if self._shown:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)
            self._shown = False
