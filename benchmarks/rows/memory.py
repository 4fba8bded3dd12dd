"""Rows on memory: making it, filling it, keeping a thousand of it."""

from __future__ import annotations

from collections.abc import Generator
from functools import partial

from mpmemory import PAGE_SIZE, SharedBuffer

from ..measure import MEMCPY, Comparison, Measured, Side, Target
from ..peers import blocks
from ..peers.blocks import BLOCKS, Block
from ..session import Session
from .programs import gather

KB, MB, GB = 1 << 10, 1 << 20, 1 << 30


def create(session: Session) -> Generator[Comparison, None, None]:
    """What does shared memory cost, made, mapped, its first byte written, unmapped and freed?

    Against the bare system calls of os, fcntl and mmap, too: what is above those is the price of this package.
    Nobody reserves memory here: pages that are not written to do not exist, so the size should not matter.
    `SharedMemory` also keeps its resource tracker busy, a process of its own, which is not in its time.
    """
    kinds = _installed(session, [kind for kind in BLOCKS.values() if kind is not blocks.Torch])
    for size in session.sizes((4 * KB, 64 * KB, MB, 16 * MB, 256 * MB, GB)):
        targets = [Target("faster", 1, blocks.Stock.name), Target("within", 1.5, blocks.Bare.name)]
        yield Comparison(
            f"{size_of(size)}, made and freed",
            [Side(kind.name, partial(_make, kind, size), floor=kind is blocks.Bare) for kind in kinds],
            "made, mapped and freed",
            size,
            "size in bytes",
            targets=targets if size == 4 * KB else (),
        )


def _make(kind: type[Block], size: int) -> None:
    block = kind(size)
    block.view[0] = 1
    block.free()


def _installed(session: Session, kinds: list[type[Block]]) -> list[type[Block]]:
    found = []
    for kind in kinds:
        with session.attempt(kind.name):
            kind(1).free()
            found.append(kind)
    return found


def fill(session: Session) -> Generator[Comparison, None, None]:
    """What does shared memory cost that is made, filled from `bytes`, read (a byte of each page), and freed?

    `SharedBuffer.from_bytes` writes to the descriptor; the peers copy into their mapping. The limit is a copy into
    private memory that is there already; fresh memory costs more than the copy, since the kernel clears each page.
    """
    kinds = _installed(session, [kind for kind in BLOCKS.values() if kind is not blocks.Ours])
    for size in session.sizes((64 * KB, MB, 16 * MB, 256 * MB)):
        data = b"\xa5" * size  # not bytes(size), which would be one page of zeros, mapped again and again
        yield Comparison(
            f"{size_of(size)} from bytes",
            [
                Side("SharedBuffer.from_bytes", partial(_from_bytes, data)),
                *(Side(kind.name, partial(_filled, kind, data), floor=kind is blocks.Bare) for kind in kinds),
                Side(MEMCPY, partial(bytearray(size).__setitem__, slice(None), data), floor=True),
            ],
            "made, filled and freed",
            size,
            "size in bytes",
        )


def _from_bytes(data: bytes) -> None:
    buffer = SharedBuffer.from_bytes(data)
    buffer.buf[::PAGE_SIZE].tobytes()  # what was written without the mapping is not in its page table yet
    buffer.close()


def _filled(kind: type[Block], data: bytes) -> None:
    block = kind(len(data))
    block.fill(data)
    with memoryview(block.view) as view:
        view[::PAGE_SIZE].tobytes()
    block.free()


def live(session: Session) -> Generator[Measured, None, None]:
    """What do 1,000 blocks of 80 KB of shared memory take that are all alive: in time, descriptors and memory?

    Each is filled. Memory is the growth of the process's PSS; all of it is more than the 80 MB of data by what the
    bookkeeping takes. Each system has a program of its own.
    """
    count, size = (20, 80_000) if session.quick else (1000, 80_000)
    samples = gather(
        session,
        BLOCKS,
        lambda name: ["live", name, str(count), str(size)],
        lambda program, _: program.hear(),
    )
    for key, unit, what in (
        ("seconds", "s", "time to make and fill them"),
        ("freed", "s", "time to free them"),
        ("fds", "", "descriptors"),
        ("memory", "B", "memory"),
    ):
        yield Measured(
            what, samples[key], f"{count:,} live blocks of {size // 1000} KB", unit=unit, floors=[blocks.Bare.name]
        )


def size_of(size: int) -> str:
    return f"{size >> 30} GB" if size >= GB else f"{size >> 20} MB" if size >= MB else f"{size >> 10} KB"
