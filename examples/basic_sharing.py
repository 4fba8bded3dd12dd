"""Share a buffer with another process: what one writes into it, the other sees.

    python examples/basic_sharing.py [--start-method {fork,forkserver,spawn}]

The buffer is an argument of the Process like any other. No copy of its contents travels:

    offset 0     the parent's text, 64 bytes, filled up with NULs
    offset 64    the child's text, 64 bytes, filled up with NULs
    offset 128   the child's process id, 8 bytes, little-endian
"""

import argparse
import os

import mpmemory as mp

TEXT = "64s"  # struct fills it up with NULs
QUESTION_AT, ANSWER_AT, PID_AT = 0, 64, 128
SIZE = 136


def read_text(buffer: mp.SharedBuffer, offset: int) -> str:
    text: bytes = buffer.get_value(TEXT, offset)
    return text.rstrip(b"\0").decode()


def child(buffer: mp.SharedBuffer) -> None:
    question = read_text(buffer, QUESTION_AT)
    print(f"Child reads {question!r}, and answers in the same memory.")
    buffer.set_value(TEXT, ANSWER_AT, question[::-1].encode())
    buffer.set_value("<q", PID_AT, os.getpid())


def main() -> None:
    parser = argparse.ArgumentParser(description="Share a buffer with another process.")
    parser.add_argument("--start-method", choices=mp.get_all_start_methods(), default=mp.get_start_method())
    ctx = mp.get_context(parser.parse_args().start_method)

    with mp.SharedBuffer(SIZE) as buffer:
        question = "Hello from the parent"
        print(f"Parent writes {question!r} into {SIZE} bytes of shared memory.")
        buffer.set_value(TEXT, QUESTION_AT, question.encode())

        process = ctx.Process(target=child, args=(buffer,), daemon=True)
        process.start()
        process.join()
        if process.exitcode != 0:
            raise SystemExit(f"child: expected exit code 0, found {process.exitcode}")

        answer = read_text(buffer, ANSWER_AT)
        pid = buffer.get_value("<q", PID_AT)
        print(f"Parent reads {answer!r}, written by process {pid}.")
        if (answer, pid) != (question[::-1], process.pid):
            raise SystemExit(f"expected {question[::-1]!r} by process {process.pid}, found {answer!r} by {pid}")
    print("OK: both processes worked in the same memory.")


if __name__ == "__main__":
    main()
