"""How far the tasks of an imap are ahead of who takes its results."""

from __future__ import annotations

from multiprocessing.pool import IMapIterator
from typing import Any


class Window:
    """How far the feeder of an imap may be ahead of who takes its results."""

    def __init__(self, iterator: IMapIterator[Any], size: int) -> None:
        self.fed = 0
        self.started = False  # somebody takes results
        self.abandoned = False  # nobody can take any more
        self.waited_for = False
        self._iterator: Any = iterator
        self.job: int = iterator._job  # type: ignore[attr-defined]
        self._size = size

    def _ahead(self) -> int:
        taken = self._iterator._index - len(self._iterator._items)
        return int(self.fed - taken)

    def open(self, most: int) -> int:
        """Return how many tasks may follow now, `most` at most."""
        # What was never iterated over is there for its effects.
        granted = most if self.abandoned else max(0, min(most, self._size - self._ahead()))
        self.fed += granted
        return granted

    def is_half_open(self) -> bool:
        return self._ahead() <= self._size // 2

    def is_unwanted(self) -> bool:
        return self.started and self.abandoned
