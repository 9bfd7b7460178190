"""A tracker is told of every run: of one that fails, and of one that was finished before."""

import pytest
from helpers.paths import CONFIGS
from hydra import compose, initialize_config_dir

from gptq_awq.errors import UserError
from gptq_awq.experiment import run as experiment

SEEN = []


class Recorder:
    """Remembers what it was told."""

    def start(self, config, name, group=None, run_id=None):
        SEEN.append({"name": name, "group": group, "run_id": run_id, "rows": [], "steps": [], "finished": []})
        return self

    def log(self, metrics, step=None):
        SEEN[-1]["steps"].append(step)

    def ledger(self, rows):
        SEEN[-1]["rows"] += rows

    def finish(self, result):
        SEEN[-1]["finished"].append(result)


@pytest.fixture
def run(tiny_folder, tiny_text, tmp_path, monkeypatch):
    monkeypatch.setenv("GPTQ_AWQ_CACHE", str(tmp_path / "cache"))
    SEEN.clear()

    def call(out, *overrides):
        data = ("data=local", f"data.path={tiny_text}", "data.samples=8", "data.seqlen=32", "eval=none")
        options = ["method=gptq", "group_size=24", "model=local", f"model.path={tiny_folder}", *data]
        with initialize_config_dir(str(CONFIGS), version_base="1.3"):
            cfg = compose("config", overrides=[*options, f"out={tmp_path / out}", *overrides])
        cfg.tracking = {"_target_": f"{__name__}.Recorder"}
        return experiment.run(cfg)

    return call


def test_a_run_is_followed_under_its_name_and_hash(run):
    result = run("a")
    (seen,) = SEEN
    assert seen["name"] == "tiny-llama gptq 4bit g24"
    assert seen["run_id"] == result.manifest["run"]
    assert [row["block"] for row in seen["rows"]] == [0] * 7 + [1] * 7
    assert seen["steps"] == [0, 1]
    assert seen["finished"] == [result]


def test_a_run_that_was_finished_before_is_told_whole(run):
    first, again = run("a"), run("b")
    assert again == first
    assert SEEN[1]["run_id"] == SEEN[0]["run_id"]
    assert [row["codes_sha256"] for row in SEEN[1]["rows"]] == [row["codes_sha256"] for row in SEEN[0]["rows"]]
    assert SEEN[1]["steps"] == [0, 1], "its history is told, too"
    assert [result.status for result in SEEN[1]["finished"]] == ["done"]


def test_a_run_that_fails_ends_as_failed(run, monkeypatch):
    def broken(*_args, **_kwargs):
        raise UserError("dtype=float16: overflows")

    monkeypatch.setattr(experiment, "full_precision", broken)
    with pytest.raises(UserError):
        run("a")
    ((result,),) = (seen["finished"] for seen in SEEN)
    assert (result.status, result.error) == ("failed", "dtype=float16: overflows")
