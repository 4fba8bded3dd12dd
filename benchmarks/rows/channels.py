"""Rows on what goes through pipes and queues, to a child that sends it back."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Generator
from functools import partial
from typing import Any

import numpy as np

from mpmemory import Memory

from ..measure import MEMCPY, Comparison, Side, Target
from ..peers.channels import CHANNELS, FasterFifo, Iceoryx, OurPipe, OurQueue, StockPipe, StockQueue
from ..session import Session
from .memory import KB, MB, size_of

SIZES = (KB, 16 * KB, 128 * KB, MB, 16 * MB, 64 * MB, 256 * MB)


def handle(session: Session) -> Generator[Comparison, None, None]:
    """What does it cost to send a handle to a child that sends it back, by our Pipe and by the stock one?

    Against an int, which is the price of the two messages alone, and against a socket, which takes the same way
    through a stock Pipe as a handle does: multiprocessing's resource sharer, two claims, each on a connection of
    its own. It is latency with one message under way. On one processor, or a busy machine, it measures the
    scheduler.
    """
    with contextlib.ExitStack() as stack:
        ours, stock = session.start(stack, [OurPipe, StockPipe], KB)
        first, second = socket.socketpair()
        memory = stack.enter_context(Memory(4 * KB))
        stack.callback(first.close)
        stack.callback(second.close)
        trips = {
            "a handle, mpmemory.Pipe": (ours, memory),
            "a handle, stock Pipe": (stock, memory),
            "a socket, stock Pipe": (stock, first),
            "an int, mpmemory.Pipe": (ours, 1),
            "an int, stock Pipe": (stock, 1),
        }
        yield Comparison(
            "there and back",
            [Side(name, partial(_pass, *trip), floor="int" in name) for name, trip in trips.items()],
            "handles",
        )


def _pass(channel: Any, item: Any) -> None:
    channel.end.send(item)
    back = channel.end.recv()
    if not isinstance(back, int):
        back.close()


def message(session: Session) -> Generator[Comparison, None, None]:
    """What does a small message cost, an int there and back, by pipes and queues?

    It is mostly the time to wake up the other process, which depends on where the scheduler has put the two. Queues
    are one for each direction. iceoryx2 is not here: it carries no Python objects.
    """
    with contextlib.ExitStack() as stack:
        kinds = [OurPipe, StockPipe, OurQueue, StockQueue, FasterFifo]
        channels = session.start(stack, kinds, KB)
        yield Comparison(
            "an int there and back",
            [Side(channel.name, partial(_pass, channel, 1)) for channel in channels],
            "small messages",
        )


def echo_pipe(session: Session) -> Generator[Comparison, None, None]:
    """How long does an array take to a child and back, by pipes, queues and native middleware?

    Ours, the stock ones and faster-fifo carry any object, pickled; both sides own what they get. iceoryx2 and
    arrayqueues carry arrays only. With iceoryx2 the array is copied into a lent sample, which the other side reads
    in place, and copies into one of its own to send it back; each side waits for an event. arrayqueues hands out a
    view of a slot that is overwritten later. A torch tensor is moved to shared memory once, and goes there and back
    by reference: nobody has a copy of their own. faster-fifo and arrayqueues have queues as large as the largest
    message takes, or more; they are left out above 64 and 16 MB. The limit is copying the array twice within one
    process, between warm buffers: once for each direction.
    """
    sizes = session.sizes(SIZES)
    with contextlib.ExitStack() as stack:
        channels = session.start(stack, CHANNELS.values(), max(sizes))
        for size in sizes:
            array = np.ones(size // 8)
            yield Comparison(
                f"{size_of(size)} there and back",
                [
                    *(
                        Side(channel.name, partial(channel.round_trip, array))
                        for channel in channels
                        if channel.most is None or size <= channel.most
                    ),
                    Side(MEMCPY, partial(copy_twice, array, np.ones_like(array)), floor=True),
                ],
                "echo of an array through a pipe or queue",
                size,
                "size in bytes",
                targets=[
                    *([Target("within", 1.05, Iceoryx.name)] if size >= 128 * KB else []),
                    *([Target("within", 1.3, MEMCPY)] if size >= 16 * MB else []),
                ],
            )


def copy_twice(source: Any, target: Any) -> None:
    """Do what an echo has to do at least."""
    target[:] = source
    source[:] = target
