"""`python -m mpmemory demo`: a short tour, with real processes."""

from __future__ import annotations

import os
import signal

import mpmemory

from ._holders import take_census

_SIZE = 16 << 20
_LABEL = "demo"


def demo() -> int:
    """Show what the package does, and return the exit status: 1 if something did not go as it should."""
    memory = mpmemory.Memory(_SIZE, name=_LABEL)
    buffer = memory.map()
    buffer.set_string("hello")
    _say(f"This process ({os.getpid()}) has made {_SIZE >> 20} MB of memory, and written 'hello' into it.")

    with mpmemory.Pool(2) as pool:
        answers = set(pool.map(_read, [memory] * 8))
        _say(f"Two workers got it as an argument. They read {', '.join(sorted(answers))}. Nothing was copied.")
        _list()

        result = pool.apply_async(_die, (memory,))
        try:
            result.get()
            lost = "nothing"
        except mpmemory.WorkerLostError as error:
            lost = str(error)
        _say(f"A worker was killed. Its task failed: {lost}.")
        _say(f"The pool goes on: {pool.apply(_read, (memory,))}. The dead one has written: {_written(buffer)!r}.")
        pool.close()
        pool.join()

    right = answers == {"'hello'"} and "SIGKILL" in lost and _written(buffer) == "world"
    buffer.close()
    memory.close()
    _say("All handles are closed, and the workers are gone.")
    left = _list()
    return 0 if right and left == 0 else 1


def _read(memory: mpmemory.Memory) -> str:
    with memory.map() as buffer:
        return repr(buffer.get_string(0, 5))


def _die(memory: mpmemory.Memory) -> None:
    memory.pwrite(b"world", 6)
    os.kill(os.getpid(), signal.SIGKILL)


def _written(buffer: mpmemory.SharedBuffer) -> str:
    return buffer.get_string(6, 5)


def _say(text: str) -> None:
    print(f"\n{text}", flush=True)


def _list() -> int:
    """Print who holds the memory of this tour, and return how many there are."""
    memories = [memory for memory in take_census().memories if memory.creator == os.getpid() and memory.label == _LABEL]
    if not memories:
        print("    python -m mpmemory ls: no memory of this tour")
    for memory in memories:
        for holder in memory.holders:
            print(f"    python -m mpmemory ls: {memory.label}, {memory.size >> 20} MB, held by process {holder.pid}")
    return len(memories)
