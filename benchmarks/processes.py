"""Programs that are measured from outside: what they say, the memory they use, and what they leave behind."""

from __future__ import annotations

import contextlib
import json
import os
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

ROOT = Path(__file__).parent.parent
LONGEST = 120.0  # seconds that a program may take to say something
INTERVAL = 0.02  # seconds between two looks at the memory in use


class Program:
    """`python -m benchmarks.probe ...` in a session of its own, of which nothing is left when it is closed."""

    def __init__(self, *arguments: str) -> None:
        self.started = time.perf_counter()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.probe", *arguments],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )

    @property
    def pid(self) -> int:
        """The process's id, which is also that of its session."""
        return self._process.pid

    def tell(self, line: str) -> None:
        """Write a line to it."""
        assert self._process.stdin
        self._process.stdin.write(line.encode() + b"\n")
        self._process.stdin.flush()

    def hear(self, meanwhile: Callable[[], object] | None = None) -> dict[str, Any]:
        """Return what its next line of JSON says, whatever else it prints; `meanwhile` is called at intervals."""
        assert self._process.stdout
        end = time.monotonic() + LONGEST
        while not (line := self._line(end, meanwhile)).startswith(b"{"):
            if not line:
                self._fail()
        said: dict[str, Any] = json.loads(line)
        return said

    def _line(self, end: float, meanwhile: Callable[[], object] | None) -> bytes:
        assert self._process.stdout
        while not select.select([self._process.stdout], [], [], INTERVAL if meanwhile else LONGEST)[0]:
            if time.monotonic() > end:
                raise TimeoutError(f"nothing was said for {LONGEST:.0f} seconds")
            if meanwhile:
                meanwhile()
        return self._process.stdout.readline()

    def _fail(self) -> NoReturn:
        """Raise what the program ended with."""
        self.kill()
        assert self._process.stderr
        words = (self._process.stderr.read().decode(errors="replace").strip().splitlines() or ["it said nothing"])[-1]
        if missing := re.match(r"ModuleNotFoundError: No module named '([^']+)'", words):
            raise ModuleNotFoundError(words, name=missing[1])
        raise RuntimeError(words)

    def mapped(self) -> set[Path]:
        """Return the files of /dev/shm that its processes have mapped."""
        found: set[Path] = set()
        for pid, _, session in _processes():
            if session == self.pid:
                with contextlib.suppress(OSError):
                    text = Path(f"/proc/{pid}/maps").read_text()
                    found.update(Path(path) for path in re.findall(r" (/dev/shm/\S+)$", text, re.MULTILINE))
        return found

    def kill(self) -> None:
        """Kill all processes of the session, and wait for their end."""
        while pids := [pid for pid, _, session in _processes() if session == self.pid]:
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.001)
        self._process.wait()

    def close(self) -> None:
        """Let the program end, and kill what does not."""
        assert self._process.stdin
        assert self._process.stdout
        assert self._process.stderr
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(10)
        self.kill()
        self._process.stdout.close()
        self._process.stderr.close()

    def peak_of(self, line: str) -> int:
        """Write a line, and return the greatest memory that was in use until the answer, in bytes."""
        self.tell(line)
        peak = 0

        def look() -> None:
            nonlocal peak
            peak = max(peak, sum(pss(pid) for pid in tree(self.pid)))

        self.hear(look)
        look()
        return peak


def _processes() -> Iterator[tuple[int, int, int]]:
    """Yield pid, parent and session of all processes that have not ended."""
    for name in os.listdir("/proc"):
        if name.isdecimal():
            with contextlib.suppress(OSError):
                fields = Path(f"/proc/{name}/stat").read_text().rpartition(")")[2].split()
                if fields[0] not in "ZX":
                    yield int(name), int(fields[1]), int(fields[3])


def tree(root: int) -> list[int]:
    """Return the process and all that descend from it."""
    parents = {pid: parent for pid, parent, _ in _processes()}
    found = [root]
    for pid in found:
        found += [child for child, parent in parents.items() if parent == pid]
    return found


def pss(pid: int) -> int:
    """Return the memory of a process in bytes, its share of what it shares with others (proportional set size)."""
    try:
        text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    except OSError:  # it has ended
        return 0
    match = re.search(r"^Pss: +(\d+) kB", text, re.MULTILINE)
    return int(match[1]) * 1024 if match else 0


def still_held(label: str) -> list[Path]:
    """Return the descriptors, of any process, on anonymous memory with this label."""
    found = []
    for fd in Path("/proc").glob("[0-9]*/fd/*"):
        with contextlib.suppress(OSError):
            if label in os.readlink(fd):
                found.append(fd)
    return found
