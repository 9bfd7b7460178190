"""Tracking: what wandb was told is in the file that it wrote, and nothing that a tracker does stops a run."""

import json
import logging
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers.example_results import AWQ_RESULT, RUN
from helpers.paths import CONFIGS, ROOT
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import OmegaConf

from gptq_awq.errors import UserError
from gptq_awq.experiment.options import check_options
from gptq_awq.experiment.sweeps.tracking import NoTracking, WandbTracking, error_profile, run_name


def offline_records(folder: Path) -> Iterator[Any]:
    """The records of the one offline run below `folder`."""
    (records,) = offline_runs(folder)
    yield from records


def offline_runs(folder: Path) -> list[list[Any]]:
    """The records of each offline run below `folder`, the oldest first.

    A .wandb file is a LevelDB log after a header of 7 bytes: blocks of 32 KiB, in them chunks of
    crc32 (4 bytes), length (2), kind (1: whole, 2: first, 3: middle, 4: last), payload.
    """
    import wandb

    wandb.teardown()  # its service closes the files after a run's finish() has returned
    paths = sorted((folder / "wandb").glob("offline-run-*/run-*.wandb"), key=lambda path: path.stat().st_mtime)
    return [list(read_records(path.read_bytes())) for path in paths]


def read_records(data: bytes) -> Iterator[Any]:
    from wandb.proto import wandb_internal_pb2

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


def history(records: Sequence[Any]) -> list[dict[str, Any]]:
    return [updates(record.history.item) for record in records if record.HasField("history")]


def run_record(records: Sequence[Any]) -> Any:
    (run,) = (record.run for record in records if record.WhichOneof("record_type") == "run")
    return run


def block_rows(*blocks: int) -> list[dict[str, Any]]:
    """Ledger rows of two linears of one site, and one of another, per block."""
    sites = {"q": "q+k", "k": "q+k", "o": "o"}
    return [
        {"name": f"{block}.{name}", "block": block, "site": site, "error_after": 0.01 * (block + 1), "weight_error": 1}
        for block in blocks
        for name, site in sites.items()
    ]


def table(folder: Path, name: str) -> list[dict[str, Any]]:
    (path,) = (folder / "wandb").glob(f"offline-run-*/files/media/table/{name}_*.table.json")
    content = json.loads(path.read_text())
    return [dict(zip(content["columns"], row, strict=True)) for row in content["data"]]


def test_an_offline_wandb_run_holds_config_metrics_ledger_and_results(wandb_home: Path) -> None:
    options = WandbTracking(project="sweeps", tags=("w4",), dir=str(wandb_home))
    tracker = options.start(AWQ_RESULT.config, name="awq-4bit-g64", group="table-1")
    tracker.log({"quantize/error": 0.5}, step=1)
    tracker.log({"quantize/error": 0.25}, step=2)
    tracker.ledger([{"layer": "0.q", "shape": [8, 4], "damping": 0.01}])
    tracker.ledger([{"layer": "1.q", "shape": [8, 4], "damping": 0.1, "fallback": "rtn"}])
    tracker.finish(AWQ_RESULT)

    records = list(offline_records(wandb_home))
    run = run_record(records)
    assert (run.project, run.display_name, run.run_group) == ("sweeps", "awq-4bit-g64", "table-1")
    assert list(run.tags) == ["w4"]
    config = updates(run.config.update)
    assert config["seed"] == 7
    assert config["method"] == {"solver": {"damping": 0.01}}

    errors = [row for row in history(records) if "quantize/error" in row]
    assert [(row["block"], row["quantize/error"]) for row in errors] == [(1, 0.5), (2, 0.25)]
    summary: dict[str, Any] = {}
    for record in records:
        if record.HasField("summary"):
            summary |= updates(record.summary.update)
    assert summary["wikitext2/ppl@2048"] == 22.15
    assert [summary[f"wikitext2/ppl@2048/delta_ci95/{end}"] for end in ("low", "high")] == [2.7, 3.1]

    # Size against quality can be plotted: both are in the summary, and so are time, memory and what a mean hides.
    size = AWQ_RESULT.size_bytes
    assert size is not None
    assert (summary["bits_per_weight"], summary["size_mb"]) == (4.5, size / 1e6)
    assert {f"seconds/{phase}" for phase in AWQ_RESULT.seconds} <= set(summary)
    assert set(AWQ_RESULT.metrics) <= {name.removesuffix("/low").removesuffix("/high") for name in summary}
    (told,) = table(wandb_home, "report")
    assert (told["method"], told["bits/weight"]) == ("awq", "4.500")

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
            tracker.finish(replace(AWQ_RESULT, status="failed", error="out of memory"))
    records = list(offline_records(wandb_home / "second"))
    assert [record.run.display_name for record in records if record.HasField("run")] == ["second"]
    assert records[-1].exit.exit_code == 1


def test_a_tracker_that_fails_warns_once_and_the_run_goes_on(wandb_home: Path, caplog) -> None:
    tracker = WandbTracking(mode="disabled", dir=str(wandb_home)).start({}, name="run")
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            tracker.log(None)  # pyright: ignore[reportArgumentType]
            tracker.ledger(None)  # pyright: ignore[reportArgumentType]
        tracker.finish(AWQ_RESULT)
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
    tracker.finish(AWQ_RESULT)


def test_a_mode_that_there_is_not_is_the_users_mistake() -> None:
    with pytest.raises(UserError, match="mode=of: give one of online, offline"):
        WandbTracking(mode="of")


@pytest.mark.parametrize(("name", "kind"), [("none", NoTracking), ("wandb", WandbTracking)])
def test_every_tracking_yaml_instantiates(name: str, kind: type) -> None:
    config = OmegaConf.create({"out": "here", "tracking": OmegaConf.load(CONFIGS / "tracking" / f"{name}.yaml")})
    tracking = instantiate(config.tracking)
    assert isinstance(tracking, kind)
    if isinstance(tracking, WandbTracking):
        assert tracking.dir == "here"


def test_wandb_is_not_imported_by_those_who_do_not_ask_for_it() -> None:
    code = "import sys, gptq_awq.experiment.sweeps.tracking as t; t.NoTracking().start({}, 'x')"
    code += "; assert 'wandb' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


# Runs that are killed and started again


def test_the_attempts_of_one_run_are_one_wandb_run_and_the_tables_have_every_block(wandb_home: Path) -> None:
    """Offline: two folders of one id, which `wandb sync` makes one run of."""
    import wandb

    options = WandbTracking(dir=str(wandb_home))
    first = options.start({}, name="run", group="sweep", run_id=RUN)
    first.ledger(block_rows(0, 1))
    for block in (0, 1):
        first.log({"quantize/relative_error": 0.1}, step=block)
    wandb.teardown()  # killed: it never finishes
    second = options.start({}, name="run", group="sweep again", run_id=RUN)
    second.ledger(block_rows(0, 1))  # restored
    second.ledger(block_rows(1, 2))  # a block that was solved twice is in the table once
    second.log({"quantize/relative_error": 0.1}, step=2)
    second.finish(AWQ_RESULT)

    killed, resumed = offline_runs(wandb_home)
    assert [run_record(records).run_id for records in (killed, resumed)] == [RUN[:16]] * 2
    assert [run_record(records).run_group for records in (killed, resumed)] == ["sweep", "sweep again"]
    assert [row["block"] for row in history(killed)] == [0, 1]  # on disk at once, not with the next one
    assert [row["block"] for row in history(resumed) if "block" in row] == [2]
    assert [row["name"] for row in table(wandb_home, "ledger")] == [row["name"] for row in block_rows(0, 1, 2)]


# Plots and names


def test_the_layer_plots_are_the_ledgers_errors_by_block_and_site(wandb_home: Path) -> None:
    tracker = WandbTracking(dir=str(wandb_home)).start({}, name="run")
    tracker.ledger(block_rows(0, 1))
    tracker.finish(AWQ_RESULT)
    records = list(offline_records(wandb_home))
    config = {}
    for record in records:
        if record.HasField("config"):
            config |= updates(record.config.update)
    chart = config["_wandb/visualize/layers/error_by_block"]["panel_config"]
    assert chart["panelDefId"] == "wandb/line/v0"
    assert chart["fieldSettings"] == {"x": "block", "y": "relative output error", "stroke": "site"}
    profile = table(wandb_home, "layers/error_by_block_table")
    assert [(row["block"], row["site"], row["relative output error"]) for row in profile] == [
        (0, "o", 0.01),
        (0, "q+k", 0.01),
        (1, "o", 0.02),
        (1, "q+k", 0.02),
    ]
    worst = table(wandb_home, "layers/worst_linears_table")
    assert [row["relative output error"] for row in worst] == [0.02] * 3 + [0.01] * 3


def test_an_error_profile_is_of_weights_where_nothing_was_calibrated_and_skips_what_is_not_finite() -> None:
    rows = [
        {"name": "a", "block": 10, "site": "s", "weight_error": 0.25},
        {"name": "b", "block": 10, "site": "s", "weight_error": 0.75},
        {"name": "c", "block": 9, "site": "s", "weight_error": float("inf")},
        {"name": "d", "block": 2, "site": "s", "weight_error": 0.1},
    ]
    assert error_profile(rows) == {(2, "s"): 0.1, (10, "s"): 0.5}
    assert list(error_profile(rows)) == [(2, "s"), (10, "s")]
    assert error_profile([]) == {}


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        (("m", "gptq", "int", 3, 64, False), "m gptq 3bit g64"),
        (("m", "gptq", "int", 4, -1, True), "m gptq 4bit per channel sym"),
        (("m", "gptq", "q4_k_m", 4, 32, None), "m gptq q4_k_m"),
        (("m", "fp"), "m fp"),
    ],
)
def test_a_runs_name_says_what_it_is(fields: tuple, name: str) -> None:
    assert run_name(*fields) == name


def test_a_runs_name_says_what_tells_it_from_others_of_its_sweep() -> None:
    typed = ["method=gptq", "bits=3", "seed=1", "data=c4", "+data.path=/some/where/text.jsonl"]
    typed += [
        "method.solver.act_order=true",
        "out=x",
        "tracking=wandb",
        "eval.perplexity.seqlen=256",
        "~a",
        "resume=false",
    ]
    assert run_name("m", "gptq", "int", 3, 64, False, typed) == (
        "m gptq 3bit g64 seed=1 data=c4 path=text.jsonl act_order=true"
    )


# Failures


def test_a_wandb_that_cannot_be_imported_leaves_the_run_untracked(monkeypatch, caplog) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with caplog.at_level(logging.WARNING):
        tracker = WandbTracking().start({}, name="run", run_id=RUN)
    assert isinstance(tracker, NoTracking)
    assert len([record for record in caplog.records if record.levelno >= logging.WARNING]) == 1


def test_a_finish_that_fails_is_logged_once(wandb_home: Path, monkeypatch, caplog) -> None:
    import wandb

    tracker = WandbTracking(mode="offline", dir=str(wandb_home)).start({}, name="run")

    def fail(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(wandb, "Table", fail)
    with caplog.at_level(logging.WARNING):
        tracker.finish(AWQ_RESULT)
    warnings = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert [record.getMessage() for record in warnings] == [
        "tracking failed, the run goes on (OSError: [Errno 28] No space left on device)"
    ]


def test_an_agent_of_a_wandb_sweep_keeps_the_run_that_it_opened(wandb_home: Path, monkeypatch) -> None:
    monkeypatch.setenv("WANDB_SWEEP_ID", "abc")
    monkeypatch.setenv("WANDB_RUN_ID", "opened-by-the-agent")
    tracker = WandbTracking(dir=str(wandb_home)).start({}, name="run", run_id="f" * 64)
    tracker.finish(AWQ_RESULT)
    assert run_record(list(offline_records(wandb_home))).run_id == "opened-by-the-agent"


def test_the_sweep_that_wandb_runs_has_options_that_exist() -> None:
    sweep = yaml.safe_load((ROOT / "scripts" / "wandb_sweep.yaml").read_text())
    first = [f"{name}={choice['values'][0]}" for name, choice in sweep["parameters"].items()]
    given = [word for word in sweep["command"] if "=" in word]
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        check_options(compose("config", overrides=[*first, *given, "out=somewhere"]))
    assert (ROOT / sweep["program"]).is_file()
