"""The reaper: a thread that gives up what is no longer used, while there is such a thing."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections.abc import Callable

#: How often the reaper looks, in seconds.
INTERVAL = 1.5

#: What is kept for the next use is given up when it was not used for so many seconds.
IDLE_TIMEOUT = 3.0


class Reaper:
    """Calls functions now and then, each as long as it returns True. Without any, there is no thread."""

    def __init__(self) -> None:
        self.start_anew()

    def start_anew(self) -> None:
        """Begin with nothing: also in a forked child, where the thread is not."""
        self._condition = threading.Condition()
        self._sweeps: set[Callable[[], bool]] = set()
        self._thread: threading.Thread | None = None
        self._at_once = False

    def watch(self, sweep: Callable[[], bool]) -> None:
        """Call `sweep` from now on. It gives up what it can, and returns whether anything is left to look after."""
        if sweep in self._sweeps or sys.is_finalizing():  # then a thread would never come up, and all goes anyway
            return
        with self._condition:
            self._sweeps.add(sweep)
            if self._thread is None:
                thread = threading.Thread(target=self._run, name="mpmemory-reaper", daemon=True)
                with contextlib.suppress(RuntimeError):  # no thread can be started: near the end of the process
                    thread.start()
                    self._thread = thread

    def _run(self) -> None:
        while True:
            with self._condition:
                if not self._sweeps:
                    self._thread = None
                    return
                if not self._at_once:
                    self._condition.wait(INTERVAL)
                self._at_once = False
                # Taken out before they are called: what is watched meanwhile is called once more.
                sweeps, self._sweeps = self._sweeps, set()
            left = {sweep for sweep in sweeps if sweep()}  # each has its own lock
            with self._condition:
                self._sweeps |= left

    def join(self) -> None:
        """Have it look at once, and wait until it has nothing left to look after."""
        with self._condition:
            thread = self._thread
            self._at_once = True  # it may be looking, or starting, just now
            self._condition.notify_all()
        if thread is not None:
            thread.join()


reaper = Reaper()

# Not another Reaper: the frame of the thread, which is none of the child's, would hold this one for ever.
os.register_at_fork(after_in_child=reaper.start_anew)
