"""What this machine offers to shared memory, and where it will hurt."""

from __future__ import annotations

import multiprocessing
import os
import platform as python_platform
import resource
import socket
import sys
from typing import Any

from . import _backends
from ._backends import platform
from ._fds import MAX_FDS

_FEW_DESCRIPTORS = 1024
_LITTLE_MEMORY = 256 << 20


def describe() -> dict[str, Any]:
    """Return what there is, by name; sizes are in bytes, None is not known, or there is no such thing."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    backend = _backends.chosen().name
    found: dict[str, Any] = {
        "python": f"{python_platform.python_implementation()} {python_platform.python_version()}",
        "kernel": f"{python_platform.system()} {python_platform.release()}",
        "backend": backend,
        "backend because": _why(backend),
        "seals": backend == "memfd",
        "proc": platform.has_proc(),
        "locks": platform.can_lease(),
        "pidfds": _has_pidfds(),
        "seqpacket": hasattr(socket, "SOCK_SEQPACKET") and sys.platform == "linux",
        "own messages": platform.messages_work(),
        "descriptors": None if soft == resource.RLIM_INFINITY else soft,
        "descriptors at most": None if hard == resource.RLIM_INFINITY else hard,
        "descriptors in a message": MAX_FDS,
        "mappings": _read_number("/proc/sys/vm/max_map_count"),
        "memory available": platform.available_on_machine(),
        "memory left in cgroup": min(platform.available_in_cgroups(), default=None),
        "dev shm": _size_of_dev_shm(),
        "start methods": multiprocessing.get_all_start_methods(),
        "start method": multiprocessing.get_start_method(allow_none=True) or multiprocessing.get_all_start_methods()[0],
    }
    found["advice"] = list(_advise(found))
    return found


def _why(backend: str) -> str:
    if os.environ.get("MPMEMORY_BACKEND"):
        return f"MPMEMORY_BACKEND={backend}"
    return {
        "memfd": "memfd_create is there",
        "posix": "there is no memfd_create, but shm_open",
        "file": "there is neither memfd_create nor shm_open: an unlinked file in the temporary folder",
    }[backend]


def _has_pidfds() -> bool:
    try:
        fd = platform.open_pidfd(os.getpid())
    except OSError:
        return False
    if fd >= 0:
        os.close(fd)
    return fd >= 0


def _size_of_dev_shm() -> int | None:
    try:
        status = os.statvfs("/dev/shm")
    except OSError:
        return None
    return status.f_blocks * status.f_frsize


def _read_number(path: str) -> int | None:
    try:
        with open(path) as file:
            return int(file.read())
    except (OSError, ValueError):
        return None


def _advise(found: dict[str, Any]) -> Any:
    soft, hard = found["descriptors"], found["descriptors at most"]
    if soft is not None and soft < _FEW_DESCRIPTORS:
        yield (
            f"A process may have {soft} descriptors only, and each memory takes one or two. "
            f"Raise the limit: ulimit -n {hard if hard is not None else 'unlimited'}"
        )
    if not found["proc"]:
        yield "There is no /proc: no locks, no warm segments, no names for SharedMemory. Mount it."
    elif not found["own messages"]:
        yield "Messages cannot carry descriptors here: Pool, Queue and Pipe are those of multiprocessing."
    if found["backend"] == "posix" and found["dev shm"] is not None and found["dev shm"] < _LITTLE_MEMORY:
        yield f"/dev/shm has {found['dev shm']} bytes only, and all memory is in it. In Docker: --shm-size=1g"
    available = [found[name] for name in ("memory available", "memory left in cgroup") if found[name] is not None]
    if available and min(available) < _LITTLE_MEMORY:
        yield f"Only {min(available)} bytes of memory are left."
