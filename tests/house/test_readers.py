"""docs/export.md's table of readers is what benchmarks/readers.py found."""

import importlib
import json

import pytest
from helpers.paths import ROOT


@pytest.fixture
def readers(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("readers")


def test_the_table_is_that_of_the_stored_findings(readers):
    page = readers.PAGE.read_text()
    assert page == readers.written(page, json.loads(readers.STORE.read_text())), (
        "benchmarks/readers.py --write makes it"
    )


def test_a_finding_is_counted_once_and_by_what_it_says(readers):
    same, other = {"kl": 1e-9, "mixture": True}, {"kl": 1.0, "mixture": False}
    refused, failed = {"refused": "mlx has no such", "mixture": True}, {"failed": "Error"}
    findings = {
        "mixtral": {"mlx": same},
        "b": {"mlx": other},
        "c": {"mlx": refused},
        "d": {"mlx": failed},
        "f": {"mlx": {"refused": "Model type f not supported.", "mixture": False}},
        "llava": {"gguf": same},
        "h": {"mlx": {"unbuilt": "RuntimeError: 98M parameters"}},
    }
    lines = readers.table({"versions": {"transformers": "5"}, "found": findings}).splitlines()
    assert "| `mlx` | mlx-lm | 5 | 1 | 1 | 1 | 1 | 1 | 1 | 1 |" in lines
    assert "- `mlx`: mixtral" in lines
    assert "- `gguf`: llava" in lines
    assert any(line.startswith("| `gguf` | llama.cpp | 1 | 1 | 0 |") for line in lines), "it is no language model"
