"""Who gets at memory: processes of the same user, and who was given a descriptor, as far as that allows."""

from __future__ import annotations

import errno
import fcntl
import mmap
import multiprocessing
import os
import pickle
import socket
import stat
import subprocess
import sys
from collections.abc import Callable
from multiprocessing import connection
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import dumps

from mpmemory import HandleLostError, Memory, RobustLock, Seal, SharedBuffer, _sharer, arrays, get_context
from mpmemory._backends import platform, posix
from mpmemory.connection import Connection, Pipe
from mpmemory.shared_memory import SharedMemory

# --- other users ----------------------------------------------------------------------------------

AS_NOBODY = """
import os, sys
from mpmemory.shared_memory import SharedMemory
os.setgroups([]); os.setgid(65534); os.setuid(65534)
try:
    SharedMemory(sys.argv[1])
except (PermissionError, FileNotFoundError) as error:
    print(type(error).__name__)
own = SharedMemory(create=True, size=5)
again = SharedMemory(own.name)
again.buf[0] = 1
assert own.buf[0] == 1
own.close()
again.close()
again.unlink()
"""


def test_another_user_cannot_attach(run_python: Any) -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root, to become another user")
    for chosen in (None, f"mpmemory-test-{os.urandom(6).hex()}"):
        block = SharedMemory(chosen, create=True, size=5)
        assert run_python(AS_NOBODY, block.name).stdout == "PermissionError\n"
        block.unlink()


NOBODY_LOOKS = """
import os, sys
os.setgroups([]); os.setgid(65534); os.setuid(65534)
found = []
for path in sys.argv[1:]:
    for flags in (os.O_RDONLY, os.O_RDWR):
        try: os.close(os.open(path, flags))
        except PermissionError: pass
        else: found.append((path, flags))
print(found)
"""


def test_another_user_opens_nothing(run_python: Any, backend: str) -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root, to become another user")
    with Memory.from_bytes(b"secret") as memory, memory.map():
        start, end = next(
            line.split()[0].split("-")
            for line in Path("/proc/self/maps").read_text().splitlines()
            if "(deleted)" in line
        )
        folder = f"/proc/{os.getpid()}"
        paths = [f"{folder}/fd/{memory.fileno()}", f"{folder}/mem", f"{folder}/map_files/{start}-{end}"]
        assert run_python(NOBODY_LOOKS, *paths).stdout == "[]\n"


def test_named_objects_are_their_owner_s_only() -> None:
    name = f"mpmemory-test-{os.urandom(6).hex()}"
    block = SharedMemory(name, create=True, size=10)
    try:
        assert stat.S_IMODE(os.stat(f"/dev/shm/{name}").st_mode) == 0o600
    finally:
        block.unlink()


def test_memory_of_the_posix_backend_had_a_name_for_its_user_only() -> None:
    """For some microseconds."""
    fd = posix.create("label")
    status = os.fstat(fd)
    assert (stat.S_IMODE(status.st_mode), status.st_nlink, status.st_uid) == (0o600, 0, os.geteuid())
    os.close(fd)


# --- the resource sharer --------------------------------------------------------------------------


def claim_with_another_key(conn: Any) -> None:
    multiprocessing.current_process().authkey = b"another"
    lost = pickle.loads(conn.recv_bytes())
    with pytest.raises(HandleLostError, match="could not be received: digest sent was rejected"):
        lost.pread(1)
    conn.send("rejected")


def test_a_claimant_needs_the_authkey(capfd: pytest.CaptureFixture[str]) -> None:
    message = dumps(Memory(10))
    ours, theirs = multiprocessing.Pipe()
    with ours, theirs:
        child = get_context("spawn").Process(target=claim_with_another_key, args=(theirs,))
        child.start()
        ours.send_bytes(message)
        assert ours.recv() == "rejected"
        child.join()
    assert pickle.loads(message).size == 10  # still there for who knows the key
    assert capfd.readouterr().err == ""


def test_another_user_is_not_answered() -> None:
    if os.geteuid() != 0:
        pytest.skip("needs to become another user")
    dumps(Memory(10))
    address = _sharer._sharer._address
    reader, writer = os.pipe()
    if (pid := os.fork()) == 0:
        os.setuid(65534)
        try:
            with connection.Client(address) as conn:
                conn.recv_bytes()
        except (EOFError, ConnectionError):
            os.write(writer, b"refused")
        finally:
            os._exit(0)
    os.close(writer)
    os.waitpid(pid, 0)
    assert os.read(reader, 100) == b"refused"
    os.close(reader)


def test_nothing_is_unpickled_for_who_does_not_know_the_authkey(capfd: pytest.CaptureFixture[str]) -> None:
    message = dumps(Memory(10))
    for data in (b"", b"x" * 100, pickle.dumps((0, 0)), b"\x80\x05" * 50, b"#CHALLENGE#" + bytes(40), b"#WELCOME#"):
        with connection.Client(_sharer._sharer._address) as conn:
            conn.recv_bytes()  # the challenge
            conn.send_bytes(data)
            with pytest.raises((EOFError, ConnectionError)):
                assert [conn.recv_bytes(), conn.recv_bytes()] == [b"#FAILURE#"]
    assert pickle.loads(message).size == 10
    assert capfd.readouterr().err == ""


# --- programs that are started --------------------------------------------------------------------


def fds_of_a_program() -> set[str]:
    """Return on what a program that is started now has descriptors, all of them left open that can be."""
    done = subprocess.run(
        [sys.executable, "-c", LIST], close_fds=False, text=True, capture_output=True, check=True, timeout=60
    )
    return {what for what in done.stdout.splitlines() if not what.startswith("pipe:")}  # its own output


LIST = """
import os
for fd in os.listdir("/proc/self/fd"):
    try: print(os.readlink(f"/proc/self/fd/{fd}"))
    except OSError: pass
"""


def receive_and_start(handle: Memory, buffer: SharedBuffer, conn: Any) -> None:
    before = fds_of_a_program()
    buffer[0] = 1
    kept = [conn.recv() for _ in range(6)]
    conn.send(("done", len(kept), fds_of_a_program() - before, [what for what in before if "memfd" in what]))


def test_what_arrives_is_not_for_programs_started_then(ctx: Any) -> None:
    left, right = ctx.Pipe()
    here, there = socket.socketpair()
    with left, right, here, there, Memory(10) as memory, memory.map() as buffer:
        child = ctx.Process(target=receive_and_start, args=(memory, buffer, right))
        child.start()
        for obj in (memory, buffer, arrays.zeros(100_000), np.ones(100_000), there, RobustLock()):
            left.send(obj)
        assert left.recv() == ("done", 6, set(), [])
        child.join()
        received = [pickle.loads(dumps(obj)) for obj in (memory, buffer)]  # by the resource sharer
        before = fds_of_a_program()
        memory.send(here)
        received += [Memory.receive(there), SharedMemory(create=True, size=10), memory.dup(), memory.as_readonly()]
        received[3].unlink()
        assert fds_of_a_program() == before
        assert not [what for what in before if "memfd" in what]
        for each in received:
            each.close()


# --- seals ----------------------------------------------------------------------------------------


def try_to_write(memory: Memory) -> dict[str, str]:
    """Return what comes of each way to write to memory that was received."""
    buffer = memory.map()
    descriptor = os.open(f"/proc/self/fd/{memory.fileno()}", os.O_RDWR)
    ways: dict[str, Callable[[], Any]] = {
        "item": lambda: buffer.__setitem__(0, 1),
        "map": lambda: memory.map(access=mmap.ACCESS_WRITE),
        "pwrite": lambda: memory.pwrite(b"x"),
        "reopened, mapped": lambda: mmap.mmap(descriptor, 0),
        "reopened, written": lambda: os.pwrite(descriptor, b"x", 0),
    }
    found = {}
    for name, way in ways.items():
        try:
            way()
        except (OSError, TypeError) as error:
            found[name] = type(error).__name__
        else:
            found[name] = "done"
    os.close(descriptor)
    assert memory.readonly
    assert buffer.readonly
    return found


def test_a_readonly_handle_is_mapped_readonly_by_its_receivers(ctx: Any) -> None:
    memory = Memory.from_bytes(b"abc")
    with ctx.Pool(1) as pool:
        found = pool.apply(try_to_write, (memory.as_readonly(),))
        # A convention, but for what the descriptor itself allows.
        assert found == {
            "item": "TypeError",
            "map": "PermissionError",
            "pwrite": "OSError",
            "reopened, mapped": "done",
            "reopened, written": "done",
        }
        pool.close()
        pool.join()
    assert memory.pread(3) == b"xbc"
    assert not memory.readonly


def test_what_is_sealed_no_receiver_can_write_to(ctx: Any) -> None:
    memory = Memory.from_bytes(b"abc")
    buffer = memory.map()
    memory.seal(Seal.FUTURE_WRITE)
    with ctx.Pool(1) as pool:
        for handle in (memory.as_readonly(), memory):
            found = pool.apply(try_to_write, (handle,))
            assert set(found.values()) <= {"TypeError", "PermissionError", "SealedError", "OSError"}, found
        pool.close()
        pool.join()
    assert memory.pread(3) == b"abc"
    buffer[0] = ord("x")  # the mapping that there was
    assert memory.pread(3) == b"xbc"


def try_to_break(memory: Memory) -> dict[str, str]:
    """Return what comes of each way to take memory away from others that have it mapped."""
    number = memory.fileno()
    again = os.open(f"/proc/self/fd/{number}", os.O_RDWR)
    punch = [sys.executable, "-c", PUNCH, str(again)]
    ways: dict[str, Callable[[], Any]] = {
        "truncate": lambda: os.ftruncate(number, 0),
        "truncate a little": lambda: os.ftruncate(again, memory.size - 1),
        "open and truncate": lambda: os.close(os.open(f"/proc/self/fd/{number}", os.O_RDWR | os.O_TRUNC)),
        "punch a hole": lambda: subprocess.run(punch, pass_fds=[again], check=True, capture_output=True),
        "run it": lambda: os.fchmod(number, 0o755),
    }
    found = {}
    for name, way in ways.items():
        try:
            way()
        except OSError as error:
            found[name] = errno.errorcode[error.errno or 0]
        except subprocess.CalledProcessError as error:
            found[name] = error.stderr.decode().splitlines()[-1]
        else:
            found[name] = "done"
    os.close(again)
    return found


# Not in Python: FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE.
PUNCH = """
import ctypes, os, sys
libc = ctypes.CDLL(None, use_errno=True)
arguments = int(sys.argv[1]), 3, ctypes.c_long(0), ctypes.c_long(4096)
if libc.fallocate(*arguments): raise OSError(ctypes.get_errno(), "fallocate")
"""


def test_a_hostile_receiver_shrinks_nothing(ctx: Any) -> None:
    memory = Memory.from_bytes(b"x" * 8192)
    buffer = memory.map()
    with ctx.Pool(1) as pool:
        found = pool.apply(try_to_break, (memory,))
        # To write zeros is to write; what is gone comes back as zeros, and nobody is killed by it.
        assert found.pop("punch a hole") == "done"
        if memory.seals & Seal.EXEC:  # from Linux 6.3 on
            assert found.pop("run it") == "EPERM"
        else:
            del found["run it"]
        assert found == dict.fromkeys(["truncate", "truncate a little", "open and truncate"], "EPERM")
        assert buffer.get_bytes() == bytes(4096) + b"x" * 4096
        memory.seal(Seal.FUTURE_WRITE)
        buffer[:] = b"y" * 8192
        found = pool.apply(try_to_break, (memory,))
        assert "PermissionError" in found.pop("punch a hole")
        found.pop("run it")
        assert set(found.values()) == {"EPERM"}
        pool.close()
        pool.join()
    assert buffer.get_bytes() == b"y" * 8192


def shrink_lease(conn: Connection) -> None:
    datagram = conn.receive_datagram()
    (lease,) = datagram._fds
    found = []
    for size in (0, os.fstat(lease.fileno()).st_size * 2):
        try:
            os.ftruncate(lease.fileno(), size)
        except OSError as error:
            found.append(error.errno)
    try:
        fcntl.fcntl(lease.fileno(), platform.F_ADD_SEALS, Seal.WRITE)
    except OSError as error:
        found.append(error.errno)
    conn.send((found, int(datagram.object().sum())))


def test_a_hostile_receiver_of_a_segment_changes_neither_size_nor_seals() -> None:
    left, right = Pipe()
    child = get_context("forkserver").Process(target=shrink_lease, args=(right,))
    with left, right:
        child.start()
        left.send(np.ones(100_000))
        assert left.recv() == ([errno.EPERM] * 3, 100_000)
        child.join()
