"""SharedMemory's names: those it makes up, and POSIX objects, shared with the standard library."""

from __future__ import annotations

import errno
import gc
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from multiprocessing import resource_tracker
from multiprocessing import shared_memory as stock
from pathlib import Path
from typing import Any

import pytest
from conftest import START_METHODS
from test_shared_memory import open_blocks

from mpmemory import _names
from mpmemory._reaper import reaper
from mpmemory.shared_memory import SharedMemory


@pytest.fixture
def name() -> Iterator[str]:
    """A name for a POSIX object that nobody else has."""
    name = f"mpmemory-test-{os.urandom(6).hex()}"
    yield name
    assert not os.path.exists(f"/dev/shm/{name}")


def test_all_forms_of_the_constructor(name: str) -> None:
    for track in (True, False):
        block = SharedMemory(name, True, 5, track=track)
        assert (block.name, block.size) == (name, 5)
        with pytest.raises(FileExistsError, match=name):
            SharedMemory(name=name, create=True, size=10)
        other = SharedMemory(name, size=3, track=track)
        assert other.size == 5
        block.buf[:] = b"hello"
        assert other.buf == b"hello"
        block.close()
        assert (block.name, block.size) == (name, 5)
        other.close()
        SharedMemory(name).unlink()
        for unlink in (block.unlink, other.unlink):
            with pytest.raises(FileNotFoundError, match=name):
                unlink()


@pytest.mark.parametrize("size", [1, 7, 4095, 4096, 4097, 100_003])
def test_sizes_are_exact_on_both_sides(size: int, name: str) -> None:
    for chosen in (None, name):
        block = SharedMemory(chosen, create=True, size=size)
        other = SharedMemory(block.name)
        assert (block.size, other.size, len(block.buf), len(other.buf)) == (size, size, size, size)
        assert bytes(block.buf) == bytes(size)
        block.unlink()


# --- names that it makes up -----------------------------------------------------------------------


def test_the_memory_of_a_closed_block_waits_for_those_who_come() -> None:
    before = open_blocks()
    name = SharedMemory(create=True, size=10).name
    gc.collect()
    assert len(open_blocks()) == len(before) + 1
    other = SharedMemory(name)
    other.unlink()
    del other
    assert open_blocks() == before


def unlink_there(name: str) -> None:
    block = SharedMemory(name)
    block.close()
    block.unlink()


def test_memory_that_another_process_unlinks_is_given_up_here(ctx: Any) -> None:
    block = SharedMemory(create=True, size=10)
    block.close()
    assert len(open_blocks()) == 1
    child = ctx.Process(target=unlink_there, args=(block.name,))
    child.start()
    child.join()
    assert child.exitcode == 0
    with pytest.raises(FileNotFoundError):
        block.unlink()
    reaper.join()  # nothing is left to look after
    assert open_blocks() == []


def test_the_same_inode_of_another_device_is_another_file() -> None:
    block = SharedMemory(create=True, size=10)
    *parts, device, inode = block.name.split("_")
    with pytest.raises(FileNotFoundError):
        SharedMemory("_".join([*parts, f"{int(device, 16) + 1:x}", inode]))
    block.unlink()


def test_what_a_number_is_used_for_now_is_only_looked_at() -> None:
    """Opening a FIFO lets the writer at its other end go on."""
    reader, writer = os.pipe()
    os.close(reader)
    with pytest.raises(FileNotFoundError):
        SharedMemory(f"mpm_{os.getpid()}_{writer}_1_5")
    left, right = socket.socketpair()
    with left, right, pytest.raises(FileNotFoundError):  # which cannot be opened
        SharedMemory(f"mpm_{os.getpid()}_{left.fileno()}_1_5")
    os.close(writer)


def test_a_name_made_up_for_something_else_leads_nowhere(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"secret")
    os.mkfifo(tmp_path / "fifo")
    fds = [os.open(path, os.O_RDONLY), os.open(path, os.O_PATH), os.open(tmp_path / "fifo", os.O_RDWR)]
    for fd in fds:
        status = os.fstat(fd)
        with pytest.raises(FileNotFoundError, match="no shared memory has this name"):
            SharedMemory(f"mpm_{os.getpid()}_{fd}_{status.st_dev:x}_{status.st_ino:x}")
        os.close(fd)


def test_numbers_that_are_used_again_lead_nowhere() -> None:
    block = SharedMemory(create=True, size=10)
    name = block.name
    block.unlink()
    number = int(name.split("_")[2])
    del block
    for _ in range(3):
        other = SharedMemory(create=True, size=10)
        assert int(other.name.split("_")[2]) == number  # the same descriptor, another memory
        with pytest.raises(FileNotFoundError):
            SharedMemory(name)
        other.unlink()
        del other
    reader, writer = os.pipe()
    assert number in {reader, writer}
    with pytest.raises(FileNotFoundError):  # nor does it wait for a pipe
        SharedMemory(name)
    os.close(reader)
    os.close(writer)


@pytest.mark.parametrize(
    "name",
    [
        "mpm_999999999_3_1_5",  # no such process
        "mpm_self_99999_1_5",
        "mpm_self_0_1_5",
        f"mpm_{2**32}_0_1_5",
        "mpm_0_0_0_0",
    ],
)
def test_names_that_lead_nowhere(name: str) -> None:
    name = name.replace("self", str(os.getpid()))
    with pytest.raises(FileNotFoundError, match=r"no shared memory has this name") as error:
        SharedMemory(name)
    assert error.value.filename == name
    with pytest.raises(ValueError, match="choose another"):
        SharedMemory(name, create=True, size=5)


@pytest.mark.parametrize("backend", ["file"], indirect=True)
def test_without_such_names_it_is_a_posix_object(backend: str) -> None:
    block = SharedMemory(create=True, size=10)
    assert os.path.exists(f"/dev/shm/{block.name}")
    other = stock.SharedMemory(block.name)
    other.buf[0] = 7
    assert block.buf[0] == 7
    other.close()
    block.unlink()
    assert not os.path.exists(f"/dev/shm/{block.name}")


@pytest.mark.parametrize("backend", ["file"], indirect=True)
def test_a_name_that_is_taken_is_not_taken_again(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = [os.urandom(4) for _ in range(2)]
    drawn = iter([numbers[0], *numbers])
    monkeypatch.setattr(os, "urandom", lambda _: next(drawn))
    blocks = [SharedMemory(create=True, size=10) for _ in range(2)]
    assert [block.name for block in blocks] == [f"mpm-{number.hex()}" for number in numbers]
    for block in blocks:
        block.unlink()


def test_in_a_pid_namespace_without_its_own_proc_it_is_a_posix_object() -> None:
    """There /proc has other processes under our numbers."""
    if os.geteuid() != 0 or subprocess.run(["unshare", "-pf", "true"], check=False).returncode != 0:
        pytest.skip("needs a private pid namespace")
    program = (
        "import os\n"
        "from mpmemory.shared_memory import SharedMemory\n"
        "block = SharedMemory(create=True, size=5)\n"
        "assert os.path.exists(f'/dev/shm/{block.name}')\n"
        "SharedMemory(block.name).buf[0] = 7\n"
        "print(block.buf[0])\n"
        "block.unlink()\n"
    )
    done = subprocess.run(
        ["unshare", "-pf", sys.executable, "-c", program], text=True, capture_output=True, check=False, timeout=60
    )
    assert (done.stdout, done.stderr) == ("7\n", "")


def test_a_fork_does_not_keep_what_the_parent_kept() -> None:
    block = SharedMemory(create=True, size=10)
    block.close()
    assert _names._kept
    pid = os.fork()
    if pid == 0:
        os._exit(len(_names._kept) or len(open_blocks()))
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    block.unlink()


def test_a_forked_child_looks_after_its_own() -> None:
    block = SharedMemory(create=True, size=10)
    block.close()  # from now on the reaper runs here
    pid = os.fork()
    if pid == 0:
        SharedMemory(create=True, size=10).close()
        os._exit([thread.name for thread in threading.enumerate()[1:]] != ["mpmemory-reaper"])
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    block.unlink()


# --- POSIX objects, shared with the standard library ----------------------------------------------


@pytest.mark.parametrize(("first", "second"), [(SharedMemory, stock.SharedMemory), (stock.SharedMemory, SharedMemory)])
def test_explicit_names_are_the_same_for_the_standard_library(first: Any, second: Any, name: str) -> None:
    creator = first(name, create=True, size=100)
    with pytest.raises(FileExistsError):
        second(name, create=True, size=100)
    attached = second(name)
    attached.buf[:5] = b"hello"
    assert bytes(creator.buf[:5]) == b"hello"
    attached.close()
    creator.close()
    attached.unlink()
    with pytest.raises(FileNotFoundError):
        creator.unlink()


@pytest.mark.parametrize("ours", ["creator", "attacher", "both"])
def test_who_attaches_to_a_name_never_destroys_it(ours: str, run_python: Any, name: str) -> None:
    """In a process that is not related, and so has a resource tracker of its own."""
    creator = stock.SharedMemory(name, create=True, size=9) if ours == "attacher" else SharedMemory(name, True, 9)
    package = "multiprocessing" if ours == "creator" else "mpmemory"
    if ours == "creator" and sys.version_info < (3, 13):
        creator.close()
        creator.unlink()
        pytest.skip("this version of the standard library destroys what it attaches to")
    options = ", track=False" if ours == "creator" else ""
    done = run_python(
        f"from {package}.shared_memory import SharedMemory\n"
        f"block = SharedMemory({name!r}{options})\n"
        "block.buf[:5] = b'hello'\n"
    )
    assert done.stderr == ""
    assert os.path.exists(f"/dev/shm/{name}")
    assert bytes(creator.buf[:5]) == b"hello"
    creator.close()
    creator.unlink()


@pytest.mark.parametrize("unlinker", ["parent", "child", "nobody"])
@pytest.mark.parametrize("method", START_METHODS)
def test_the_resource_tracker_has_nothing_to_complain_about(
    method: str, unlinker: str, run_python: Any, name: str
) -> None:
    done = run_python(
        "import multiprocessing, sys\n"
        "from mpmemory.shared_memory import SharedMemory\n"
        "def child(name, unlink):\n"
        "    block = SharedMemory(name)\n"
        "    block.buf[0] += 1\n"
        "    if unlink: block.unlink()\n"
        "if __name__ == '__main__':\n"
        f"    ctx = multiprocessing.get_context({method!r})\n"
        f"    block = SharedMemory({name!r}, create=True, size=10)\n"
        f"    process = ctx.Process(target=child, args=({name!r}, {unlinker == 'child'}))\n"
        "    process.start(); process.join()\n"
        "    assert block.buf[0] == 1 and process.exitcode == 0\n"
        f"    if {unlinker == 'parent'}: block.unlink()\n"
    )
    assert done.stderr == ""
    assert not os.path.exists(f"/dev/shm/{name}")  # if nobody has unlinked it, the tracker did


def test_an_untracked_name_stays(run_python: Any, name: str) -> None:
    done = run_python(
        "from mpmemory.shared_memory import SharedMemory\n"
        f"SharedMemory({name!r}, create=True, size=10, track=False).buf[0] = 7\n"
        f"SharedMemory({name + '2'!r}, create=True, size=10, track=False).unlink()\n"
        "from multiprocessing import resource_tracker\n"
        "assert resource_tracker._resource_tracker._fd is None\n"  # not even started
    )
    assert done.stderr == ""
    block = SharedMemory(name)
    assert block.buf[0] == 7
    block.unlink()


@pytest.mark.parametrize("addition", ["é", ":colon", "\nline", " space"])
def test_names_that_the_tracker_cannot_read(addition: str, run_python: Any, name: str) -> None:
    done = run_python(
        "from mpmemory.shared_memory import SharedMemory\n"
        "from multiprocessing import resource_tracker\n"
        "resource_tracker.ensure_running()\n"
        "for track in (True, False):\n"
        f"    block = SharedMemory({name + addition!r}, create=True, size=10, track=track)\n"
        f"    SharedMemory({name + addition!r}).buf[0] = 7\n"
        "    assert block.buf[0] == 7\n"
        "    block.unlink()\n"
    )
    assert done.stderr == ""
    assert not os.path.exists(f"/dev/shm/{name}{addition}")


def test_the_tracker_does_not_miss_what_an_unrelated_process_has_unlinked(run_python: Any, name: str) -> None:
    done = run_python(
        "import subprocess, sys\n"
        "from mpmemory.shared_memory import SharedMemory\n"
        f"block = SharedMemory({name!r}, create=True, size=10)\n"
        "program = 'import sys; from mpmemory.shared_memory import SharedMemory; SharedMemory(sys.argv[1]).unlink()'\n"
        "subprocess.run([sys.executable, '-c', program, block.name], check=True)\n"
        "try: block.unlink()\n"
        "except FileNotFoundError: print('gone')\n"
    )
    assert (done.stdout, done.stderr) == ("gone\n", "")


def test_without_a_tracker_nothing_is_left_behind(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    def register(*_: Any) -> None:  # it has to be started, for which no descriptor is left
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(resource_tracker, "register", register)
    with pytest.raises(OSError, match="Too many open files"):
        SharedMemory(name, create=True, size=10)
    assert not os.path.exists(f"/dev/shm/{name}")


def test_an_empty_object_is_refused(name: str) -> None:
    with open(f"/dev/shm/{name}", "x"):
        pass
    with pytest.raises(ValueError, match="cannot map 0 bytes"):
        SharedMemory(name)
    os.unlink(f"/dev/shm/{name}")


def test_a_name_that_there_is_no_memory_for_leaves_nothing_behind(small_shm: list[str], run_python: Any) -> None:
    program = (
        "import os\n"
        "from mpmemory.shared_memory import SharedMemory\n"
        "block = SharedMemory(create=True, size=100 << 20)\n"  # a memfd is in no /dev/shm
        "block.buf[-1] = 1\n"
        "try: SharedMemory('big', create=True, size=2 << 20)\n"
        "except OSError as error: print(error)\n"
        "print(os.listdir('/dev/shm'))\n"
    )
    done = run_python(program, prefix=small_shm)
    assert done.stdout == "[Errno 28] cannot have memory of 2097152 bytes: No space left on device\n[]\n"
    assert done.stderr == ""
