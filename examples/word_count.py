"""Count the words of real text in several processes, which all read the same memory.

    python examples/word_count.py [FILE or folder] [--processes N] [--suffix .py]
                                  [--start-method {fork,forkserver,spawn}]

The text is loaded once, by default the source code of Python's own standard library. A task is a handle on
the memory and a range of it, so that the text itself never travels. The result is compared with that of
counting in one process.
"""

import argparse
import os
import re
import sysconfig
import time
from collections import Counter
from pathlib import Path

import mpmemory as mp

WORD = re.compile(rb"[A-Za-z_]\w*")
LINE_END = re.compile(rb"\n")

Task = tuple[mp.Memory, int, int]  # of the memory: from the one offset up to the other


def find_files(path: Path, suffix: str) -> list[Path]:
    """Return `path` itself, or the files in a folder that end in `suffix`, installed packages left out."""
    if not path.is_dir():
        return [path]
    return sorted(
        file
        for file in path.rglob(f"*{suffix}")
        if file.is_file() and "site-packages" not in file.relative_to(path).parts
    )


def load(files: list[Path]) -> mp.SharedBuffer:
    """Return shared memory with the contents of `files`. Raises ValueError if there is no word in it."""
    if len(files) == 1:
        memory = mp.Memory.from_file(files[0])
        if memory.size == 0:
            raise ValueError("the file is empty")
        text = memory.map()
    else:
        # A line end behind each file, so that words of two files cannot become one.
        sizes = [file.stat().st_size for file in files]
        text = mp.SharedBuffer(sum(sizes) + len(sizes))
        offset = 0
        for file, size in zip(files, sizes, strict=True):
            with file.open("rb") as source:
                source.readinto(text[offset : offset + size])
            text[offset + size] = ord("\n")
            offset += size + 1
    if not WORD.search(text.buf):
        raise ValueError("there is no text in it")
    return text


def cut(text: mp.SharedBuffer, parts: int) -> list[Task]:
    """Cut `text` at line ends, into about `parts` tasks of about the same length."""
    tasks = []
    start = 0
    for part in range(1, parts + 1):
        line_end = LINE_END.search(text.buf, text.size * part // parts)
        stop = line_end.end() if line_end else text.size
        if stop > start:
            tasks.append((text.memory, start, stop))
            start = stop
    return tasks


def count_words(task: Task) -> Counter[bytes]:
    memory, start, stop = task
    with memory.map(stop - start, start) as text:
        return Counter(WORD.findall(text.buf))


def main() -> None:
    parser = argparse.ArgumentParser(description="Count the words of real text in several processes.")
    parser.add_argument(
        "path",
        nargs="?",
        type=Path,
        default=Path(sysconfig.get_path("stdlib")),
        metavar="PATH",
        help="a file, or a folder with all below it (default: Python's standard library)",
    )
    parser.add_argument("--suffix", default=".py", help="which files of a folder to take (default: .py)")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1, metavar="N")
    parser.add_argument("--start-method", choices=mp.get_all_start_methods(), default=mp.get_start_method())
    args = parser.parse_args()
    if args.processes < 1:
        parser.error(f"--processes must be 1 or more, found {args.processes}")
    ctx = mp.get_context(args.start_method)

    start = time.perf_counter()
    try:
        files = find_files(args.path, args.suffix)
        if not files:
            parser.error(f"{args.path}: no files that end in {args.suffix!r}")
        text = load(files)
    except OSError as error:
        parser.error(f"{error.filename or args.path}: {error.strerror}")
    except ValueError as error:
        parser.error(f"{args.path}: {error}")
    loading = time.perf_counter() - start
    print(f"Loaded {text.size:,} bytes into shared memory (files: {len(files):,}): {loading:.2f} s")

    with text:
        start = time.perf_counter()
        expected = count_words((text.memory, 0, text.size))
        sequential = time.perf_counter() - start
        words = f"{expected.total():,} words, {len(expected):,} of them distinct"
        print(f"Counted {words}, in one process: {sequential:.2f} s")

        start = time.perf_counter()
        # Several tasks for each process even out their speed. Each sends a Counter back: so not too many.
        tasks = cut(text, 4 * args.processes)
        found: Counter[bytes] = Counter()
        with ctx.Pool(args.processes) as pool:
            for counter in pool.map(count_words, tasks, chunksize=1):
                found.update(counter)
        parallel = time.perf_counter() - start
        print(f"The same with processes: {args.processes}, tasks: {len(tasks)}, pool start included: {parallel:.2f} s")

    print(f"Speed-up: {sequential / parallel:.2f} ({args.start_method}, {os.cpu_count()} processors)")
    if found != expected:
        word = next(word for word in expected | found if found[word] != expected[word])
        raise SystemExit(f"expected {expected[word]} times {word!r}, found {found[word]} times")
    print("OK: both ways count the same.")


if __name__ == "__main__":
    main()
