"""POSIX: shm_open(3), unlinked at once; and objects that keep their name, for `mpmemory.shared_memory`."""

from __future__ import annotations

import functools
import os

name = "posix"


@functools.cache
def available() -> bool:
    """Return whether shared memory objects exist here, and can be written like files (not so on macOS)."""
    try:
        fd = create("mpmemory-probe")
    except (ImportError, OSError):
        return False
    try:
        return os.pwrite(fd, b"\0", 0) == 1
    except OSError:
        return False
    finally:
        os.close(fd)


def create(label: str) -> int:
    # Short, since macOS allows 31 bytes in all; random, and exclusive, since the name space is everybody's.
    path = f"/mpmemory-{os.urandom(8).hex()}"
    fd = open_named(path, os.O_CREAT | os.O_EXCL)
    try:
        unlink(path)
    except BaseException:
        os.close(fd)
        raise
    return fd


def open_named(path: str, flags: int = 0) -> int:
    """Return a new descriptor, for reading and writing, of the object that `path` ("/name") names. Raises OSError."""
    # What multiprocessing.shared_memory uses; absent where the C library lacks it.
    import _posixshmem  # type: ignore[import-not-found]

    fd: int = _posixshmem.shm_open(path, flags | os.O_RDWR, mode=0o600)
    return fd


def unlink(path: str) -> None:
    """Take away the name of an object. Raises OSError."""
    import _posixshmem

    _posixshmem.shm_unlink(path)
