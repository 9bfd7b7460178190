"""Imports point downward only: a file may import from lower layers and from its own package."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "gptq_awq"
# Lowest first. What stands on one line may not import each other.
LAYERS = [
    {"errors", "progress", "files", "runlog", "profiling", "kernels", "__init__"},
    {"sealed"},
    {"journal", "ranks"},
    {"assets", "linalg", "hadamard", "text", "results", "memory", "manifest", "plugins", "statistics", "scores"},
    {"moments", "tracking", "report", "cache", "runs"},
    {"grids", "data", "sweep", "frontier"},
    {"models", "solvers"},
    {"transforms", "tuning", "costs", "self_calibration"},
    {"pipeline"},
    {"evaluation"},
    {"export", "allocation"},
    {"plan"},
    {"needs"},
    {"work"},
    {"trial"},
    {"forecast"},
    {"row"},
    {"api", "experiment"},
    {"replay", "notebook"},
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
