"""Memory and SharedBuffer against simple models: any order of calls, in hypothesis's state machines."""

from __future__ import annotations

import errno
import functools
import mmap
import struct
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    consumes,
    initialize,
    invariant,
    multiple,
    rule,
)
from machines import Counting, run

from mpmemory import Memory, Seal, SealedError, SharedBuffer, _backends
from mpmemory.connection import Pipe

SIZES = st.one_of(st.integers(0, 10_000), st.sampled_from([4095, 4096, 4097, 8192, 70_000]))
DATA = st.one_of(st.binary(max_size=100), st.integers(0, 9000).map(lambda size: b"\xa5" * size))


# --- Memory: a bytearray --------------------------------------------------------------------------


class Handle:
    """A handle, and what the model knows of it."""

    def __init__(self, memory: Memory, readonly: bool) -> None:
        self.memory = memory
        self.readonly = readonly


class MemoryMachine(Counting):
    """One memory, through any number of handles and buffers; some travel through a pipe."""

    handles = Bundle("handles")
    buffers = Bundle("buffers")
    closed = Bundle("closed")

    @initialize(size=SIZES, target=handles)
    def create(self, size: int) -> Handle:
        self.model = bytearray(size)
        self.seals = Seal(0)
        self.mapped: list[SharedBuffer] = []
        self.keeping_from_sealing: list[SharedBuffer] = []
        self.first = Memory(size, name="model")
        self.can_be_sealed = _backends.chosen().name == "memfd"
        return Handle(self.first.dup(), False)

    def teardown(self) -> None:
        if hasattr(self, "first"):
            self.first.close()

    def is_sealed(self, seals: Seal) -> bool:
        return bool(self.seals & seals)

    @property
    def cannot_write(self) -> bool:
        return self.is_sealed(Seal.WRITE | Seal.FUTURE_WRITE)

    @rule(handle=handles, target=handles)
    def dup(self, handle: Handle) -> Handle:
        return Handle(handle.memory.dup(), handle.readonly)

    @rule(handle=handles, target=handles)
    def as_readonly(self, handle: Handle) -> Handle:
        return Handle(handle.memory.as_readonly(), True)

    @rule(handle=handles, target=handles)
    def travel(self, handle: Handle) -> Handle:
        left, right = Pipe()
        with left, right:
            left.send(handle.memory)
            return Handle(right.recv(), handle.readonly)

    @rule(handle=consumes(handles), target=closed)
    def close(self, handle: Handle) -> Memory:
        handle.memory.close()
        return handle.memory

    @rule(memory=closed)
    def use_after_close(self, memory: Memory) -> None:
        assert memory.closed
        for action in (lambda: memory.size, lambda: memory.pread(0), memory.map, memory.dup, lambda: memory.grow(1)):
            with pytest.raises(ValueError, match="memory 'model' is closed"):
                action()
        memory.close()

    @rule(handle=handles, offset=SIZES, data=DATA)
    def pwrite(self, handle: Handle, offset: int, data: bytes) -> None:
        if offset + len(data) > len(self.model):
            with pytest.raises(ValueError, match="not within"):
                handle.memory.pwrite(data, offset)
        elif not data:
            assert handle.memory.pwrite(data, offset) == 0
        elif handle.readonly:
            with pytest.raises(OSError, match="cannot write") as error:
                handle.memory.pwrite(data, offset)
            assert error.value.errno == errno.EBADF
        elif self.cannot_write:
            with pytest.raises(SealedError):
                handle.memory.pwrite(data, offset)
        else:
            assert handle.memory.pwrite(data, offset) == len(data)
            self.model[offset : offset + len(data)] = data

    @rule(handle=handles, offset=SIZES, length=SIZES)
    def pread(self, handle: Handle, offset: int, length: int) -> None:
        if offset + length > len(self.model):
            with pytest.raises(ValueError, match="not within"):
                handle.memory.pread(length, offset)
        else:
            assert handle.memory.pread(length, offset) == self.model[offset : offset + length]

    @rule(handle=handles, size=SIZES)
    def grow(self, handle: Handle, size: int) -> None:
        if size < len(self.model):
            with pytest.raises(ValueError, match="cannot shrink"):
                handle.memory.grow(size)
        elif handle.readonly:
            with pytest.raises(PermissionError, match="read-only"):
                handle.memory.grow(size)
        elif self.is_sealed(Seal.GROW) and size > len(self.model):
            with pytest.raises(SealedError):
                handle.memory.grow(size)
        else:
            handle.memory.grow(size)
            self.model.extend(bytes(size - len(self.model)))

    @rule(
        handle=handles,
        offset=SIZES,
        length=st.one_of(st.none(), SIZES),
        access=st.sampled_from([None, mmap.ACCESS_READ, mmap.ACCESS_WRITE]),
        target=buffers,
    )
    def map(self, handle: Handle, offset: int, length: int | None, access: int | None) -> Any:
        count = len(self.model) - offset if length is None else length
        map_it = functools.partial(handle.memory.map, length, offset, access=access)
        if count < 0 or offset + count > len(self.model):
            with pytest.raises(ValueError, match="not within"):
                map_it()
        elif access == mmap.ACCESS_WRITE and (handle.readonly or self.cannot_write):
            with pytest.raises(PermissionError, match="cannot map memory 'model' for writing"):
                map_it()
        elif count == 0:
            with pytest.raises(ValueError, match="cannot map 0 bytes"):
                map_it()
        else:
            buffer = map_it()
            readonly = access == mmap.ACCESS_READ or handle.readonly or self.cannot_write
            assert (len(buffer), buffer.offset, buffer.readonly) == (count, offset, readonly)
            self.mapped.append(buffer)
            if not handle.readonly and not self.cannot_write:
                self.keeping_from_sealing.append(buffer)  # one for reading, too: it could be made writable
            return buffer
        return multiple()

    @rule(buffer=buffers, place=SIZES, data=DATA)
    def write_mapped(self, buffer: SharedBuffer, place: int, data: bytes) -> None:
        if place + len(data) > len(buffer):
            with pytest.raises(ValueError, match="not within"):
                buffer.set_bytes(data, place)
        elif buffer.readonly:
            with pytest.raises(TypeError, match="read-only"):
                buffer.set_bytes(data, place)
        else:
            buffer.set_bytes(data, place)
            start = buffer.offset + place
            self.model[start : start + len(data)] = data

    @rule(buffer=consumes(buffers))
    def unmap(self, buffer: SharedBuffer) -> None:
        buffer.close()
        self.mapped.remove(buffer)
        if buffer in self.keeping_from_sealing:
            self.keeping_from_sealing.remove(buffer)

    @rule(handle=handles, seals=st.sampled_from([Seal.GROW, Seal.SHRINK, Seal.FUTURE_WRITE, Seal.WRITE, Seal.SEAL]))
    def seal(self, handle: Handle, seals: Seal) -> None:
        seal = functools.partial(handle.memory.seal, seals)
        if not self.can_be_sealed:
            with pytest.raises(
                OSError, match="Permission denied|not supported" if handle.readonly else "not supported"
            ):
                seal()
        elif handle.readonly:
            with pytest.raises(PermissionError):
                seal()
        elif self.is_sealed(Seal.SEAL):
            with pytest.raises(SealedError):
                seal()
        elif seals == Seal.WRITE and self.keeping_from_sealing and not self.is_sealed(Seal.WRITE):
            with pytest.raises(OSError, match="busy"):
                seal()
        else:
            seal()
            self.seals |= seals

    @invariant()
    def is_the_model(self) -> None:
        if hasattr(self, "first"):
            assert self.first.size == len(self.model)
            assert self.first.pread(len(self.model)) == self.model
            for buffer in self.mapped:
                assert buffer.buf == self.model[buffer.offset : buffer.offset + len(buffer)]


@pytest.mark.usefixtures("backend")
def test_memory_is_a_bytearray(long: bool, record_figure: Callable[[str, Any], None]) -> None:
    run(MemoryMachine, long, 40, 500, record_figure)


# --- SharedBuffer: a bytearray, and views that live on --------------------------------------------

FORMATS = st.sampled_from(["B", "<h", ">i", "q", "<d", "3s", "=Hx", "<2q"])


class BufferMachine(Counting):
    """One memory through buffers and views, all of which are closed, dropped or kept in any order."""

    buffers = Bundle("buffers")
    views = Bundle("views")

    @initialize(size=st.integers(64, 20_000), target=buffers)
    def create(self, size: int) -> SharedBuffer:
        self.size = size
        self.model = bytearray(size)
        self.views_made: list[tuple[Any, int]] = []
        return SharedBuffer(size)

    @rule(buffer=buffers, target=buffers)
    def travel(self, buffer: SharedBuffer) -> Any:
        if buffer.closed:
            return multiple()
        left, right = Pipe()
        with left, right:
            left.send(buffer)
            return right.recv()

    @rule(buffer=buffers)
    def close(self, buffer: SharedBuffer) -> None:
        buffer.close()
        assert buffer.closed
        with pytest.raises(ValueError, match="buffer is closed"):
            buffer[0]
        with pytest.raises(ValueError, match="buffer is closed"):
            buffer.view()

    @rule(buffer=buffers, offset=SIZES, format=FORMATS, number=st.integers(-100, 200))
    def values(self, buffer: SharedBuffer, offset: int, format: str, number: int) -> None:
        if buffer.closed:
            return
        layout = struct.Struct(format)
        count = len(layout.unpack(bytes(layout.size)))
        value: Any = b"%3d" % abs(number) if "s" in format else float(number) if "d" in format else number
        values = (value,) * count
        try:
            data = layout.pack(*values)
        except struct.error:
            data = None
        if data is None or offset + layout.size > self.size:
            with pytest.raises(ValueError, match=r"cannot write|not within"):
                buffer.set_values(format, offset, values)
        else:
            buffer.set_values(format, offset, values)
            self.model[offset : offset + layout.size] = data
            assert buffer.get_values(format, offset) == layout.unpack_from(self.model, offset) == values

    @rule(buffer=buffers, offset=SIZES, text=st.text(max_size=30), encoding=st.sampled_from(["utf-8", "utf-16-le"]))
    def strings(self, buffer: SharedBuffer, offset: int, text: str, encoding: str) -> None:
        if buffer.closed:
            return
        data = text.encode(encoding)
        if offset + len(data) > self.size:
            with pytest.raises(ValueError, match="not within"):
                buffer.set_string(text, offset, encoding)
        else:
            assert buffer.set_string(text, offset, encoding) == len(data)
            self.model[offset : offset + len(data)] = data
            assert buffer.get_string(offset, len(data), encoding) == text

    @rule(
        buffer=buffers, start=st.integers(-200, 200), stop=st.integers(-200, 20_000), step=st.sampled_from([1, 3, -2])
    )
    def slices(self, buffer: SharedBuffer, start: int, stop: int, step: int) -> None:
        if buffer.closed:
            return
        key = slice(start, stop, step)
        assert buffer[key] == self.model[key]
        data = bytes(len(self.model[key]))
        with pytest.raises(ValueError, match="has length"):
            buffer[key] = data + b"x"
        buffer[key] = data
        self.model[key] = data

    @rule(buffer=buffers, byte=st.integers(0, 255))
    def clear(self, buffer: SharedBuffer, byte: int) -> None:
        if not buffer.closed:
            buffer.clear(byte)
            self.model[:] = bytes([byte]) * self.size

    @rule(buffer=buffers, offset=SIZES, format=st.sampled_from("bBhiqd"), array=st.booleans(), target=views)
    def view(self, buffer: SharedBuffer, offset: int, format: str, array: bool) -> Any:
        if buffer.closed:
            return multiple()
        itemsize = struct.calcsize(format)
        if offset > self.size:
            with pytest.raises(ValueError, match="not within"):
                buffer.view(format, offset=offset)
            return multiple()
        count = (self.size - offset) // itemsize
        made = buffer.ndarray(count, format, offset) if array else buffer.view(format, offset=offset)
        assert len(made) == count
        self.views_made.append((made, offset))
        return made

    @rule(view=views, place=SIZES, number=st.integers(0, 100))
    def write_view(self, view: Any, place: int, number: int) -> None:
        if place < len(view):
            view[place] = number
            (offset,) = (offset for made, offset in self.views_made if made is view)
            itemsize = view.itemsize
            data = np.array([number], view.dtype if isinstance(view, np.ndarray) else view.format).tobytes()
            self.model[offset + place * itemsize : offset + (place + 1) * itemsize] = data

    @rule(view=consumes(views))
    def drop(self, view: Any) -> None:
        self.views_made = [each for each in self.views_made if each[0] is not view]

    @rule(buffer=buffers)
    def compare(self, buffer: SharedBuffer) -> None:
        if not buffer.closed:
            assert bytes(buffer) == self.model

    @invariant()
    def live_views_show_the_model(self) -> None:
        for view, offset in getattr(self, "views_made", ()):
            assert view.tobytes() == self.model[offset : offset + view.nbytes]


@pytest.mark.usefixtures("backend")
def test_a_buffer_is_a_bytearray_and_views_outlive_it(long: bool, record_figure: Callable[[str, Any], None]) -> None:
    run(BufferMachine, long, 40, 500, record_figure)
