"""The sweeps under configs/experiment: they compose, are as long as they say, and can be overridden."""

import json
import subprocess
import sys
from itertools import zip_longest

import pytest
import yaml
from helpers.paths import CONFIGS
from hydra import compose, initialize_config_dir
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.utils import instantiate

from gptq_awq import results

EXPERIMENTS = sorted(p.stem for p in (CONFIGS / "experiment").glob("*.yaml"))
GRIDS = {"weight_only": 16, "methods": 16, "calibration": 15, "one_pass": 12, "frontier": 13, "gguf_frontier": 5}
SEARCHES = [name for name in EXPERIMENTS if name.startswith("search_")]


def composed(*overrides):
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return compose("config", overrides=list(overrides), return_hydra_config=True)


def parsed(cfg):
    params = cfg.hydra.sweeper.params or {}
    return OverridesParser.create().parse_overrides([f"{k}={v}" for k, v in params.items()])


def corners(override):
    """Every value of a choice, both ends of an interval."""
    if override.is_discrete_sweep():
        return list(override.sweep_string_iterator())
    if override.is_interval_sweep():
        return [str(override.value().start), str(override.value().end)]
    return [override.get_value_element_as_str()]


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_value_of_every_preset_builds_a_run(name):
    cfg = composed(f"experiment={name}")
    assert cfg.hydra.mode.name == "MULTIRUN"
    axes = [[f"{o.get_key_element()}={v}" for v in corners(o)] for o in parsed(cfg)]
    for values in zip_longest(*axes) if axes else [()]:
        chosen = [value or axis[0] for value, axis in zip(values, axes, strict=True)]
        run = composed(f"experiment={name}", *chosen, "out=somewhere")
        for node in ("method", "grid", "data", "eval"):
            instantiate(run[node], _convert_="all")


@pytest.mark.parametrize("name", GRIDS)
def test_a_preset_is_as_long_as_it_says(name):
    (batch,) = BasicSweeper.split_arguments(parsed(composed(f"experiment={name}")), None)
    assert len(batch) == GRIDS[name]


def test_the_presets_tested_here_are_all_there_are():
    assert {*GRIDS, *SEARCHES, "search"} == set(EXPERIMENTS)


@pytest.mark.parametrize("name", ["search", *SEARCHES])
def test_searches_never_see_the_test_windows(name):
    assert composed(f"experiment={name}").eval.perplexity.text.split == "train"


def test_full_precision_inputs_reach_every_method_of_one_pass():
    for method in ("rtn", "awq", "gptq"):
        cfg = composed("experiment=one_pass", f"method={method}")
        assert instantiate(cfg.method, _convert_="all").error_propagation is False


def test_the_command_line_has_the_last_word(tmp_path):
    """One value on the command line replaces the axis of the preset; a list replaces it by another."""
    program = tmp_path / "run.py"
    program.write_text(
        f"""import hydra
@hydra.main(version_base="1.3", config_path={str(CONFIGS)!r}, config_name="config")
def main(cfg):
    print("RUN", cfg.method.name, cfg.bits, cfg.group_size)
main()
"""
    )
    command = [sys.executable, program, "experiment=weight_only", "bits=4", "group_size=-1,32"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
    runs = [line for line in done.stdout.splitlines() if line.startswith("RUN")]
    assert runs == ["RUN gptq 4 -1", "RUN gptq 4 32"]


def test_a_search_goes_on_where_it_was(cli, tiny, tmp_path):
    def search(trials):
        options = ("bits=3", *tiny, "eval.perplexity.windows=4", f"hydra.sweeper.n_trials={trials}")
        done = cli("experiment=search_gptq", *options)
        assert done.returncode == 0, done.stderr

    folder = tmp_path / "multirun" / "search_gptq"
    search(2)
    best = yaml.safe_load((folder / "optimization_results.yaml").read_text())
    rows = [json.loads(path.read_text()) for path in folder.glob("*/results.json")]
    assert len(rows) == 2
    assert best["best_value"] == pytest.approx(min(row["metrics"]["tiny/kl"] for row in rows))
    search(1)
    optuna = pytest.importorskip("optuna")
    (summary,) = optuna.get_all_study_summaries(f"sqlite:///{folder / 'study.db'}")
    assert summary.n_trials == 3
    assert not results.load(folder).empty
