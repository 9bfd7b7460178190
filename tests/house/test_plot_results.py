"""The plot of results: what is drawn, and what is refused with one line."""

import importlib
import math
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
from helpers.example_results import GPTQ_RESULT, PPL
from helpers.paths import ROOT

from gptq_awq.report import records
from gptq_awq.results import load

SCRIPTS = ROOT / "scripts"


@pytest.fixture
def plot(monkeypatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    return importlib.import_module("plot_results")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    deltas = {("gptq", 4): 2.9, ("gptq", 3): 16.0, ("gptq", 8): -0.01, ("rtn", 2): math.inf, ("rtn", 4): 6.0}
    for (method, bits), delta in deltas.items():
        metrics = {
            PPL: 19.2 + delta,
            f"{PPL}/delta": delta,
            f"{PPL}/delta_ci95": [delta - 0.1, delta + 0.1],
            "wikitext2/kl": abs(delta) / 10,
        }
        folder = tmp_path / "runs" / f"{method}{bits}"
        folder.mkdir(parents=True)
        replace(GPTQ_RESULT, method=method, bits=bits, bits_per_weight=bits + 0.5, metrics=metrics).write(folder)
    return tmp_path / "runs"


def test_a_line_runs_from_few_bits_to_many_and_marks_what_is_not_distinguishable(plot: ModuleType, root: Path) -> None:
    lines = plot.points(records(load(root)), PPL)
    assert [point.bits_per_weight for point in lines["gptq"]] == [3.5, 4.5, 8.5]
    assert [point.value for point in lines["gptq"]] == [16.0, 2.9, -0.01]
    assert [point.hollow for point in lines["gptq"]] == [False, False, True]
    assert lines["gptq"][1].low == pytest.approx(2.8)


def test_what_else_is_rounded_has_lines_of_its_own(plot: ModuleType, tmp_path: Path) -> None:
    for name, method, act in (("a", "fp", None), ("b", "fp", "int8"), ("c", "gptq", None), ("d", "gptq", "int8")):
        (tmp_path / name).mkdir()
        replace(GPTQ_RESULT, method=method, act=act, metrics={PPL: 20.0}).write(tmp_path / name)
    assert list(plot.points(records(load(tmp_path)), PPL)) == ["fp, act int8", "gptq", "gptq, act int8"]


def test_another_grid_is_another_line(plot: ModuleType, tmp_path: Path) -> None:
    for name, method, grid in (("a", "gptq", "int"), ("b", "gptq", "allocated"), ("c", "rtn", "nf4")):
        (tmp_path / name).mkdir()
        replace(GPTQ_RESULT, method=method, grid=grid, metrics={PPL: 20.0}).write(tmp_path / name)
    assert list(plot.points(records(load(tmp_path)), PPL)) == ["gptq", "gptq, allocated", "rtn, nf4"]


@pytest.mark.parametrize("options", [[], ["--metric", "wikitext2/kl"]])
def test_a_picture_is_drawn_and_the_same_runs_give_the_same_file(
    options: list[str], plot: ModuleType, root: Path, tmp_path: Path
) -> None:
    pytest.importorskip("matplotlib", reason="drawing is an extra: pip install gptq_awq[plots]")
    pictures = [tmp_path / "new" / name for name in ("a.svg", "b.svg")]
    for picture in pictures:
        assert plot.main([str(root), "--out", str(picture), *options]) == 0
    assert pictures[0].read_text().startswith("<?xml")
    assert pictures[0].read_bytes() == pictures[1].read_bytes()


def test_a_choice_that_is_the_users_is_asked_for_in_one_line(
    plot: ModuleType, root: Path, tmp_path: Path, capsys
) -> None:
    pytest.importorskip("matplotlib", reason="drawing is an extra: pip install gptq_awq[plots]")
    for options, named in (
        (["--metric", "typo"], "--metric: choose one of wikitext2/kl, wikitext2/ppl@2048"),
        (["--model", "typo"], "no finished run"),
        (["--out", "a.bmp"], "--out"),
    ):
        assert plot.main([str(root), "--out", str(tmp_path / "a.svg"), *options]) == 2
        error = capsys.readouterr().err
        assert named in error
        assert len(error.splitlines()) == 1
    replace(GPTQ_RESULT, model="another", metrics={PPL: 9.0}).write(root)
    assert plot.main([str(root), "--out", str(tmp_path / "a.svg")]) == 2
    assert "--model: choose one of another, stories15M" in capsys.readouterr().err


def test_without_matplotlib_the_error_names_the_extra(
    plot: ModuleType, root: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert plot.main([str(root), "--out", str(tmp_path / "a.svg")]) == 2
    assert "pip install gptq_awq[plots]" in capsys.readouterr().err
