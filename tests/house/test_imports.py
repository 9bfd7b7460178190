"""Imports point downward only: a file may import from lower layers and from its own package."""

import ast
from pathlib import Path

import pytest
from helpers.paths import ROOT

PACKAGE = ROOT / "gptq_awq"
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
    {"__main__"},
]
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}


def unit(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(path: Path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "gptq_awq":
            parts = node.module.split(".")[1:]
            yield from parts[:1] or [alias.name for alias in node.names]
        elif isinstance(node, ast.Import):
            yield from (a.name.split(".")[1] for a in node.names if a.name.startswith("gptq_awq."))


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_downward(path):
    here = unit(path)
    for name in imported(path):
        assert name == here or here == "__init__" or RANK[name] < RANK[here], f"{path.name} imports {name}"
