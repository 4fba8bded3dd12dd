"""`python -m mpmemory`: what it says is what is there."""

from __future__ import annotations

import json
import os
import pty
import resource
import signal
import subprocess
import sys
from collections.abc import Sequence
from multiprocessing import forkserver
from typing import Any

import pytest
from conftest import START_METHODS

import mpmemory
from mpmemory import Memory, SharedBuffer, _holders, _machine
from mpmemory.__main__ import _size, main

MB = 1 << 20


def run(*args: str, prefix: Sequence[str] = (), **options: Any) -> subprocess.CompletedProcess[str]:
    program = [*prefix, sys.executable, "-W", "error", "-m", "mpmemory", *args]
    return subprocess.run(program, text=True, capture_output=True, check=False, timeout=60, **options)


def ls(*args: str) -> dict[str, Any]:
    done = run("ls", "--json", *args)
    assert (done.returncode, done.stderr) == (0, "")
    return json.loads(done.stdout)  # type: ignore[no-any-return]


def rows(label: str, *args: str) -> list[dict[str, Any]]:
    return [memory for memory in ls(*args)["memories"] if memory["label"] == label]


def make_and_hold(label: str, ours: Memory, conn: Any) -> None:
    own = SharedBuffer(3 * MB, name=label)
    own.buf[:MB] = b"x" * MB
    again = ours.dup()
    first, second = ours.map(), ours.map(10, 5)
    conn.send((os.getpid(), own, again.fileno() and first.size + second.size))
    conn.recv()


@pytest.mark.parametrize("method", START_METHODS)
def test_ls_says_who_holds_what(method: str) -> None:
    ctx = mpmemory.get_context(method)
    label = f"census-{os.getpid()}-{method}"
    memory = Memory(MB, name=label)
    pipes = [ctx.Pipe() for _ in range(3)]
    children = [ctx.Process(target=make_and_hold, args=(label, memory, right)) for _, right in pipes]
    for child in children:
        child.start()
    made = {}
    for left, _ in pipes:
        pid, own, _ = left.recv()
        made[pid] = own
    Memory(1).close()  # with a handle go the duplicates that were made for starting children
    found = rows(label)
    # The fork server closes its copies when it has forked, and the child may be faster.
    server = forkserver._forkserver._forkserver_pid  # type: ignore[attr-defined]
    while any(holder["pid"] == server for row in found for holder in row["holders"]):
        found = rows(label)
    assert sorted(row["size"] for row in found) == [MB, 3 * MB, 3 * MB, 3 * MB]
    ours = found[-1]
    assert (ours["creator"], ours["creator_lives"], ours["resident"]) == (os.getpid(), True, 0)
    assert {holder["pid"] for holder in ours["holders"]} == {os.getpid(), *made}
    for holder in ours["holders"]:
        expected = (2, 2) if holder["pid"] in made else (1, 0)
        # Before Python 3.13 a mapping has a descriptor of its own.
        fds = holder["fds"] if sys.version_info >= (3, 13) else holder["fds"] - expected[1]
        assert (fds, holder["mappings"]) == expected
        assert "python" in holder["command"]
    for row in found[:-1]:
        assert row["resident"] == MB
        assert row["creator"] in made
        assert {holder["pid"] for holder in row["holders"]} == {row["creator"], os.getpid()}

    killed = children[0]
    killed.kill()
    killed.join()
    after = rows(label)
    assert len(after) == 4  # this process holds what the dead one made
    assert [row["creator_lives"] for row in after if row["creator"] == killed.pid] == [False]
    assert all(killed.pid not in {holder["pid"] for holder in row["holders"]} for row in after)
    assert f"{killed.pid} †" in run("ls").stdout
    mine = rows(label, "--pid", str(os.getpid()))
    assert {holder["pid"] for row in mine for holder in row["holders"]} == {os.getpid()}

    for child, (left, right) in zip(children, pipes, strict=True):
        if child is not killed:
            left.send("end")
        left.close()
        right.close()
        child.join()
    made.clear()
    memory.close()
    del own
    assert rows(label) == []


def test_the_table_of_ls() -> None:
    memory = Memory(5 * MB, name="a label for people")
    lines = run("ls", "--pid", str(os.getpid())).stdout.splitlines()
    assert lines[0].split() == ["LABEL", "SIZE", "RESIDENT", "MADE", "BY", "HELD", "BY", "FDS", "MAPS", "COMMAND"]
    (row,) = [line for line in lines if line.startswith("a label for people")]
    assert row.split()[4:11] == ["5.0", "MB", "0", "B", str(os.getpid()), str(os.getpid()), "1"]
    assert lines[-1].endswith("of it resident")
    assert memory.size == 5 * MB


def test_memory_of_the_posix_backend(monkeypatch: pytest.MonkeyPatch, backend: str) -> None:
    if backend == "file":
        pytest.skip("a temporary file tells nothing")
    memory = Memory(MB, name="census")
    identities = [held for held in _holders.take_census(os.getpid()).memories if held.size == MB]
    assert [held.label for held in identities] == ["census" if backend == "memfd" else None]
    assert memory.size == MB


def test_ls_of_no_process() -> None:
    done = run("ls", "--pid", "999999999")
    assert done.returncode == 1
    assert done.stderr == "python -m mpmemory ls: there is no process 999999999\n"


def test_ls_again_and_again_on_a_terminal() -> None:
    """Each time on a cleared screen."""
    ours, theirs = pty.openpty()
    program = [sys.executable, "-m", "mpmemory", "ls", "--watch"]
    with subprocess.Popen(program, stdout=theirs, stderr=subprocess.PIPE, text=True) as process:
        os.close(theirs)
        found = b""
        while found.count(b"\033[H\033[2J") < 2:
            found += os.read(ours, 1 << 16)
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 130
        assert process.stderr
        assert process.stderr.read() == ""
    os.close(ours)
    assert found.count(b"LABEL ") >= 1


def test_without_proc(without_proc: list[str]) -> None:
    done = run("ls", prefix=without_proc)
    assert done.returncode == 1
    assert "this system has no /proc, and nothing else says who holds which memory" in done.stderr
    done = run(prefix=without_proc)
    assert done.returncode == 0
    assert "There is no /proc" in done.stdout


def test_sizes_in_words() -> None:
    sizes = [None, 0, 1023, 1024, 10 << 10, 5 << 20, 3 << 30, 2 << 40]
    assert [_size(size) for size in sizes] == ["-", "0 B", "1023 B", "1.0 KB", "10 KB", "5.0 MB", "3.0 GB", "2.0 TB"]


def test_ls_again_and_again() -> None:
    program = [sys.executable, "-m", "mpmemory", "ls", "--watch", "--json"]
    with subprocess.Popen(program, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout
        for _ in range(2):
            assert "memories" in json.loads(process.stdout.readline())
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 130
        assert process.stderr
        assert process.stderr.read() == ""


def test_a_backend_that_was_chosen() -> None:
    found = json.loads(run("--json", env={**os.environ, "MPMEMORY_BACKEND": "file"}).stdout)
    assert (found["backend"], found["backend because"]) == ("file", "MPMEMORY_BACKEND=file")


def test_what_the_machine_offers() -> None:
    found = json.loads(run("--json").stdout)
    assert found["backend"] == "memfd"
    assert found["descriptors"] == resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    assert found["start methods"] == mpmemory.get_all_start_methods()
    assert found["locks"] is found["own messages"] is found["proc"] is True
    text = run().stdout
    for name in found:
        assert name == "advice" or f"{name}  " in text


@pytest.mark.parametrize(
    ("changed", "advice"),
    [
        ({"descriptors": 256, "descriptors at most": 4096}, "Raise the limit: ulimit -n 4096"),
        ({"proc": False}, "There is no /proc"),
        ({"own messages": False}, "are those of multiprocessing"),
        ({"backend": "posix", "dev shm": 64 << 20}, "In Docker: --shm-size=1g"),
        ({"memory left in cgroup": 1 << 20}, "Only 1048576 bytes of memory are left"),
    ],
)
def test_advice(changed: dict[str, Any], advice: str) -> None:
    found = _machine.describe()
    usual = {"descriptors": 4096, "backend": "memfd", "memory available": 1 << 40, "memory left in cgroup": None}
    assert list(_machine._advise({**found, **usual})) == []
    (line,) = _machine._advise({**found, **usual, **changed})
    assert advice in line


def test_advice_on_few_descriptors() -> None:
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, 512))

    done = run(preexec_fn=limit)
    assert "A process may have 256 descriptors only" in done.stdout
    assert "ulimit -n 512" in done.stdout


def test_the_demo(capfd: pytest.CaptureFixture[str]) -> None:
    done = run("demo")
    assert (done.returncode, done.stderr) == (0, "")
    assert "was killed by SIGKILL" in done.stdout
    assert done.stdout.endswith("ls: no memory of this tour\n")


def test_odd_command_lines(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["nothing"], ["ls", "--pid", "x"]):
        with pytest.raises(SystemExit) as error:
            main(arguments)
        assert error.value.code == 2
    with pytest.raises(SystemExit) as error:
        main(["--help"])
    assert error.value.code == 0
    assert "demo" in capsys.readouterr().out


def test_head_closes_the_pipe() -> None:
    program = f"{sys.executable} -m mpmemory ls | true"
    done = subprocess.run(["sh", "-c", program], text=True, capture_output=True, check=False, timeout=60)
    assert done.stderr == ""
