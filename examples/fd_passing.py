"""Send memory over a Unix socket, as a file descriptor.

    python examples/fd_passing.py [--start-method {fork,forkserver,spawn}]

Any two processes with a Unix socket between them can do this, related or not: `Memory.send` is a plain
SCM_RIGHTS message of one byte and one descriptor, so the peer can be written in another language.
"""

import argparse
import socket

import mpmemory as mp

GREETING = b"written by the parent"
REPLY = b"written by the child!"  # as long as the greeting, which it replaces
CONFIRMATION = b"DONE\n"


def child(sock: socket.socket) -> None:
    # A parent that was killed would not show as the end of the stream: a forked child has that end, too.
    sock.settimeout(30)
    with sock, mp.Memory.receive(sock) as memory, memory.map() as buffer:
        greeting = buffer.get_bytes()
        print(f"Child received {memory.size} bytes of memory as fd {memory.fileno()}. They say {greeting!r}.")
        if greeting != GREETING:
            raise SystemExit(f"child: expected {GREETING!r}, found {greeting!r}")
        buffer.set_bytes(REPLY)
        sock.sendall(CONFIRMATION)


def main() -> None:
    parser = argparse.ArgumentParser(description="Send memory over a Unix socket, as a file descriptor.")
    parser.add_argument("--start-method", choices=mp.get_all_start_methods(), default=mp.get_start_method())
    ctx = mp.get_context(parser.parse_args().start_method)

    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with ours, theirs, mp.Memory.from_bytes(GREETING) as memory:
        process = ctx.Process(target=child, args=(theirs,), daemon=True)
        process.start()
        theirs.close()  # only the child has it now: should the child die, we read the end of the stream

        print(f"Parent sends {memory.size} bytes of memory, which say {GREETING!r}.")
        memory.send(ours)
        with ours.makefile("rb") as lines:
            confirmation = lines.readline()
        process.join()

        reply = memory.pread(memory.size)
        print(f"Parent is told {confirmation!r}. The memory now says {reply!r}.")
        if (confirmation, reply, process.exitcode) != (CONFIRMATION, REPLY, 0):
            raise SystemExit(
                f"expected {CONFIRMATION!r}, {REPLY!r} and exit code 0, "
                f"found {confirmation!r}, {reply!r} and {process.exitcode}"
            )
    print("OK: the memory went over the socket, and its contents did not.")


if __name__ == "__main__":
    main()
