"""The leak check that users have: it finds each kind of leak, names it, and takes nothing else for one."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from multiprocessing import shared_memory as stock
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import START_METHODS

import mpmemory
from mpmemory import Memory, SharedBuffer, SharedMemory, _backends, arrays
from mpmemory.connection import Pipe
from mpmemory.testing import assert_no_leaks


@contextlib.contextmanager
def left_behind(*patterns: str) -> Iterator[None]:
    """Expect that the block leaves just this, each a line. Other names may be of another worker of xdist."""
    with pytest.raises(AssertionError) as error, assert_no_leaks(timeout=0.1):
        yield
    first, *lines = str(error.value).splitlines()
    assert first == "left behind:"
    lines = [line for line in lines if not line.startswith("  /dev/shm/") or re.fullmatch("|".join(patterns), line[2:])]
    assert len(lines) == len(patterns), lines
    for pattern in patterns:
        assert any(re.fullmatch(f"  {pattern}", line) for line in lines), (pattern, lines)


TARGET = {
    "memfd": r"/memfd:mpmemory:\d+:table \(deleted\)",
    "posix": r"/dev/shm/mpmemory-\w+ \(deleted\)",
    "file": r"/.*/\S+ \(deleted\)",
}


def held(backend: str, pid: int, who: str, *, size: int, fds: int, mappings: int) -> list[str]:
    """Return what says that a memory is held; nothing where it cannot be told from other files."""
    label = {"memfd": "'table'", "posix": "None"}.get(backend)
    counts = f"{fds} descriptors and {mappings} mappings"
    return [f"memory {label} of {size} bytes: {counts} of process {pid}{who}"] if label else []


# --- each kind ------------------------------------------------------------------------------------


def test_a_descriptor() -> None:
    fds: list[int] = []
    with left_behind(r"descriptor \d+: /dev/null"):
        fds.append(os.open(os.devnull, os.O_RDONLY))
    os.close(fds[0])


def test_a_descriptor_whose_number_was_used_before() -> None:
    fd = os.open(os.devnull, os.O_RDONLY)
    with left_behind(f"descriptor {fd}: /dev/zero"):
        os.close(fd)
        assert os.open("/dev/zero", os.O_RDONLY) == fd
    os.close(fd)


def test_a_handle(backend: str) -> None:
    memories = []
    with left_behind(
        rf"descriptor \d+: {TARGET[backend]}",
        *held(backend, os.getpid(), r" \(this one\)", size=5000, fds=1, mappings=0),
    ):
        memories.append(Memory(5000, name="table"))
    assert memories.pop().size == 5000


def test_a_mapping(backend: str) -> None:
    views = []
    fds = 1 if sys.version_info >= (3, 13) else 2  # that of mmap itself
    with (
        left_behind(
            *[rf"descriptor \d+: {TARGET[backend]}"] * fds,
            rf"mapping of {TARGET[backend]}: 8192 bytes in all",
            *held(backend, os.getpid(), r" \(this one\)", size=8192, fds=fds, mappings=1),
        ),
        Memory(5000, name="table").map() as buffer,
    ):
        views.append(buffer.buf)
    assert len(views.pop()) == 5000


def test_a_second_mapping_of_the_same_memory() -> None:
    with Memory(4096, name="table") as memory, memory.map() as first:
        second: list[SharedBuffer] = []
        pattern = rf"mapping of {TARGET[_backends.chosen().name]}: 8192 bytes in all"
        fds = [] if sys.version_info >= (3, 13) else [r"descriptor \d+: /memfd.*"]
        with left_behind(pattern, *fds):
            second.append(memory.map())
        second.pop().close()
        assert first.size == 4096


def test_a_process() -> None:
    with left_behind(r"process \d+: cat", r"descriptor \d+: pipe:\[\d+\]", r"descriptor \d+: pipe:\[\d+\]"):
        child = subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    child.communicate()


def test_a_process_that_was_not_waited_for() -> None:
    with left_behind(r"process \d+: ended, but nobody has waited for it"):
        child = subprocess.Popen(["true"])
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    child.wait()


def test_a_process_of_a_process(ctx: Any) -> None:
    ours, theirs = Pipe()
    with ours, theirs:
        child = ctx.Process(target=start_cat, args=(theirs,))
        with assert_no_leaks():  # what the start method itself needs
            child.start()
            grandchild = ours.recv()
            pids = {int(match) for match in re.findall(r"process (\d+): ", leaks_now())}
            assert pids == {child.pid, grandchild}
            ours.send("end")
            child.join()


def start_cat(conn: Any) -> None:
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE) as cat:
        conn.send(cat.pid)
        conn.recv()


_nothing: dict[Any, Any] = {}


def leaks_now() -> str:
    """Return what would be left if the block that was entered first ended now."""
    from mpmemory import testing

    return "\n".join(text for _, text in testing._left(_nothing).values())


@pytest.mark.parametrize("backend", ["memfd", "posix"], indirect=True)
def test_memory_of_another_process(backend: str, ctx: Any) -> None:
    """A worker that lives on keeps what it was sent."""
    ours, theirs = Pipe()
    with ours, theirs:
        child = ctx.Process(target=keep, args=(theirs,))
        child.start()
        ours.recv()
        with (
            left_behind(*held(backend, child.pid, ": .+", size=5000, fds=1, mappings=0)),
            Memory(5000, name="table") as m,
        ):
            ours.send(m)
            ours.recv()
        with assert_no_leaks():  # not what was there before
            pass
        ours.send(None)
        child.join()


def keep(conn: Any) -> None:
    kept = []
    conn.send("ready")
    while (obj := conn.recv()) is not None:
        kept.append(obj)
        conn.send("kept")


def test_a_name_that_this_process_holds() -> None:
    blocks = []
    with left_behind(
        rf"/dev/shm/psm_\w+: held by process {os.getpid()}",
        r"descriptor \d+: /dev/shm/psm_\w+",
        r"mapping of /dev/shm/psm_\w+: \d+ bytes in all",
        r"descriptor \d+: /dev/shm/psm_\w+",  # that of mmap itself
    ):
        blocks.append(stock.SharedMemory(create=True, size=100))
    blocks[0].close()
    blocks.pop().unlink()


@pytest.mark.parametrize("kind", [SharedMemory, stock.SharedMemory])
def test_a_name_that_nobody_holds(kind: Any) -> None:
    name = f"test-{os.getpid()}"
    with left_behind(f"/dev/shm/{name}: nobody has it open or mapped"):
        kind(name, create=True, size=100).close()
    kind(name).unlink()


def test_a_name_of_a_process_that_was_killed(ctx: Any) -> None:
    name = f"test-{os.getpid()}"
    with left_behind(f"/dev/shm/{name}: nobody has it open or mapped"):
        child = ctx.Process(target=create_and_die, args=(name,))
        child.start()
        child.join()
        assert child.exitcode == -signal.SIGKILL
    SharedMemory(name).unlink()


def create_and_die(name: str) -> None:
    SharedMemory(name, create=True, size=100, track=False)
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_block_without_a_name_that_was_not_unlinked() -> None:
    with left_behind(
        r"descriptor \d+: /memfd:.*:shared_memory \(deleted\)", r"memory 'shared_memory' of 100 bytes: .*"
    ):
        block = SharedMemory(create=True, size=100)
        block.close()
    block.unlink()


def test_a_handle_that_nobody_received() -> None:
    memory = Memory(100)
    queue = multiprocessing.SimpleQueue()
    # The sharer's own socket is among it: it waits for the receiver.
    with left_behind(r"descriptor \d+: socket:\[\d+\]"):
        queue.put(memory)
    with assert_no_leaks():
        assert queue.get().size == 100
    queue.close()
    del memory


# --- what is none ---------------------------------------------------------------------------------


def test_names_of_others_are_not_ours() -> None:
    """As with pytest-xdist: another process tree makes and keeps a name meanwhile."""
    name = f"test-{os.getpid()}"
    program = (
        "import os, sys\n"
        "if os.fork(): os._exit(0)\n"  # an orphan is in no tree
        "from mpmemory import SharedMemory\n"
        f"block = SharedMemory({name!r}, create=True, size=100, track=False)\n"
        "print('made', flush=True); sys.stdin.read(); block.unlink(); print('gone', flush=True)"
    )
    options: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", program], **options) as other:
        with assert_no_leaks():
            pass
        with assert_no_leaks(timeout=0.1):
            other.wait()
            assert other.stdout is not None
            assert other.stdout.readline() == "made\n"
            assert os.path.exists(f"/dev/shm/{name}")
        assert other.stdin is not None
        other.stdin.close()
        assert other.stdout.readline() == "gone\n"


def use_a_pool(ctx: Any) -> None:
    with ctx.Pool(2) as pool:
        assert pool.map(double, [np.ones(100_000), SharedBuffer(100), arrays.zeros(20_000)]) == [2.0, 100, 0.0]


def double(obj: Any) -> Any:
    return obj[0] * 2 if isinstance(obj, np.ndarray) else obj.size


def use_a_queue(ctx: Any) -> None:
    queue = ctx.Queue()
    child = ctx.Process(target=queue.put, args=(np.ones(100_000),))
    child.start()
    assert queue.get().sum() == 100_000
    child.join()
    queue.close()


def use_arrays(ctx: Any) -> None:
    many = [arrays.zeros(10) for _ in range(100)]
    child = ctx.Process(target=len, args=(many,))
    child.start()
    child.join()


def use_locks(ctx: Any) -> None:
    lock = mpmemory.RobustLock()
    with lock:
        pass
    with ctx.Lock():
        pass


def use_the_sharer(ctx: Any) -> None:
    queue = multiprocessing.get_context(ctx.get_start_method()).SimpleQueue()
    queue.put(Memory(100))
    assert queue.get().size == 100
    queue.close()


def end_without_a_join(ctx: Any) -> None:
    ctx.Process(target=Memory, args=(100,)).start()


def make_cycles(ctx: Any) -> None:
    cycle: list[Any] = [Memory(100), SharedBuffer(100)]
    cycle.append(cycle)


USES = [use_a_pool, use_a_queue, use_arrays, use_locks, use_the_sharer, end_without_a_join, make_cycles]


@pytest.mark.parametrize("use", USES)
def test_what_is_no_leak(use: Callable[[Any], None], ctx: Any) -> None:
    with assert_no_leaks():
        use(ctx)


@pytest.mark.parametrize("use", [use_a_pool, use_a_queue])
def test_what_is_no_leak_on_each_backend(use: Callable[[Any], None], backend: str) -> None:
    with assert_no_leaks():
        use(mpmemory.get_context("fork"))


def test_variables_of_the_block(ctx: Any) -> None:
    """A process that was joined, and a pool that was terminated, are no leaks, though variables hold them."""
    with assert_no_leaks():
        child = ctx.Process(target=len, args=([],))
        child.start()
        child.join()
        with ctx.Pool(1) as pool:
            assert pool.apply(len, ([],)) == 0
    assert child.exitcode == 0


@pytest.mark.parametrize("method", START_METHODS)
def test_what_multiprocessing_starts_once(method: str, run_python: Any) -> None:
    run_python(f"""
import multiprocessing, os
from mpmemory.testing import assert_no_leaks

if __name__ == "__main__":
    ctx = multiprocessing.get_context({method!r})
    with assert_no_leaks():
        child = ctx.Process(target=len, args=([],))
        child.start()
        child.join()
        ctx.Semaphore()  # needs the resource tracker
    assert os.listdir("/proc/self/fd")
""")


def test_it_waits_for_a_process_that_is_ending() -> None:
    with assert_no_leaks():
        child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
        assert child.stdin is not None
        child.stdin.close()
        threading.Thread(target=child.wait).start()


def test_what_was_there_before_may_go() -> None:
    memory, view = Memory(100), Memory(100).map()
    with assert_no_leaks():
        memory.close()
        view.close()


def test_an_error_in_the_block_is_the_error() -> None:
    memories = []

    def leak_and_fail() -> None:
        memories.append(Memory(100))
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), assert_no_leaks():
        leak_and_fail()


def test_as_a_decorator() -> None:
    memories = []

    @assert_no_leaks(timeout=0)
    def leak() -> None:
        memories.append(Memory(100))

    with pytest.raises(AssertionError, match="descriptor"):
        leak()


def test_without_proc(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the check is on other systems, as far as that can be had here: descriptors, and children."""
    monkeypatch.setattr(_backends.platform, "has_proc", lambda: False)
    memories = []
    with pytest.raises(AssertionError, match="descriptor"), assert_no_leaks(timeout=0):
        memories.append(Memory(100))
    memories.clear()
    with assert_no_leaks():
        use_a_queue(mpmemory.get_context("fork"))


# --- the plugin -----------------------------------------------------------------------------------

PROJECT = """
import os, sys
import pytest

leaks = []

def test_the_plugin_does_not_import_the_package():
    assert "mpmemory" not in sys.modules

def test_clean(no_memory_leaks):
    from mpmemory import SharedBuffer
    assert SharedBuffer(100).size == 100

def test_leaking(no_memory_leaks):
    from mpmemory import Memory
    leaks.append(Memory(100, name="table"))

def test_failing(no_memory_leaks):
    from mpmemory import Memory
    memory = Memory(100)
    assert False

@pytest.mark.parametrize("number", range(20))
def test_named(number, no_memory_leaks):
    from multiprocessing.shared_memory import SharedMemory
    block = SharedMemory(create=True, size=100)
    block.close()
    block.unlink()
"""


@pytest.mark.parametrize("arguments", [(), ("-n", "2")], ids=["alone", "xdist"])
def test_the_fixture_in_a_project_of_a_user(arguments: tuple[str, ...], tmp_path: Path) -> None:
    (tmp_path / "test_it.py").write_text(PROJECT)
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "no:randomly", *arguments],
        cwd=tmp_path,
        text=True,
        capture_output=True,
        timeout=60,
        check=False,
        env={key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")},
    )
    assert "1 failed, 23 passed, 1 error" in done.stdout, done.stdout + done.stderr
    assert "ERROR test_it.py::test_leaking - AssertionError: left behind:" in done.stdout
    assert re.search(
        r"memory 'table' of 100 bytes: 1 descriptors and 0 mappings of process \d+ \(this one\)", done.stdout
    )


def test_the_plugin_imports_pytest_and_nothing_of_ours() -> None:
    program = "import sys, pytest_mpmemory; assert 'pytest' in sys.modules and 'mpmemory' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True)


def test_the_check_needs_no_pytest() -> None:
    program = "import sys, mpmemory.testing; assert 'pytest' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True)
