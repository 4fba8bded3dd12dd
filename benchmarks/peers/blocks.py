"""Blocks of shared memory: one small adapter for each way to make and free one."""

from __future__ import annotations

import fcntl
import itertools
import mmap
import os
from multiprocessing.shared_memory import SharedMemory
from typing import Any

import mpmemory
from mpmemory import Memory, Seal, SharedBuffer, arrays

# The flags that the library uses here. MFD_NOEXEC_SEAL (0x8) is not in Python, and only in Linux 6.3 on.
MEMFD_FLAGS = os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING | (0x8 if Seal.EXEC in Memory(0).seals else 0)

_numbers = itertools.count()


class Block:
    """What a block is asked for: made by the constructor, `view` is its memory, `free` ends it.

    `label` is the start of the names of those that have names.
    """

    name = ""
    view: Any

    def __init__(self, size: int, label: str | None = None) -> None:
        raise NotImplementedError

    def fill(self, data: bytes) -> None:
        """Write all of it."""
        self.view[:] = data

    def free(self) -> None:
        """Unmap the memory and give it back."""
        raise NotImplementedError


class Ours(Block):
    """`mpmemory.SharedBuffer`."""

    name = "mpmemory.SharedBuffer"

    def __init__(self, size: int, label: str | None = None) -> None:
        self.view = SharedBuffer(size, name=label or "mpmemory")

    def free(self) -> None:
        self.view.close()


class _ByName(Block):
    kind: Any

    def __init__(self, size: int, label: str | None = None) -> None:
        name = f"{label}-{next(_numbers)}" if label else None
        self._memory = self.kind(name, create=True, size=size)
        self.view = self._memory.buf

    def free(self) -> None:
        del self.view
        self._memory.close()
        self._memory.unlink()


class _Array(Block):
    def fill(self, data: bytes) -> None:
        memoryview(self.view)[:] = data

    def free(self) -> None:
        del self.view


class OurArray(_Array):
    """`mpmemory.arrays.empty`; small ones share memory."""

    name = "mpmemory.arrays"

    def __init__(self, size: int, label: str | None = None) -> None:
        self.view = arrays.empty(size, "u1")


class OurSharedMemory(_ByName):
    """`mpmemory.shared_memory.SharedMemory`, the drop-in."""

    name = "mpmemory SharedMemory"
    kind = mpmemory.SharedMemory

    def __init__(self, size: int, label: str | None = None) -> None:
        super().__init__(size)  # without a name of one's own it is anonymous


class Stock(_ByName):
    """`multiprocessing.shared_memory.SharedMemory`."""

    name = "SharedMemory"
    kind = SharedMemory


class Bare(Block):
    """The bare system calls of `os`, `fcntl` and `mmap` behind a SharedBuffer."""

    name = "bare calls"

    def __init__(self, size: int, label: str | None = None) -> None:
        self._fd = os.memfd_create(label or "bare", MEMFD_FLAGS)
        fcntl.fcntl(self._fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
        os.ftruncate(self._fd, size)
        self.view = mmap.mmap(self._fd, size)

    def free(self) -> None:
        self.view.close()
        os.close(self._fd)


class PosixIpc(Block):
    """`posix_ipc.SharedMemory`, mapped by `mmap`."""

    name = "posix_ipc"

    def __init__(self, size: int, label: str | None = None) -> None:
        import posix_ipc

        self._memory = posix_ipc.SharedMemory(
            f"/{label}-{next(_numbers)}" if label else None, posix_ipc.O_CREX, size=size
        )
        self.view = mmap.mmap(self._memory.fd, size)

    def free(self) -> None:
        self.view.close()
        self._memory.close_fd()
        self._memory.unlink()


class SharedArray(_Array):
    """`SharedArray.create`: an array with a name."""

    name = "SharedArray"

    def __init__(self, size: int, label: str | None = None) -> None:
        import SharedArray

        self._delete = SharedArray.delete
        self._name = f"shm://{label or f'mpmemory-{os.getpid()}'}-{next(_numbers)}"
        self.view = SharedArray.create(self._name, size, "u1")

    def free(self) -> None:
        super().free()
        self._delete(self._name)


class Torch(_Array):
    """`torch.Tensor.share_memory_`."""

    name = "torch"

    def __init__(self, size: int, label: str | None = None) -> None:
        import torch

        self.view = torch.empty(size, dtype=torch.uint8).share_memory_().numpy()


BLOCKS: dict[str, type[Block]] = {
    kind.name: kind for kind in (Ours, OurArray, OurSharedMemory, Stock, Bare, PosixIpc, SharedArray, Torch)
}
