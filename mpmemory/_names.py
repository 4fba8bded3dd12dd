"""Names for anonymous memory: how a process finds it that was given nothing but a string.

A name says where a descriptor of the memory is, and which memory that must be:

    mpm_<pid>_<descriptor>_<device>_<inode>

/proc/<pid>/fd/<descriptor> leads there, for processes of the same user. A number may be used again, for
another process or another file; then device and inode are others, and the name leads nowhere.

A name ends with the process that it names, or when any process withdraws it. That is noted where all can
see it: in the mode of the file, as the sticky bit, which means nothing else for a file.
"""

from __future__ import annotations

import errno
import os
import re
import stat

from . import _backends
from ._backends import platform
from ._fds import LostFd, OwnedFd
from ._reaper import reaper
from .errors import failed

_NAME = re.compile(r"mpm_(\d{1,10})_(\d{1,10})_([0-9a-f]{1,16})_([0-9a-f]{1,16})", re.ASCII)

# Descriptors that only their name is left of in this process: others may still come and ask for it.
_kept: dict[str, OwnedFd] = {}


def available() -> bool:
    """Return whether memory of this process's backend can have such a name.

    That takes a /proc, of this process's own pid namespace, and a file system that does not use the number of an
    inode again.
    """
    return platform.has_proc() and os.readlink("/proc/self") == str(os.getpid()) and _backends.chosen().name != "file"


def is_name(text: str) -> bool:
    """Return whether `text` has the form of such a name."""
    return _NAME.fullmatch(text) is not None


def name_of(fd: OwnedFd | LostFd) -> str:
    """Return the name of the memory of `fd`, which leads there as long as `fd` is open in this process."""
    return _name(fd.fileno(), os.fstat(fd.fileno()))


def _name(number: int, status: os.stat_result) -> str:
    return f"mpm_{os.getpid()}_{number}_{status.st_dev:x}_{status.st_ino:x}"


def find(name: str) -> OwnedFd:
    """Return a new descriptor of the memory that has this name.

    Raises:
        FileNotFoundError: no memory has it (any more).
        PermissionError: it is in a process of another user.
        OSError: no descriptor is left (EMFILE).
    """
    match = _NAME.fullmatch(name)
    if match is None:
        raise _unknown(name)
    pid, number, device, inode = match.groups()
    try:
        # What this opens may be anything by now. So it is only looked at, and not even a FIFO notices.
        found = OwnedFd(os.open(f"/proc/{pid}/fd/{number}", os.O_PATH | os.O_CLOEXEC))
        status = os.fstat(found.fileno())
        if (status.st_dev, status.st_ino) != (int(device, 16), int(inode, 16)) or _is_withdrawn(status):
            raise _unknown(name)
        # Nor does a name, which may come from anybody, lead root to a file that its process could not open so.
        if not stat.S_ISREG(status.st_mode) or status.st_nlink:
            raise _unknown(name)
        return OwnedFd(platform.reopen(found.fileno()))
    except (FileNotFoundError, ProcessLookupError):
        raise _unknown(name) from None
    except OSError as error:
        raise failed(f"cannot open shared memory {name!r}", error) from None


def withdraw(name: str, fd: OwnedFd | LostFd | None) -> None:
    """End the name of the memory of `fd`, wherever it leads; None is the memory that has this name.

    Raises FileNotFoundError if it has ended before, and otherwise as `find`.
    """
    if fd is None:
        fd = _kept.get(name) or find(name)
    status = os.fstat(fd.fileno())
    if _is_withdrawn(status):
        raise _unknown(name)
    os.fchmod(fd.fileno(), stat.S_IMODE(status.st_mode) | stat.S_ISVTX)
    _kept.pop(name, None)


def keep(name: str, fd: OwnedFd | LostFd) -> None:
    """Keep `fd` open until its name is withdrawn, if it is what the name leads to."""
    if isinstance(fd, OwnedFd):
        status = os.fstat(fd.fileno())
        if _name(fd.fileno(), status) == name and not _is_withdrawn(status):
            _kept[name] = fd
            reaper.watch(_release_withdrawn)


def _release_withdrawn() -> bool:
    """Give up what another process has withdrawn the name of, and return whether anything is left."""
    for name, fd in list(_kept.items()):
        if _is_withdrawn(os.fstat(fd.fileno())):
            _kept.pop(name, None)
    return bool(_kept)


def _is_withdrawn(status: os.stat_result) -> bool:
    return bool(status.st_mode & stat.S_ISVTX)


def _unknown(name: str) -> FileNotFoundError:
    return FileNotFoundError(
        errno.ENOENT, "no shared memory has this name (it was unlinked, or its process is gone)", name
    )


# The child's copies: the names lead to the parent.
os.register_at_fork(after_in_child=_kept.clear)
