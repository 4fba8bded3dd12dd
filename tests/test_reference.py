"""The reference has every public name, and every public name has a docstring."""

from __future__ import annotations

import ast
import importlib
import inspect
import multiprocessing
import re
import textwrap
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import mpmemory

ROOT = Path(__file__).parent.parent
REFERENCE = ROOT / "docs" / "reference"

# What modules without an underscore have for other modules of the package.
INTERNAL: dict[str, set[str]] = {
    "buffer": set(),
    "connection": set(),
    "context": set(),
    "errors": {"describe_exit", "failed"},
    "locks": set(),
    "memory": {"HasFileno", "check_range", "flat_view"},
    "pool": set(),
    "queues": {"Counter"},
    "shared_memory": set(),
    "testing": set(),
    "arrays": set(),
}
INTERNAL_MODULES = {"reduction"}

# Values that are public, which do not say where they were defined.
VALUES = {
    "buffer": {"CACHE_LINE_SIZE", "PAGE_SIZE"},
    "context": {"default_context"},
    "pool": {"BUFFER_PER_WORKER"},
}


def documented(page: Path) -> set[str]:
    return set(re.findall(r"^::: (\S+)$", page.read_text(), re.MULTILINE))


def public_names(name: str) -> set[str]:
    module = importlib.import_module(f"mpmemory.{name}")
    if hasattr(module, "__all__"):
        return set(module.__all__)
    own = {
        key
        for key, value in vars(module).items()
        if not key.startswith("_")
        and not isinstance(value, ModuleType)
        and (inspect.isclass(value) or inspect.isfunction(value))
        and value.__module__ == module.__name__
    }
    return own | VALUES.get(name, set())


def test_there_is_a_page_for_each_public_module() -> None:
    modules = {path.stem for path in (ROOT / "mpmemory").glob("[!_]*.py")}
    assert modules - INTERNAL_MODULES == set(INTERNAL)
    assert {page.stem for page in REFERENCE.glob("*.md")} == {*INTERNAL, "index", "command-line"}


@pytest.mark.parametrize("module", INTERNAL)
def test_the_reference_has_every_public_name(module: str) -> None:
    expected = {f"mpmemory.{module}.{name}" for name in public_names(module) - INTERNAL[module]}
    assert documented(REFERENCE / f"{module}.md") == expected


def test_the_reference_has_every_name_of_the_package() -> None:
    text = (REFERENCE / "index.md").read_text()
    ours = set(mpmemory.__all__) - set(multiprocessing.__all__)
    linked = dict(re.findall(r"\[`(\w+)`\]\[(mpmemory\.[\w.]+)\]", text))
    assert set(linked) >= ours
    pages: set[str] = set().union(*map(documented, REFERENCE.glob("*.md")))
    assert set(linked.values()) <= pages
    for name, target in linked.items():
        module, _, attribute = target.rpartition(".")
        assert getattr(importlib.import_module(module), attribute) is getattr(mpmemory, name), name
    for name in ("Pool", "Pipe", "Queue", "SimpleQueue", "JoinableQueue"):
        assert f"`{name}`" in text


def without_docstring(path: str, value: Any) -> list[str]:
    """Return what has no docstring of its own: the function or class, and the public members defined in it."""
    missing = [] if value.__doc__ else [path]
    if inspect.isclass(value):
        for name, member in vars(value).items():
            if name.startswith("_"):
                continue
            function = getattr(member, "__func__", member)  # under a classmethod
            if (inspect.isfunction(function) or isinstance(member, property)) and not function.__doc__:
                missing.append(f"{path}.{name}")
    return missing


@pytest.mark.parametrize("module", INTERNAL)
def test_every_public_name_has_a_docstring(module: str) -> None:
    functions = {
        name: getattr(importlib.import_module(f"mpmemory.{module}"), name)
        for name in public_names(module) - VALUES.get(module, set())
    }
    assert [each for name, value in functions.items() for each in without_docstring(name, value)] == []


# Members that are for other modules of the package.
INTERNAL_MEMBERS = {
    "Connection.send_message",
    "Connection.send_datagram",
    "Connection.receive_datagram",
    "Results.__init__",
}

# What leads to the docstring that names the parameters.
ELSEWHERE = re.compile(r"those of `|see `|As `|this is `|Arguments and errors are")


def public_functions(module: str) -> list[tuple[str, Any]]:
    """Return the public functions of a module, and the public methods and properties of its classes, with names."""
    functions: list[tuple[str, Any]] = []
    for name in sorted(public_names(module) - VALUES.get(module, set()) - INTERNAL[module]):
        value = getattr(importlib.import_module(f"mpmemory.{module}"), name)
        if not inspect.isclass(value):
            functions.append((name, value))
            continue
        text = value.__doc__ or ""
        skipped = {"__init__"} if ELSEWHERE.search(text) or "as `multiprocessing." in text else set()
        for key, member in vars(value).items():
            function = member.fget if isinstance(member, property) else getattr(member, "__func__", member)
            is_public = key == "__init__" or not key.startswith("_")
            if is_public and key not in skipped and inspect.isfunction(function):
                functions.append((f"{name}.{key}", function))
    return [
        (path, function)
        for path, function in functions
        if path not in INTERNAL_MEMBERS and not ELSEWHERE.search(function.__doc__ or "")
    ]


@pytest.mark.parametrize("module", [module for module in INTERNAL if module != "errors"])
def test_docstrings_name_their_parameters(module: str) -> None:
    unnamed = []
    for path, function in public_functions(module):
        text = function.__doc__ or ""
        words = {"self", "cls", *re.findall(r"\w+", text)} | ({"obj"} if "object" in text else set())
        unnamed += [f"{path}: {name}" for name in inspect.signature(function).parameters if name not in words]
    assert unnamed == []


# What functions of the package return that is raised.
MADE = {"failed": "OSError", "_explain": "OSError", "_no_index": "TypeError"}


def raised(function: Any) -> set[str]:
    """Return the names of the errors that the function's own code raises."""
    names = set()
    for node in ast.walk(ast.parse(textwrap.dedent(inspect.getsource(function)))):
        if isinstance(node, ast.Raise) and node.exc is not None:
            name = ast.unparse(node.exc.func if isinstance(node.exc, ast.Call) else node.exc).rpartition(".")[2]
            names.add(MADE.get(name, name))
    return names


@pytest.mark.parametrize("module", [module for module in INTERNAL if module != "errors"])
def test_docstrings_name_the_errors_that_are_raised(module: str) -> None:
    """Those of the function itself, which is most: what it calls is not followed."""
    functions = public_functions(module)
    assert [
        f"{path}: {name}"
        for path, function in functions
        for name in sorted(raised(function))
        if name not in (function.__doc__ or "")
    ] == []
