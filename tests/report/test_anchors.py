"""Laws of the comparison with published figures, and of the experiments that hold them."""

from typing import Any

import pytest
import yaml
from helpers.paths import CONFIGS
from hydra import compose, initialize_config_dir
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.utils import instantiate
from omegaconf import OmegaConf

from gptq_awq.errors import UserError
from gptq_awq.report import main
from gptq_awq.report.anchors import Anchors, check, markdown, met

TABLES = sorted(p.stem for p in (CONFIGS / "experiment" / "reproduce").glob("*.yaml") if p.stem != "protocol")
PPL = "text/ppl@64"


def table(*rows, **more):
    return {"source": "a paper", "metric": PPL, "where": {"model": "m"}, "tolerance": 0.1, "rows": list(rows)} | more


def run(method, ppl, bits=4, **more):
    row = {"method": method, "bits": bits, "model": "m", "status": "done", "path": f"runs/{method}{bits}{ppl}"}
    return row | {"metrics": {PPL: ppl, f"{PPL}/baseline": 5.0}, "config": {"data": {"samples": 8}}} | more


def statuses(rows, *anchors, **more):
    return [one.status for one in check(rows, Anchors.of(table(*anchors, **more)))]


def composed(name, *overrides):
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return compose("config", [f"experiment=reproduce/{name}", *overrides, "out=x"], return_hydra_config=True)


def jobs(cfg):
    """The overrides of each run of a sweep."""
    params = [f"{key}={value}" for key, value in cfg.hydra.sweeper.params.items()]
    (batch,) = BasicSweeper.split_arguments(OverridesParser.create().parse_overrides(params), None)
    return batch


def test_a_figure_is_within_up_to_its_tolerance():
    rows = [run("gptq", 11.0), run("rtn", 11.1), run("awq", float("nan"))]
    wanted = [{"method": m, "bits": 4, "expected": 10.0} for m in ("gptq", "rtn", "awq")]
    assert statuses(rows, *wanted) == ["within", "OUTSIDE", "OUTSIDE"]
    assert statuses([run("rtn", 11.1)], wanted[1] | {"tolerance": 0.12}) == ["within"]


def test_what_did_not_run_is_missing_and_says_why():
    wanted = [{"method": m, "bits": b, "expected": 10.0} for m, b in (("gptq", 4), ("rtn", 4), ("rtn", 3))]
    rows = [run("gptq", 10.0, status="failed", metrics={}, error="no hub"), run("rtn", 10.0, metrics={})]
    found = check(rows, Anchors.of(table(*wanted)))
    assert [(one.status, one.why) for one in found] == [
        ("missing", "failed: no hub"),
        ("missing", f"no {PPL}"),
        ("missing", "no such run"),
    ]
    assert not met(found)


def test_nothing_passes_on_another_model_or_other_settings():
    wanted = {"method": "rtn", "bits": 4, "expected": 10.0}
    assert statuses([run("rtn", 10.0, model="another")], wanted) == ["missing"]
    assert statuses([run("rtn", 10.0)], wanted | {"data.samples": 128}) == ["missing"]
    assert statuses([run("rtn", 10.0)], wanted | {"data.samples": 8}) == ["within"]
    assert statuses([run("rtn", 10.0)], wanted | {"method.damping": None}) == ["missing"], "absent is not null"


def test_every_run_tells_full_precision():
    assert statuses([run("rtn", 10.0), run("gptq", 9.0)], {"method": "fp", "expected": 5.0}) == ["within"]
    assert statuses([], {"method": "fp", "expected": 5.0}) == ["missing"]


def test_without_an_expected_figure_nothing_is_passed_or_failed():
    found = check([run("rtn", 10.0)], Anchors.of(table({"method": "rtn", "bits": 4, "expected": None})))
    assert [one.status for one in found] == ["no figure"]
    assert met(found)
    assert statuses([], {"method": "rtn", "bits": 4, "expected": None}) == ["missing"]


def test_runs_that_settings_do_not_tell_apart_are_refused_unless_they_agree():
    wanted = {"method": "rtn", "expected": 10.0}
    assert statuses([run("rtn", 10.0), run("rtn", 10.0001, bits=3)], wanted) == ["within"]
    with pytest.raises(UserError, match="report them apart"):
        statuses([run("rtn", 10.0), run("rtn", 10.1, bits=3)], wanted)


def test_the_table_shows_both_figures_and_counts():
    anchors = Anchors.of(table({"method": "rtn", "expected": 10.0}, {"method": "gptq", "expected": 9.0}))
    told = markdown(check([run("rtn", 10.5)], anchors), anchors)
    assert "| rtn | 10.00 | 10.50 | +5.0% | 10.0% | within |" in told
    assert "| gptq | 9.000 |  |  | 10.0% | missing (no such run) |" in told
    assert "1 of 2 within tolerance, 0 outside, 1 missing." in told


@pytest.mark.parametrize(
    "wrong", [table({"method": "rtn"}), table({"expected": "much"}), {"rows": []}, table({"expected": 1}, extra=1)]
)
def test_a_table_that_makes_no_sense_is_refused(wrong):
    with pytest.raises(UserError, match="anchors"):
        Anchors.of(wrong)


@pytest.mark.parametrize("name", TABLES)
def test_every_run_of_every_table_builds_and_meets_one_figure(name):
    cfg = composed(name)
    anchors = instantiate(cfg.hydra.callbacks.sweep_end).anchors
    assert anchors == Anchors.read(f"reproduce/{name}")
    rows = []
    for number, overrides in enumerate(jobs(cfg)):
        one = composed(name, *overrides)
        plain = {key: value for key, value in one.items() if key != "hydra"}
        config: Any = OmegaConf.to_container(OmegaConf.create(plain), resolve=True)
        built = {node: instantiate(config[node], _convert_="all") for node in ("method", "grid", "data", "eval")}
        row = {key: config[key] for key in ("bits", "group_size", "sym")} | {"model": config["model"]["name"]}
        metrics = {anchors.metric: float(number + 1), f"{anchors.metric}/baseline": 1.0}
        row |= {"status": "done", "path": str(number), "config": config, "metrics": metrics}
        rows.append(row | {"method": built["method"].name})
    found = check(rows, anchors)
    assert "missing" not in [one.status for one in found]
    assert len({one.ours for one in found[1:]}) == len(found) - 1 <= len(rows)
    assert found[0].anchor.settings == {"method": "fp"}


@pytest.mark.parametrize("name", [name for name in TABLES if name != "local"])
def test_published_tables_are_scored_by_the_papers_protocol(name):
    cfg = composed(name)
    text = instantiate(cfg.eval.perplexity.text, _convert_="all")
    assert (text.join, text.split) == ("gptq", "test")
    assert (cfg.eval.perplexity.seqlen, cfg.eval.perplexity.windows, cfg.data.samples) == (2048, None, 128)


def expectations(tmp_path, rtn):
    """An experiment of one's own: figures that anything meets, one that depends, one that nothing was run for."""
    path = tmp_path / "configs" / "experiment" / "mine.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [
        {"method": "fp", "expected": 50.0},
        {"method": "gptq", "bits": 4, "expected": 50.0},
        {"method": "rtn", "bits": 4, "expected": rtn},
    ]
    anchors = {"source": "nowhere", "metric": "tiny/ppl@32", "where": {"model": "tiny-llama", "group_size": 24}}
    anchors |= {"tolerance": 0.99, "rows": rows}
    sweep = {"mode": "MULTIRUN", "sweeper": {"params": {"method": "rtn,gptq"}}}
    hydra = sweep | {"callbacks": {"sweep_end": {"anchors": anchors}}}
    path.write_text("# @package _global_\n" + yaml.safe_dump({"hydra": hydra}))
    return path


def test_a_sweep_ends_with_the_comparison_and_a_folder_is_compared_again(cli, tiny, tmp_path, capsys):
    runs, path = tmp_path / "runs", expectations(tmp_path, rtn=1.0)
    done = cli("--config-dir", tmp_path / "configs", "experiment=mine", *tiny, f"hydra.sweep.dir={runs}")
    assert done.returncode == 1, done.stderr
    assert "2 of 3 within tolerance, 1 outside" in done.stdout

    def against(name):
        code = main([str(runs), "--against", str(name)])
        return code, "".join(capsys.readouterr())

    assert against(path)[0] == 1
    code, told = against(expectations(tmp_path, rtn=50.0))
    assert code == 0
    assert "3 of 3 within tolerance" in told
    code, told = against("reproduce/local")
    assert code == 1
    assert "0 of 11 within tolerance, 0 outside, 11 missing" in told
    code, told = against("reproduce/nothing")
    assert code == 2
    assert "reproduce/opt-125m" in told
    assert against(CONFIGS / "experiment" / "methods.yaml")[0] == 2


def test_where_the_hub_is_absent_every_figure_is_missing(cli, tmp_path):
    done = cli("experiment=reproduce/opt-125m", "method=rtn", "bits=4", f"hydra.sweep.dir={tmp_path / 'runs'}")
    assert done.returncode == 2, done.stderr
    assert "0 of 4 within tolerance, 0 outside, 4 missing" in done.stdout
    assert "missing (failed: " in done.stdout
