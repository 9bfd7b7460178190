"""Tracking: what wandb was told is in the file that it wrote, and nothing that a tracker does stops a run."""

import json
import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hydra.utils import instantiate
from omegaconf import OmegaConf

from gptq_awq.errors import UserError
from gptq_awq.results import Result
from gptq_awq.tracking import NoTracking, WandbTracking

CONFIGS = Path(__file__).resolve().parent.parent / "configs" / "tracking"
RESULT = Result(
    method="awq",
    bits=4,
    bits_per_weight=4.5,
    group_size=64,
    sym=False,
    model="stories15M",
    status="done",
    metrics={
        "wikitext2/ppl@2048": 22.15,
        "wikitext2/ppl@2048/delta_ci95": [2.7, 3.1],
        "wikitext2/kl": float("inf"),
    },
    size_bytes=90_000_000,
    baseline_size_bytes=269_000_000,
    seconds={"quantize": 52.5},
    peak_memory_bytes=None,
    ledger="ledger.jsonl",
    manifest={"tokens": {"eval": {"wikitext2": "ab12"}}},
    config={"seed": 7, "method": {"solver": {"damping": 0.01}}},
)


@pytest.fixture
def wandb_home(tmp_path: Path, monkeypatch) -> Path:
    """wandb without a network, an account, a console, or files outside of `tmp_path`."""
    for name in ("WANDB_DATA_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR"):
        monkeypatch.setenv(name, str(tmp_path / name))
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    return tmp_path


def offline_records(folder: Path) -> Iterator[Any]:
    """The records of the one offline run below `folder`.

    Its .wandb file is a LevelDB log after a header of 7 bytes: blocks of 32 KiB, in them chunks of
    crc32 (4 bytes), length (2), kind (1: whole, 2: first, 3: middle, 4: last), payload.
    """
    import wandb
    from wandb.proto import wandb_internal_pb2

    wandb.teardown()  # its service closes the files after a run's finish() has returned
    (path,) = (folder / "wandb").glob("offline-run-*/run-*.wandb")
    data = path.read_bytes()
    assert data.startswith(b":W&B")
    position, record = 7, b""
    while position + 7 <= len(data):
        left_in_block = 32768 - position % 32768
        if left_in_block < 7:
            position += left_in_block
            continue
        length, kind = int.from_bytes(data[position + 4 : position + 6], "little"), data[position + 6]
        record += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):
            yield wandb_internal_pb2.Record.FromString(record)
            record = b""


def updates(items: Any) -> dict[str, Any]:
    return {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items}


def table(folder: Path, name: str) -> list[dict[str, Any]]:
    (path,) = (folder / "wandb").glob(f"offline-run-*/files/media/table/{name}_*.table.json")
    content = json.loads(path.read_text())
    return [dict(zip(content["columns"], row, strict=True)) for row in content["data"]]


def test_an_offline_wandb_run_holds_config_metrics_ledger_and_results(wandb_home: Path) -> None:
    options = WandbTracking(project="sweeps", tags=("w4",), dir=str(wandb_home))
    tracker = options.start(RESULT.config, name="awq-4bit-g64", group="table-1")
    tracker.log({"quantize/error": 0.5}, step=1)
    tracker.log({"quantize/error": 0.25}, step=2)
    tracker.ledger([{"layer": "0.q", "shape": [8, 4], "damping": 0.01}])
    tracker.ledger([{"layer": "1.q", "shape": [8, 4], "damping": 0.1, "fallback": "rtn"}])
    tracker.finish(RESULT)

    records = list(offline_records(wandb_home))
    (run,) = (record.run for record in records if record.WhichOneof("record_type") == "run")
    assert (run.project, run.display_name, run.run_group) == ("sweeps", "awq-4bit-g64", "table-1")
    assert list(run.tags) == ["w4"]
    config = updates(run.config.update)
    assert config["seed"] == 7
    assert config["method"] == {"solver": {"damping": 0.01}}

    history = [updates(record.history.item) for record in records if record.HasField("history")]
    errors = {row["_step"]: row["quantize/error"] for row in history if "quantize/error" in row}
    assert errors == {1: 0.5, 2: 0.25}
    summary: dict[str, Any] = {}
    for record in records:
        if record.HasField("summary"):
            summary |= updates(record.summary.update)
    assert summary["wikitext2/ppl@2048"] == 22.15
    assert [summary[f"wikitext2/ppl@2048/delta_ci95/{end}"] for end in ("low", "high")] == [2.7, 3.1]

    ledger = table(wandb_home, "ledger")
    assert [row["layer"] for row in ledger] == ["0.q", "1.q"]
    assert [row["damping"] for row in ledger] == [0.01, 0.1]
    assert [row["fallback"] for row in ledger] == [None, "rtn"]
    (row,) = table(wandb_home, "results")
    assert (row["method"], row["bits_per_weight"], row["wikitext2/ppl@2048"]) == ("awq", 4.5, 22.15)
    assert records[-1].exit.exit_code == 0


def test_runs_of_a_sweep_in_one_process_do_not_flow_into_each_other(wandb_home: Path) -> None:
    for name in ("first", "second"):
        tracker = WandbTracking(dir=str(wandb_home / name)).start({"name": name}, name=name)
        tracker.log({"x": 1.0})
        if name == "second":  # the first never finished: it crashed
            tracker.finish(replace(RESULT, status="failed", error="out of memory"))
    records = list(offline_records(wandb_home / "second"))
    assert [record.run.display_name for record in records if record.HasField("run")] == ["second"]
    assert records[-1].exit.exit_code == 1


def test_a_tracker_that_fails_warns_once_and_the_run_goes_on(wandb_home: Path, caplog) -> None:
    tracker = WandbTracking(mode="disabled", dir=str(wandb_home)).start({}, name="run")
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            tracker.log(None)  # pyright: ignore[reportArgumentType]
            tracker.ledger(None)  # pyright: ignore[reportArgumentType]
        tracker.finish(RESULT)
    warnings = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(warnings) == 1
    assert "the run goes on" in caplog.text


def test_a_wandb_that_does_not_start_leaves_the_run_untracked(monkeypatch, caplog) -> None:
    import wandb

    def refuse(**options: Any) -> None:
        raise wandb.Error("no account")

    monkeypatch.setattr(wandb, "init", refuse)
    with caplog.at_level(logging.WARNING):
        tracker = WandbTracking().start({}, name="run")
    assert isinstance(tracker, NoTracking)
    assert "no account" in caplog.text
    tracker.finish(RESULT)


def test_a_mode_that_there_is_not_is_the_users_mistake() -> None:
    with pytest.raises(UserError, match=r"tracking\.mode=of"):
        WandbTracking(mode="of")


@pytest.mark.parametrize(("name", "kind"), [("none", NoTracking), ("wandb", WandbTracking)])
def test_every_tracking_yaml_instantiates(name: str, kind: type) -> None:
    config = OmegaConf.create({"out": "here", "tracking": OmegaConf.load(CONFIGS / f"{name}.yaml")})
    tracking = instantiate(config.tracking)
    assert isinstance(tracking, kind)
    if isinstance(tracking, WandbTracking):
        assert tracking.dir == "here"


def test_wandb_is_not_imported_by_those_who_do_not_ask_for_it() -> None:
    import subprocess
    import sys

    code = "import sys, gptq_awq.tracking as t; t.NoTracking().start({}, 'x'); assert 'wandb' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
