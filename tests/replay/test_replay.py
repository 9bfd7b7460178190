"""A stored run that is replayed comes out the same, or the first layer that doesn't is named."""

import json

import pytest
import yaml

from gptq_awq.replay.replay import main


@pytest.fixture(scope="module")
def stored(tmp_path_factory, tiny_folder, tiny_text):
    """A finished run, made in this process."""
    from helpers.paths import CONFIGS
    from hydra import compose, initialize_config_dir

    from gptq_awq.experiment.run import run

    out = tmp_path_factory.mktemp("stored") / "run"
    overrides = [
        *("method=gptq", "bits=3", "group_size=24", "model=local", f"model.path={tiny_folder}"),
        *("data=local", f"data.path={tiny_text}", "data.samples=8", "data.seqlen=32", "compute_dtype=float32"),
        *(f"eval.perplexity.path={tiny_text}", "eval.perplexity.seqlen=32", "eval.perplexity.windows=8", f"out={out}"),
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GPTQ_AWQ_CACHE", str(tmp_path_factory.mktemp("cache")))
        with initialize_config_dir(str(CONFIGS), version_base="1.3"):
            cfg = compose("config", overrides=overrides)
        run(cfg)
    return out


@pytest.fixture
def copy(stored, tmp_path):
    """The same run, to be tampered with."""
    for path in stored.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


def edit_config(folder, **changes):
    config = yaml.safe_load((folder / "config.yaml").read_text()) | changes
    (folder / "config.yaml").write_text(yaml.safe_dump(config))


def test_a_replayed_run_is_identical_metrics_included(stored, capsys):
    before = {path.name: path.read_bytes() for path in stored.iterdir()}
    assert main([str(stored), "--scores"]) == 0
    assert capsys.readouterr().out == "identical: 14 layers and all metrics\n"
    assert {path.name: path.read_bytes() for path in stored.iterdir()} == before


def test_the_first_layer_whose_codes_differ_is_named(copy, capsys):
    lines = [json.loads(line) for line in (copy / "ledger.jsonl").read_text().splitlines()]
    for row in lines[9:]:
        row["codes_sha256"] = "0" * 64
    (copy / "ledger.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert main([str(copy)]) == 1
    assert f"different: {lines[9]['name']}: stored 000000000000, now {''}" in capsys.readouterr().out


def test_what_is_not_as_it_was_is_said(copy, capsys):
    edit_config(copy, seed=1)
    row = json.loads((copy / "results.json").read_text())
    row["manifest"]["packages"]["torch"] = "1.0"
    (copy / "results.json").write_text(json.dumps(row))
    assert main([str(copy)]) == 1
    said = capsys.readouterr().out
    assert "packages torch: then 1.0" in said
    assert "calibration tokens" in said
    assert "different: model.layers.0.self_attn.q_proj" in said


def test_a_metric_that_differs_is_named(copy, capsys):
    row = json.loads((copy / "results.json").read_text())
    row["metrics"]["tiny/kl"] += 1e-9
    (copy / "results.json").write_text(json.dumps(row))
    assert main([str(copy), "--scores"]) == 1
    assert "different: tiny/kl" in capsys.readouterr().out


def test_a_folder_without_a_finished_run_is_refused_in_one_line(copy, tmp_path_factory, capsys):
    row = json.loads((copy / "results.json").read_text())
    (copy / "results.json").write_text(json.dumps(row | {"status": "failed"}))
    for folder in (copy, tmp_path_factory.mktemp("empty")):
        assert main([str(folder)]) == 2
        assert "no finished run" in capsys.readouterr().err
    (copy / "results.json").write_text(json.dumps(row))
    edit_config(copy, model={"_target_": "gptq_awq.models.load.LocalModel", "path": "/nowhere"})
    assert main([str(copy)]) == 2
    assert "model.path=/nowhere" in capsys.readouterr().err
