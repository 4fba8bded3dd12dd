"""What the documents say is run: README, examples and benchmarks."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import START_METHODS

ROOT = Path(__file__).parent.parent
EXAMPLES = sorted(path.name for path in (ROOT / "examples").glob("*.py"))
DOCUMENTS = sorted(
    str(path.relative_to(ROOT))
    for pattern in ("*.md", "docs/*.md", "examples/*.md", "benchmarks/*.md")
    for path in ROOT.glob(pattern)
)
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(language: str, path: str = "README.md") -> list[str]:
    return [text for kind, text in BLOCK.findall((ROOT / path).read_text()) if kind == language]


@pytest.mark.parametrize("method", START_METHODS)
def test_the_first_program_of_the_readme(method: str, run_python: Any) -> None:
    start = f"import multiprocessing\nif __name__ == '__main__': multiprocessing.set_start_method({method!r})\n"
    assert run_python(start + blocks("python")[0]).stdout == blocks("output")[0]


def test_the_other_programs_of_the_readme(run_python: Any) -> None:
    outputs = [run_python(program).stdout for program in blocks("python")[1:]]
    assert [output for output in outputs if output] == blocks("output")[1:]


def test_the_readme_has_two_commands() -> None:
    first, second = blocks("sh")
    assert "examples/word_count.py" in first
    assert "pytest" in second


@pytest.mark.parametrize("path", ["docs/migrating.md", "docs/arrays.md"])
def test_programs_of_the_docs(path: str, run_python: Any) -> None:
    for program, output in zip(blocks("python", path), blocks("output", path), strict=True):
        assert run_python(program).stdout == output


@pytest.mark.parametrize("name", DOCUMENTS)
def test_links_lead_somewhere(name: str) -> None:
    path = ROOT / name
    for target in re.findall(r"\]\(([^)#]+)\)", path.read_text()):
        if "://" not in target:
            assert (path.parent / target).exists(), target


def test_there_are_all_examples() -> None:
    names = "basic_sharing fd_passing worker_pool alignment batch surviving_pool replace_shared_memory word_count"
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


def test_benchmarks_run() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks", "--quick"],
        cwd=ROOT,
        text=True,
        capture_output=True,
        check=False,
        timeout=110,
    )
    assert done.returncode == 0, done.stderr
    assert "SharedBuffer of 4 KB" in done.stdout
