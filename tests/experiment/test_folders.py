"""Laws of a run's folder: it is the run's own while it runs, holds one run, and a finished run in it is whole."""

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
from helpers.damage import flip
from helpers.example_results import AWQ_RESULT

from gptq_awq.experiment.folder import (
    FILES,
    LEDGER,
    UNFINISHED,
    clear_earlier,
    clear_leftovers,
    damage,
    records,
    write_recorded,
)
from gptq_awq.experiment.output_folder import remove_empty_folder
from gptq_awq.experiment.registry import Run, alone_in
from gptq_awq.results import FILE_NAME, Result
from gptq_awq.runtime.runlog import LOG
from gptq_awq.storage.records import records_of

SHA256 = "ab" * 32
WEIGHTS = "checkpoints/hf/model.safetensors"
HOLDER = """
import sys, time
from pathlib import Path
from gptq_awq.experiment.output_folder import remove_empty_folder
from gptq_awq.experiment.registry import alone_in
with alone_in(Path(sys.argv[1]), print):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("GPTQ_AWQ_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def finished(out, formats=("hf",), sha256=SHA256):
    """A folder as a finished run leaves it."""
    for name in ("config.yaml", LEDGER, "scores.npz", *(f"checkpoints/{each}/model.safetensors" for each in formats)):
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text(f"{name} of {sha256}, and more so that there are bits to flip")
    for each in formats:
        (out / "checkpoints" / each / "README.md").write_text("a card")
        (out / "checkpoints" / each / "verification.json").write_text("{}")
    checkpoints = {each: {"path": f"checkpoints/{each}"} for each in formats}
    row = replace(AWQ_RESULT, status="done", manifest={"run": sha256, "checkpoints": checkpoints})
    write_recorded(row, records_of(out, [*FILES, "checkpoints"]), out)
    return Run(sha256, out)


def test_a_finished_run_is_found_in_its_folder_and_remembered_elsewhere(tmp_path):
    run = finished(tmp_path / "a")
    assert run.finished() == tmp_path / "a"
    other = Run(SHA256, tmp_path / "b")
    (tmp_path / "b").mkdir()
    assert other.finished() is None
    run.remember()
    assert other.finished() == (tmp_path / "a").resolve()
    assert Run("cd" * 32, tmp_path / "a").finished() is None


@pytest.mark.parametrize("name", ["config.yaml", LEDGER, "scores.npz", WEIGHTS, "checkpoints/hf/verification.json"])
@pytest.mark.parametrize("how", ["flipped", "deleted"])
def test_a_file_that_changed_makes_a_run_unfinished_and_is_named(tmp_path, name, how):
    run = finished(tmp_path / "a")
    if how == "flipped":
        flip(tmp_path / "a" / name, 0)
    else:
        (tmp_path / "a" / name).unlink()
    said = []
    assert run.finished(said.append) is None
    assert len(said) == 1
    assert f"{name} is not what the run stored" in said[0]


def test_a_changed_number_in_the_row_is_noticed(tmp_path):
    run = finished(tmp_path / "a")
    path = tmp_path / "a" / FILE_NAME
    row = json.loads(path.read_text())
    name = next(iter(row["metrics"]))
    path.write_text(json.dumps(row))
    assert run.finished() is not None, "spaces are no change"
    row["metrics"][name] = 0.123
    path.write_text(json.dumps(row))
    said = []
    assert run.finished(said.append) is None
    assert FILE_NAME in said[0]


def test_a_row_without_records_or_with_records_of_another_run_is_no_finished_run(tmp_path):
    run = finished(tmp_path / "a")
    row = Result.read(tmp_path / "a" / FILE_NAME)
    assert damage(tmp_path / "a", row, records(row)) is None
    finished(tmp_path / "b", sha256="cd" * 32)
    (tmp_path / "a" / WEIGHTS).write_bytes((tmp_path / "b" / WEIGHTS).read_bytes())
    assert run.finished() is None
    content = json.loads((tmp_path / "b" / FILE_NAME).read_text())
    del content["manifest"]["files"]
    (tmp_path / "b" / FILE_NAME).write_text(json.dumps(content))
    assert Run("cd" * 32, tmp_path / "b").finished() is None


def test_a_model_card_may_be_edited(tmp_path):
    run = finished(tmp_path / "a")
    (tmp_path / "a" / "checkpoints" / "hf" / "README.md").write_text("my own words")
    assert run.finished() is not None
    (tmp_path / "a" / "checkpoints" / "hf" / "README.md").unlink()
    assert run.finished() is None


def test_a_run_taken_over_replaces_all_of_an_earlier_one(tmp_path):
    finished(tmp_path / "a", formats=())
    (tmp_path / "a" / LOG).write_text("how it was computed")
    out = tmp_path / "b"
    finished(out, sha256="cd" * 32)
    (out / "allocation.json").write_text("{}")
    (out / UNFINISHED).write_text("")
    run = Run(SHA256, out)
    run.adopt(tmp_path / "a")
    assert run.finished() == out
    assert sorted(path.name for path in out.iterdir()) == sorted(["config.yaml", LEDGER, LOG, FILE_NAME, "scores.npz"])
    assert (out / LOG).stat().st_ino != (tmp_path / "a" / LOG).stat().st_ino, "each log goes on by itself"


def test_only_an_earlier_runs_own_files_are_cleared(tmp_path):
    finished(tmp_path, formats=("hf", "gptq"))
    (tmp_path / "checkpoints" / "mine").mkdir()
    (tmp_path / "notes.txt").write_text("keep")
    clear_earlier(tmp_path, ["gptq"], ["config.yaml", LEDGER])
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["gptq", "mine"]
    assert not (tmp_path / "scores.npz").exists()
    assert (tmp_path / "notes.txt").exists()


def test_leftovers_of_kills_are_cleared_and_a_checkpoint_under_replacement_is_put_back(tmp_path):
    run = finished(tmp_path, formats=("hf", "gptq"))
    checkpoints = tmp_path / "checkpoints"
    (checkpoints / "hf").rename(checkpoints / ".hf.old-12345678")
    (checkpoints / ".gptq.old-12345678").mkdir()
    (checkpoints / ".hf.12345678").mkdir()
    (checkpoints / "gptq" / ".README.md.12345678").write_text("")
    (tmp_path / ".storing-abc").mkdir()
    (tmp_path / ".results.json.abc.tmp").write_text("")
    assert len(clear_leftovers(tmp_path)) == 5
    assert not [path for path in tmp_path.rglob(".*")]
    assert run.finished() is not None
    assert clear_leftovers(tmp_path) == []


def test_a_folder_is_one_runs_own_whatever_its_cache(tmp_path):
    out = tmp_path / "out"
    for cache in ("cache", "another"):
        environment = os.environ | {"GPTQ_AWQ_CACHE": str(tmp_path / cache)}
        command = [sys.executable, "-c", HOLDER, str(out)]
        with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as holder:
            try:
                assert holder.stdout.readline() == "held\n"
                with pytest.raises(BlockingIOError, match="another run"), alone_in(out, None):
                    pass
            finally:
                holder.kill()
    with alone_in(out, None):
        assert not list(out.iterdir())


def test_a_finished_runs_loose_ends_are_tied_up(tmp_path, own_cache):
    run = finished(tmp_path / "a")
    (own_cache / "progress" / SHA256).mkdir(parents=True)
    run.settle()
    assert not (own_cache / "progress" / SHA256).exists()
    assert Run(SHA256, tmp_path / "b").finished() == (tmp_path / "a").resolve()


def test_a_refused_command_deletes_no_folder_that_others_made(tmp_path, monkeypatch):
    work = tmp_path / "above" / "work"
    for folder in (own := work / "outputs" / "2026-01-01" / "10-00", given := work / "runs" / "x", work / "y"):
        folder.mkdir(parents=True)
    monkeypatch.chdir(work)
    remove_empty_folder(own)
    assert not (work / "outputs").exists()
    remove_empty_folder(given)
    assert (work / "runs").is_dir()
    assert not given.exists()
    with alone_in(work / "y", None):  # a run that has stored nothing yet
        remove_empty_folder(work / "y")
        assert (work / "y").is_dir()
    (work / "runs").rmdir()
    remove_empty_folder(work / "y")
    assert work.is_dir()
