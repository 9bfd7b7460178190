"""What a run reads is in use: it goes last, and while a run needs it, it does not go at all."""

import json
import os
import subprocess
import sys
import time

import pytest
import torch
from helpers.interrupted_runs import run, same
from helpers.quantization_runs import GRID, SMALL, tokens
from helpers.tiny_models import tiny_model

from gptq_awq.api import load_method
from gptq_awq.cache.cache import clear, entries, prune
from gptq_awq.calibration.observation import ObservationCache
from gptq_awq.evaluation.baseline import AnswersFile
from gptq_awq.quantization.quantize import quantize
from gptq_awq.storage.journal import Journal
from gptq_awq.storage.pins import delete_unpinned, pinned

AWQ = load_method("awq")[0]


def journal(folder, name, age):
    written = Journal(folder / "moments" / name, "key")
    written.keep_batch(0, 0, [torch.zeros(10)])
    written.append(0, {"h": torch.zeros(1000)}, {})
    then = time.time() - age
    for path in written.folder.rglob("*.safetensors"):
        os.utime(path, (then, then))
    return written


@pytest.mark.parametrize("used", [lambda kept: kept.block(0), lambda kept: kept.batch(0, 0)], ids=["block", "batch"])
def test_reading_a_record_is_using_it(tmp_path, used):
    often, never = (journal(tmp_path, name, age) for name, age in (("often", 5000), ("never", 4000)))
    used(often)
    assert [entry.path.name for entry in prune(6000, tmp_path)] == ["never"]
    assert often.folder.is_dir()
    assert not never.folder.exists()


def test_looking_for_a_record_that_is_foreign_is_no_use_of_it(tmp_path):
    kept = journal(tmp_path, "a", 5000)
    with pytest.raises(Exception, match="another computation"):
        Journal(kept.folder, "other").block(0)
    assert next(entries(["moments"], tmp_path)).used < time.time() - 4000


def test_reading_answers_is_using_them(tmp_path):
    file = AnswersFile.of(tiny_model("llama"), "weights", None, tmp_path / "baselines")
    file.add({"a": 1.0})
    os.utime(file.path, (0, 0))
    file.read()
    assert next(entries(["baselines"], tmp_path)).used > time.time() - 100


def test_a_record_under_a_live_run_is_neither_pruned_nor_cleared(tmp_path):
    plain = run(AWQ)
    record = ObservationCache(Journal(tmp_path / "moments" / "key", "key"), 10**9)
    other = journal(tmp_path, "other", 0)
    model, done = tiny_model("llama"), {}
    steps = quantize(model, tokens(), AWQ, GRID, SMALL, record=record)
    for block in steps:
        done |= {row["name"]: (row["codes_sha256"], row.get("error_after", 0)) for row in block.rows}
        prune(0, tmp_path)
        clear(["moments"], folder=tmp_path)
        assert record.journal.count() == 2
    assert same((done, model.state_dict()), plain)
    assert not other.folder.exists()
    assert [entry.path.name for entry in prune(0, tmp_path)] == ["key"]  # once it has ended


def test_a_run_that_is_left_in_the_middle_needs_nothing_any_more(tmp_path):
    record = ObservationCache(Journal(tmp_path / "moments" / "key", "key"), 10**9)
    steps = quantize(tiny_model("llama"), tokens(), AWQ, GRID, SMALL, record=record)
    next(steps)
    assert prune(0, tmp_path) == []
    steps.close()
    assert [entry.path.name for entry in prune(0, tmp_path)] == ["key"]


def test_progress_of_a_live_run_is_not_cleared(tmp_path):
    kept = Journal(tmp_path / "progress" / "run", "key")
    steps = quantize(tiny_model("llama"), tokens(), load_method("gptq")[0], GRID, SMALL, progress=kept)
    next(steps)
    assert clear(["progress"], folder=tmp_path) == []
    assert kept.count() == 1
    steps.close()
    assert len(clear(["progress"], folder=tmp_path)) == 1


def test_pins_are_of_processes_and_die_with_them(tmp_path):
    entry = tmp_path / "moments" / "key"
    entry.mkdir(parents=True)
    program = f"""
import sys, time
from pathlib import Path
from gptq_awq.storage.pins import pinned
with pinned(Path({json.dumps(str(entry))})):
    print("pinned", flush=True)
    time.sleep(600)
"""
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "pinned\n"
        assert not delete_unpinned(entry, entry.rmdir)
        with pinned(entry):
            other.kill()
            other.wait()
            assert not delete_unpinned(entry, entry.rmdir)  # two processes need it, and one is left
    assert delete_unpinned(entry, entry.rmdir)
    assert not entry.exists()
