"""Sweeps by Hydra's plugins, and what is said where one is missing."""

import subprocess

import pytest
from helpers.paths import ROOT

from gptq_awq import results
from gptq_awq.errors import UserError
from gptq_awq.experiment.sweeps import plugins


@pytest.fixture
def nothing_installed(monkeypatch):
    """As if no plugin were there."""

    def missing(name):
        raise ModuleNotFoundError(name)

    monkeypatch.setattr(plugins, "find_spec", missing)


@pytest.mark.slow
@pytest.mark.fresh
def test_joblib_runs_a_sweep_two_at_a_time(cli, tiny, tmp_path):
    done = cli("-m", "hydra/launcher=joblib", "hydra.launcher.n_jobs=2", "method=rtn", "bits=2,3,4,8", *tiny)
    assert done.returncode == 0, done.stderr
    table = results.load(tmp_path / "multirun")
    assert sorted(table["bits"]) == [2, 3, 4, 8]
    assert set(table["status"]) == {"done"}


@pytest.mark.parametrize(
    ("arguments", "extra"),
    [
        (["-m", "hydra/launcher=joblib"], "gptq_awq[joblib]"),
        (["--multirun", "hydra/launcher=slurm"], "gptq_awq[slurm]"),
        (["-m", "hydra/launcher=submitit_local"], "gptq_awq[slurm]"),
        (["-m", "hydra/launcher=ray"], "gptq_awq[ray]"),
        (["-m", "hydra/sweeper=optuna"], "gptq_awq[optuna]"),
        (["experiment=search_gptq", "bits=3"], "gptq_awq[optuna]"),
        (["experiment=methods", "hydra/launcher=slurm"], "gptq_awq[slurm]"),
    ],
)
def test_a_missing_plugin_is_one_line_that_names_the_extra(nothing_installed, arguments, extra):
    with pytest.raises(UserError) as error:
        plugins.check_plugins(arguments)
    assert f"pip install '{extra}'" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["-m", "bits=2,3"],
        ["experiment=weight_only"],
        ["-m", "hydra/launcher=basic"],
        ["experiment=typo"],
        ["--help"],
    ],
)
def test_what_needs_no_plugin_passes_without_one(nothing_installed, arguments):
    plugins.check_plugins(arguments)


def test_a_launcher_without_a_sweep_is_refused():
    with pytest.raises(UserError, match="add -m"):
        plugins.check_plugins(["hydra/launcher=joblib", "bits=4"])
    plugins.check_plugins(["--cfg", "hydra", "hydra/launcher=joblib"])


def test_slurm_is_refused_where_there_is_none(monkeypatch):
    monkeypatch.setattr(plugins.shutil, "which", lambda name: None)
    with pytest.raises(UserError, match=r"no srun here.*slurm_local"):
        plugins.check_plugins(["-m", "hydra/launcher=slurm"])


def test_the_script_says_what_it_wants(tmp_path):
    script = ROOT / "scripts" / "slurm_local.sh"
    done = subprocess.run([script, "dance", tmp_path], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "start|stop|status" in done.stderr
    done = subprocess.run([script, "status", tmp_path], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert f"start {tmp_path}" in done.stderr
