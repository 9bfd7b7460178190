"""The house's laws: imports point downward only, rooms are few, files and functions short, tests share by helpers."""

import ast
import functools
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.paths import ROOT, TESTS

PACKAGE = ROOT / "gptq_awq"
FILES = sorted(PACKAGE.rglob("*.py"))
# Lowest first. What stands on one line may not import each other.
LAYERS = [
    {"__init__", "errors", "kernels"},
    {"storage", "runtime", "numerics"},
    {"results", "cache", "grids", "data"},
    {"models"},
    {"calibration", "evaluation", "tuning"},
    {"solvers", "transforms", "report"},
    {"quantization", "export", "frontier"},
    {"allocation", "api"},
    {"experiment"},
    {"replay"},
    {"playground"},
    {"__main__"},
]
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}
LOOSE = {"errors", "results", "__main__"}
MOST_ROOMS, LONGEST_CHAIN, LONGEST_FILE, LONGEST_FUNCTION = 25, 13, 400, 60
NO_STATEMENT = re.compile(r"(Of|The same|That|What)\b")


def room(path: Path) -> str:
    """The package or loose module at the top that a file belongs to."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(path: Path) -> Iterator[str]:
    """The rooms that a file imports from, also inside of functions."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "gptq_awq":
            parts = node.module.split(".")[1:]
            names = [alias.name for alias in node.names]
            yield from parts[:1] or ["__init__" if name == "__version__" else name for name in names]
        elif isinstance(node, ast.Import):
            yield from (a.name.split(".")[1] for a in node.names if a.name.startswith("gptq_awq."))


def named(path: Path) -> str:
    return str(path.relative_to(PACKAGE))


# ------------------------------------------------------------------------------------------------------------- rooms


@pytest.mark.parametrize("path", FILES, ids=named)
def test_imports_point_downward(path):
    here = room(path)
    for name in imported(path):
        assert name == here or here == "__init__" or RANK[name] < RANK[here], f"{path.name} imports {name}"


def test_rooms_are_few_and_loose_modules_are_named():
    rooms = {room(path) for path in FILES} - {"__init__"}
    assert len(rooms) <= MOST_ROOMS
    assert {name for name in rooms if (PACKAGE / f"{name}.py").is_file()} == LOOSE


def test_no_chain_of_rooms_is_long():
    below: dict[str, set[str]] = {}
    for path in FILES:
        if room(path) != "__init__":
            below.setdefault(room(path), set()).update(set(imported(path)) - {room(path), "__init__"})

    @functools.cache
    def height(name: str) -> int:
        return 1 + max(map(height, below[name]), default=0)

    assert max(map(height, below)) <= LONGEST_CHAIN


# ------------------------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize("path", FILES, ids=named)
def test_files_and_functions_are_short(path):
    source = path.read_text()
    assert len(source.splitlines()) <= LONGEST_FILE
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno - node.lineno < LONGEST_FUNCTION, node.name


@pytest.mark.parametrize("path", FILES, ids=named)
def test_docstrings_begin_with_a_statement_that_stands_by_itself(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node) or ""
            assert not NO_STATEMENT.match(text), f"{getattr(node, 'name', 'module')}: {text.splitlines()[0]}"


# ------------------------------------------------------------------------------------------------------------- tests


def test_no_test_file_imports_from_another_and_every_name_is_given_once():
    files = sorted(TESTS.rglob("*.py"))
    names = [path.stem for path in files if path.stem.startswith("test_")]
    assert len(set(names)) == len(names)  # pytest imports them by these
    for path in files:
        for node in ast.walk(ast.parse(path.read_text())):
            modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            modules += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            assert not any(part.startswith("test_") for name in modules for part in name.split(".")), path.name
