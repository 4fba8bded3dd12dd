"""Memory: one behaviour on every backend, and an error for everything odd, with no descriptor lost."""

from __future__ import annotations

import errno
import mmap
import os
import socket
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mpmemory import Memory, Seal, SharedBuffer
from mpmemory._backends import platform
from mpmemory._fds import OwnedFd
from mpmemory.buffer import _rebuild_buffer
from mpmemory.testing import assert_no_leaks

pytestmark = pytest.mark.usefixtures("backend")


def test_size_is_exact_and_contents_are_zeros(backend: str) -> None:
    for size in (1, 4095, 4096, 4097, 1_000_003):
        with Memory(size) as memory:
            assert memory.size == size
            assert memory.pread(size) == bytes(size)


def test_properties(backend: str) -> None:
    with Memory(10_000, name="größe") as memory:
        assert memory.name == "größe"
        assert not memory.closed
        assert not memory.readonly
        assert memory.resident == (0 if backend == "memfd" else memory.resident)
        memory.pwrite(b"x")
        assert memory.resident >= 4096
        assert os.fstat(memory.fileno()).st_size == 10_000
        assert "größe" in repr(memory)
        assert str(memory.fileno()) in repr(memory)
    assert memory.closed
    assert "closed" in repr(memory)
    assert memory.name == "größe"


def test_the_label_is_seen_in_maps_on_linux(backend: str) -> None:
    if backend != "memfd":
        pytest.skip("only memfd has labels")
    buffer = Memory(100, name="my label").map()
    assert f"/memfd:mpmemory:{os.getpid()}:my label" in Path("/proc/self/maps").read_text()
    buffer.close()
    assert ":my label" not in Path("/proc/self/maps").read_text()


def test_descriptors_are_close_on_exec(backend: str) -> None:
    memory = Memory(1)
    assert not os.get_inheritable(memory.fileno())
    assert not os.get_inheritable(memory.dup().fileno())


def test_memory_cannot_be_shrunk(backend: str) -> None:
    with Memory(5000) as memory:
        if backend == "memfd":
            assert Seal.SHRINK in memory.seals
            with pytest.raises(PermissionError):
                os.ftruncate(memory.fileno(), 10)
        else:
            assert Seal.SHRINK not in memory.seals
        with pytest.raises(ValueError, match="5000 bytes and cannot shrink to 4999"):
            memory.grow(4999)
        assert memory.size == 5000


def test_from_bytes(backend: str) -> None:
    data = os.urandom(123_457)
    for source in (data, bytearray(data), memoryview(data)):
        memory = Memory.from_bytes(source, name="copy")
        assert (memory.size, memory.name) == (len(data), "copy")
        assert memory.pread(len(data)) == data
    assert Memory.from_bytes(b"").size == 0


def test_from_bytes_takes_any_buffer(backend: str) -> None:
    import numpy as np

    array = np.arange(24, dtype=">i4").reshape(4, 6)
    assert Memory.from_bytes(array).pread(96) == array.tobytes()
    assert Memory.from_bytes(array.T).pread(96) == array.T.tobytes()
    assert Memory.from_bytes(array[::2, ::-1]).pread(48) == array[::2, ::-1].tobytes()
    assert Memory.from_bytes(np.float64(2.5)).pread(8) == np.float64(2.5).tobytes()
    assert Memory.from_bytes(np.empty((0, 3))).size == 0
    with pytest.raises(TypeError):
        Memory.from_bytes("text")  # type: ignore[arg-type]


def test_from_file(backend: str, tmp_path: Path) -> None:
    data = os.urandom(300_000)
    path = tmp_path / "data.bin"
    path.write_bytes(data)
    memory = Memory.from_file(path)
    assert memory.name == "data.bin"
    assert memory.pread(len(data)) == data
    assert os.lseek(memory.fileno(), 0, os.SEEK_CUR) == 0
    path.write_bytes(b"")  # a copy: nothing changes
    assert memory.pread(len(data)) == data
    assert Memory.from_file(os.fsencode(path), name="other").name == "other"
    assert Memory.from_file(path).size == 0
    long = tmp_path / ("ü" * 127)
    long.write_bytes(b"x")
    assert Memory.from_file(long).name == "ü" * 100


def test_from_file_of_a_kind_that_cannot_be_copied_in_the_kernel(backend: str) -> None:
    memory = Memory.from_file("/proc/self/status")
    assert memory.pread(memory.size).startswith(b"Name:")


def test_pread_and_pwrite(backend: str) -> None:
    memory = Memory(100)
    assert memory.pwrite(b"abc", 97) == 3
    assert memory.pread(4, 96) == b"\0abc"
    assert memory.pread(0, 100) == b""
    assert memory.pwrite(b"", 100) == 0


def test_a_mapping_outlives_its_handle(backend: str) -> None:
    memory = Memory(100)
    buffer = memory.map()
    assert buffer.memory.fileno() == memory.fileno()  # one descriptor for both
    memory.close()
    memory.close()
    buffer[0] = 5
    assert buffer.memory.pread(1) == b"\x05"


def test_dup_is_independent(backend: str) -> None:
    first = Memory(10, name="n")
    second = first.dup()
    assert second.fileno() != first.fileno()
    assert (second.identity, second.name) == (first.identity, "n")
    first.pwrite(b"shared")
    first.close()
    assert second.pread(6) == b"shared"
    assert Memory(10).identity != second.identity


def test_from_fd_owns_memory(backend: str) -> None:
    memory = Memory(77, name="mine")
    number = os.dup(memory.fileno())
    os.set_inheritable(number, True)
    taken = Memory.from_fd(number)
    assert taken.fileno() == number
    assert (taken.size, taken.identity) == (77, memory.identity)
    assert not os.get_inheritable(number)
    if backend == "memfd":
        assert taken.name == "mine"
    taken.close()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(number)


def test_from_fd_of_a_regular_file(tmp_path: Path) -> None:
    path = tmp_path / "numbers"
    path.write_bytes(b"0123456789")
    memory = Memory.from_fd(os.open(path, os.O_RDWR))
    assert memory.name == "numbers"
    with memory.map(4, 3) as buffer:
        assert buffer.get_bytes() == b"3456"
        buffer[0:2] = b"xx"
    memory.close()
    assert path.read_bytes() == b"012xx56789"


def test_transfers_in_several_parts(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The system transfers 2 GB at a time."""
    monkeypatch.setattr(platform, "MAX_TRANSFER", 1000)
    data = os.urandom(4321)
    memory = Memory.from_bytes(data)
    assert memory.pread(4000, 300) == data[300:4300]
    assert memory.pwrite(data[:3210], 1111) == 3210
    assert memory.pread(4321) == data[:1111] + data[:3210]


def test_a_file_that_is_shorter_than_the_system_says() -> None:
    memory = Memory.from_fd(os.open("/sys/devices/system/cpu/online", os.O_RDONLY))
    with pytest.raises(OSError, match=r"memory 'online' ended at \d+ while it was read") as error:
        memory.pread(memory.size)
    assert error.value.errno == errno.EIO


def test_identity_is_device_and_inode(backend: str) -> None:
    memory = Memory(1)
    status = os.fstat(memory.fileno())
    assert memory.identity == (status.st_dev, status.st_ino)


# --- bad input: the error says what was asked and what was found, and no descriptor is lost ---


def no_fd_lost(action: Any) -> None:
    with assert_no_leaks():
        action()


@pytest.mark.parametrize(
    ("size", "kind", "message"),
    [
        (-1, ValueError, "size must not be negative, found -1"),
        (1.5, TypeError, "float"),
        ("10", TypeError, "str"),
        (None, TypeError, "NoneType"),
        (2**63, OSError, f"cannot have memory of {2**63} bytes"),
        (2**80, OSError, f"cannot have memory of {2**80} bytes"),
    ],
)
def test_bad_sizes(size: Any, kind: type[Exception], message: str) -> None:
    def action() -> None:
        with pytest.raises(kind, match=message):
            Memory(size)
        memory = Memory(1)
        with pytest.raises(kind, match=message):
            memory.grow(size)
        assert memory.size == 1

    no_fd_lost(action)


def test_more_than_the_machine_has(backend: str) -> None:
    size = 1 << 60
    if backend == "memfd":  # nothing is allocated before it is touched, but so much cannot be mapped
        memory = Memory(size)
        with pytest.raises(OSError, match=f"cannot map {size} bytes") as error:
            memory.map()
        assert error.value.errno == errno.ENOMEM
    else:  # all is allocated at once: an error now, not a SIGBUS later
        with pytest.raises(OSError, match=f"cannot (have memory of|reserve) {size} bytes") as error:
            Memory(size)
        assert error.value.errno in {errno.ENOSPC, errno.EFBIG, errno.ENOMEM}


@pytest.mark.parametrize(
    ("name", "kind", "message"),
    [
        (b"bytes", TypeError, "name must be a str, found bytes"),
        ("a\0b", ValueError, "NUL"),
        ("x" * 201, ValueError, "at most 200 bytes, found 201"),
    ],
)
def test_bad_names(name: Any, kind: type[Exception], message: str, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"x")

    def action() -> None:
        for make in (lambda: Memory(1, name=name), lambda: Memory.from_bytes(b"x", name=name)):
            with pytest.raises(kind, match=message):
                make()
        with pytest.raises(kind, match=message):
            Memory.from_file(path, name=name)

    no_fd_lost(action)
    assert Memory(1, name="x" * 200).name == "x" * 200


def test_contents_larger_than_files_may_be(tmp_path: Path, run_python: Any) -> None:
    """The kernel writes what it may, and says how much: the rest is an error."""
    (tmp_path / "big").write_bytes(bytes(2000))
    run_python(
        "import errno, resource, mpmemory\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "for make, what in (\n"
        "    (lambda: mpmemory.Memory.from_bytes(bytes(2000)), 'cannot write 2000 bytes into memory'),\n"
        f"    (lambda: mpmemory.Memory.from_file({str(tmp_path / 'big')!r}), 'cannot copy '),\n"
        "    (lambda: mpmemory.Memory.from_file('/proc/self/status'), 'cannot copy /proc/self/status into memory'),\n"
        "):\n"
        "    try: make()\n"
        "    except OSError as error: assert error.errno == errno.EFBIG and what in str(error), error\n"
        "    else: raise SystemExit(f'no error, but {what}')\n"
    )


def test_from_file_refuses_what_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")

    def action() -> None:
        with pytest.raises(FileNotFoundError, match="missing"):
            Memory.from_file(tmp_path / "missing")
        with pytest.raises(IsADirectoryError) as error:
            Memory.from_file(tmp_path)
        assert (error.value.errno, error.value.filename) == (errno.EISDIR, tmp_path)
        with pytest.raises(ValueError, match="expected a regular file, found a pipe"):
            Memory.from_file(tmp_path / "fifo")
        with pytest.raises(ValueError, match="expected a regular file, found a character device"):
            Memory.from_file("/dev/zero")

    no_fd_lost(action)


def test_from_fd_refuses_what_cannot_be_mapped_and_leaves_it(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    left, right = socket.socketpair()
    directory = os.open(tmp_path, os.O_RDONLY)
    write_only = os.open(tmp_path / "file", os.O_WRONLY | os.O_CREAT)
    appending = os.open(tmp_path / "file", os.O_RDWR | os.O_APPEND)
    path_only = os.open(tmp_path / "file", os.O_PATH)
    null = os.open("/dev/null", os.O_RDWR)
    closed = os.dup(reader)
    os.close(closed)
    cases = [
        (reader, "a pipe"),
        (writer, "a pipe"),
        (left.fileno(), "a socket"),
        (directory, "a directory"),
        (write_only, "not open for reading"),
        (path_only, "not open for reading"),
        (appending, "open for appending"),
        (null, "a character device"),
        (closed, "not open"),
        (-1, "not open"),
        (2**40, "not open"),
    ]

    def action() -> None:
        for fd, message in cases:
            with pytest.raises(ValueError, match=f"cannot map file descriptor {fd}: .*{message}"):
                Memory.from_fd(fd)
        with pytest.raises(TypeError):
            Memory.from_fd(open(tmp_path / "file", "rb"))  # type: ignore[arg-type]  # noqa: SIM115

    os.set_inheritable(reader, True)
    with pytest.warns(ResourceWarning):
        no_fd_lost(action)
    assert os.get_inheritable(reader)
    os.write(writer, b"still usable")
    for fd in (reader, writer, directory, write_only, appending, path_only, null):
        os.close(fd)
    left.close()
    right.close()


@pytest.mark.parametrize(
    ("length", "offset", "message"),
    [
        (101, 0, "offset 0 and length 101 are not within a size of 100 bytes"),
        (1, 100, "offset 100 and length 1 are not within a size of 100 bytes"),
        (None, 101, "offset 101 and the rest are not within a size of 100 bytes"),
        (-1, 0, "offset 0 and length -1"),
        (1, -1, "offset -1 and length 1"),
        (2**70, 0, "not within"),
        (0, 0, "cannot map 0 bytes of memory 'mpmemory', at offset 0 of 100"),
        (None, 100, "cannot map 0 bytes of memory 'mpmemory', at offset 100 of 100"),
    ],
)
def test_mapping_out_of_range(length: Any, offset: int, message: str) -> None:
    memory = Memory(100)

    def action() -> None:
        with pytest.raises(ValueError, match=message):
            memory.map(length, offset)

    no_fd_lost(action)


def test_mapping_oddities() -> None:
    with pytest.raises(ValueError, match="cannot map 0 bytes"):
        Memory(0).map()
    memory = Memory(100)
    with pytest.raises(ValueError, match=r"ACCESS_COPY, found 17"):
        memory.map(access=17)
    with pytest.raises(TypeError):
        memory.map(1.0)  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        memory.map(1, "0")  # type: ignore[arg-type]


def test_reading_and_writing_out_of_range() -> None:
    memory = Memory(10)
    for action in (
        lambda: memory.pread(11),
        lambda: memory.pread(1, 10),
        lambda: memory.pread(-1),
        lambda: memory.pread(1, -1),
        lambda: memory.pwrite(b"12", 9),
        lambda: memory.pwrite(b"1", -1),
        lambda: memory.pwrite(bytes(11)),
    ):
        with pytest.raises(ValueError, match="are not within a size of 10 bytes"):
            action()
    assert memory.pread(10) == bytes(10)
    assert memory.size == 10


def test_a_closed_handle_is_a_value_error_everywhere() -> None:
    memory = Memory(10, name="gone")
    memory.close()
    left, right = socket.socketpair()
    for action in (
        lambda: memory.size,
        lambda: memory.resident,
        lambda: memory.identity,
        lambda: memory.seals,
        lambda: memory.readonly,
        memory.fileno,
        memory.map,
        lambda: memory.pread(1),
        lambda: memory.pwrite(b""),
        lambda: memory.grow(100),
        memory.dup,
        lambda: memory.send(left),
        memory.__enter__,
    ):
        with pytest.raises(ValueError, match="memory 'gone' is closed"):
            action()
    left.close()
    right.close()


def test_a_handle_that_arrived_on_something_else() -> None:
    """From a program that pickles something of its own; `from_fd` and `receive` refuse it."""
    reader, writer = os.pipe()
    with Memory._own(OwnedFd(writer), "pipe") as memory:
        memory.as_readonly().close()  # does not wait for a writer
        with pytest.raises(ValueError, match="not within a size of 0 bytes"):
            memory.map(10)
    os.close(reader)
    with Memory._own(OwnedFd(os.open("/dev/zero", os.O_RDWR)), "device") as memory:
        buffer = _rebuild_buffer(SharedBuffer, memory, 4096, 4096, mmap.ACCESS_WRITE)
        with pytest.raises(OSError, match="cannot map 4096 bytes of memory 'device': No such device"):  # not a SIGBUS
            buffer[0]


def test_out_of_descriptors(run_python: Any) -> None:
    run_python(
        "import errno, os, resource, mpmemory\n"
        "memory = mpmemory.Memory(10)\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (40, 40))\n"
        "kept = []\n"
        "for make in (lambda: mpmemory.Memory(10), memory.dup, lambda: mpmemory.SharedBuffer(10)):\n"
        "    try:\n"
        "        while True: kept.append(make())\n"
        "    except OSError as error:\n"
        "        assert error.errno == errno.EMFILE, error\n"
        "        assert 'the limit of this process is 40, see `ulimit -n`' in str(error), error\n"
        "assert len(kept) > 20\n"
        "kept.clear()\n"
        "mpmemory.Memory(10)\n"
    )


def test_handles_are_closed_when_dropped() -> None:
    def action() -> None:
        for _ in range(500):
            memory = Memory(10)
            memory.map()
            memory.dup()

    no_fd_lost(action)


def test_a_descriptor_in_use_is_not_closed_under_its_user() -> None:
    """A number that is closed too early is soon another file's."""
    memory = Memory(10)
    fd = memory._open()
    memory.close()
    assert isinstance(fd, OwnedFd)
    assert os.fstat(fd.fileno()).st_size == 10


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    size=st.integers(1, 20_000),
    steps=st.lists(st.tuples(st.integers(0, 25_000), st.binary(max_size=9000)), max_size=8),
)
def test_writes_by_any_way_are_those_to_a_bytearray(size: int, steps: list[tuple[int, bytes]]) -> None:
    model = bytearray(size)
    memory = Memory(size)
    buffer = memory.map()
    for index, (offset, data) in enumerate(steps):
        write = memory.pwrite if index % 2 else buffer.set_bytes
        if offset + len(data) <= size:
            assert write(data, offset) == len(data)
            model[offset : offset + len(data)] = data
        else:
            with pytest.raises(ValueError, match="not within"):
                write(data, offset)
    assert memory.pread(size) == model == buffer.buf
    buffer.close()
    memory.close()


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(offset=st.integers(0, 12_000), length=st.integers(1, 12_000))
def test_any_byte_offset_can_be_mapped(offset: int, length: int) -> None:
    data = bytes(index % 251 for index in range(12_288))
    memory = Memory.from_bytes(data)
    if offset + length <= len(data):
        with memory.map(length, offset) as buffer:
            assert buffer.buf == data[offset : offset + length]
    else:
        with pytest.raises(ValueError, match="not within"):
            memory.map(length, offset)
