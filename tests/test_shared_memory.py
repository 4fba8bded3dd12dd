"""SharedMemory: all that the standard library's does, from related and unrelated processes, and what it should do."""

from __future__ import annotations

import copy
import errno
import gc
import inspect
import multiprocessing
import os
import pickle
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import resource_tracker
from multiprocessing import shared_memory as stock
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import START_METHODS, dumps, eventually, open_fds, shm_names

from mpmemory import HandleLostError, SharedBuffer, _names, shared_memory
from mpmemory._reaper import reaper
from mpmemory.shared_memory import ShareableList, SharedMemory

Blocks = list[Any]


@pytest.fixture
def name() -> Iterator[str]:
    """A name for a POSIX object that nobody else has."""
    name = f"mpmemory-test-{os.urandom(6).hex()}"
    yield name
    assert not os.path.exists(f"/dev/shm/{name}")


def open_blocks() -> list[str]:
    return [what for what in open_fds().values() if ":shared_memory" in what]


# --- as the standard library's ---------------------------------------------------------------------


def test_the_signature() -> None:
    parameters = inspect.signature(SharedMemory).parameters.values()
    assert [(each.name, each.default) for each in parameters] == [
        ("name", None),
        ("create", False),
        ("size", 0),
        ("track", True),
    ]
    assert {name for name in dir(stock.SharedMemory) if not name.startswith("_")} <= set(dir(SharedMemory))


@pytest.mark.parametrize(
    ("args", "options", "expected", "message"),
    [
        ((), {}, ValueError, "'name' can only be None if create=True"),
        ((None, True), {}, ValueError, "'size' must be a positive number different from zero"),
        ((None, True, -1), {}, ValueError, "'size' must be a positive integer, found -1"),
        (("nix",), {"size": -1}, ValueError, "'size' must be a positive integer, found -1"),
        (("nix",), {}, FileNotFoundError, "nix"),
        (("",), {}, OSError, "Invalid argument"),
        (("x" * 300,), {}, OSError, "Errno"),
        ((b"nix",), {}, TypeError, "name must be a str, found bytes"),
        ((5, True, 5), {}, TypeError, "name must be a str, found int"),
        ((None, True, "5"), {}, TypeError, "'str' object cannot be interpreted as an integer|not supported"),
        ((None, True, 10**30), {}, OSError, "cannot have memory of 1000000"),
    ],
)
def test_wrong_arguments(args: Any, options: Any, expected: type[Exception], message: str) -> None:
    with pytest.raises(expected, match=message):
        SharedMemory(*args, **options)
    if args[-1:] != (10**30,):  # an OverflowError there
        with pytest.raises(expected):
            stock.SharedMemory(*args, **options)


def test_a_size_that_is_no_int_leaves_nothing_behind() -> None:
    before = shm_names()
    with pytest.raises(TypeError):
        SharedMemory(create=True, size=1.5)  # type: ignore[arg-type]
    eventually(lambda: shm_names() <= before)


@pytest.mark.parametrize("create", [True, False])
def test_a_name_with_a_nul(create: bool) -> None:
    with pytest.raises(ValueError, match="embedded null character"):
        SharedMemory("a\0b", create, 5)


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


def test_a_life() -> None:
    block = SharedMemory(create=True, size=10)
    assert repr(block) == f"SharedMemory({block.name!r}, size=10)"
    assert block.buf is block.buf
    other = SharedMemory(block.name)
    other.buf[:4] = b"abcd"
    assert bytes(block.buf[:4]) == b"abcd"
    block.close()
    block.close()
    assert block.buf is None
    assert repr(block) == f"SharedMemory({block.name!r}, size=10)"
    assert bytes(SharedMemory(name=block.name).buf[:4]) == b"abcd"  # closed is not unlinked
    block.unlink()
    for gone in (block.unlink, other.unlink, lambda: SharedMemory(block.name)):
        with pytest.raises(FileNotFoundError, match="no shared memory has this name") as error:
            gone()
        assert error.value.filename == block.name
    other.buf[:4] = b"efgh"
    assert bytes(other.buf[:4]) == b"efgh"
    other.close()
    assert open_blocks() == []


def test_views_stay_valid_after_close() -> None:
    block = SharedMemory(create=True, size=80)
    numbers = np.ndarray((10,), dtype=np.float64, buffer=block.buf)  # the recipe of NumPy's users
    view = block.buf
    part = view[8:16]
    block.unlink()
    block.close()
    del block
    numbers[1] = 2.5
    assert (part.cast("d")[0], len(view)) == (2.5, 80)
    del numbers, view
    assert part.cast("d")[0] == 2.5


def test_attributes_of_the_user_s_own() -> None:
    for made in (SharedMemory(create=True, size=5), ShareableList([1])):
        made.label = "label"  # type: ignore[attr-defined]
        assert vars(made) == {"label": "label"}
        assert pickle.loads(dumps(made)).label == "label"
        (made if isinstance(made, SharedMemory) else made.shm).unlink()


def test_a_subclass_closes_in_its_own_way() -> None:
    closed = []

    class Closing(SharedMemory):
        def close(self) -> None:
            closed.append(self.size)
            super().close()

    block = Closing(create=True, size=5)
    block.unlink()
    del block
    with pytest.raises(FileNotFoundError):
        Closing("mpmemory-test-nix")
    gc.collect()
    assert closed == [5]


def test_closing_and_unlinking_in_several_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """One thread closes the block just when another has begun to unlink it."""
    block = SharedMemory(create=True, size=5)
    withdraw = _names.withdraw

    def close_first(*args: Any) -> None:
        closing = threading.Thread(target=block.close)
        closing.start()
        closing.join()
        withdraw(*args)

    monkeypatch.setattr(_names, "withdraw", close_first)
    block.unlink()
    assert _names._kept == {}
    assert open_blocks() == []


def test_numpy_s_recipe() -> None:
    source = np.array([1, 1, 2, 3, 5, 8])
    block = SharedMemory(create=True, size=source.nbytes)
    here = np.ndarray(source.shape, dtype=source.dtype, buffer=block.buf)
    here[:] = source
    attached = SharedMemory(name=block.name)
    there = np.ndarray((6,), dtype=np.int64, buffer=attached.buf)
    there[-1] = 888
    assert here.tolist() == [1, 1, 2, 3, 5, 888]
    attached.close()  # with the array alive: no BufferError
    block.close()
    block.unlink()
    assert there[-1] == 888


class Named(SharedMemory):
    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.label = "label"


def test_plain_pickle_goes_by_name() -> None:
    block = Named(create=True, size=10)
    for again in (pickle.loads(pickle.dumps(block)), copy.copy(block)):
        assert type(again) is Named
        again.buf[0] += 1
    assert block.buf[0] == 2
    data = pickle.dumps(block)
    block.unlink()
    with pytest.raises(FileNotFoundError):
        pickle.loads(data)


def test_multiprocessing_pickles_a_descriptor() -> None:
    block = Named(create=True, size=10)
    data = dumps(block)
    block.unlink()
    block.buf[0] = 7
    again = pickle.loads(data)
    assert (type(again), again.label, again.name, again.size) == (Named, "label", block.name, 10)
    assert again.buf[0] == 7
    with pytest.raises(FileNotFoundError):
        again.unlink()


def test_a_closed_block_is_sent_as_long_as_its_name_leads_there() -> None:
    block = SharedMemory(create=True, size=10)
    block.buf[0] = 7
    block.close()
    assert pickle.loads(dumps(block)).buf[0] == 7
    block.unlink()
    with pytest.raises(FileNotFoundError):
        dumps(block)


def test_a_lost_block_says_so() -> None:
    block = SharedMemory(create=True, size=10)
    data = dumps(block)
    pickle.loads(data).close()
    lost = pickle.loads(data)  # what a sender gives out once
    assert (lost.name, lost.size) == (block.name, 10)
    with pytest.raises(HandleLostError):
        _ = lost.buf
    lost.close()
    block.unlink()


# --- names ----------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("backend", ["posix"], indirect=True)
def test_the_posix_backend_has_such_names_too(backend: str) -> None:
    test_a_life()


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


# --- other processes ------------------------------------------------------------------------------


def increment(block: SharedMemory) -> tuple[int, SharedMemory]:
    block.buf[0] += 1
    return block.buf[0], block


def increment_by_name(name: str) -> int:
    block = SharedMemory(name)
    block.buf[0] += 1
    value = block.buf[0]
    block.close()
    return value


@pytest.mark.parametrize("stock_objects", [False, True])
def test_through_all_channels(stock_objects: bool, ctx: Any) -> None:
    method = ctx.get_start_method()
    chosen = multiprocessing.get_context(method) if stock_objects else ctx
    block = SharedMemory(create=True, size=10)
    with chosen.Pool(1) as pool:
        value, again = pool.apply(increment, (block,))
        assert (value, again.buf[0], again.name) == (1, 1, block.name)
        assert pool.map(increment_by_name, [block.name] * 3) == [2, 3, 4]
        pool.close()
        pool.join()
    child = chosen.Process(target=increment, args=(block,))
    child.start()
    child.join()
    assert block.buf[0] == 5
    queue = chosen.SimpleQueue()
    queue.put(block)
    queue.get().buf[0] = 9
    assert block.buf[0] == 9
    queue.close()
    with ProcessPoolExecutor(1, mp_context=chosen) as executor:
        value, again = executor.submit(increment, block).result()
        assert (value, again.buf[0]) == (10, 10)
    block.unlink()


def make(_: int) -> tuple[SharedMemory, str]:
    block = SharedMemory(create=True, size=10)
    block.buf[:2] = b"ok"
    return block, block.name


@pytest.mark.parametrize("stock_objects", [False, True])
def test_what_a_worker_makes(stock_objects: bool, ctx: Any) -> None:
    chosen = multiprocessing.get_context(ctx.get_start_method()) if stock_objects else ctx
    with chosen.Pool(1, maxtasksperchild=1) as pool:
        made = pool.map(make, range(3), chunksize=1)
        pool.close()
        pool.join()
    for block, name in made:
        assert bytes(block.buf[:2]) == b"ok"
        with pytest.raises(FileNotFoundError):  # the worker, which the name leads to, has ended
            SharedMemory(name)


def test_an_unrelated_process_attaches(run_python: Any) -> None:
    block = SharedMemory(create=True, size=10)
    block.buf[:5] = b"hello"
    program = (
        "import sys\n"
        "from mpmemory.shared_memory import SharedMemory\n"
        "block = SharedMemory(sys.argv[1])\n"
        "print(block.size, bytes(block.buf[:5]))\n"
        "block.buf[:5] = b'world'\n"
        "block.close()\n"
        "if sys.argv[2] == 'unlink': block.unlink()\n"
    )
    for action in ("close", "unlink"):
        done = run_python(program, block.name, action)
        assert (done.stdout[:2], done.stderr) == ("10", "")
        assert bytes(block.buf[:5]) == b"world"
    with pytest.raises(FileNotFoundError):
        SharedMemory(block.name)


def test_two_hundred_processes_attach_at_once(tmp_path: Any) -> None:
    block = SharedMemory(create=True, size=200)
    program = tmp_path / "attach.py"
    # Forked by a program of its own, which has nothing of ours but the name.
    program.write_text(
        "import os, sys\n"
        "from mpmemory.shared_memory import SharedMemory\n"
        "reader, writer = os.pipe()\n"
        "for index in range(200):\n"
        "    if os.fork() == 0:\n"
        "        os.close(writer)\n"
        "        os.read(reader, 1)\n"  # until all are there
        "        SharedMemory(sys.argv[1]).buf[index] = 1\n"
        "        os._exit(0)\n"
        "os.close(writer)\n"
        "print({os.wait()[1] for _ in range(200)})\n"
    )
    done = subprocess.run([sys.executable, program, block.name], text=True, capture_output=True, check=True, timeout=60)
    assert done.stdout == "{0}\n"
    assert bytes(block.buf) == b"\1" * 200
    block.unlink()


class Manager:
    """What `multiprocessing.managers.SharedMemoryManager` does, without its process."""

    def __init__(self) -> None:
        self.names: list[str] = []

    def SharedMemory(self, size: int) -> SharedMemory:
        block = SharedMemory(None, create=True, size=size)
        self.names.append(block.name)
        return block

    def ShareableList(self, sequence: list[Any]) -> ShareableList[Any]:
        made = ShareableList(sequence)
        self.names.append(made.shm.name)
        return made

    def destroy(self) -> None:
        for name in self.names:
            block = SharedMemory(name)
            block.close()
            block.unlink()


def test_code_in_the_style_of_a_manager() -> None:
    manager = Manager()
    block, items = manager.SharedMemory(100), manager.ShareableList([1, "two"])
    manager.destroy()
    for name in manager.names:
        with pytest.raises(FileNotFoundError):
            SharedMemory(name)
    block.buf[0] = 1
    assert list(items) == [1, "two"]


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


def test_out_of_descriptors(run_python: Any) -> None:
    from conftest import LIMITED

    run_python(
        LIMITED + "from mpmemory.shared_memory import SharedMemory\n"
        "block = SharedMemory(create=True, size=10)\n"
        "expect_the_limit(lambda: SharedMemory(create=True, size=10))\n"
        "expect_the_limit(lambda: SharedMemory(block.name))\n"
        "closed = SharedMemory(create=True, size=10)\n"
        "closed.close()\n"
        "with no_descriptors_left():\n"
        "    block.unlink()\n"
        "    closed.unlink()\n"
    )


def test_it_is_a_thin_adaptor() -> None:
    block = SharedMemory(create=True, size=10)
    assert isinstance(block._buffer, SharedBuffer)
    assert shared_memory.__all__ == stock.__all__
    block.unlink()


def test_a_block_that_outlives_the_modules_says_nothing(run_python: Any) -> None:
    done = run_python(
        "import multiprocessing, mpmemory\n"
        "multiprocessing.current_process().kept = mpmemory.SharedMemory(create=True, size=10)\n"
    )
    assert done.stderr == ""
