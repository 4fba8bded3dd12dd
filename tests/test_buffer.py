"""SharedBuffer: bytes, text, values, views and arrays; and what lives how long."""

from __future__ import annotations

import gc
import hashlib
import mmap
import multiprocessing
import os
import pickle
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from conftest import dumps, mappings, open_fds
from hypothesis import given, settings
from hypothesis import strategies as st

from mpmemory import CACHE_LINE_SIZE, PAGE_SIZE, Memory, SharedBuffer, align
from mpmemory import memory as memory_module
from mpmemory._backends import platform


def test_the_constructor_is_memory_and_map() -> None:
    with SharedBuffer(1000, name="numbers") as buffer:
        assert (buffer.size, len(buffer), buffer.offset) == (1000, 1000, 0)
        assert (buffer.memory.size, buffer.memory.name) == (1000, "numbers")
        assert not buffer.readonly
        assert not buffer.closed
        assert buffer.buf == bytes(1000)
        assert "numbers" in repr(buffer)
        assert "1000" in repr(buffer)
    assert buffer.closed
    assert "closed" in repr(buffer)


def test_from_bytes() -> None:
    buffer = SharedBuffer.from_bytes(b"hello", name="greeting")
    assert (bytes(buffer), buffer.size, buffer.memory.name) == (b"hello", 5, "greeting")
    with pytest.raises(ValueError, match="0 bytes"):
        SharedBuffer.from_bytes(b"")
    with pytest.raises(ValueError, match="0 bytes"):
        SharedBuffer(0)


def test_items_and_slices() -> None:
    buffer = SharedBuffer(10)
    buffer[0] = 255
    buffer[-1] = 7
    buffer[2:5] = b"abc"
    buffer[8:0:-4] = bytearray(b"xy")
    assert (buffer[0], buffer[9]) == (255, 7)
    part = buffer[2:5]
    assert isinstance(part, memoryview)
    assert part == b"aby"
    part[0] = ord("A")
    assert buffer.get_bytes() == b"\xff\0Aby\0\0\0x\x07"
    assert list(buffer)[:2] == [255, 0]


@pytest.mark.parametrize("index", [10, -11, 2**70])
def test_an_index_out_of_range(index: int) -> None:
    buffer = SharedBuffer(10)
    with pytest.raises(IndexError, match=f"index {index} is not within a size of 10 bytes"):
        buffer[index]
    with pytest.raises(IndexError, match=f"index {index} is not within a size of 10 bytes"):
        buffer[index] = 1
    assert buffer.buf == bytes(10)


def test_wrong_items_write_nothing() -> None:
    buffer = SharedBuffer(10)
    cases: list[tuple[Any, Any, type[Exception], str]] = [
        (0, 256, ValueError, "a byte is 0 to 255, found 256"),
        (0, -1, ValueError, "a byte is 0 to 255, found -1"),
        (0, "a", TypeError, "str"),
        (0, 1.0, TypeError, "float"),
        ("0", 1, TypeError, "memoryview"),
        (slice(0, 5), b"1234", ValueError, "has length 5, found 4 bytes"),
        (slice(8, 20), b"123", ValueError, "has length 2, found 3 bytes"),
        (slice(0, 5), "12345", TypeError, "bytes-like"),
    ]
    for key, value, kind, message in cases:
        with pytest.raises(kind, match=message):
            buffer[key] = value
    assert buffer.buf == bytes(10)


def test_bytes_and_text() -> None:
    buffer = SharedBuffer(32)
    assert buffer.set_bytes(b"abc", 29) == 3
    assert buffer.get_bytes(29) == b"abc"
    assert buffer.get_bytes(30, 1) == b"b"
    assert buffer.get_bytes(32) == b""
    assert buffer.set_string("größer", 4) == 8
    assert buffer.get_string(4, 8) == "größer"
    assert buffer.get_string(29) == "abc"
    assert buffer.set_string("ab", 0, "utf-16-le") == 4
    assert buffer.get_string(0, 4, "utf-16-le") == "ab"
    with pytest.raises(UnicodeDecodeError):
        SharedBuffer.from_bytes(b"\xff").get_string()


def test_out_of_range_names_offset_length_and_size_and_writes_nothing() -> None:
    buffer = SharedBuffer(10)
    actions: list[Callable[[], object]] = [
        lambda: buffer.get_bytes(0, 11),
        lambda: buffer.get_bytes(-1, 1),
        lambda: buffer.get_bytes(0, -1),
        lambda: buffer.get_bytes(11),
        lambda: buffer.set_bytes(b"12", 9),
        lambda: buffer.set_bytes(bytes(11)),
        lambda: buffer.set_bytes(b"1", -1),
        lambda: buffer.get_string(8, 3),
        lambda: buffer.set_string("abc", 8),
        lambda: buffer.get_value("<q", 3),
        lambda: buffer.set_value("<q", 3, 1),
        lambda: buffer.set_values("<8h", 0, range(8)),
        lambda: buffer.view("q", 2),
        lambda: buffer.view("B", 1, 10),
        lambda: buffer.view("B", None, 11),
        lambda: buffer.ndarray(2),
        lambda: buffer.ndarray(1, "u1", 10),
        lambda: buffer.ndarray(1, "u1", -1),
    ]
    for action in actions:
        with pytest.raises(ValueError, match=r"offset -?\d+ and (length -?\d+|the rest) are not within a size of 10"):
            action()
    assert buffer.buf == bytes(10)


def test_values() -> None:
    buffer = SharedBuffer(64)
    buffer.set_value("<q", 3, -5)
    assert buffer.get_value("<q", 3) == -5
    buffer.set_values("<Hd4s", 20, (7, 0.5, b"abcd"))
    assert buffer.get_values("<Hd4s", 20) == (7, 0.5, b"abcd")
    assert buffer.get_bytes(20, 14) == struct.pack("<Hd4s", 7, 0.5, b"abcd")
    assert buffer.get_value("?", 63) is False


def test_bad_formats_and_values_write_nothing() -> None:
    buffer = SharedBuffer(64)
    actions: list[tuple[Callable[[], object], str]] = [
        (lambda: buffer.get_value("zz", 0), "bad struct format 'zz'"),
        (lambda: buffer.set_value("zz", 0, 1), "bad struct format 'zz'"),
        (lambda: buffer.get_value("", 0), "format of one value, found '' of 0"),
        (lambda: buffer.get_value("<2i", 0), "format of one value, found '<2i' of 2"),
        (lambda: buffer.set_value("<2i", 0, 1), r"cannot write \(1,\) in struct format '<2i'"),
        (lambda: buffer.set_values("<2i", 0, iter((1, 2, 3))), r"cannot write \(1, 2, 3\)"),
        (lambda: buffer.set_values("<2i", 0, (1, "2")), "cannot write"),
        (lambda: buffer.set_values("<2i", 0, (1, 2**40)), "cannot write"),
        (lambda: buffer.set_values("<bf", 0, (1, 1e300)), "cannot write"),
    ]
    for action, message in actions:
        with pytest.raises(ValueError, match=message):
            action()
    assert buffer.buf == bytes(64)


def test_views() -> None:
    buffer = SharedBuffer(100)
    numbers = buffer.view("q", 3, 8)
    numbers[2] = -1
    assert buffer.get_value("<q", 24) == -1
    assert (numbers.format, numbers.shape) == ("q", (3,))
    assert buffer.view("q").shape == (12,)
    assert buffer.view("q", offset=96).shape == (0,)
    assert buffer.view().nbytes == 100
    table = buffer.view("H", (2, 3), 50)
    table[1, 2] = 513
    assert buffer.get_bytes(60, 2) == b"\x01\x02"
    for shape in (0, (2, 0), (), (-1, 2)):
        with pytest.raises(ValueError, match="shape must have numbers from 1 on"):
            buffer.view("B", shape)
    for bad in ("<q", "zz", "", "2i"):
        with pytest.raises(ValueError, match="one native struct character"):
            buffer.view(bad)


def test_clear() -> None:
    size = 1_000_003
    buffer = SharedBuffer(size)
    buffer.clear(200)
    assert buffer.buf == bytes([200]) * size
    buffer.clear()
    assert buffer.buf == bytes(size)
    for value in (256, -1):
        with pytest.raises(ValueError, match=f"a byte is 0 to 255, found {value}"):
            buffer.clear(value)


def test_arrays() -> None:
    buffer = SharedBuffer(10_000)
    array = buffer.ndarray((3, 4), offset=8)
    assert (array.dtype, array.shape, array.flags.c_contiguous) == (np.float64, (3, 4), True)
    array[1, 2] = 0.5
    assert buffer.get_value("<d", 8 + 6 * 8) == 0.5
    columns = buffer.ndarray((3, 4), "i2", order="F")
    assert columns.flags.f_contiguous
    assert buffer.ndarray(5, [("a", "<i4"), ("b", "S3")]).dtype.itemsize == 7
    assert buffer.ndarray((), "u1", 9_999).shape == ()
    assert buffer.ndarray((0, 4), "f8", 10_000).shape == (0, 4)
    assert buffer.ndarray(4, "S0").shape == (4,)
    assert buffer.ndarray(2, np.dtype(("f4", (3,)))).shape == (2, 3)
    assert buffer.ndarray(2, "M8[s]")[0] == np.datetime64(0, "s")
    with pytest.raises(TypeError, match="cannot hold Python objects"):
        buffer.ndarray(1, object)
    with pytest.raises(ValueError, match="negative"):
        buffer.ndarray((-1, 4))
    with pytest.raises(ValueError, match="order must be 'C' or 'F', found 'K'"):
        buffer.ndarray(1, order="K")


def test_arrays_on_readonly_and_copied_mappings() -> None:
    memory = Memory.from_bytes(bytes(80))
    assert not memory.map(access=mmap.ACCESS_READ).ndarray(10).flags.writeable
    private = memory.map(access=mmap.ACCESS_COPY)
    private.ndarray(10)[:] = 1
    assert memory.pread(80) == bytes(80)


def test_ndarray_without_numpy_says_what_to_install(run_python: Any) -> None:
    run_python(
        "import sys\n"
        "sys.modules['numpy'] = None\n"
        "import mpmemory\n"
        "try: mpmemory.SharedBuffer(8).ndarray(1)\n"
        "except ImportError as error: assert 'mpmemory[numpy]' in str(error), error\n"
        "else: raise SystemExit('no error')\n"
    )


# --- lifetime ---


def test_a_numpy_view_survives_everything_else() -> None:
    buffer = SharedBuffer(8000, name="survivor")
    array = buffer.ndarray(1000)
    part = array[10:20:3].reshape(2, 2)
    buffer.close()
    del buffer, array
    gc.collect()
    part[:] = 2.5
    assert part.sum() == 10.0
    assert any("survivor" in line for line in mappings())
    del part
    assert not any("survivor" in line for line in mappings())


@pytest.mark.parametrize("make", [lambda b: b.buf, lambda b: b[1:5], lambda b: b.view("d"), lambda b: b.ndarray(10)])
def test_close_with_live_views(make: Callable[[SharedBuffer], Any]) -> None:
    buffer = SharedBuffer(800)
    view = make(buffer)
    buffer.close()
    buffer.close()
    view[0] = 1
    assert view[0] == 1


def test_close_unmaps_at_once() -> None:
    before, fds = mappings(), open_fds()
    buffer = SharedBuffer(800)
    assert mappings() != before
    buffer.close()
    assert (mappings(), open_fds()) == (before, fds)


def test_releasing_what_buf_gave_does_not_end_the_buffer() -> None:
    buffer = SharedBuffer(8)
    with buffer.buf as view:
        view[0] = 1
    assert buffer[0] == 1


def test_use_after_close_is_a_value_error() -> None:
    buffer = SharedBuffer(80)
    buffer.close()
    actions: list[Callable[[], object]] = [
        lambda: buffer.memory,
        lambda: buffer.offset,
        lambda: buffer.readonly,
        lambda: list(buffer),
        lambda: buffer.size,
        lambda: buffer.buf,
        lambda: len(buffer),
        lambda: buffer[0],
        lambda: buffer.__setitem__(0, 1),
        lambda: buffer.get_bytes(),
        lambda: buffer.set_bytes(b""),
        lambda: buffer.get_string(),
        lambda: buffer.set_string(""),
        lambda: buffer.get_value("b", 0),
        lambda: buffer.set_value("b", 0, 1),
        lambda: buffer.view(),
        lambda: buffer.ndarray(1),
        lambda: buffer.clear(),
        lambda: bytes(buffer),
        lambda: buffer.__enter__(),
    ]
    for action in actions:
        with pytest.raises(ValueError, match="buffer is closed"):
            action()


def test_the_buffer_protocol() -> None:
    buffer = SharedBuffer.from_bytes(b"abc")
    if sys.version_info < (3, 12):
        with pytest.raises(TypeError):
            memoryview(buffer)  # type: ignore[arg-type]
        assert hashlib.sha256(buffer.buf).digest() == hashlib.sha256(b"abc").digest()
        return
    assert hashlib.sha256(buffer).digest() == hashlib.sha256(b"abc").digest()
    view = memoryview(buffer)
    buffer.close()
    view[0] = ord("A")
    assert bytes(view) == b"Abc"
    readonly = Memory.from_bytes(b"abc").map(access=mmap.ACCESS_READ)
    assert memoryview(readonly).readonly
    with pytest.raises(TypeError, match="read-write"):
        struct.pack_into("B", readonly, 0, 1)  # type: ignore[arg-type]


def test_threads_share_a_buffer() -> None:
    buffer = SharedBuffer(8 * 1000)

    def work(index: int) -> None:
        for item in range(index, 1000, 8):
            buffer.set_value("<q", 8 * item, item)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert buffer.get_values("<1000q", 0) == tuple(range(1000))


def test_closing_a_handle_while_another_thread_uses_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """A number that is closed is soon another file's: who uses it holds it. Here the other thread comes in between."""
    left, right = socket.socketpair()
    real_fstat, real_send = os.fstat, memory_module.send_fds

    def fstat(fd: int) -> os.stat_result:
        memory.close()
        return real_fstat(fd)

    def send_fds(sock: socket.socket, data: bytes, fds: list[int]) -> None:
        memory.close()
        real_send(sock, data, fds)

    with left, right:
        memory = Memory(100)
        monkeypatch.setattr(memory_module, "send_fds", send_fds)
        memory.send(left)
        assert memory.closed
        assert Memory.receive(right).size == 100
        memory = Memory(100)
        monkeypatch.setattr(os, "fstat", fstat)
        assert memory.size == 100
        assert memory.closed


def test_closing_a_buffer_while_another_thread_maps_it(monkeypatch: pytest.MonkeyPatch) -> None:
    buffer = pickle.loads(dumps(SharedBuffer(100)))
    real = platform.map_fd

    def map_fd(*args: Any, **options: Any) -> Any:
        buffer.close()
        return real(*args, **options)

    monkeypatch.setattr(platform, "map_fd", map_fd)
    for _ in range(2):
        with pytest.raises(ValueError, match="buffer is closed"):
            buffer[0]


# --- alignment ---


@settings(deadline=None)
@given(st.integers(0, 2**70), st.integers(1, 2**20))
def test_align_is_the_least_multiple_not_below(offset: int, alignment: int) -> None:
    aligned = align(offset, alignment)
    assert aligned % alignment == 0
    assert offset <= aligned < offset + alignment


def test_alignment_constants() -> None:
    assert PAGE_SIZE == mmap.PAGESIZE
    assert CACHE_LINE_SIZE in {32, 64, 128, 256}
    assert align(1) == CACHE_LINE_SIZE
    for bad in ((-1, 8), (0, 0), (0, -8)):
        with pytest.raises(ValueError, match="expected an offset from 0 and an alignment from 1 on"):
            align(*bad)
    with pytest.raises(TypeError):
        align(1.5)  # type: ignore[arg-type]


# --- pickling particulars (the channels have a file of their own) ---


def read_first(buffer: SharedBuffer) -> tuple[int, bool]:
    return buffer[0], buffer.readonly


def test_readonly_mappings_arrive_readonly() -> None:
    buffer = Memory.from_bytes(b"x").map(access=mmap.ACCESS_READ)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(read_first, (buffer,)) == (ord("x"), True)


def test_a_private_mapping_cannot_be_sent() -> None:
    private = Memory.from_bytes(b"x").map(access=mmap.ACCESS_COPY)
    with multiprocessing.get_context("spawn").Pool(1) as pool, pytest.raises(TypeError, match="ACCESS_COPY is private"):
        pool.apply(read_first, (private,))


def test_importing_mpmemory_does_not_import_numpy() -> None:
    program = "import mpmemory, sys; sys.exit('numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
