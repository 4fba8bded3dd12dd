"""POSIX: shm_open(3), unlinked at once."""

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
    # What multiprocessing.shared_memory uses; absent where the C library lacks it.
    import _posixshmem  # type: ignore[import-not-found]

    # Short, since macOS allows 31 bytes in all; random, and exclusive, since the name space is everybody's.
    path = f"/mpmemory-{os.urandom(8).hex()}"
    fd: int = _posixshmem.shm_open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, mode=0o600)
    try:
        _posixshmem.shm_unlink(path)
    except BaseException:
        os.close(fd)
        raise
    return fd
