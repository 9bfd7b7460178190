"""`python run.py`, as a user would call it."""

import json

import pytest
import torch
import yaml
from helpers.paths import CONFIGS

from gptq_awq import results


@pytest.mark.parametrize("method", ["fp", "rtn", "gptq", "awq", "awq_gptq"])
def test_a_run_stores_its_row_ledger_config_and_log(cli, tiny, tmp_path, method):
    done = cli(f"method={method}", "bits=3", *tiny, f"out={tmp_path / 'out'}")
    assert done.returncode == 0, done.stderr
    row = json.loads((tmp_path / "out" / "results.json").read_text())
    assert row["method"] == method
    assert row["status"] == "done"
    metrics = row["metrics"]
    assert set(metrics) >= {f"tiny/ppl@32{part}" for part in ("", "/baseline", "/delta", "/delta_ci95")}
    assert set(metrics) >= {"tiny/kl", "tiny/top1_agreement", "tiny/dnll"}
    assert set(row["seconds"]) == {"load", "baseline", "quantize", "evaluate", "compile", "total"}
    assert set(row["manifest"]["provenance"]) == {"date", "command", "git", "host", "version"}
    assert f"method={method}" in row["manifest"]["provenance"]["command"]
    assert row["peak_memory_bytes"] > 0
    assert set(row["manifest"]["tokens"]) == {"calibration", "eval"}
    assert yaml.safe_load((tmp_path / "out" / "config.yaml").read_text())["bits"] == 3
    assert (tmp_path / "out" / "run.log").is_file()
    ledger = results.read_ledger(tmp_path / "out" / "ledger.jsonl")
    if method == "fp":
        assert metrics["tiny/kl"] == pytest.approx(0, abs=1e-6)
        assert row["size_bytes"] == row["baseline_size_bytes"]
        assert ledger.empty
    else:
        assert metrics["tiny/kl"] > 0
        assert row["size_bytes"] < row["baseline_size_bytes"]
        assert len(ledger) == 14
        assert ledger["ragged"].any()
        assert 3 < row["bits_per_weight"] < 5
    assert "tiny/ppl@32" in done.stdout
    assert not (tmp_path / "outputs").exists()


def test_one_seed_gives_one_result_and_another_seed_another(cli, tiny, tmp_path):
    rows = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        done = cli("method=awq_gptq", "bits=3", *tiny, f"seed={seed}", f"out={tmp_path / name}", "resume=false")
        assert done.returncode == 0, done.stderr
        rows.append(json.loads((tmp_path / name / "results.json").read_text()))
    assert rows[0]["metrics"] == rows[1]["metrics"]
    for row in rows:  # of when and where, and of folders; no hash has it
        del row["manifest"]["provenance"], row["manifest"]["files"]
    assert rows[0]["manifest"] == rows[1]["manifest"]
    assert rows[0]["manifest"]["tokens"]["calibration"] != rows[2]["manifest"]["tokens"]["calibration"]
    assert rows[0]["metrics"] != rows[2]["metrics"]


def test_a_sweep_gives_every_run_its_own_folder(cli, tiny, tmp_path):
    done = cli("-m", "method=rtn,gptq", "bits=3,8", *tiny)
    assert done.returncode == 0, done.stderr
    table = results.load(tmp_path / "multirun")
    assert sorted(zip(table["method"], table["bits"], strict=True)) == [
        *(("gptq", 3), ("gptq", 8), ("rtn", 3), ("rtn", 8)),
    ]


def test_the_baseline_is_computed_once(cli, tiny, tmp_path, cache):
    for name in ("a", "b"):
        done = cli("method=rtn", "bits=4", *tiny, f"out={tmp_path / name}", "resume=false")
        assert done.returncode == 0, done.stderr
    assert "baseline of tiny read from" in (tmp_path / "b" / "run.log").read_text()


def test_documents_with_padding_and_a_module_objective_run(cli, tiny, tmp_path):
    lines = tmp_path / "documents.jsonl"
    lines.write_text("\n".join(json.dumps({"text": "the cat sees a dog. " * n}) for n in range(1, 20)))
    options = ("data.packing=documents", "data.seqlen=128", f"data.path={lines}")
    options += ("method.transforms.awq.objective=module",)
    done = cli("method=awq", *tiny, *options, f"out={tmp_path / 'out'}")
    assert done.returncode == 0, done.stderr
    ledger = results.read_ledger(tmp_path / "out" / "ledger.jsonl")
    assert ledger["tokens"].max() < 8 * 128


def test_lm_eval_tasks_of_ones_own_run_offline(cli, tiny, tmp_path):
    data = tmp_path / "task.jsonl"
    data.write_text("\n".join(json.dumps({"q": f"the cat sees {w}", "a": i % 2}) for i, w in enumerate("abcdefgh")))
    task = {
        "task": "cats",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{q}}",
        "doc_to_choice": ["yes", "no"],
        "doc_to_target": "a",
        "metric_list": [{"metric": "acc"}],
    }
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "cats.yaml").write_text(yaml.safe_dump(task))
    options = ("eval=full", "eval.tasks=[cats]", f"eval.include_path={tmp_path / 'tasks'}", "eval.limit=6")
    done = cli("method=rtn", *tiny, *options, f"out={tmp_path / 'out'}")
    assert done.returncode == 0, done.stderr
    metrics = json.loads((tmp_path / "out" / "results.json").read_text())["metrics"]
    assert set(metrics) >= {"lm_eval/cats/acc", "lm_eval/cats/acc/baseline", "lm_eval/cats/acc/p_value"}


def test_help_names_the_groups_and_the_main_options(cli):
    done = cli("--help")
    assert done.returncode == 0
    for word in ("method", "awq_gptq", "group_size", "model.path", "eval.perplexity.path", "bits"):
        assert word in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["method=typo"], "awq_gptq"),
        (["model=typo"], "smollm2-135m"),
        (["no_such_option=1"], "no_such_option"),
        (["bits=1"], "bits=1"),
        (["bits=9"], "bits=9"),
        (["bits=2.5"], "bits=2.5"),
        (["group_size=0"], "group_size=0"),
        (["device=toaster"], "device=toaster"),
        (["dtype=float12"], "dtype=float12"),
        (["compute_dtype=float12"], "compute_dtype=float12"),
        (["tokens_per_batch=0"], "tokens_per_batch=0"),
        (["model.path=/nowhere"], "model.path=/nowhere"),
        (["model.path=null"], "model.path"),
        (["data.path=/nowhere.txt"], "data.path=/nowhere.txt"),
        (["data.path=null"], "data.path"),
        (["data.samples=100000"], "data.samples"),
        (["data.seqlen=100000000"], "data.seqlen"),
        (["data=c4"], "data=wikitext2"),
        (["model=hub", "model.path=null", "+model.id=nobody/nothing", "~model.path"], "model=smollm2-135m"),
        (["eval.perplexity.path=/nowhere.txt"], "eval.perplexity.path=/nowhere.txt"),
        (["eval.perplexity.windows=1000000"], "eval.perplexity.windows"),
        (["eval.perplexity.seqlen=256"], "eval.perplexity.seqlen=256"),
        (["method.solver.damping=-1"], "damping=-1"),
        (["grid.search=typo"], "grid.search=typo"),
        (["resume=maybe"], "resume=maybe"),
        (["cache_gb=-1"], "cache_gb=-1"),
    ],
)
def test_bad_input_is_one_clear_line_and_leaves_nothing_behind(cli, tiny, tmp_path, arguments, message):
    out = tmp_path / "out"
    base = tiny
    if arguments[0] in ("data=c4",):
        base = [a for a in tiny if not a.startswith("data")]
    if arguments[0] == "model=hub":
        arguments, base = (
            ["model=hub", "model.id=nobody/nothing"],
            [a for a in tiny if not a.startswith("model")],
        )
    if arguments[0] == "model=typo":
        base = [a for a in tiny if not a.startswith("model")]
    method = [] if arguments[0].startswith("method=") else ["method=gptq"]
    done = cli(*method, *base, *arguments, f"out={out}")
    assert done.returncode != 0
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not (out / "results.json").exists()
    assert not (out / "ledger.jsonl").exists()


def test_non_finite_weights_are_refused_by_name(cli, tiny, tmp_path):
    from helpers.tiny_models import save_tiny_folder, tiny_model

    folder = save_tiny_folder(tmp_path / "broken")
    model = tiny_model("llama")
    model.model.layers[0].mlp.up_proj.weight[0, 0] = torch.nan
    model.save_pretrained(folder)
    done = cli("method=rtn", *tiny, f"model.path={folder}", f"out={tmp_path / 'out'}")
    assert done.returncode == 2
    assert "model.layers.0.mlp.up_proj.weight" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_too_little_memory_is_said_before_calibration_starts(tiny_folder, tiny_text, tmp_path, monkeypatch):
    from hydra import compose, initialize_config_dir

    from gptq_awq.errors import UserError
    from gptq_awq.experiment.run import run as experiment
    from gptq_awq.runtime import memory

    monkeypatch.setattr(memory, "available_bytes", lambda device, budget=None: 1000)
    monkeypatch.setenv("GPTQ_AWQ_CACHE", str(tmp_path / "cache"))
    overrides = [
        *("method=gptq", "model=local", f"model.path={tiny_folder}", "data=local", f"data.path={tiny_text}"),
        *("data.samples=4", "data.seqlen=32", "eval=none", f"out={tmp_path / 'out'}"),
    ]
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        cfg = compose("config", overrides=overrides)
    with pytest.raises(UserError, match=r"widest layer: 160 columns.*data.samples"):
        experiment(cfg)
    assert not (tmp_path / "out" / "results.json").exists()


def test_a_failed_run_leaves_an_earlier_runs_results_alone(cli, tiny, tmp_path):
    out = tmp_path / "out"
    assert cli("method=rtn", "bits=4", *tiny, f"out={out}").returncode == 0
    before = {name: (out / name).read_bytes() for name in ("results.json", "ledger.jsonl", "config.yaml")}
    assert cli("method=gptq", "bits=4", *tiny, "data.samples=100000", f"out={out}").returncode == 2
    assert {name: (out / name).read_bytes() for name in before} == before
    assert not (out / "ledger.partial.jsonl").exists()


def test_a_real_model_loses_less_with_calibrated_methods_than_with_rtn(cli, shared, stories15m, tmp_path):
    stories = shared / "data" / "tinystories"
    done = cli(
        *("-m", "method=rtn,gptq,awq", "bits=3", "group_size=32", "sym=false", "seed=0"),
        *("model=local", f"model.path={stories15m}", "data=local", f"data.path={stories / 'tinystories_10k.txt'}"),
        *("data.samples=16", "data.seqlen=256", f"eval.perplexity.path={stories / 'tinystories_val.txt'}"),
        *("eval.perplexity.seqlen=256", "eval.perplexity.windows=16", f"hydra.sweep.dir={tmp_path / 'sweep'}"),
    )
    assert done.returncode == 0, done.stderr
    stored = [json.loads(path.read_text()) for path in (tmp_path / "sweep").glob("*/results.json")]
    rows = {row["method"]: row["metrics"] for row in stored}
    name = "tinystories_val/ppl@256"
    assert rows["rtn"][f"{name}/baseline"] == pytest.approx(3.9, abs=0.3)
    for method in ("gptq", "awq"):
        assert rows[method][f"{name}/delta_ci95"][1] < rows["rtn"][f"{name}/delta_ci95"][0], rows
        assert rows[method]["tinystories_val/kl"] < rows["rtn"]["tinystories_val/kl"]
        assert rows[method]["tinystories_val/top1_agreement"] > rows["rtn"]["tinystories_val/top1_agreement"]


def test_wandb_follows_a_run_offline(cli, tiny, tmp_path):
    done = cli("method=gptq", *tiny, "tracking=wandb", "tracking.mode=offline", f"out={tmp_path / 'out'}")
    assert done.returncode == 0, done.stderr
    assert list((tmp_path / "out" / "wandb").glob("offline-run-*/*.wandb"))
