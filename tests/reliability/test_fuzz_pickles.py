"""What is rebuilt from a pickle, attached to or read from shared memory, when nothing there is as it should be."""

from __future__ import annotations

import contextlib
import functools
import io
import mmap
import os
import pickle
import struct
import warnings
from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np
import pytest
from descriptors import KINDS, address_space, opened, peak_memory
from exploration import effort, explore, no_fd_lost
from hypothesis import strategies as st

from mpmemory import HandleLostError, Memory, RobustLock, SharedBuffer, _mappings, _references, arrays
from mpmemory._fds import OwnedFd
from mpmemory._messages import Message
from mpmemory.buffer import _rebuild_buffer
from mpmemory.connection import Connection, _rebuild_connection
from mpmemory.locks import RangeLock, _rebuild_range_lock, _rebuild_robust_lock
from mpmemory.memory import _rebuild_memory
from mpmemory.reduction import in_message
from mpmemory.shared_memory import ShareableList, SharedMemory

# What a wrong descriptor, place or size may be answered with. A BlockingIOError is an OSError, too.
CLEAR = (OSError, ValueError, TypeError, IndexError, OverflowError, RuntimeError, EOFError)

# Of the machine, perhaps: nothing here may read all of what claims to be so big.
HUGE = 1 << 24


class Shared:
    """A descriptor under way."""

    def __init__(self, number: int) -> None:
        self._number = number

    def claim(self) -> OwnedFd:
        return OwnedFd(os.dup(self._number))


def use_memory(memory: Memory) -> None:
    actions: list[Callable[[], Any]] = [
        lambda: memory.size,
        lambda: memory.resident,
        lambda: memory.readonly,
        lambda: memory.seals,
        lambda: repr(memory),
        lambda: memory.pread(min(memory.size, 10)),
        lambda: memory.pwrite(b""),
        lambda: memory.grow(memory.size),
        lambda: memory.dup().close(),
        lambda: memory.as_readonly().close(),
        lambda: memory.map(min(memory.size, HUGE)).get_bytes(0, 1),
        lambda: memory.map(min(memory.size, HUGE), access=mmap.ACCESS_COPY).clear(1),
        lambda: memory.map(min(memory.size, HUGE), access=mmap.ACCESS_READ)[-1],
        lambda: memory.lock().acquire(timeout=0),
    ]
    for action in actions:
        tolerate(action)
    memory.close()


def tolerate(action: Callable[[], Any], errors: tuple[type[Exception], ...] = CLEAR) -> bool:
    """Do it, and return whether it was done, or was answered with an error that says something."""
    try:
        action()
    except errors as error:
        message = str(error)
    else:
        return True
    assert message
    return False


@pytest.mark.parametrize("kind", KINDS)
def test_handles_on_descriptors_of_all_kinds(kind: str) -> None:
    with no_fd_lost(), opened(kind) as (fd,):
        use_memory(_rebuild_memory(Memory, "foreign", Shared(fd)))
        number = os.dup(fd)
        if not tolerate(lambda: use_memory(Memory.from_fd(number)), (ValueError,)):
            os.close(number)  # left as it was


def use_lock(lock: RangeLock | RobustLock) -> None:
    if lock.acquire(timeout=0):
        lock.release()


@pytest.mark.parametrize("kind", KINDS)
def test_connections_and_locks_on_descriptors_of_all_kinds(kind: str) -> None:
    with opened(kind) as (fd,):
        conn = _rebuild_connection(Connection, Shared(fd), True, True)
        tolerate(lambda: os.set_blocking(conn.fileno(), False))
        tolerate(lambda: conn.poll(0) and conn.recv_bytes())
        tolerate(lambda: conn.send_bytes(b"x"))
        conn.close()
        memory = _rebuild_memory(Memory, "foreign", Shared(fd))
        locks = [_rebuild_range_lock(RangeLock, memory, 0, length, False) for length in (0, 8)]
        for lock in (locks[0], _rebuild_robust_lock(RobustLock, locks[1])):
            tolerate(functools.partial(use_lock, lock))


NUMBERS = st.one_of(st.integers(-10, 70_000), st.integers(-(2**65), 2**65), st.sampled_from([4096, 50_000, 2**63]))
BUFFERS = st.tuples(
    st.sampled_from(list(KINDS)),
    NUMBERS,
    NUMBERS,
    st.sampled_from([mmap.ACCESS_READ, mmap.ACCESS_WRITE, mmap.ACCESS_COPY]),
)


def test_buffers_anywhere_on_anything(long: bool, record_figure: Callable[[str, Any], None]) -> None:
    def rebuild(example: tuple[str, int, int, int]) -> None:
        kind, offset, size, access = example
        with no_fd_lost(), opened(kind) as (fd,):
            memory = _rebuild_memory(Memory, "foreign", Shared(fd))
            buffer = _rebuild_buffer(SharedBuffer, memory, offset, size, access)
            del memory
            tolerate(lambda: buffer[0])
            tolerate(lambda: buffer[-1])
            tolerate(lambda: buffer.set_bytes(b"x", size - 1))
            tolerate(lambda: buffer.lock(0, 1))
            tolerate(lambda: buffer.view("q")[-1])
            tolerate(lambda: repr(buffer))
            buffer.close()

    tried = explore(rebuild, BUFFERS, effort(long, 500, 10_000))
    record_figure("hostile buffers rebuilt", tried)


DTYPES = st.sampled_from(["d", "b", "V7", "S0", "U3", "O", "i4,f8", "(2,3)i2", "M8[ns]", "O,i4"]).map(np.dtype)
ARRAYS = st.tuples(
    st.sampled_from(list(KINDS)),
    NUMBERS,
    st.lists(NUMBERS, max_size=3).map(tuple),
    st.lists(NUMBERS, max_size=3).map(tuple),
    DTYPES,
    st.booleans(),
)


def test_arrays_anywhere_on_anything(long: bool, record_figure: Callable[[str, Any], None]) -> None:
    def rebuild(example: tuple[str, int, tuple[int, ...], tuple[int, ...], str, bool]) -> None:
        kind, *place = example
        with no_fd_lost():
            with opened(kind) as (fd,):
                array = _references._rebuild(_rebuild_memory(Memory, "foreign", Shared(fd)), *place)
            if isinstance(array, _references.LostArray):
                with pytest.raises(HandleLostError):
                    array + 1
            else:
                assert not array.dtype.hasobject
                if array.nbytes:
                    assert arrays.is_shared(array)
                    array[(0,) * array.ndim], array[(-1,) * array.ndim]
            del array
            _mappings.release(float("inf"))

    before = peak_memory()
    tried = explore(rebuild, ARRAYS, effort(long, 500, 10_000))
    assert peak_memory() - before < 200 << 20
    record_figure("hostile arrays rebuilt", tried)


# --- pickles that were changed on the way ---


class Guarded(pickle.Unpickler):
    """Finds what our own pickles name, and nothing that such a pickle with an error in it may come to name."""

    allowed: ClassVar[set[tuple[str, str]]] = set()

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self.allowed:
            raise pickle.UnpicklingError(f"{module}.{name}")
        return super().find_class(module, name)


class Recording(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        Guarded.allowed.add((module, name))
        return super().find_class(module, name)


CHANGES = st.lists(st.tuples(st.integers(0, 2000), st.sampled_from("xid"), st.integers(0, 255)), min_size=1, max_size=4)


def changed(data: bytes, changes: list[tuple[int, str, int]]) -> bytes:
    new = bytearray(data)
    for place, how, byte in changes:
        index = place % max(len(new), 1)
        new[index : index + (how != "i")] = b"" if how == "d" else bytes([byte])
    return bytes(new)


def test_our_pickles_with_errors_in_them(long: bool, record_figure: Callable[[str, Any], None]) -> None:
    memory = Memory(10_000)
    shared = memory.map()
    block = SharedMemory(create=True, size=100)
    items = ShareableList([1, "two", b"three", None])
    array = arrays.zeros((10, 1000))
    objects = [memory, shared, memory.lock(10, 20), RobustLock(), block, items, array, [array, array[2:5].T, memory]]
    messages = []
    for each in objects:
        message = Message.of_object(each)
        data = b"".join(map(bytes, message._pieces))
        in_message.incoming = message._fds
        Recording(io.BytesIO(data)).load()
        messages.append((data, message._fds))
    unpickled = 0

    def load(example: tuple[int, list[tuple[int, str, int]]]) -> None:
        nonlocal unpickled
        data, in_message.incoming = messages[example[0]]
        data = changed(data, example[1])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                result = Guarded(io.BytesIO(data)).load()
            except Exception:  # noqa: BLE001, RUF100  # any: those of pickle, and of what is called with wrong arguments
                return
            unpickled += 1
            with contextlib.suppress(Exception):  # what has attributes of a wrong type may raise anything
                repr(result)

    # A pickle can ask for memory without end, by LONG_BINPUT, whatever it is about.
    with no_fd_lost(), address_space(1 << 28):
        tried = explore(load, st.tuples(st.integers(0, len(messages) - 1), CHANGES), effort(long, 1000, 10_000))
        _mappings.release(float("inf"))
    assert unpickled
    in_message.incoming = ()
    block.unlink()
    items.shm.unlink()
    record_figure("pickles with errors loaded", tried)


# --- names and lists ---

NAME_PARTS = st.tuples(
    st.sampled_from([str(os.getpid()), "1", "0", "999999999", "self"]),
    st.one_of(st.integers(0, 30).map(str), st.just("999999999")),
    st.sampled_from(["0", "1", "own", "ffffffffffffffff"]),
    st.sampled_from(["0", "1", "own", "ffffffffffffffff"]),
)
NAMES = st.one_of(st.text(max_size=20), st.text("mp_0123456789abcdef/.-", max_size=30), NAME_PARTS)


def test_names_that_mean_something_else(long: bool, record_figure: Callable[[str, Any], None]) -> None:
    def attach(example: Any) -> None:
        name = example
        if not isinstance(name, str):
            pid, number, device, inode = example
            try:
                status = os.fstat(int(number))
            except OSError:
                status = os.stat("/")
            device = f"{status.st_dev:x}" if device == "own" else device
            inode = f"{status.st_ino:x}" if inode == "own" else inode
            name = f"mpm_{pid}_{number}_{device}_{inode}"
        with no_fd_lost():
            tolerate(lambda: SharedMemory(name).close(), (OSError, ValueError))

    with opened(*KINDS):
        tried = explore(attach, NAMES, effort(long, 500, 10_000))
    record_figure("names attached to", tried)


WORDS = st.one_of(st.integers(-(2**63), 2**63 - 1), st.integers(-20, 200))
LISTS = st.tuples(
    st.lists(WORDS, max_size=12).map(lambda words: struct.pack(f"{len(words)}q", *words)),
    st.lists(
        st.sampled_from(["q", "d", "8s", "16s", "99999999", "9999999s", "9999999x", "xxxxxx?x", "2q", "0s", "P", "p"])
        .map(lambda text: text.encode().ljust(8, b"\0"))
        | st.binary(min_size=8, max_size=8),
        max_size=5,
    ).map(b"".join),
    st.binary(max_size=40),
)  # fmt: skip


def test_lists_that_are_none(long: bool, record_figure: Callable[[str, Any], None]) -> None:
    read = 0

    def look(parts: tuple[bytes, bytes, bytes]) -> None:
        nonlocal read
        content = b"".join(parts) or b"\0"
        block = SharedMemory(create=True, size=len(content))
        block.buf[:] = content
        try:
            items: ShareableList[Any] = ShareableList(name=block.name)
        except ValueError:
            return
        finally:
            block.unlink()
        assert len(items) < len(content)
        for index in range(-len(items), len(items)):
            read += tolerate(functools.partial(items.__getitem__, index), (ValueError,))
            tolerate(functools.partial(items.__setitem__, index, "text"), (ValueError,))
        for whole in (lambda: repr(items), lambda: items.format, lambda: items.count(1), lambda: items.index(1)):
            tolerate(whole, (ValueError,))

    before = peak_memory()
    real: ShareableList[Any] = ShareableList([1, "two", b"three", None, 0.5])
    real.shm.unlink()
    content = bytes(real.shm.buf)
    damaged = CHANGES.map(lambda changes: (changed(content, changes), b"", b""))
    tried = explore(look, st.one_of(LISTS, damaged), effort(long, 500, 10_000))
    assert read
    assert peak_memory() - before < 200 << 20
    record_figure("hostile lists read", tried)
