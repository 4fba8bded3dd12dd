"""The row on the drop-ins for `multiprocessing.shared_memory`."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator
from functools import partial
from multiprocessing import shared_memory as stock
from typing import Any

import mpmemory

from ..measure import Comparison, Side
from ..session import Session

KINDS = {"mpmemory": mpmemory, "multiprocessing": stock}
SIZE = 4096


def drop_ins(session: Session) -> Generator[Comparison, None, None]:
    """What do our `SharedMemory` and `ShareableList` cost, next to those of the standard library?

    Attaching is to a block of the same process.
    """
    with contextlib.ExitStack() as stack:
        blocks = {name: kind.SharedMemory(create=True, size=SIZE) for name, kind in KINDS.items()}
        lists = {name: kind.ShareableList(range(100)) for name, kind in KINDS.items()}
        for block in (*blocks.values(), *(each.shm for each in lists.values())):
            stack.callback(block.unlink)
            stack.callback(block.close)
        yield _compare("a block of 4 KB, made and freed", {name: partial(_make, kind) for name, kind in KINDS.items()})
        yield _compare(
            "attach to a block by its name", {name: partial(_attach, block) for name, block in blocks.items()}
        )
        yield _compare("ShareableList, add to an item", {name: partial(_add, each) for name, each in lists.items()})


def _compare(what: str, actions: dict[str, Callable[[], object]]) -> Comparison:
    return Comparison(what, [Side(name, action) for name, action in actions.items()], "drop-ins")


def _make(kind: Any) -> None:
    memory = kind.SharedMemory(create=True, size=SIZE)
    memory.buf[0] = 1
    memory.close()
    memory.unlink()


def _attach(block: Any) -> None:
    memory = type(block)(block.name)
    memory.buf[0] = 1
    memory.close()


def _add(items: Any) -> None:
    items[50] += 1
