"""The backends: which one is chosen, and what each leaves to be seen."""

from __future__ import annotations

import os
import platform as system
import stat
from typing import Any

import pytest

from mpmemory import Memory, Seal, _backends


def test_no_name_is_left(backend: str) -> None:
    memory = Memory(4096)
    assert os.fstat(memory.fileno()).st_nlink == 0


def test_nothing_is_left_of_finding_out_what_the_system_has(backend: str, run_python: Any) -> None:
    run_python(
        "import os, mpmemory\n"
        "fds = lambda: os.listdir('/proc/self/fd')\n"
        "before = fds()\n"
        "mpmemory.Memory(1).close()\n"
        "assert fds() == before, (fds(), before)\n"
    )


def test_nobody_else_may_open_it(backend: str) -> None:
    if backend == "memfd":
        pytest.skip("it is in no folder, at any time")
    memory = Memory(1)
    assert stat.S_IMODE(os.fstat(memory.fileno()).st_mode) == 0o600


def test_memory_cannot_be_executed(backend: str) -> None:
    release = tuple(int(part) for part in system.release().split(".")[:2])
    memory = Memory(1)
    if backend != "memfd" or release < (6, 3):
        pytest.skip("only memfd has seals, and this one from Linux 6.3 on")
    assert Seal.EXEC in memory.seals
    with pytest.raises(PermissionError):
        os.fchmod(memory.fileno(), 0o700)


def test_a_backend_that_this_system_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_backends.posix, "available", lambda: False)
    monkeypatch.setenv("MPMEMORY_BACKEND", "posix")
    _backends.chosen.cache_clear()
    try:
        with pytest.raises(ValueError, match="MPMEMORY_BACKEND='posix' is not available on this system"):
            Memory(1)
    finally:
        _backends.chosen.cache_clear()


def test_a_full_file_system_is_an_error_and_not_a_crash(backend: str, small_shm: list[str], run_python: Any) -> None:
    if backend != "posix":
        pytest.skip("the memory of the other backends is not in /dev/shm")
    program = "import mpmemory; mpmemory.SharedBuffer(1 << 20).clear(1); mpmemory.SharedBuffer(2 << 20).clear(1)"
    done = run_python(program, prefix=small_shm, check=False)
    assert done.returncode == 1
    assert "OSError: [Errno 28] cannot have memory of 2097152 bytes: No space left on device" in done.stderr


def test_a_backend_can_be_forced(backend: str) -> None:
    assert _backends.chosen().name == backend


def test_an_unknown_backend_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    _backends.chosen.cache_clear()
    monkeypatch.setenv("MPMEMORY_BACKEND", "floppy")
    with pytest.raises(ValueError, match="MPMEMORY_BACKEND='floppy': expected one of memfd, posix, file"):
        Memory(1)
