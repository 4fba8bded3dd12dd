"""What the documents say is run: README and examples."""

from __future__ import annotations

import itertools
import os
import re
import shutil
import socket
import struct
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import START_METHODS

import mpmemory

ROOT = Path(__file__).parent.parent
EXAMPLES = sorted(path.name for path in (ROOT / "examples").glob("*.py"))
DOCUMENTS = sorted(
    str(path.relative_to(ROOT))
    for pattern in ("*.md", "docs/**/*.md", "examples/*.md", "benchmarks/*.md")
    for path in ROOT.glob(pattern)
)
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(language: str, path: str = "README.md") -> list[str]:
    return [text for kind, text in BLOCK.findall((ROOT / path).read_text()) if kind == language]


def programs(path: str) -> list[tuple[str, str]]:
    """Return the Python programs of a document, each with what it prints: the block of output behind it, or nothing."""
    found = [*BLOCK.findall((ROOT / path).read_text()), ("", "")]
    pairs = list(itertools.pairwise(found))
    assert all(kind == "python" for (kind, _), (after, _) in pairs if after == "output")
    return [(text, output if after == "output" else "") for (kind, text), (after, output) in pairs if kind == "python"]


PROGRAMS = [
    pytest.param(*program, id=f"{path}-{number}")
    for path in DOCUMENTS
    for number, program in enumerate(programs(path), start=1)
]


@pytest.mark.parametrize("method", START_METHODS)
def test_the_first_program_of_the_readme(method: str, run_python: Any) -> None:
    start = f"import multiprocessing\nif __name__ == '__main__': multiprocessing.set_start_method({method!r})\n"
    assert run_python(start + blocks("python")[0]).stdout == blocks("output")[0]


@pytest.mark.parametrize(("program", "output"), PROGRAMS)
def test_programs_of_the_docs(program: str, output: str, run_python: Any) -> None:
    assert run_python(program).stdout == output


@pytest.mark.skipif(shutil.which("cc") is None, reason="there is no C compiler")
def test_c_programs_of_the_docs(tmp_path: Path) -> None:
    """One turns letters in a memory into capitals, the other is a function: it gets a socket to receive from."""
    reader, receive = blocks("c", "docs/howto/languages.md")
    (tmp_path / "reader.c").write_text(reader)
    (tmp_path / "receive.c").write_text(
        f"{receive}\n#include <stdlib.h>\n#include <unistd.h>\nint main(int argc, char **argv)"
        '{ return pwrite(receive_memory(atoi(argv[1])), "by C", 4, 0) != 4; }'
    )
    for name in ("reader", "receive"):
        command = ["cc", "-Wall", "-Wextra", "-Wno-unused-parameter", "-Werror", f"{name}.c", "-o", name]
        subprocess.run(command, cwd=tmp_path, check=True, timeout=60)

    memory = mpmemory.Memory.from_bytes(b"capitals")
    fd = memory.fileno()
    subprocess.run([tmp_path / "reader", str(fd)], pass_fds=[fd], check=True, timeout=60)
    assert memory.pread(8) == b"CAPITALS"

    ours, theirs = socket.socketpair()
    with ours, theirs:
        memory.send(ours)
        subprocess.run([tmp_path / "receive", str(theirs.fileno())], pass_fds=[theirs.fileno()], check=True, timeout=60)
    assert memory.pread(8) == b"by CTALS"


def test_the_readme_has_two_commands() -> None:
    first, second = blocks("sh")
    assert "examples/word_count.py" in first
    assert "pytest" in second


@pytest.mark.parametrize("name", DOCUMENTS)
def test_links_lead_somewhere(name: str) -> None:
    path = ROOT / name
    for target in re.findall(r"\]\(([^)#]+)\)", path.read_text()):
        if "://" not in target:
            assert (path.parent / target).exists(), target


def test_there_are_all_examples() -> None:
    names = (
        "basic_sharing fd_passing worker_pool alignment batch surviving_pool replace_shared_memory word_count "
        "numpy_pool image_filter bank"
    )
    assert {f"{name}.py" for name in names.split()} <= set(EXAMPLES)


@pytest.mark.parametrize("method", START_METHODS)
@pytest.mark.parametrize("example", EXAMPLES)
def test_examples(example: str, method: str, tmp_path: Path) -> None:
    program = [ROOT / "examples" / example, "--start-method", method]
    done = subprocess.run(
        [sys.executable, "-W", "error", *program],
        text=True,
        capture_output=True,
        check=False,
        timeout=100,
        env={**os.environ, "TMPDIR": str(tmp_path)},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout
    assert done.stderr == ""
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("text", "message"),
    [(None, "No such file or directory"), (b"", "the file is empty"), (b"1 + 2\n", "there is no text in it")],
)
def test_word_count_of_what_has_no_words(text: bytes | None, message: str, tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    if text is not None:
        path.write_bytes(text)
    program = ROOT / "examples" / "word_count.py"
    done = subprocess.run([sys.executable, program, path], text=True, capture_output=True, check=False, timeout=60)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].endswith(message)
    assert "Traceback" not in done.stderr


def run_example(name: str, *args: str | Path, **options: Any) -> subprocess.CompletedProcess[str]:
    program = [sys.executable, "-W", "error", ROOT / "examples" / name, *args]
    return subprocess.run(program, text=True, capture_output=True, check=False, timeout=60, **options)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ("numpy_pool.py --size 1000", "argument --size: expected ROWSxCOLUMNS, as in 10000x1000, found '1000'"),
        ("numpy_pool.py --size 0x10", "argument --size: expected 1 row and 2 columns at least, found '0x10'"),
        ("numpy_pool.py --size 10x1", "argument --size: expected 1 row and 2 columns at least, found '10x1'"),
        ("numpy_pool.py --size 100000x1000", "expected 50,000,000 numbers at most, found 100,000,000"),
        ("numpy_pool.py --workers 0", "argument --workers: expected a number from 1 to 64, found '0'"),
        ("numpy_pool.py --workers=-1", "argument --workers: expected a number from 1 to 64, found '-1'"),
        ("numpy_pool.py --workers two", "argument --workers: expected a number from 1 to 64, found 'two'"),
        ("image_filter.py --size 900x", "argument --size: expected WIDTHxHEIGHT, as in 900x600, found '900x'"),
        ("image_filter.py --size 900x0", "argument --size: expected 16x16 or more, found '900x0'"),
        ("image_filter.py --size 99999x99999", "expected 8,294,400 pixels at most, found 9,999,800,001"),
        ("image_filter.py --workers 65", "argument --workers: expected a number from 1 to 64, found '65'"),
        ("image_filter.py --output x.jpg", "argument --output: expected a name that ends in .png, found 'x.jpg'"),
        ("image_filter.py --output none/x.png", "argument --output: there is no folder 'none'"),
        ("image_filter.py --output folder.png", "argument --output: expected a file, found the folder 'folder.png'"),
    ],
)
def test_wrong_options(args: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "folder.png").mkdir()
    done = run_example(*args.split(), cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].endswith(message)
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("size", ["2x2", "1x7", "33x100", "2000x3"])
def test_a_pool_on_small_matrices(size: str) -> None:
    done = run_example("numpy_pool.py", "--size", size, "--workers", "3")
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("name", ["numpy_pool.py", "image_filter.py"])
def test_without_numpy_there_is_one_line(name: str, tmp_path: Path) -> None:
    (tmp_path / "numpy.py").write_text("raise ImportError('no NumPy here')")
    done = run_example(name, env={**os.environ, "PYTHONPATH": str(tmp_path)})
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr == "arrays in shared memory need NumPy: pip install 'mpmemory[numpy]'\n"


def chunks_of_png(data: bytes) -> dict[bytes, bytes]:
    """Return what is in each chunk, the checksums checked."""
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    chunks: dict[bytes, bytes] = {}
    offset = 8
    while offset < len(data):
        length, kind = struct.unpack_from(">I4s", data, offset)
        end = offset + 8 + length
        assert struct.unpack_from(">I", data, end)[0] == zlib.crc32(data[offset + 4 : end])
        assert kind not in chunks
        chunks[kind] = data[offset + 8 : end]
        offset = end + 4
    assert offset == len(data)
    return chunks


@pytest.mark.parametrize(("width", "height"), [(16, 16), (90, 131)])
def test_the_picture(width: int, height: int, tmp_path: Path) -> None:
    path = tmp_path / "picture.png"
    done = run_example("image_filter.py", "--size", f"{width}x{height}", "--output", path)
    assert (done.returncode, done.stderr) == (0, "")
    assert f"The picture is in {path}." in done.stdout
    chunks = chunks_of_png(path.read_bytes())
    assert list(chunks) == [b"IHDR", b"IDAT", b"IEND"]
    assert struct.unpack(">IIBBBBB", chunks[b"IHDR"]) == (width, height, 8, 2, 0, 0, 0)
    lines = np.frombuffer(zlib.decompress(chunks[b"IDAT"]), np.uint8).reshape(height, 1 + 3 * width)
    assert not lines[:, 0].any()  # filter 0 in each line
    pixels = lines[:, 1:].reshape(height, width, 3)
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 100  # colours: it is no empty picture
    assert (pixels.std(axis=(1, 2)) > 0).all()  # nor has it an empty line


def test_a_picture_that_cannot_be_written() -> None:
    done = run_example("image_filter.py", "--size", "16x16", "--output", f"{'x' * 300}.png")
    assert done.returncode == 1
    assert done.stderr.startswith("cannot save the picture: ")
    assert "File name too long" in done.stderr
    assert len(done.stderr.splitlines()) == 1
