"""Where anonymous memory comes from: one mechanism a file, one contract, chosen once.

The contract of a backend module, `create(label) -> int`:

1. returns a new file descriptor, owned by the caller: open for reading and writing, close-on-exec,
   on an empty file that can be grown, mapped, and read and written with pread and pwrite;
2. the file has no name by the time `create` returns, so that the kernel frees it with the last
   descriptor and mapping, however their processes end;
3. `label` is shown to people where the system has a place for it; it is never an address;
4. a failure is the system's OSError, and nothing is left behind.

What can be told from a descriptor alone (seals, size, label) is in `platform`, since a process
also holds memory that another process made on another backend.
"""

from __future__ import annotations

import functools
import os
import sys
from typing import Protocol

if sys.platform == "win32":
    raise ImportError("mpmemory needs a POSIX system: on Windows a file descriptor cannot travel between processes.")

from . import file, memfd, posix


class Backend(Protocol):
    """What the module of a backend offers; see the contract above."""

    name: str

    def available(self) -> bool:
        """Return whether this system has the mechanism."""

    def create(self, label: str) -> int:
        """Return a new descriptor on empty anonymous memory."""


BACKENDS: dict[str, Backend] = {backend.name: backend for backend in (memfd, posix, file)}


@functools.cache
def chosen() -> Backend:
    """Return this process's backend: `MPMEMORY_BACKEND` if set, else the first that is available.

    Raises:
        ValueError: `MPMEMORY_BACKEND` names no backend, or one that this system does not have.
    """
    forced = os.environ.get("MPMEMORY_BACKEND")
    if not forced:
        return next(backend for backend in BACKENDS.values() if backend.available())
    if forced not in BACKENDS:
        raise ValueError(f"MPMEMORY_BACKEND={forced!r}: expected one of {', '.join(BACKENDS)}")
    if not BACKENDS[forced].available():
        raise ValueError(f"MPMEMORY_BACKEND={forced!r} is not available on this system ({sys.platform})")
    return BACKENDS[forced]
