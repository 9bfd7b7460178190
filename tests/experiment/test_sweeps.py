"""Sweeps that are interrupted, repeated, run twice at once, or break: `python run.py`, as a user would call it."""

import json
import math
import os
import random
import resource
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers.forked import RUN, fork
from helpers.paths import ROOT
from helpers.tiny_models import GROUPED, save_tiny_folder

from gptq_awq import results
from gptq_awq.errors import UserError
from gptq_awq.experiment.sweeps.sweep import failed, no_objective, objective
from gptq_awq.runtime.fingerprint import run_sha256
from gptq_awq.runtime.source import code_sha256

BLOCKS = 8


@pytest.fixture(scope="module")
def deep_folder(tmp_path_factory):
    """A model of some depth, so that there is a middle to be killed in."""
    import transformers

    folder = save_tiny_folder(tmp_path_factory.mktemp("deep") / "deep-llama")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**GROUPED | {"num_hidden_layers": BLOCKS})
    transformers.LlamaForCausalLM(config).eval().save_pretrained(folder)
    return folder


@pytest.fixture
def deep(tiny, deep_folder):
    return *(option for option in tiny if not option.startswith("model.path")), f"model.path={deep_folder}"


@pytest.fixture
def start(tmp_path, forks):
    """Start run.py and don't wait for it."""
    started = []

    def call(*arguments, cache):
        environment = os.environ | {"GPTQ_AWQ_CACHE": str(cache), "HF_HUB_OFFLINE": "1"}
        started.append(fork(RUN, arguments, environment, tmp_path))
        return started[-1]

    yield call
    for process in started:
        if process.poll() is None:
            process.kill()
        process.communicate()


def outcome(out):
    """All that must not depend on how often a run was killed."""
    row = json.loads((out / "results.json").read_text())
    codes = [(line["name"], line["codes_sha256"], line.get("error_after")) for line in ledger(out)]
    return row["metrics"], row["bits_per_weight"], codes, row["manifest"]["run"]


def ledger(out):
    return [json.loads(line) for line in (out / "ledger.jsonl").read_text().splitlines()]


def kill_after(process, cache, blocks):
    """SIGKILL as soon as so many blocks are in the run's journal."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if list((cache / "progress").glob(f"*/block-{blocks - 1:04d}.safetensors")):
            process.send_signal(signal.SIGKILL)
            break
        time.sleep(0.002)
    process.wait(60)
    assert process.returncode == -signal.SIGKILL, process.communicate()


@pytest.mark.parametrize("method", ["gptq", pytest.param("awq", marks=pytest.mark.slow)])
def test_runs_killed_at_random_blocks_end_as_an_uninterrupted_one(cli, start, deep, tmp_path, method):
    assert cli(f"method={method}", "bits=3", *deep, f"out={tmp_path / 'whole'}").returncode == 0
    cache, out = tmp_path / "cache", tmp_path / "killed"
    first, second = sorted(random.sample(range(1, BLOCKS - 2), 2))
    for blocks in (first, second):
        kill_after(start(f"method={method}", "bits=3", *deep, f"out={out}", cache=cache), cache, blocks)
        assert not (out / "results.json").exists()
    done = cli(f"method={method}", "bits=3", *deep, f"out={out}", GPTQ_AWQ_CACHE=str(cache))
    assert done.returncode == 0, done.stderr
    assert outcome(out) == outcome(tmp_path / "whole"), (first, second)
    resumed = json.loads((out / "results.json").read_text())["manifest"]["resumed"]
    assert resumed[0] >= second
    assert not list((cache / "progress").glob("[!.]*")), "progress is cleaned up at the end"


def test_the_same_command_in_another_folder_takes_the_finished_runs_over(cli, tiny, tmp_path):
    sweep = ("-m", "method=rtn,gptq", "bits=3", *tiny)
    for name in ("a", "b"):
        done = cli(*sweep, f"hydra.sweep.dir={tmp_path / name}")
        assert done.returncode == 0, done.stderr
    assert "2 of 2 runs were finished before" in done.stderr
    for folder in (tmp_path / "a").glob("*_3bit"):
        assert outcome(folder) == outcome(tmp_path / "b" / folder.name)
        assert (tmp_path / "b" / folder.name / "scores.npz").is_file()
    assert len(results.load(tmp_path / "a")) == 2
    assert len(results.load(tmp_path / "a", tmp_path / "b")) == 2, "a copy is no second run"


def test_a_run_with_another_setting_or_none_to_reuse_is_computed(cli, tiny, tmp_path):
    def again(*options):
        done = cli("method=rtn", "bits=3", *tiny, *options, f"out={tmp_path / 'b'}")
        assert done.returncode == 0, done.stderr
        return "done already" not in done.stderr

    assert cli("method=rtn", "bits=3", *tiny, f"out={tmp_path / 'a'}").returncode == 0
    assert not again()
    assert again("resume=false")
    assert again("eval.perplexity.windows=15")
    (tmp_path / "a" / "ledger.jsonl").unlink()
    (tmp_path / "b" / "results.json").unlink()
    assert again(), "a finished run that lost files is none"


def test_exported_checkpoints_are_taken_over_with_the_run(cli, tiny, tmp_path):
    for name in ("a", "b"):
        done = cli("method=rtn", *tiny, "export.formats=[hf]", f"out={tmp_path / name}")
        assert done.returncode == 0, done.stderr
    assert "done already" in done.stderr
    files = [sorted(p.name for p in (tmp_path / name / "checkpoints" / "hf").iterdir()) for name in ("a", "b")]
    assert files[0] == files[1]


def test_config_code_data_and_packages_make_the_hash_and_folders_do_not(monkeypatch):
    config = {"bits": 4, "out": "a", "tracking": {"name": "x"}, "resume": True, "cache_gb": 1}
    base = run_sha256(config, {"model": "m"}, "code")
    assert run_sha256(config | {"out": "b", "resume": False, "tracking": None}, {"model": "m"}, "code") == base
    others = [
        run_sha256(config | {"bits": 3}, {"model": "m"}, "code"),
        run_sha256(config, {"model": "n"}, "code"),
        run_sha256(config, {"model": "m"}, "edited"),
    ]
    monkeypatch.setattr("gptq_awq.runtime.source.version", lambda name: "0")
    others.append(run_sha256(config, {"model": "m"}, "code"))
    assert len({base, *others}) == 5


def test_the_code_of_a_run_is_what_its_numbers_come_from(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "my_solver.py").write_text("class Mine: strength = 1")
    mine = {"method": {"solver": {"_target_": "my_solver.Mine"}, "transforms": {}}}
    gptq = {"method": {"solver": {"_target_": "gptq_awq.solvers.gptq.GPTQ"}}}
    before = code_sha256(mine), code_sha256(gptq), code_sha256()
    assert len(set(before)) == 3
    (tmp_path / "my_solver.py").write_text("class Mine: strength = 2")
    assert code_sha256(mine) != before[0]
    assert (code_sha256(gptq), code_sha256()) == before[1:]
    original = Path.read_bytes
    for name in ("solvers/gptq.py", "kernels/columns.py", "report/__init__.py"):
        monkeypatch.setattr(Path, "read_bytes", lambda p, n=name: original(p) + (b"#" if str(p).endswith(n) else b""))
        assert (code_sha256(gptq) != before[1]) is (name != "report/__init__.py"), name


def test_a_local_tasks_items_are_part_of_the_run(cli, tiny, tmp_path):
    (tmp_path / "tasks").mkdir()
    task = (
        "task: cats\ndataset_path: json\ndataset_kwargs: {data_files: {test: DATA}}\ntest_split: test\n"
        "output_type: multiple_choice\ndoc_to_text: '{{q}}'\ndoc_to_choice: ['yes', 'no']\ndoc_to_target: a\n"
        "metric_list: [{metric: acc}]\n"
    )
    (tmp_path / "tasks" / "cats.yaml").write_text(task.replace("DATA", str(tmp_path / "task.jsonl")))
    options = ("eval=full", "eval.tasks=[cats]", f"eval.include_path={tmp_path / 'tasks'}", "eval.limit=4")
    runs = set()
    for question in ("the cat sees", "the cat sees", "the dog sees"):
        rows = [json.dumps({"q": f"{question} {word}", "a": i % 2}) for i, word in enumerate("abcd")]
        (tmp_path / "task.jsonl").write_text("\n".join(rows))
        done = cli("method=rtn", *tiny, *options, f"out={tmp_path / 'out'}")
        assert done.returncode == 0, done.stderr
        runs.add(outcome(tmp_path / "out")[-1])
    assert len(runs) == 2


@pytest.mark.parametrize("same_folder", [True, False])
def test_of_two_processes_at_one_run_one_waits_and_computes_nothing(start, deep, tmp_path, same_folder):
    outs = [tmp_path / "out", tmp_path / ("out" if same_folder else "other")]
    pair = [start("method=gptq", "bits=3", *deep, f"out={out}", cache=tmp_path / "cache") for out in outs]
    said = [process.communicate(timeout=180)[1] for process in pair]
    assert [process.returncode for process in pair] == [0, 0], said
    assert sum("done already" in lines for lines in said) == 1, said
    assert sum("quantize (gptq)" in lines for lines in said) == 1, said
    assert outcome(outs[0]) == outcome(outs[1])


def test_a_failing_run_leaves_a_row_and_the_others_go_on(cli, tiny, tmp_path):
    sweep = ("-m", "method=rtn", "bits=3,9,8", *tiny, f"hydra.sweep.dir={tmp_path / 'sweep'}")
    done = cli(*sweep)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert "error: bits=9" in done.stderr
    assert "1 of them failed" in done.stderr
    table = results.load(tmp_path / "sweep").set_index("bits")
    assert table["status"].to_dict() == {3: "done", 8: "done", 9: "failed"}
    assert table["error"][9].startswith("bits=9")
    assert " rtn " in done.stdout, "the sweep ends with its table"


def test_a_failure_does_not_replace_a_finished_row(cli, tiny, tmp_path):
    sweep = ("bits=3", *tiny, f"hydra.sweep.dir={tmp_path / 'sweep'}", "hydra.sweep.subdir=run")
    assert cli("-m", "method=rtn", *sweep).returncode == 0
    before = (tmp_path / "sweep" / "run" / "results.json").read_bytes()
    done = cli("-m", "method=gptq", *sweep, "data.samples=1000000")
    assert done.returncode == 2, done.stderr
    assert (tmp_path / "sweep" / "run" / "results.json").read_bytes() == before


def test_a_sweep_shares_baseline_moments_and_tokens(cli, tiny, tmp_path):
    cache = tmp_path / "cache"
    done = cli("-m", "method=awq", "bits=2,3,4", *tiny, GPTQ_AWQ_CACHE=str(cache))
    assert done.returncode == 0, done.stderr
    assert len(list((cache / "moments").glob("[!.]*"))) == 1
    assert len(list((cache / "baselines").glob("*.safetensors"))) == 1


def test_without_room_nothing_is_kept_and_the_numbers_are_the_same(cli, tiny, tmp_path):
    outs = {}
    for gigabytes in (0, 1):
        out, cache = tmp_path / str(gigabytes), tmp_path / f"cache{gigabytes}"
        done = cli("method=awq", *tiny, f"cache_gb={gigabytes}", f"out={out}", GPTQ_AWQ_CACHE=str(cache))
        assert done.returncode == 0, done.stderr
        outs[gigabytes] = outcome(out)
        kept = [p for kind in ("tokens", "baselines", "moments") for p in (cache / kind).glob("[!.]*")]
        assert bool(kept) == bool(gigabytes)
    assert outs[0] == outs[1]


def limited(size):
    """Let the process write no file larger than this: a disk that is full."""
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def test_a_full_disk_is_one_clear_line_and_leaves_earlier_results_alone(cli, tiny, tmp_path):
    out, cache = tmp_path / "out", tmp_path / "cache"
    assert cli("method=rtn", "bits=4", *tiny, f"out={out}", GPTQ_AWQ_CACHE=str(cache)).returncode == 0
    before = {path.name: path.read_bytes() for path in out.iterdir() if path.name != "run.log"}
    command = [sys.executable, str(ROOT / "run.py"), "method=rtn", "bits=3", *map(str, tiny), f"out={out}"]
    environment = os.environ | {"GPTQ_AWQ_CACHE": str(cache)}
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, check=False, cwd=tmp_path, preexec_fn=limited(4000)
    )
    assert done.returncode == 2, done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith("error: ")
    assert "be written" in last
    assert "File too large" in last
    assert "Traceback" not in done.stderr
    assert {path.name: path.read_bytes() for path in out.iterdir() if path.name != "run.log"} == before


def test_a_folder_that_cannot_be_written_is_one_clear_line(cli, tiny, tmp_path):
    (tmp_path / "file").write_text("")
    done = cli("method=rtn", *tiny, f"out={tmp_path / 'file' / 'out'}")
    assert done.returncode == 2
    assert done.stderr.startswith("error: out=")


def test_a_cache_that_cannot_be_written_costs_the_cache_and_not_the_run(cli, tiny, tmp_path):
    (tmp_path / "file").write_text("")
    done = cli("method=awq", *tiny, f"out={tmp_path / 'out'}", GPTQ_AWQ_CACHE=str(tmp_path / "file" / "cache"))
    assert done.returncode == 0, done.stderr
    assert "not kept" in done.stderr


def test_a_search_minimizes_the_kl_or_what_it_is_told():
    metrics = {"text/ppl@32": 5.0, "text/kl": 0.25, "text/kl/ci95": [0.2, 0.3]}
    config = {"method": {"name": "gptq"}, "model": {}, "bits": 3, "group_size": 64, "sym": False}
    result = replace(failed(config, UserError("why")), metrics=metrics, bits_per_weight=3.5)
    assert objective(result, None) == 0.25
    assert objective(result, "text/ppl@32") == 5.0
    assert objective(result, [None, "bits_per_weight"]) == (0.25, 3.5)
    assert no_objective([None, "bits_per_weight"]) == (math.inf, math.inf)
    assert math.isnan(objective(replace(result, metrics={}), None))
    with pytest.raises(UserError, match=r"objective=text/k: choose one of .*text/kl"):
        objective(result, "text/k")
