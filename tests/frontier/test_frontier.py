"""Laws of the frontier's command: which runs are points, what they are compared with, a sweep from end to end."""

import math
import sys

import pytest

from gptq_awq.errors import UserError
from gptq_awq.frontier.frontier import choose, draw, main, points, table, uniform_at
from gptq_awq.results import load

KL = "text/kl"


def run(bits_per_weight, kl, tie="linear", predicted=0.1, **more):
    allocation = {"sensitivity": "fisher", "predicted": predicted}
    row = {"status": "done", "method": "gptq", "model": "m", "grid": "allocated", "sym": False, "size_bytes": 10**6}
    row |= {"bits_per_weight": bits_per_weight, "metrics": {KL: kl, f"{KL}/ci95": [kl / 2, kl * 2]}, "path": "p"}
    return row | {"config": {"grid": {"tie": tie}}, "manifest": {"allocation": allocation}} | more


def uniform(bits_per_weight, kl):
    return run(bits_per_weight, kl, grid="int", config={"grid": {}}, manifest={})


def test_what_is_tied_or_has_no_budget_is_uniform():
    found = points([run(3.0, 0.2), run(3.3, 0.3, tie="model"), uniform(4.3, 0.1)], KL)
    assert [p.kind for p in found] == ["allocated", "uniform", "uniform"]
    assert [p.predicted for p in found] == [0.1, 0.1, None]


def test_relative_errors_predict_no_kl():
    manifest = {"allocation": {"sensitivity": "error", "predicted": 0.5}}
    assert points([run(3.0, 0.2, manifest=manifest)], KL)[0].predicted is None


def test_other_formats_are_no_points():
    others = [run(4.5, 0.1, grid="nf4", manifest={}, sym=None), run(16, 0.0, sym=None, grid=None, manifest={})]
    assert points([*others, run(3.0, 0.2)], KL) == points([run(3.0, 0.2)], KL)


def test_uniform_bits_between_two_widths_are_the_geometric_mean_half_way():
    line = points([uniform(3.0, 0.4), uniform(4.0, 0.1)], KL)
    assert uniform_at(3.0, line) == pytest.approx(0.4)
    assert uniform_at(3.5, line) == pytest.approx(math.sqrt(0.4 * 0.1))
    assert uniform_at(2.9, line) is None
    assert uniform_at(3.5, points([run(3.5, 0.1)], KL)) is None


def test_the_table_tells_how_far_prediction_and_uniform_bits_are():
    rows = table(points([uniform(3.0, 0.4), uniform(4.0, 0.1), run(3.5, 0.15, predicted=0.12)], KL)).splitlines()
    assert len(rows) == 2 + 3
    assert rows[3].split(" | ")[3:] == ["0.1200", "0.1500 [0.07500, 0.3000]", "1.25", "0.75 |"]


def test_one_model_one_method_one_kl():
    rows = [run(3.0, 0.2), run(3.0, 0.2, method="rtn"), run(3.0, 0.2, method="fp")]
    with pytest.raises(UserError, match="--method: choose one of gptq, rtn"):
        choose(rows, None, None, None)
    assert choose(rows, "m", "rtn", None) == ([rows[1]], KL)
    with pytest.raises(UserError, match="no finished run"):
        choose([], None, None, None)
    with pytest.raises(UserError, match="text/kl"):
        choose(rows, None, "gptq", "other/kl")


def test_without_matplotlib_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UserError, match=r"gptq_awq\[plots\]"):
        draw(points([run(3.0, 0.2)], KL), "m", KL)


def test_a_model_that_broke_has_no_place_on_the_axis_but_in_the_table():
    pytest.importorskip("matplotlib")
    line = points([run(2.5, math.inf), run(3.0, 0.2), run(9.0, 0.0)], KL)
    assert "inf" in table(line)
    draw(line, "m", KL)
    with pytest.raises(UserError, match="positive"):
        draw(line[:1], "m", KL)


def test_a_sweep_and_its_frontier(cli, tiny, tmp_path, capsys):
    grids = "grid={budget_bits:3.8},{budget_bits:5},{tie:model,budget_bits:3.9},{tie:model,budget_bits:4.9}"
    done = cli("experiment=frontier", *tiny, grids, f"hydra.sweep.dir={tmp_path / 'runs'}")
    assert done.returncode == 0, done.stderr
    runs = load(tmp_path / "runs")
    assert len(runs) == 4
    assert all(manifest["allocation"]["predicted"] > 0 for manifest in runs["manifest"])
    picture = tmp_path / "frontier.svg"
    assert main([str(tmp_path / "runs"), "--out", str(picture)]) == 0
    told = capsys.readouterr().out
    assert told.count("| allocated |") == told.count("| uniform |") == 2
    before = picture.read_bytes()
    assert main([str(tmp_path / "runs"), "--out", str(picture)]) == 0
    assert picture.read_bytes() == before
    assert main([str(tmp_path / "runs"), "--out", str(tmp_path / "frontier.txt")]) == 2
