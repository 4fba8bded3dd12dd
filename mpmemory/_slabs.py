"""Where arrays are put: memory of their own, or for small ones a slab that many share.

A slab is filled from its start to its end, and never twice: so what is handed out is zeros. It goes with
its last array.
"""

from __future__ import annotations

import os
import threading
import weakref

from ._fds import budget
from ._mappings import Mapping, map_whole
from .memory import Memory

#: An array of so many bytes has memory of its own, which costs one or two descriptors.
OWN_MIN = 64 << 10

#: The size of a slab in bytes, at least.
SLAB_SIZE = 1 << 20

#: The label of slabs.
SLAB = "mpmemory-slab"

#: What the place of an array in a slab is a multiple of, in bytes.
ALIGNMENT = 64


class Slabs:
    """The slabs that this process puts its next arrays into."""

    def __init__(self) -> None:
        self.start_anew()

    def start_anew(self) -> None:
        """Begin with nothing: also in a forked child, since its parent goes on to fill the slabs there are."""
        self._lock = threading.RLock()
        self._open: dict[int, tuple[weakref.ref[Mapping], int]] = {}  # by size: slab, and where its free part begins
        self._own: weakref.WeakSet[Mapping] = weakref.WeakSet()

    def allocate(self, nbytes: int) -> tuple[Mapping, int]:
        """Return a mapping, and where in it there are so many bytes of zeros. Raises OSError."""
        nbytes = max(nbytes, 1)  # an array without any bytes takes some, too: its address tells where it is
        if nbytes >= OWN_MIN and len(self._own) < budget():
            return self.allocate_own(nbytes), 0
        with self._lock:
            # With few descriptors left, large arrays share slabs too.
            size = max(SLAB_SIZE, 8 << (nbytes - 1).bit_length())
            # Taken out meanwhile: a signal handler or finalizer that comes in between begins a slab of its own.
            slabs = self._open
            reference, start = slabs.pop(size, (None, 0))
            slab = reference() if reference is not None else None
            if slab is None or start + nbytes > size:
                slab, start = map_whole(Memory(size, name=SLAB)), 0
            slabs[size] = weakref.ref(slab), -(-(start + nbytes) // ALIGNMENT) * ALIGNMENT
        return slab, start

    def allocate_own(self, nbytes: int) -> Mapping:
        """Return a mapping of new memory of so many bytes. Raises OSError."""
        mapping = map_whole(Memory(max(nbytes, 1), name="array"))
        self._own.add(mapping)
        return mapping

    def is_slab(self, mapping: Mapping) -> bool:
        """Return whether that memory, of whichever process, may hold other arrays, too."""
        return mapping.label == SLAB


slabs = Slabs()

os.register_at_fork(after_in_child=slabs.start_anew)
