"""Shared memory for Python's multiprocessing that pickles as a file descriptor.

Serves as a drop-in for `import multiprocessing as mp`: all of its names are here, those of the default
context, next to `Memory` and `SharedBuffer`.
"""

from . import _backends as _backends  # first: it refuses systems that cannot do it
from .buffer import CACHE_LINE_SIZE as CACHE_LINE_SIZE
from .buffer import PAGE_SIZE as PAGE_SIZE
from .buffer import SharedBuffer as SharedBuffer
from .buffer import align as align
from .context import default_context as _default
from .context import get_context as get_context
from .errors import HandleLostError as HandleLostError
from .errors import MpMemoryError as MpMemoryError
from .errors import SealedError as SealedError
from .errors import WorkerLostError as WorkerLostError
from .memory import Memory as Memory
from .memory import Seal as Seal

__version__ = "0.1.0"

# multiprocessing's own, by name, so that editors and type checkers see them.
Array = _default.Array
AuthenticationError = _default.AuthenticationError
Barrier = _default.Barrier
BoundedSemaphore = _default.BoundedSemaphore
BufferTooShort = _default.BufferTooShort
Condition = _default.Condition
Event = _default.Event
JoinableQueue = _default.JoinableQueue
Lock = _default.Lock
Manager = _default.Manager
Pipe = _default.Pipe
Pool = _default.Pool
Process = _default.Process
ProcessError = _default.ProcessError
Queue = _default.Queue
RLock = _default.RLock
RawArray = _default.RawArray
RawValue = _default.RawValue
Semaphore = _default.Semaphore
SimpleQueue = _default.SimpleQueue
TimeoutError = _default.TimeoutError
Value = _default.Value
active_children = _default.active_children
allow_connection_pickling = _default.allow_connection_pickling
cpu_count = _default.cpu_count
current_process = _default.current_process
freeze_support = _default.freeze_support
get_all_start_methods = _default.get_all_start_methods
get_logger = _default.get_logger
get_start_method = _default.get_start_method
log_to_stderr = _default.log_to_stderr
parent_process = _default.parent_process
reducer = _default.reducer
set_executable = _default.set_executable
set_forkserver_preload = _default.set_forkserver_preload
set_start_method = _default.set_start_method

__all__ = [name for name in globals() if not name.startswith("_")]
