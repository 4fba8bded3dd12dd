"""Seals, and memory that can only be read: here, and by whoever receives it."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
from pathlib import Path

import pytest

from mpmemory import Memory, Seal, SealedError, SharedBuffer
from mpmemory._backends import platform


def test_readonly_memory(tmp_path: Path) -> None:
    path = tmp_path / "numbers"
    path.write_bytes(b"0123456789")
    memory = Memory.from_fd(os.open(path, os.O_RDONLY))
    assert memory.readonly
    buffer = memory.map()
    assert buffer.readonly
    assert buffer.buf.readonly
    with pytest.raises(TypeError, match="read-only"):
        buffer[0] = 1
    with pytest.raises(PermissionError, match="it is read-only"):
        memory.map(access=mmap.ACCESS_WRITE)
    with pytest.raises(OSError, match="cannot write 1 bytes") as error:
        memory.pwrite(b"x")
    assert error.value.errno == errno.EBADF
    with pytest.raises(PermissionError, match="cannot grow memory 'numbers': it is read-only"):
        memory.grow(100)
    copy = memory.map(access=mmap.ACCESS_COPY)
    copy[0] = ord("x")
    assert memory.pread(2) == b"01"


def test_sealing(backend: str) -> None:
    memory = Memory(100)
    with pytest.raises(TypeError, match="expected a Seal, found int"):
        memory.seal(8)  # type: ignore[arg-type]
    if backend != "memfd":
        before = memory.seals
        with pytest.raises(OSError, match=r"cannot add <Seal.GROW: 4> to memory 'mpmemory': Operation not supported"):
            memory.seal(Seal.GROW)
        assert memory.seals == before
        return
    mapped = memory.map()
    with pytest.raises(OSError, match=r"cannot add <Seal.WRITE: 8> to memory 'mpmemory': Device or resource busy"):
        memory.seal(Seal.WRITE)
    memory.seal(Seal.GROW | Seal.FUTURE_WRITE)
    memory.seal(Seal.GROW)
    assert memory.seals & ~Seal.EXEC == Seal.SHRINK | Seal.GROW | Seal.FUTURE_WRITE
    mapped[0] = 7  # those there are go on
    assert memory.readonly
    assert memory.map().readonly
    with pytest.raises(SealedError, match="cannot write 1 bytes into memory 'mpmemory': seal FUTURE_WRITE is on it"):
        memory.pwrite(b"x")
    with pytest.raises(SealedError, match="cannot grow memory 'mpmemory' to 200 bytes: seal GROW is on it"):
        memory.grow(200)
    mapped.close()
    memory.seal(Seal.WRITE | Seal.SEAL)
    with pytest.raises(SealedError, match=r"cannot add <Seal.EXEC: 32> to memory 'mpmemory': seal SEAL is on it"):
        memory.seal(Seal.EXEC)
    assert memory.pread(1) == b"\7"
    other = Memory(10)
    reader = Memory.from_fd(os.open(f"/proc/self/fd/{other.fileno()}", os.O_RDONLY))
    with pytest.raises(PermissionError, match=r"cannot add .* Permission denied"):
        reader.seal(Seal.GROW)


@pytest.mark.parametrize("seal", [Seal.WRITE, Seal.FUTURE_WRITE])
def test_sealed_memory_cannot_be_mapped_for_writing(seal: Seal, backend: str) -> None:
    if backend != "memfd":
        pytest.skip("only memfd has seals")
    memory = Memory(100)
    fcntl.fcntl(memory.fileno(), platform.F_ADD_SEALS, seal)
    assert memory.readonly
    assert seal in memory.seals
    assert memory.map().readonly
    with pytest.raises(SealedError, match=f"cannot map memory .* for writing: seal {seal.name} is on it"):
        memory.map(access=mmap.ACCESS_WRITE)


def test_memory_that_is_sealed_against_growing(backend: str) -> None:
    if backend != "memfd":
        pytest.skip("only memfd has seals")
    memory = Memory(10)
    fcntl.fcntl(memory.fileno(), platform.F_ADD_SEALS, Seal.GROW)
    with pytest.raises(SealedError, match="cannot grow memory 'mpmemory' to 20 bytes: seal GROW is on it"):
        memory.grow(20)
    assert memory.size == 10


def test_sealing_a_memfd_of_another_program() -> None:
    memory = Memory.from_fd(os.memfd_create("other", os.MFD_ALLOW_SEALING))
    assert not memory.seals
    memory.seal(Seal.GROW)
    with pytest.raises(SealedError, match="seal GROW is on it"):
        memory.grow(10)
    with pytest.raises(OSError, match="Operation not supported"):
        memory.seal(Seal(1 << 20))  # one that the kernel does not know
    with pytest.raises(OSError, match="Operation not supported"):
        Memory.from_fd(os.memfd_create("other")).seal(Seal.GROW)


def test_readonly_handles(backend: str) -> None:
    memory = Memory.from_bytes(b"abc", name="label")
    reader = memory.as_readonly()
    assert (reader.name, reader.size, reader.identity) == ("label", 3, memory.identity)
    assert reader.readonly
    assert reader.dup().readonly
    assert reader.as_readonly().readonly
    assert reader.pread(3) == b"abc"
    with pytest.raises(PermissionError, match="cannot map memory 'label' for writing: it is read-only"):
        reader.map(access=mmap.ACCESS_WRITE)
    with pytest.raises(PermissionError, match="cannot grow memory 'label': it is read-only"):
        reader.grow(10)
    with reader.map() as buffer, memory.map() as writer:
        writer[0] = ord("x")
        assert buffer.get_bytes() == b"xbc"
    assert type(SharedBuffer(10).memory.as_readonly()) is Memory
    memory.close()
    assert reader.pread(3) == b"xbc"
    with pytest.raises(ValueError, match="is closed"):
        memory.as_readonly()
