"""Everywhere: an unlinked temporary file, in the folder that `TMPDIR` names (see `tempfile.gettempdir`)."""

from __future__ import annotations

import os
import tempfile

name = "file"


def available() -> bool:
    return True


def create(label: str) -> int:
    # On Linux TemporaryFile uses O_TMPFILE: the file never has a name. dup is close-on-exec (PEP 446).
    with tempfile.TemporaryFile(buffering=0, prefix="mpmemory-") as file:
        return os.dup(file.fileno())
