"""Datagrams and segments of a peer that means no good: an error of that message only, and nothing left behind."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import socket
import struct
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from descriptors import KINDS, opened, peak_memory
from exploration import effort, explore, no_fd_lost
from hypothesis import strategies as st

from mpmemory import HandleLostError, Queue, _mappings, _segments
from mpmemory._backends import platform
from mpmemory.connection import Connection, Pipe

HEADER = struct.Struct("<2sBxIQQQ")
ENTRY = struct.Struct("<QQ")

# What numbers are made of that a receiver computes with.
U64 = st.one_of(
    st.integers(0, 2**64 - 1),
    st.builds(
        lambda power, change: max(0, min((1 << power) + change, 2**64 - 1)), st.integers(0, 64), st.integers(-80, 80)
    ),
)
SOME_BYTES = st.one_of(st.binary(max_size=64), st.integers(0, 1 << 16).map(bytes))


def send(conn: Connection, datagram: bytes, fds: list[int]) -> None:
    with socket.socket(fileno=os.dup(conn.fileno())) as sock:
        if datagram or fds:  # nothing at all would be the end
            socket.send_fds(sock, [datagram], fds)


def is_next_received(left: Any, right: Any) -> bool:
    left.send("next")
    return bool(right.recv() == "next")


@dataclasses.dataclass
class Foreign:
    """A datagram. None: what is right for the rest of it."""

    magic: bytes
    kind: int
    count: int | None
    length: int | None
    buffers: int
    payload: bytes
    fds: list[str]

    def pack(self) -> bytes:
        count = len(self.fds) if self.count is None else self.count
        length = len(self.payload) if self.length is None else self.length
        return HEADER.pack(self.magic, self.kind, count, 0, length, self.buffers) + self.payload


FOREIGN = st.builds(
    Foreign,
    magic=st.one_of(st.just(b"mM"), st.just(b"mM"), st.binary(min_size=2, max_size=2)),
    kind=st.one_of(st.integers(0, 3), st.integers(0, 255)),
    count=st.one_of(st.none(), st.integers(0, 4), st.sampled_from([253, 254, 500, 700, 750, 751, 2**32 - 1])),
    length=st.one_of(st.none(), U64),
    buffers=st.one_of(st.just(0), st.integers(0, 5), U64),
    payload=SOME_BYTES,
    fds=st.lists(st.sampled_from(list(KINDS)), max_size=3),
)


def test_datagrams_with_descriptors_of_all_kinds(long: bool, record_figure: Callable[[str, Any], None]) -> None:
    left, right = Pipe()

    def send_and_receive(foreign: Foreign | bytes) -> None:
        with no_fd_lost():
            with opened(*(foreign.fds if isinstance(foreign, Foreign) else [])) as fds:
                send(left, foreign.pack() if isinstance(foreign, Foreign) else foreign, fds)
            if right.poll():
                with contextlib.suppress(OSError):
                    right.recv_bytes()  # not unpickled: a random pickle may do anything
            assert is_next_received(left, right)
            _segments.warm.release(float("inf"))

    before = peak_memory()
    with left, right:
        tried = explore(send_and_receive, st.one_of(FOREIGN, FOREIGN, st.binary()), effort(long, 1500, 20_000))
    assert peak_memory() - before < 200 << 20
    record_figure("hostile datagrams received", tried)


# --- segments ---


@dataclasses.dataclass
class Segment:
    """A segment, and when its sender shrinks it."""

    size: int
    seals: int
    table: list[tuple[int, int]]
    claimed: int | None  # how many entries the table has; None: as many as it has
    length: int
    shrunk_to: int
    shrunk: str

    def create(self) -> int:
        fd = os.memfd_create("hostile", os.MFD_ALLOW_SEALING)
        table = b"".join(ENTRY.pack(*entry) for entry in self.table)
        os.pwrite(fd, os.urandom(1000) + bytes(3000), 0)
        os.pwrite(fd, table, 0)
        os.ftruncate(fd, self.size)
        if self.seals:
            platform.add_seals(fd, self.seals)
        return fd

    def shrink(self, fd: int, when: str) -> None:
        if when == self.shrunk:
            with contextlib.suppress(PermissionError):  # sealed
                os.ftruncate(fd, min(self.shrunk_to, os.fstat(fd).st_size))


def ascending(gaps: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Return a table as it should be: one buffer after the other."""
    table, end = [], 4096
    for gap, length in gaps:
        table.append((end + gap, length))
        end += gap + length
    return table


GAPS = st.lists(st.tuples(st.integers(0, 100), st.integers(0, 5000)), min_size=1, max_size=4)
SEGMENT = st.builds(
    Segment,
    size=st.one_of(st.integers(0, 70_000), st.sampled_from([4096, 1 << 16, 1 << 20, 1 << 33, 1 << 46, 2**63 - 1])),
    seals=st.sampled_from(
        [
            0,
            platform.F_SEAL_SHRINK,
            platform.F_SEAL_GROW,
            platform.F_SEAL_SHRINK | platform.F_SEAL_GROW,
            platform.F_SEAL_SHRINK | platform.F_SEAL_GROW | platform.F_SEAL_SEAL,
            platform.F_SEAL_SHRINK | platform.F_SEAL_GROW | 0x0008,
        ]
    ),
    table=st.one_of(GAPS.map(ascending), GAPS.map(ascending), st.lists(st.tuples(U64, U64), max_size=4), st.just([])),
    claimed=st.one_of(st.none(), st.none(), U64),
    length=st.one_of(st.integers(0, 4000), U64),
    shrunk_to=st.integers(0, 70_000),
    shrunk=st.sampled_from(["never", "sent", "opened"]),
)


def test_segments_whose_sender_lies_and_shrinks_them(long: bool, record_figure: Callable[[str, Any], None]) -> None:
    left, right = Pipe()
    opened = 0

    def send_and_receive(segment: Segment) -> None:
        nonlocal opened
        claimed = len(segment.table) if segment.claimed is None else segment.claimed
        with no_fd_lost():
            fd = segment.create()
            send(left, HEADER.pack(b"mM", 2, 1, 0, segment.length, claimed), [fd])
            segment.shrink(fd, "sent")
            with contextlib.suppress(OSError):
                _, payload, parts, _ = right.receive_datagram()._parse()
                opened += 1
                segment.shrink(fd, "opened")
                for part in (payload, *parts):
                    with memoryview(part) as view:
                        if len(view):  # the whole of it may be more than the machine has
                            view[0] = view[-1] = 1
                del payload, parts, part, view
            assert is_next_received(left, right)
            os.close(fd)
            _segments.warm.release(float("inf"))

    before = peak_memory()
    with left, right:
        tried = explore(send_and_receive, SEGMENT, effort(long, 1500, 20_000))
    assert opened > tried // 20  # some of them are as they should be, but for what their sender does next
    assert peak_memory() - before < 200 << 20
    record_figure("hostile segments received", tried)


# --- pickles with hostile descriptors and buffers, in all that receives them ---


def test_arrays_in_a_segment_that_is_shrunk_are_the_receivers_own(pipe: Any) -> None:
    left, right = pipe
    left.send(np.arange(20_000))
    datagram = right.receive_datagram()
    (lease,) = datagram._fds
    fd = os.memfd_create("copy", os.MFD_ALLOW_SEALING)
    os.write(fd, os.pread(lease.fileno(), 1 << 20, 0))
    send(left, datagram._data, [fd])
    array = right.recv()
    os.ftruncate(fd, 0)
    os.close(fd)
    assert (array == np.arange(20_000)).all()
    array += 1
    assert array.flags.writeable


@pytest.mark.parametrize("kind", KINDS)
def test_a_queue_goes_on_after_what_is_no_message(kind: str) -> None:
    queue = Queue(2)
    with opened(kind) as fds:
        for header in (b"mM", HEADER.pack(b"mM", 2, 1, 0, 1 << 62, 0), HEADER.pack(b"mM", 2, 1, 0, 1 << 62, 1 << 50)):
            send(queue._writer, header, fds)
            with pytest.raises(OSError, match=r".+") as error:
                queue.get(timeout=10)
            assert not isinstance(error.value, HandleLostError | TimeoutError)
            queue.put("next")
            assert queue.get(timeout=10) == "next"
    queue.close()
    queue.join_thread()
    _mappings.release(float("inf"))
