"""Fixtures and options of all tests: every one leaves no process, descriptor, mapping or shared memory behind."""

from __future__ import annotations

import contextlib
import gc
import json
import multiprocessing
import os
import pickle
import platform
import re
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import forkserver
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import pytest

import mpmemory
from mpmemory import (
    HandleLostError,
    Memory,
    RangeLock,
    RobustLock,
    _backends,
    _mappings,
    _names,
    _reaper,
    _segments,
    _sharer,
)
from mpmemory._reaper import reaper
from mpmemory.connection import Pipe

Array = Any  # of NumPy, or lost

START_METHODS = ["fork", "forkserver", "spawn"]
# Not in children, which import this as well: some are killed at any moment, and that of posix makes a name to find out.
BACKENDS = []
if multiprocessing.parent_process() is None:
    BACKENDS = [name for name, backend in _backends.BACKENDS.items() if backend.available()]

# A message of 1,000 handles is 2,000 descriptors here, and many systems start with a limit of 1,024.
with contextlib.suppress(ValueError):  # more is not allowed
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 4096), hard))

# Most of what a child takes to start is importing these, which are not what is tested. Of ours it has nothing yet.
multiprocessing.set_forkserver_preload(["pytest", "hypothesis", "numpy", "multiprocessing.pool", "concurrent.futures"])

# No threads of NumPy's, which each child would start: a matrix product is nowhere.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

# The start of a program that is to be at the limit of its descriptors at times.
LIMITED = """
import contextlib, errno, os, resource, socket
import numpy as np
from mpmemory import Memory
from mpmemory.connection import Pipe
from mpmemory.queues import JoinableQueue, Queue, SimpleQueue

resource.setrlimit(resource.RLIMIT_NOFILE, (400, 400))

@contextlib.contextmanager
def no_descriptors_left():
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):
            while True:
                stack.callback(os.close, os.dup(0))
        yield

def expect_the_limit(action):
    with no_descriptors_left():
        try:
            action()
        except OSError as error:
            assert error.errno == errno.EMFILE and "ulimit -n" in str(error), repr(error)
        else:
            raise AssertionError("no error")
"""


# --- options and figures of tests/reliability: here, since that folder's own conftest would be loaded too late ---


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("reliability")
    group.addoption("--long", action="store_true", help="run tests/reliability in full")
    group.addoption("--storm-seconds", type=float, metavar="S", help="how long a storm lasts (60 with --long)")
    group.addoption("--figures", metavar="FILE", help="write what the tests have counted to FILE, as JSON")


@pytest.fixture
def long(request: pytest.FixtureRequest) -> bool:
    """Return whether all of it is to be run."""
    return bool(request.config.getoption("long"))


@pytest.fixture
def record_figure(request: pytest.FixtureRequest) -> Callable[[str, Any], None]:
    """Record a number, which is added to those of the same name, or a list of numbers, for `--figures`."""
    properties = request.node.user_properties  # they also reach pytest from the processes of xdist
    return lambda name, value: properties.append((f"figure: {name}", value))


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    figures: dict[str, Any] = {}
    for report in (report for reports in terminalreporter.stats.values() for report in reports):
        if getattr(report, "when", None) == "call":
            for name, value in report.user_properties:
                if name.startswith("figure: "):
                    name = name.removeprefix("figure: ")
                    figures[name] = value if isinstance(value, list) else figures.get(name, 0) + value
    numbers = {name: value for name, value in sorted(figures.items()) if not isinstance(value, list)}
    if numbers:
        terminalreporter.section("figures")
        for name, value in numbers.items():
            terminalreporter.line(f"{value:>15,} {name}")
    if path := config.getoption("figures"):
        of = {
            "arguments": list(config.invocation_params.args),
            "date": time.strftime("%Y-%m-%d"),
            "python": platform.python_version(),
            "kernel": platform.release(),
            "processors": os.cpu_count(),
        }
        Path(path).write_text(json.dumps({**of, "figures": dict(sorted(figures.items()))}, indent=1))


def open_fds() -> dict[int, str]:
    """Return this process's descriptors and what they are on."""
    fds = {}
    for entry in os.listdir("/proc/self/fd"):
        try:
            fds[int(entry)] = os.readlink(f"/proc/self/fd/{entry}")
        except FileNotFoundError:  # the listing's own
            continue
    return fds


def mappings() -> list[str]:
    """Return this process's mappings of shared memory, whatever their names."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    return sorted(line for line in lines if re.search(r"/memfd:|/dev/shm/|\(deleted\)", line))


def eventually(condition: Callable[[], bool]) -> None:
    """Wait until it holds, where there is no event to wait for, or other tests are in the way for a while."""
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def shm_names() -> set[str]:
    """Return what has a name in /dev/shm, of the kinds of names that this package and SharedMemory make."""
    return {name for name in os.listdir("/dev/shm") if name.startswith(("mpmemory", "psm_"))}


def dumps(obj: object) -> bytes:
    """Pickle as the stock Queue, Pipe and Pool do."""
    return bytes(ForkingPickler.dumps(obj))


def echo(obj: Any) -> Any:
    """Send and receive an object within this process."""
    return pickle.loads(dumps(obj))


def address(array: Array) -> int:
    return int(array.__array_interface__["data"][0])


def is_free(lock: RangeLock | RobustLock) -> bool:
    """Return whether it can be acquired now, by a holder of its own."""
    if acquired := lock.acquire(blocking=False):
        lock.release()
    return acquired


def assert_lost(handle: Memory, message: str) -> None:
    actions: list[Any] = [
        lambda: handle.size,
        lambda: handle.fileno(),
        lambda: handle.map(),
        lambda: handle.pread(1),
        lambda: handle.pwrite(b"x"),
        lambda: handle.dup(),
        lambda: dumps(handle),
    ]
    for action in actions:
        with pytest.raises(HandleLostError, match=message) as error:
            action()
        assert error.value.errno
    assert "lost" in repr(handle)
    assert not handle.closed
    handle.close()
    assert handle.closed


def skip_unless_available(nbytes: int) -> None:
    match = re.search(r"^MemAvailable: +(\d+) kB", Path("/proc/meminfo").read_text(), re.MULTILINE)
    assert match
    if int(match[1]) * 1024 < nbytes:
        pytest.skip(f"needs {nbytes >> 30} GB of memory")


@pytest.fixture(scope="session", autouse=True)
def _the_fork_server_knows_no_test() -> None:
    """Start it now: the environment of whoever starts it is that of all children it will have."""
    forkserver.ensure_running()


@pytest.fixture(scope="session", autouse=True)
def _old_objects_are_not_collected() -> None:
    """Leave out all that was imported when garbage is collected: each test does that, some of them often."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _leaves_nothing(no_memory_leaks: None) -> Iterator[None]:
    # What has descriptors and awaits collection (a pool in the frames of an error) must not go in the middle of a test
    # that compares them.
    gc.collect()
    yield
    # Many tests pickle handles that nobody is to receive, and failed ones leave what the next must not find.
    _sharer._sharer.stop(timeout=10)
    kept = list(_names._kept)
    if kept:
        _names._kept.clear()
    _segments.warm.release(float("inf"))
    _mappings.release(float("inf"))
    reaper.join()  # a fork would warn of its thread
    assert kept == []


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Run the test on each backend, in this process and in all that it starts."""
    monkeypatch.setenv("MPMEMORY_BACKEND", request.param)
    _backends.chosen.cache_clear()
    yield request.param
    _backends.chosen.cache_clear()


@pytest.fixture(params=START_METHODS)
def ctx(request: pytest.FixtureRequest) -> mpmemory.context.ForkContext:
    """Run the test with each start method, in a context of ours."""
    return mpmemory.get_context(request.param)


@pytest.fixture
def pipe() -> Any:
    left, right = Pipe()
    with left, right:
        yield left, right


@pytest.fixture
def never_idle(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep warm what is kept warm."""
    monkeypatch.setattr(_reaper, "IDLE_TIMEOUT", 1000.0)


def in_namespace(script: str) -> list[str]:
    """Return what to put before a command so that it sees other file systems."""
    if os.geteuid() != 0 or subprocess.run(["unshare", "-m", "true"], check=False).returncode != 0:
        pytest.skip("needs a private mount namespace")
    return ["unshare", "-m", "sh", "-ec", f'{script}\nexec "$@"', "-"]


@pytest.fixture
def small_shm() -> list[str]:
    """Return what to put before a command so that it runs with a /dev/shm of 1 MB."""
    return in_namespace("mount -t tmpfs -o size=1m tmpfs /dev/shm")


@pytest.fixture
def without_proc() -> list[str]:
    """Return what to put before a command so that it runs without a /proc."""
    return in_namespace("umount -l /proc")


@pytest.fixture
def small_cgroup() -> Iterator[list[str]]:
    """Return what to put before a command so that it may use 64 MB."""
    name = f"mpmemory-test-{os.getpid()}"
    for folder, limit in (
        (Path("/sys/fs/cgroup/memory", name), "memory.limit_in_bytes"),
        (Path("/sys/fs/cgroup", name), "memory.max"),
    ):
        with contextlib.suppress(OSError):
            folder.mkdir()
            try:
                (folder / limit).write_text(str(64 << 20))
                yield ["sh", "-c", f'echo $$ > {folder}/cgroup.procs && exec "$@"', "-"]
                return
            finally:
                folder.rmdir()
    pytest.skip("needs a memory cgroup of its own")


@pytest.fixture
def run_python(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run a program in a new interpreter; fail the test if it fails, unless `check=False`.

    `prefix` is what comes before the command: see `small_shm`.
    """

    def run(
        source: str, *args: str, check: bool = True, prefix: Sequence[str] = (), **options: object
    ) -> subprocess.CompletedProcess[str]:
        script = tmp_path / "program.py"
        script.write_text(source)
        done = subprocess.run(
            [*prefix, sys.executable, "-W", "error", str(script), *args],
            text=True,
            capture_output=True,
            timeout=60,
            check=False,
            **options,  # type: ignore[call-overload]
        )
        if check:
            assert done.returncode == 0, done.stderr
        return done

    return run
