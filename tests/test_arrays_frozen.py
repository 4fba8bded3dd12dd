"""Frozen arrays: nobody can write to them."""

from __future__ import annotations

import fcntl
import mmap
import os
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from conftest import Array, address, dumps, echo
from test_arrays import far_echo

from mpmemory import Memory, Seal, SharedBuffer, _mappings, arrays
from mpmemory._backends import platform


def try_to_write(a: Array) -> list[str]:
    errors = []
    memory = arrays.memory_of(a)
    descriptor = os.open(f"/proc/self/fd/{memory.fileno()}", os.O_RDWR)
    actions: list[Callable[[], Any]] = [
        lambda: a.__setitem__(0, 1),
        lambda: setattr(a.flags, "writeable", True),
        lambda: memory.map(access=mmap.ACCESS_WRITE),
        lambda: memory.pwrite(b"x"),
        lambda: mmap.mmap(descriptor, 0),
        lambda: os.pwrite(descriptor, b"x", 0),
    ]
    for action in actions:
        try:
            action()
        except (OSError, ValueError) as error:
            errors.append(type(error).__name__)
        else:
            errors.append("none")
    os.close(descriptor)
    return errors


REFUSED = ["ValueError", "ValueError", "SealedError", "SealedError", "PermissionError", "PermissionError"]


@pytest.mark.parametrize(
    "make",
    [
        lambda: arrays.ones((300, 300)),  # memory of its own
        lambda: arrays.ones((300, 300))[10:20, ::-2].T,
        lambda: arrays.ones(10),  # in a slab
        lambda: np.ones((10, 10))[::-2].T,  # private
    ],
)
def test_frozen_arrays_cannot_be_written_to(make: Callable[[], Array], ctx: Any) -> None:
    a = make()
    view = arrays.frozen(a)
    assert (view == 1).all()
    assert view.shape == a.shape
    assert try_to_write(view) == REFUSED
    with ctx.Pool(1) as pool:
        assert pool.apply(try_to_write, (view,)) == REFUSED
        assert pool.apply(np.sum, (view,)) == view.size
        pool.close()
        pool.join()
    assert (arrays.frozen(view) == 1).all()


def test_a_frozen_view_sees_what_is_written_through_the_array() -> None:
    a = arrays.ones((300, 300))
    view = arrays.frozen(a)
    received = far_echo(view)
    a[0, 0] = 5
    assert view[0, 0] == received[0, 0] == 5
    assert not far_echo(a).flags.writeable
    assert not echo(a).flags.writeable  # also where a mapping can be written to
    small = arrays.ones(10)
    copy = arrays.frozen(small)
    small[0] = 5
    assert copy[0] == 1
    assert far_echo(small).flags.writeable  # other small arrays are not sealed with it


def test_an_array_that_is_sealed_while_it_is_received(monkeypatch: pytest.MonkeyPatch) -> None:
    a = arrays.ones((300, 300))
    data = dumps(a)
    with arrays.memory_of(a) as memory:
        memory.seal(Seal.FUTURE_WRITE)
    _mappings._whole.clear()
    monkeypatch.setattr(Memory, "readonly", False)  # as it was when the receiver looked
    found = pickle.loads(data)
    assert (found == 1).all()
    assert not found.flags.writeable


def test_frozen_memory_of_others_cannot_shrink() -> None:
    descriptor = os.memfd_create("theirs", os.MFD_ALLOW_SEALING)
    os.ftruncate(descriptor, 80)
    fcntl.fcntl(descriptor, platform.F_ADD_SEALS, int(Seal.GROW))
    view = arrays.frozen(Memory.from_fd(descriptor).map().ndarray(10))
    with pytest.raises(PermissionError):  # that would write zeros
        os.ftruncate(arrays.memory_of(view).fileno(), 0)


def test_frozen_is_not_content_with_a_descriptor_opened_read_only() -> None:
    memory = Memory(80)
    readonly = Memory.from_fd(os.open(f"/proc/self/fd/{memory.fileno()}", os.O_RDONLY))  # a receiver can undo that
    with pytest.raises(PermissionError, match="cannot add"):
        arrays.frozen(readonly.map().ndarray(10))
    arrays.frozen(memory.map().ndarray(10))
    assert arrays.frozen(readonly.map().ndarray(10)).tolist() == [0] * 10


def test_frozen_seals_no_other_memory() -> None:
    # The kernel puts mappings side by side: behind the end of one begins another.
    buffers = [SharedBuffer(mmap.PAGESIZE) for _ in range(30)]
    ends = [buffer.ndarray(0, offset=mmap.PAGESIZE) for buffer in buffers]
    starts = {address(buffer.ndarray(1)) for buffer in buffers}
    assert any(address(end) in starts for end in ends)
    for end in ends:
        assert arrays.frozen(end).shape == (0,)
    assert not any(buffer.memory.readonly for buffer in buffers)


@pytest.mark.parametrize("backend", ["posix", "file"], indirect=True)
def test_frozen_needs_seals(backend: str) -> None:
    with pytest.raises(OSError, match=r"cannot add <Seal\..*> to memory 'array': Operation not"):
        arrays.frozen(np.ones(3))
