"""Stored runs of strangers: a replay runs no code that they name, and says in one line what is wrong with them."""

import json
import os

import pytest
import yaml
from helpers.example_results import AWQ_RESULT
from helpers.hostile import changed, nested, places, values
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gptq_awq.experiment.renamed import current_targets
from gptq_awq.replay.replay import main, named_code

CONFIG = {
    "model": {"_target_": "gptq_awq.models.load.LocalModel", "path": "nowhere", "trust_remote_code": False},
    "data": {"_target_": "gptq_awq.data.corpora.LocalText", "path": "nowhere", "samples": 4, "seqlen": 32},
    "method": {"name": "gptq", "_target_": "gptq_awq.quantization.method.Method", "transforms": []},
    "grid": {"_target_": "gptq_awq.grids.integer.IntGrid", "bits": 4, "group_size": 32},
    "eval": {"_target_": "gptq_awq.evaluation.protocol.Evaluation", "tasks": ["lambada_openai"], "include_path": None},
    "tracking": {"_target_": "gptq_awq.experiment.sweeps.tracking.NoTracking"},
    "seed": 0,
    "device": "cpu",
    "resume": True,
}
OLD = {
    "gptq_awq.data.WikiText2": "gptq_awq.data.corpora.WikiText2",
    "gptq_awq.data.corpora.WikiText2": "gptq_awq.data.corpora.WikiText2",
    "gptq_awq.pipeline.method.Method": "gptq_awq.quantization.method.Method",
    "gptq_awq.pipeline.experts.ExpertPolicy": "gptq_awq.calibration.expert_policy.ExpertPolicy",
    "gptq_awq.self_calibration.SelfCalibration": "gptq_awq.calibration.self_calibration.SelfCalibration",
    "gptq_awq.tracking.Wandb": "gptq_awq.experiment.sweeps.tracking.Wandb",
}
LEDGER = json.dumps({"name": "model.layers.0.q", "codes_sha256": "ab" * 32}) + "\n"
FUZZ = settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)


def stored(folder, config, ledger=LEDGER):
    AWQ_RESULT.write(folder)
    (folder / "config.yaml").write_text(config if isinstance(config, str) else yaml.safe_dump(config))
    (folder / "ledger.jsonl").write_text(ledger)
    return folder


def refused(folder, capsys, *options):
    """The one line that a replay of a folder ends with."""
    assert main([str(folder), *options]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert said.count("\n") == 1
    return said


CODE = {
    "a function": (("method", "transforms"), [{"_target_": "os.system", "command": "touch ran"}], "'os.system'"),
    "another class": (("model", "_target_"), "builtins.eval", "'builtins.eval'"),
    "a class that no config names": (("model", "_target_"), "gptq_awq.storage.assets.scratch_folder", "scratch_folder"),
    "a class by a map": (("model", "_target_"), {"a": 1}, "which is not a class"),
    "remote code": (("model", "trust_remote_code"), True, "trust_remote_code"),
    "remote code, in words": (("model", "trust_remote_code"), "no", "trust_remote_code"),
    "a folder of tasks": (("eval", "include_path"), "tasks", "eval.include_path"),
    "a task's file": (("eval", "tasks"), ["./task.yaml"], "a task|lm-eval task"),
    "a task's config": (("eval", "tasks"), [{"task": "x", "doc_to_text": "{{ 1 }}"}], "lm-eval task"),
    "the environment": (("model", "path"), "${oc.env:HOME}", "oc.env"),
}


@pytest.mark.parametrize("case", CODE)
def test_a_config_that_names_code_of_others_is_refused_without_trust(case, tmp_path, capsys, monkeypatch):
    place, value, named = CODE[case]
    monkeypatch.chdir(tmp_path)
    said = refused(stored(tmp_path, changed(CONFIG, place, value)), capsys)
    assert any(each in said for each in named.split("|"))
    assert "--trust" in said
    assert not (tmp_path / "ran").exists()
    said = refused(tmp_path, capsys, "--trust")  # as the model is nowhere
    assert "--trust" not in said


def test_a_config_of_this_package_names_no_code_of_others():
    assert named_code(CONFIG) is None


@pytest.mark.parametrize("old", OLD)
def test_old_names_of_classes_are_todays(old):
    config = changed(CONFIG, ("data",), {"_target_": old, "more": [{"_target_": old}]})
    now = current_targets(config)
    assert now["data"] == {"_target_": OLD[old], "more": [{"_target_": OLD[old]}]}


def test_a_run_of_before_the_move_is_replayed_without_trust(tmp_path, capsys):
    config = changed(CONFIG, ("data", "_target_"), "gptq_awq.data.LocalText")
    config = changed(config, ("method", "_target_"), "gptq_awq.pipeline.method.Method")
    assert named_code(current_targets(config)) is None
    assert "--trust" not in refused(stored(tmp_path, config), capsys)


# --------------------------------------------------------------------------------------------------- broken folders

LAUGHS = "a: &a [x, x]\n" + "\n".join(f"{c}: &{c} [*{b}, *{b}]" for b, c in zip("abcdefgh", "bcdefghi", strict=True))
CONFIGS = ["", "null", "[]", "text", "- a", "{", "a: *b", LAUGHS, "&a [*a]", "!!python/object/apply:os.system [ls]"]
CONFIGS += ["a: " + "[" * 3000, "\0", "seed: 0", "x" * 1_100_000, "? [a]\n: b", "1: 2", "model: ${model}"]


@pytest.mark.parametrize("at", range(len(CONFIGS)))
def test_a_broken_config_is_one_line(at, tmp_path, capsys):
    refused(stored(tmp_path, CONFIGS[at]), capsys)


@pytest.mark.parametrize("ledger", ["{", "null\n", "[]", "1", '{"name": 5}', '{"name": "q"}', "[" * 5000, "\0", '"a"'])
def test_a_broken_ledger_is_one_line(ledger, tmp_path, capsys):
    assert "ledger" in refused(stored(tmp_path, CONFIG, ledger), capsys)


@pytest.mark.parametrize("name", ["results.json", "config.yaml", "ledger.jsonl"])
def test_a_file_that_is_missing_or_no_file_is_one_line(name, tmp_path, capsys):
    path = stored(tmp_path, CONFIG) / name
    path.unlink()
    refused(tmp_path, capsys)
    path.mkdir()
    refused(tmp_path, capsys)
    path.rmdir()
    os.mkfifo(path)
    assert "no regular file" in refused(tmp_path, capsys)
    path.unlink()
    path.symlink_to("/dev/zero")
    assert "no regular file" in refused(tmp_path, capsys)


def test_names_that_no_terminal_takes_are_shown_escaped(tmp_path, capsys):
    config = changed(CONFIG, ("model",), {"\ud800": None})
    assert "\\ud800" in refused(stored(tmp_path, json.dumps(config)), capsys)


@FUZZ
@given(st.sampled_from(list(places(CONFIG))), values | st.just(nested(200)))
def test_any_config_is_one_line(tmp_path, capsys, place, value):
    refused(stored(tmp_path, json.dumps(changed(CONFIG, place, value))), capsys)


@pytest.mark.slow
@settings(FUZZ, max_examples=2000)
@given(st.text() | st.binary().map(lambda content: content.decode("latin1")))
def test_any_text_for_a_config_is_one_line(tmp_path, capsys, text):
    refused(stored(tmp_path, text), capsys)
