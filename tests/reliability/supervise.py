"""Programs of tests, each in a session of its own: watched, and ended with all that they have started.

A program says what it does by lines of JSON on its standard output. If it says nothing for `PATIENCE` seconds it
hangs: then all its processes write their stacks and are killed, and the test fails with what they wrote.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import re
import select
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent

PATIENCE = 60.0
"""How long a program may say nothing, in seconds: far longer than anything takes on a busy machine."""


SOON = 10.0
"""How long what a program leaves may take to go after its end, in seconds."""


# A resource tracker that was started anew does not know the semaphores of stock queues and pools.
_UNKNOWN_SEMAPHORE = re.compile(
    r'Traceback \(most recent call last\):\n  File "[^"]*resource_tracker.py", line \d+, in main\n.*\n(?: *~*\^+\n)?'
    r"KeyError: '/mp-\w+'\n"
)


class Failed(AssertionError):
    """A program has failed, or hangs; with all that it wrote to its standard error."""


def report(**what: Any) -> None:
    """Say something, in the program."""
    print(json.dumps(what), flush=True)


def show_stacks_when_asked() -> None:
    """Have this process write the stacks of its threads at SIGUSR1. Called by each process of a program."""
    faulthandler.register(signal.SIGUSR1, all_threads=True)


@contextlib.contextmanager
def failing_at_once() -> Iterator[None]:
    """End this program at the first error, in its block, with all that it has started: nobody waits for them then."""
    try:
        yield
    except BaseException:
        traceback.print_exc()
        for pid in set(session(os.getsid(0))) - {os.getpid()}:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        os._exit(1)


def session(sid: int) -> list[int]:
    """Return the processes of a session, but those that have ended and were not collected."""
    members = []
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            with contextlib.suppress(OSError):  # it has ended meanwhile
                # proc(5): what is behind the name, which may contain anything: state, parent, group, session
                state, _, _, its_session = Path(f"/proc/{entry}/stat").read_text().rpartition(")")[2].split()[:4]
                if int(its_session) == sid and state not in "ZX":
                    members.append(int(entry))
    return members


def _catches(pid: int, number: int) -> bool:
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("SigCgt:"):
                return bool(int(line.split()[1], 16) >> (number - 1) & 1)
    return False


def until(condition: Callable[[], Any], seconds: float) -> bool:
    """Wait until it holds, where there is no event to wait for; False if it does not within `seconds`."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.002)
    return True


class Program:
    """A program of this folder that runs in a session of its own, with a folder for its temporary files."""

    def __init__(self, name: str, *arguments: str) -> None:
        # Not pytest's tmp_path: addresses of sockets in it, with the name of the test, may be too long.
        self._temporary = tempfile.TemporaryDirectory()
        self._errors = Path(self._temporary.name, "errors")
        self._shm = set(os.listdir("/dev/shm"))
        # multiprocessing warns that its tracker was killed, and, from Python 3.12 on, of forks beside threads.
        warnings = ["-Werror", "-Wignore:resource_tracker:UserWarning", "-Wignore:This process:DeprecationWarning"]
        with self._errors.open("w") as errors:
            self._process = subprocess.Popen(
                [sys.executable, *warnings, str(HERE / name), *arguments],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=errors,
                start_new_session=True,
                env={**os.environ, "TMPDIR": self._temporary.name},
            )

    def __enter__(self) -> Program:
        return self

    def __exit__(self, *_: object) -> None:
        """End it with all that belongs to it."""
        while members := session(self._process.pid):
            for pid in members:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        self._process.communicate()
        self._temporary.cleanup()

    def lines(self) -> Iterator[dict[str, Any]]:
        """Yield what it reports, until it has ended. Raises Failed if it hangs, or leaves something behind."""
        stdout = self._process.stdout
        assert stdout is not None
        buffered = b""
        while True:
            if not select.select([stdout], [], [], PATIENCE)[0]:
                raise Failed(f"nothing happened for {PATIENCE} seconds:\n{self._stacks()}")
            data = os.read(stdout.fileno(), 1 << 16)
            if not data:  # closed by all that had it
                break
            *complete, buffered = (buffered + data).split(b"\n")
            yield from map(json.loads, complete)
        self._process.wait(PATIENCE)
        if not until(lambda: not session(self._process.pid), SOON):
            raise Failed(f"processes are left behind:\n{self._stacks()}")
        errors = _UNKNOWN_SEMAPHORE.sub("", self._read_errors())
        if self._process.returncode != 0 or errors:
            raise Failed(f"it ended with status {self._process.returncode}:\n{errors}")
        left = [name for name in os.listdir(self._temporary.name) if name.startswith("mpmemory")]
        if left:
            raise Failed(f"left in the folder for temporary files: {left}")
        # Names of ours live for some microseconds: those seen may be of another test process.
        if not until(lambda: not self._new_names(), SOON):
            raise Failed(f"left in /dev/shm: {self._new_names()}")

    def _new_names(self) -> list[str]:
        return sorted(name for name in set(os.listdir("/dev/shm")) - self._shm if name.startswith("mpmemory"))

    def _read_errors(self) -> str:
        return self._errors.read_text()

    def _stacks(self) -> str:
        lines = []
        for pid in session(self._process.pid):
            with contextlib.suppress(OSError):
                command = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ")
                lines.append(f"process {pid}: {command.decode(errors='replace')[:200]}")
                if _catches(pid, signal.SIGUSR1):
                    before = len(self._read_errors())
                    os.kill(pid, signal.SIGUSR1)
                    until(lambda: len(self._read_errors()) > before, 2)  # noqa: B023
        return "\n".join(lines) + "\n" + self._read_errors()
