"""A pool of workers on sockets: memory is sent once, then only offsets and lengths.

    python examples/worker_pool.py [--start-method {fork,forkserver,spawn}] [--workers N]

Each worker first receives the memory's file descriptor, with one byte. Lines of text follow:

    parent:  WORK offset length      reverse these bytes, in place
    worker:  DONE offset length
    parent:  QUIT
"""

import argparse
import contextlib
import itertools
import socket

import mpmemory as mp

TEXTS = [b"Hello World", b"Shared Memory", b"Zero Copy IPC"]


def worker(sock: socket.socket) -> None:
    # A parent that was killed would not show as the end of the stream: forked workers have that end, too.
    sock.settimeout(30)
    # The descriptor comes first. Opened any earlier, the buffered lines could swallow the byte it travels with.
    # They are for reading only: a text file for both drops lines that it has read ahead when it is written to.
    with sock, mp.Memory.receive(sock) as memory, memory.map() as buffer, sock.makefile("rb") as lines:
        for line in lines:
            match line.split():
                case [b"WORK", offset, length]:
                    data = buffer.get_bytes(int(offset), int(length))
                    buffer.set_bytes(data[::-1], int(offset))
                    sock.sendall(b"DONE %b %b\n" % (offset, length))
                case [b"QUIT"]:
                    return
                case _:
                    raise SystemExit(f"worker: expected WORK or QUIT, found {line!r}")


def main() -> None:
    parser = argparse.ArgumentParser(description="A pool of workers on sockets.")
    parser.add_argument("--start-method", choices=mp.get_all_start_methods(), default=mp.get_start_method())
    parser.add_argument("--workers", type=int, choices=range(1, 10), default=2, metavar="N", help="1 to 9, default 2")
    args = parser.parse_args()
    ctx = mp.get_context(args.start_method)

    # Each text begins a cache line of its own, so that workers do not take lines from each other.
    offsets = list(itertools.accumulate((mp.align(len(text)) for text in TEXTS), initial=0))
    with contextlib.ExitStack() as stack:
        buffer = stack.enter_context(mp.SharedBuffer(offsets[-1]))
        for text, offset in zip(TEXTS, offsets, strict=False):
            buffer.set_bytes(text, offset)

        processes, peers = [], []
        for _ in range(args.workers):
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
            stack.enter_context(ours)
            with theirs:  # only the worker keeps it: should it die, we read the end of the stream
                process = ctx.Process(target=worker, args=(theirs,), daemon=True)
                process.start()
            buffer.memory.send(ours)
            processes.append(process)
            peers.append((ours, stack.enter_context(ours.makefile("rb"))))
        print(f"Sent {buffer.size} bytes of shared memory to {len(peers)} workers, as a file descriptor each.")

        # All requests, then all answers: few enough to fit the sockets' buffers.
        jobs = list(zip(TEXTS, offsets, itertools.cycle(peers)))
        for text, offset, (sock, _) in jobs:
            sock.sendall(b"WORK %d %d\n" % (offset, len(text)))
        for text, offset, (_, lines) in jobs:
            answer, expected = lines.readline(), b"DONE %d %d\n" % (offset, len(text))
            if answer != expected:
                raise SystemExit(f"expected the answer {expected!r}, found {answer!r}")
            result = buffer.get_bytes(offset, len(text))
            print(f"{text!r} is reversed, in place: {result!r}.")
            if result != text[::-1]:
                raise SystemExit(f"expected {text[::-1]!r}, found {result!r}")

        for (sock, _), process in zip(peers, processes, strict=True):
            sock.sendall(b"QUIT\n")
            process.join()
            if process.exitcode != 0:
                raise SystemExit(f"worker: expected exit code 0, found {process.exitcode}")
    print("OK: all texts are reversed, and only offsets and lengths went over the sockets.")


if __name__ == "__main__":
    main()
