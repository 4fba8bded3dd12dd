"""Linux: memfd_create(2). No name at any time, no mount needed, can be sealed."""

from __future__ import annotations

import errno
import fcntl
import functools
import os

from .platform import F_ADD_SEALS, F_SEAL_SHRINK

name = "memfd"

# Not in Python's os module. From Linux 6.3 on a memfd without this flag makes the kernel log a warning.
MFD_NOEXEC_SEAL = 0x0008


def available() -> bool:
    return hasattr(os, "memfd_create")


@functools.cache
def _flags() -> int:
    base = os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING
    try:
        os.close(os.memfd_create("mpmemory-probe", base | MFD_NOEXEC_SEAL))
    except OSError as error:
        if error.errno != errno.EINVAL:  # EINVAL: the kernel is older than the flag
            raise
        return base
    return base | MFD_NOEXEC_SEAL


def create(label: str) -> int:
    # With the process that made it, for `python -m mpmemory ls`.
    fd = os.memfd_create(f"mpmemory:{os.getpid()}:{label}", _flags())
    # At birth, so that no holder can ever shrink it under another's mapping (SIGBUS).
    fcntl.fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK)
    return fd
