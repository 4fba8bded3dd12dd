"""Memory: the handle. An owned file descriptor on anonymous memory, with nothing mapped."""

from __future__ import annotations

import enum
import errno
import fcntl
import operator
import os
import socket
import stat
from collections.abc import Callable
from pickle import PickleBuffer
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol, Self, SupportsIndex, TypeVar

from . import _backends
from ._backends import platform
from ._fds import LostFd, OwnedFd, borrow_socket, recv_fd, send_fds
from .errors import SealedError, failed
from .reduction import Shareable, release_launched, share_fd

if TYPE_CHECKING:
    from typing_extensions import Buffer  # collections.abc.Buffer, from 3.12 on

    from .buffer import SharedBuffer
    from .locks import RangeLock

T = TypeVar("T")

# memfd_create(2) takes 249 bytes, of which the backend needs some for the process that makes it.
_MAX_NAME = 200

# Of a file, in bytes: off_t.
_MAX_SIZE = 2**63 - 1


class HasFileno(Protocol):
    """A socket, or a Connection."""

    def fileno(self) -> int:
        """Return the file descriptor."""


class Seal(enum.IntFlag):
    """What can no longer be done with a memory, by anybody (F_GET_SEALS, fcntl(2))."""

    SEAL = 0x0001
    """No seal can be added."""
    SHRINK = 0x0002
    """It cannot become smaller."""
    GROW = 0x0004
    """It cannot become larger."""
    WRITE = 0x0008
    """Its contents cannot change."""
    FUTURE_WRITE = 0x0010
    """No writable mapping can be made; those there are stay."""
    EXEC = 0x0020
    """It cannot be made executable."""


_WRITE = Seal.WRITE | Seal.FUTURE_WRITE

# As an int: members of an IntFlag take more time than the system calls that they are compared with.
_WRITE_SEALS = int(_WRITE)


class Memory(Shareable):
    """A handle on anonymous shared memory: a file descriptor that multiprocessing can carry.

    The memory starts as zeros and is freed by the kernel when the last handle and mapping of the last
    process is gone, however that process ended. It has no name that could be left behind.

    Pass a handle as an argument or result of a Process, Pool or ProcessPoolExecutor, or put it into a
    Queue or Pipe: the receiver has a handle of its own on the same memory. Plain pickle is a TypeError.

    `with` closes the handle; so does its last reference going. Any use after `close()` is a ValueError.
    A handle that arrived without its memory raises HandleLostError when used. Handles can be used from
    several threads; after fork the child has handles of its own.
    """

    __slots__ = ("_fd", "_name")

    _fd: OwnedFd | LostFd | None
    _name: str

    def __init__(self, size: SupportsIndex, *, name: str = "mpmemory", reserve: bool = False) -> None:
        """Create `size` bytes of zeros.

        Args:
            size: in bytes, kept exactly. 0 is a handle that can `grow`.
            name: a label for people, as in /proc/PID/maps; never an address.
            reserve: allocate all of it now, so that a full machine is an error here, and nobody is killed for
                it later. Where the backend is not memfd, that is always done, by `grow` too; on memfd what
                `grow` adds is not reserved.

        Raises:
            TypeError: `size` is not an int, or `name` not a str.
            ValueError: `size` is negative, or `name` has a NUL or is longer than 200 bytes.
            OSError: no descriptor is left (EMFILE), `size` is beyond what files can have (EFBIG), or what is
                to be allocated is more than the file system (ENOSPC), the machine or the cgroup has (ENOMEM).
        """
        size = _check_count(size, "size")
        self._name = _check_name(name)
        if (reserve or _backends.chosen().name == "posix") and size <= _MAX_SIZE:  # where all is allocated, too
            _check_available(size)
        fd = _create(name)
        _grow(fd, size)
        if reserve and size:
            _allocate(fd, size)
        self._fd = fd

    @classmethod
    def _own(cls, fd: OwnedFd | LostFd, name: str) -> Self:
        self = cls.__new__(cls)
        self._fd = fd
        self._name = name
        return self

    @classmethod
    def from_bytes(cls, data: Buffer, *, name: str = "mpmemory") -> Self:
        """Create memory that holds a copy of `data`, any object with the buffer protocol; `name` is a label for people.

        Raises TypeError for other objects, OSError (ENOSPC, ENOMEM) if there is not so much memory.
        """
        view = flat_view(data)
        fd = _create(_check_name(name))
        try:
            platform.write_all(fd.fileno(), view, 0)
        except OSError as error:
            raise failed(f"cannot write {len(view)} bytes into memory", error) from None
        return cls._own(fd, name)

    @classmethod
    def from_file(cls, path: str | bytes | os.PathLike[Any], *, name: str | None = None) -> Self:
        """Create memory that holds a copy of the file at `path`, made by the kernel.

        The copy is independent of the file. `name` is the file's own name if not given.

        Raises ValueError if `path` is not a regular file, OSError if it cannot be read or copied (IsADirectoryError
        for a folder).
        """
        if name is None:
            name = os.fsdecode(os.path.basename(path)).encode(errors="replace")[:_MAX_NAME].decode(errors="ignore")
        _check_name(name)
        # Non-blocking: a FIFO would wait for a writer before it could be refused.
        source = OwnedFd(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK))
        mode = os.fstat(source.fileno()).st_mode
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path)
        if not stat.S_ISREG(mode):
            raise ValueError(f"expected a regular file, found {_describe_mode(mode)}: {os.fsdecode(path)}")
        fd = _create(name)
        try:
            platform.copy(source.fileno(), fd.fileno())
            os.lseek(fd.fileno(), 0, os.SEEK_SET)  # for who reads it from the start, in another language
        except OSError as error:
            raise failed(f"cannot copy {os.fsdecode(path)} into memory", error) from None
        return cls._own(fd, name)

    @classmethod
    def from_fd(cls, fd: SupportsIndex) -> Self:
        """Take over `fd`, a descriptor of a memfd, shared memory object or regular file that can be read.

        From then on the handle closes it; it is made close-on-exec. `name` is what the system calls it.

        Raises:
            TypeError: `fd` is not an int.
            ValueError: it is not open, or cannot be mapped (a pipe, a socket, a directory, write-only);
                it is left as it was.
        """
        number = operator.index(fd)
        problem = _why_unmappable(number)
        if problem:
            raise ValueError(f"cannot map file descriptor {number}: {problem}")
        os.set_inheritable(number, False)
        return cls._own(OwnedFd(number), platform.label_of(number) or "mpmemory")

    @classmethod
    def receive(cls, sock: socket.socket | HasFileno) -> Self:
        """Receive a handle that a peer sends over a Unix socket: `Memory.send`, or any program's SCM_RIGHTS.

        Reads one byte, and the one descriptor that comes with it. Waits as the socket does (timeouts too).

        Args:
            sock: an AF_UNIX socket, or a multiprocessing Connection on one (`Pipe()`).

        Raises:
            EOFError: the peer has closed the socket.
            ValueError: `sock` is no Unix socket; or what came was no descriptor, or none that can be mapped.
            OSError: EMFILE if this process has no descriptor left; otherwise as recvmsg(2).
        """
        fd = _over_socket(sock, recv_fd)
        problem = _why_unmappable(fd.fileno())
        if problem:
            raise ValueError(f"received a file descriptor that cannot be mapped: {problem}")
        return cls._own(fd, platform.label_of(fd.fileno()) or "mpmemory")

    def send(self, sock: socket.socket | HasFileno) -> None:
        """Send this handle over a Unix socket, with one byte (1) of data. The peer gets a descriptor of its own.

        Once this returns the handle may be closed. Raises ValueError if `sock` is no Unix socket, OSError
        as sendmsg(2).
        """
        fd = self._open()
        _over_socket(sock, lambda unix: send_fds(unix, b"\x01", [fd.fileno()]))

    # --- what it is ---

    def fileno(self) -> int:
        """Return the file descriptor, which stays this handle's."""
        return self._open().fileno()

    @property
    def size(self) -> int:
        """The size in bytes, as it is now: it changes when any process calls `grow`."""
        return self._status().st_size

    @property
    def resident(self) -> int:
        """How many bytes of it take up memory now (for a file on disk: how many it has allocated)."""
        return self._status().st_blocks * 512  # stat(2): in units of 512 bytes

    @property
    def identity(self) -> tuple[int, int]:
        """`(st_dev, st_ino)`: equal for two handles on the same memory, as long as one is open."""
        status = self._status()
        return status.st_dev, status.st_ino

    @property
    def seals(self) -> Seal:
        """The seals on it; where the backend is not memfd, none or `SEAL` alone: none can be added."""
        fd = self._open()
        return Seal(platform.seals(fd.fileno()))

    @property
    def readonly(self) -> bool:
        """Whether no writable mapping can be made: it was opened read-only, or sealed against writing."""
        fd = self._open()
        return _is_open_readonly(fd.fileno()) or bool(platform.seals(fd.fileno()) & _WRITE_SEALS)

    @property
    def name(self) -> str:
        """The label for people."""
        return self._name

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._fd is None

    def __repr__(self) -> str:
        kind = type(self).__name__
        if self._fd is None:
            return f"<{kind} {self._name!r} closed>"
        if isinstance(self._fd, LostFd):
            return f"<{kind} {self._name!r} lost>"
        return f"<{kind} {self._name!r} size={self.size} fd={self.fileno()}>"

    # --- what can be done with it ---

    def map(
        self, length: SupportsIndex | None = None, offset: SupportsIndex = 0, *, access: int | None = None
    ) -> SharedBuffer:
        """Map memory into this process.

        The buffer lives on its own: it holds the memory also when this handle is closed.

        Args:
            length: in bytes; to the end of the memory if None.
            offset: in bytes from the start, any number.
            access: `mmap.ACCESS_WRITE` (the default; `ACCESS_READ` if the memory is readonly), `ACCESS_READ`,
                or `ACCESS_COPY` (writes stay in this mapping).

        Raises:
            ValueError: the range is empty or not within the memory; `access` is something else.
            PermissionError: write access to readonly memory (SealedError if a seal is the reason).
            OSError: ENOMEM if there is no room or the limit vm.max_map_count is reached.
        """
        # Imported late: a Memory maps to a SharedBuffer, which holds a Memory.
        from .buffer import SharedBuffer

        return SharedBuffer._of(self, length, offset, access)

    def pread(self, length: SupportsIndex, offset: SupportsIndex = 0) -> bytes:
        """Return `length` bytes from `offset` on, without mapping.

        Raises ValueError beyond the end; OSError (EIO) if it is a file that somebody makes shorter meanwhile.
        """
        offset, length = check_range(offset, length, self.size)
        fd = self._open()
        parts = []
        while length > 0:
            part = os.pread(fd.fileno(), min(length, platform.MAX_TRANSFER), offset)
            if not part:
                raise failed(f"memory {self._name!r} ended at {offset} while it was read", OSError(errno.EIO, ""))
            parts.append(part)
            offset += len(part)
            length -= len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def pwrite(self, data: Buffer, offset: SupportsIndex = 0) -> int:
        """Write `data` at `offset`, without mapping, and return its length in bytes.

        Raises ValueError beyond the end, where nothing is written; OSError if the memory is readonly (SealedError if
        a seal is the reason).
        """
        view = flat_view(data)
        offset, length = check_range(offset, len(view), self.size)
        fd = self._open()
        try:
            platform.write_all(fd.fileno(), view, offset)
        except OSError as error:
            raise self._explain(f"cannot write {length} bytes into memory {self._name!r}", error, _WRITE) from None
        return length

    def grow(self, size: SupportsIndex) -> None:
        """Make the memory `size` bytes long, for all that hold it. What is new is zeros.

        Mappings keep their length. Safe against others that grow it at the same time: the largest wins.

        Raises ValueError if `size` is smaller than it is (memory never shrinks), PermissionError if it was opened
        read-only (SealedError if it is sealed against growing), OSError as on creation.
        """
        size = _check_count(size, "size")
        now = self.size
        if size < now:
            raise ValueError(f"memory {self._name!r} has {now} bytes and cannot shrink to {size}")
        fd = self._open()
        if _is_open_readonly(fd.fileno()):
            raise PermissionError(errno.EACCES, f"cannot grow memory {self._name!r}: it is read-only")
        if size <= _MAX_SIZE and platform.grow_takes_memory(fd.fileno()):
            _check_available(size - now)
        try:
            _grow(fd, size)
        except PermissionError as error:
            raise self._explain(f"cannot grow memory {self._name!r} to {size} bytes", error, Seal.GROW) from None

    def seal(self, seals: Seal) -> None:
        """Forbid for ever, and to everybody, what the seals say.

        Args:
            seals: one or several, as in `Seal.WRITE | Seal.GROW`. Those that are there already change nothing.

        Raises:
            TypeError: `seals` is no Seal.
            SealedError: `Seal.SEAL` is there: no seal can be added.
            OSError: EBUSY for `Seal.WRITE` while anybody has the memory mapped for writing, or for reading by a
                handle that could write (`FUTURE_WRITE` lets them go on); ENOTSUP where the backend is not memfd;
                EACCES if the handle is read-only.
        """
        if not isinstance(seals, Seal):
            raise TypeError(f"expected a Seal, found {type(seals).__name__}")
        fd = self._open()
        asked = f"cannot add {seals!r} to memory {self._name!r}"
        try:
            platform.add_seals(fd.fileno(), seals)
        except OSError as error:
            if error.errno == errno.EPERM and not self.seals & Seal.SEAL:
                error = OSError(errno.EACCES, "")  # fcntl(2): EPERM also if the descriptor is not open for writing
            raise self._explain(asked, error, Seal.SEAL) from None

    def as_readonly(self) -> Self:
        """Return a second handle on the same memory, through which it can only be read, also by its receivers.

        They have been asked nicely: whoever has the descriptor can open the memory for writing again, in /proc.
        `seal(Seal.FUTURE_WRITE)` makes the kernel refuse that, to all, for ever.

        Raises OSError: no descriptor is left (EMFILE); ENOTSUP without a /proc.
        """
        fd = self._open()
        try:
            if not platform.has_proc():
                raise OSError(errno.ENOTSUP, "")
            # Non-blocking: what arrived may be a FIFO, as for a file that `from_file` opens.
            return self._own(OwnedFd(platform.reopen(fd.fileno(), os.O_RDONLY | os.O_NONBLOCK)), self._name)
        except OSError as error:
            raise failed(f"cannot open memory {self._name!r} for reading only", error) from None

    def lock(
        self, offset: SupportsIndex = 0, length: SupportsIndex | None = None, *, shared: bool = False
    ) -> RangeLock:
        """Return a lock on `length` bytes from `offset` on (to the end if None), exclusive or `shared`, to be acquired.

        See `mpmemory.locks.RangeLock` for arguments and errors.
        """
        from .locks import RangeLock  # imported late: a lock holds a Memory

        return RangeLock(self, offset, length, shared=shared)

    def dup(self) -> Self:
        """Return a second handle, with a descriptor of its own, on the same memory. Raises OSError (EMFILE)."""
        return self._own(self._open().dup(), self._name)

    def close(self) -> None:
        """Give up the handle. Buffers made from it stay valid. Closing twice is fine."""
        self._fd = None
        release_launched()

    def __enter__(self) -> Self:
        self._open()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # Bound early: at interpreter exit the module's globals may be gone.
    def __del__(self, _release: Callable[[], None] = release_launched) -> None:
        _release()

    # --- inside ---

    def _explain(self, asked: str, error: OSError, seals: Seal) -> OSError:
        """Return `error` with what was asked, as a SealedError if one of `seals` is the reason."""
        found = self.seals & seals if error.errno == errno.EPERM else Seal(0)
        if found:
            return SealedError(errno.EPERM, f"{asked}: seal {found.name} is on it")
        return failed(asked, error)

    def _open(self) -> OwnedFd | LostFd:
        fd = self._fd
        if fd is None:
            raise ValueError(f"memory {self._name!r} is closed")
        return fd

    # Whoever uses the number holds its owner meanwhile: another thread may close this handle.
    def _status(self) -> os.stat_result:
        fd = self._open()
        return os.fstat(fd.fileno())

    def _share(self) -> Memory:
        """Return another handle on the same descriptor, which is closed with the last handle that has it."""
        return Memory._own(self._open(), self._name)

    def _reduce(self) -> tuple[Callable[..., Self], tuple[Any, ...]]:
        return _rebuild_memory, (type(self), self._name, share_fd(self._open()))


def _rebuild_memory(cls: type[Memory], name: str, shared: Any) -> Any:
    return cls._own(shared.claim(), name)


def flat_view(data: Buffer) -> memoryview:
    """Return the bytes of `data` as a one-dimensional view, copied only if they are not contiguous."""
    view = memoryview(data)
    # raw() instead of cast(): that refuses formats which are not native, such as big-endian ints.
    return PickleBuffer(view).raw() if view.c_contiguous else memoryview(view.tobytes())


def check_range(offset: SupportsIndex, length: SupportsIndex | None, size: int) -> tuple[int, int]:
    """Return offset and length of a range within `size` bytes; a length of None reaches to the end.

    Raises ValueError, with all three numbers, if it is not within; TypeError if one is not an int.
    """
    start = operator.index(offset)
    count = size - start if length is None else operator.index(length)
    if start < 0 or count < 0 or start + count > size:
        asked = "the rest" if length is None else f"length {count}"
        raise ValueError(f"offset {start} and {asked} are not within a size of {size} bytes")
    return start, count


def _check_count(value: SupportsIndex, what: str) -> int:
    count = operator.index(value)
    if count < 0:
        raise ValueError(f"{what} must not be negative, found {count}")
    return count


def _check_name(name: str) -> str:
    if not isinstance(name, str):
        raise TypeError(f"name must be a str, found {type(name).__name__}")
    if "\0" in name:
        raise ValueError(f"name must not have a NUL character, found {name!r}")
    length = len(name) if name.isascii() else len(os.fsencode(name))
    if length > _MAX_NAME:
        raise ValueError(f"name must have at most {_MAX_NAME} bytes, found {length}")
    return name


def _create(name: str) -> OwnedFd:
    try:
        return OwnedFd(_backends.chosen().create(name))
    except OSError as error:
        raise failed(f"cannot create memory {name!r}", error) from None


def _grow(fd: OwnedFd | LostFd, size: int) -> None:
    try:
        if size > _MAX_SIZE:  # Python would say OverflowError
            raise OSError(errno.EFBIG, "")
        platform.grow(fd.fileno(), size)
    except OSError as error:
        raise failed(f"cannot have memory of {size} bytes", error) from None


def _check_available(size: int) -> None:
    # Not left to the kernel: it finds out when all is used up, and then the OOM killer chooses somebody.
    available = platform.available_memory()
    if available is not None and available < size:
        asked = f"cannot reserve {size} bytes of memory, of which {available} are available"
        raise failed(asked, OSError(errno.ENOMEM, ""))


def _allocate(fd: OwnedFd, size: int) -> None:
    try:
        if not hasattr(os, "posix_fallocate"):
            raise OSError(errno.ENOTSUP, "")
        os.posix_fallocate(fd.fileno(), 0, size)
    except OSError as error:
        raise failed(f"cannot reserve {size} bytes of memory", error) from None


def _why_unmappable(fd: int) -> str | None:
    """Return why the descriptor cannot be mapped, or None if it can."""
    try:
        mode = os.fstat(fd).st_mode
        flags = _open_flags(fd)
    except (OSError, OverflowError):
        return "it is not open"
    if not stat.S_ISREG(mode):
        return f"it is {_describe_mode(mode)}, not memory or a regular file"
    if platform.is_path_only(flags) or flags & os.O_ACCMODE == os.O_WRONLY:
        return "it is not open for reading"
    if flags & os.O_APPEND:
        return "it is open for appending, where nothing can be written in place"
    return None


def _open_flags(fd: int) -> int:
    return fcntl.fcntl(fd, fcntl.F_GETFL)


def _is_open_readonly(fd: int) -> bool:
    return _open_flags(fd) & os.O_ACCMODE == os.O_RDONLY


def _describe_mode(mode: int) -> str:
    kinds = {
        stat.S_IFDIR: "a directory",
        stat.S_IFIFO: "a pipe",
        stat.S_IFSOCK: "a socket",
        stat.S_IFCHR: "a character device",
        stat.S_IFBLK: "a block device",
    }
    return kinds.get(stat.S_IFMT(mode), "neither file nor memory")


def _over_socket(sock: socket.socket | HasFileno, action: Callable[[socket.socket], T]) -> T:
    """Do `action` with `sock`, or with the socket under a Connection. Raises ValueError if it is not a Unix one."""
    if not isinstance(sock, socket.socket):
        try:
            with borrow_socket(sock.fileno()) as inner:
                return _over_socket(inner, action)
        except OSError as error:
            if error.errno != errno.ENOTSOCK:
                raise
        raise ValueError(f"expected a Unix socket, found a {type(sock).__name__} on {_describe_fd(sock.fileno())}")
    if sock.family != socket.AF_UNIX:
        raise ValueError(f"expected a Unix socket, found one of family {sock.family.name}")
    return action(sock)


def _describe_fd(fd: int) -> str:
    return _describe_mode(os.fstat(fd).st_mode)
