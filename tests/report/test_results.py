"""Laws of the results row and the ledger: what is written is what is read, and a torn file harms nobody."""

import json
import logging
import math
import os
import time
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from gptq_awq.errors import UserError
from gptq_awq.results import Ledger, Result, count, load, read_ledger, without_copies

CONTRACT = [
    *("method", "bits", "bits_per_weight", "group_size", "sym", "model", "status", "metrics", "size_bytes"),
    *("baseline_size_bytes", "seconds", "peak_memory_bytes", "ledger", "manifest", "config"),
]
FORMATS = ["grid", "act", "kv"]
RESULT = Result(
    method="awq",
    bits=4,
    bits_per_weight=4.5,
    group_size=64,
    sym=False,
    model="stories15M",
    status="done",
    metrics={"wikitext2/ppl@2048": 22.15, "wikitext2/ppl@2048/delta_ci95": [2.7, 3.1]},
    size_bytes=90_000_000,
    baseline_size_bytes=269_000_000,
    seconds={"quantize": 52.5, "evaluate": 20.0},
    peak_memory_bytes=1_240_000_000,
    ledger="ledger.jsonl",
    manifest={"tokens": {"eval": {"wikitext2": "ab12"}}},
    config={"seed": 0, "method": {"solver": {"damping": 0.01}}},
)


def test_a_row_has_the_keys_of_the_contract_and_error_only_after_a_failure(tmp_path: Path) -> None:
    assert list(json.loads(RESULT.write(tmp_path).read_text())) == [*CONTRACT, *FORMATS]
    failed = replace(RESULT, status="failed", error="UserError: bits=9")
    assert list(json.loads(failed.write(tmp_path).read_text())) == [*CONTRACT, "error", *FORMATS]


def test_what_is_written_is_what_is_read(tmp_path: Path) -> None:
    assert Result.read(RESULT.write(tmp_path)) == RESULT


def test_non_finite_metrics_are_strict_json_and_come_back_as_floats(tmp_path: Path) -> None:
    metrics = {"a": math.inf, "b": -math.inf, "c": math.nan, "d_ci95": [0.5, math.inf], "e": np.float32("inf")}
    path = replace(RESULT, metrics=metrics).write(tmp_path)

    def refuse(token: str) -> None:
        raise AssertionError(f"{token} is not JSON")

    json.loads(path.read_text(), parse_constant=refuse)
    row = load(tmp_path).iloc[0]
    assert (row["a"], row["b"], row["d_ci95"], row["e"]) == (math.inf, -math.inf, [0.5, math.inf], math.inf)
    assert math.isnan(row["c"])


def test_arrays_tensors_paths_and_dtypes_are_written_as_plain_values(tmp_path: Path) -> None:
    metrics = {"x": np.float32(0.5), "y": torch.tensor(2.0), "z": torch.tensor([1, 2])}
    config = {"path": tmp_path, "dtype": torch.float32}
    read = Result.read(replace(RESULT, metrics=metrics, config=config).write(tmp_path))
    assert read.metrics == {"x": 0.5, "y": 2.0, "z": [1, 2]}
    assert read.config == {"path": str(tmp_path), "dtype": "torch.float32"}


def test_a_write_that_fails_leaves_the_earlier_row_and_no_litter(tmp_path: Path, monkeypatch) -> None:
    RESULT.write(tmp_path)

    def full(descriptor: int) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="no space"):
        replace(RESULT, method="gptq").write(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]
    assert Result.read(tmp_path / "results.json") == RESULT


def test_a_row_is_as_readable_as_any_file_of_the_user(tmp_path: Path) -> None:
    (tmp_path / "other").write_text("")
    assert RESULT.write(tmp_path).stat().st_mode == (tmp_path / "other").stat().st_mode


def test_load_flattens_metrics_and_seconds_and_names_the_run_folder(tmp_path: Path) -> None:
    for name, method in (("b/0", "gptq"), ("a", "awq")):
        (tmp_path / name).mkdir(parents=True)
        replace(RESULT, method=method).write(tmp_path / name)
    df = load(tmp_path)
    assert list(df["method"]) == ["awq", "gptq"]  # in the order of paths
    assert list(df["path"]) == [str(tmp_path / "a"), str(tmp_path / "b" / "0")]
    assert df["wikitext2/ppl@2048"].tolist() == [22.15, 22.15]
    assert df["seconds/quantize"].tolist() == [52.5, 52.5]
    assert df["config"][0] == RESULT.config
    assert set(CONTRACT) <= set(df.columns)


def test_copies_of_a_computation_are_one_row_and_a_finished_one_wins(tmp_path: Path) -> None:
    same, other = {"run": "ab" * 32}, {"run": "cd" * 32}
    failed = replace(RESULT, status="failed", error="killed", manifest=same)
    runs = {"a": failed, "b": replace(RESULT, manifest=same), "c": replace(RESULT, manifest=same)}
    runs |= {
        "d": replace(RESULT, manifest=other),
        "e": RESULT,
        "f": RESULT,
    }  # the last two: of before there were hashes
    for name, run in runs.items():
        (tmp_path / name).mkdir()
        run.write(tmp_path / name)
    assert [Path(path).name for path in load(tmp_path)["path"]] == ["b", "d", "e", "f"]
    assert len(load(tmp_path, copies=True)) == 6


def test_several_roots_are_one_table_and_may_overlap(tmp_path: Path) -> None:
    for name in ("a", "b/c"):
        (tmp_path / name).mkdir(parents=True)
        RESULT.write(tmp_path / name)
    assert len(load(tmp_path / "a", tmp_path / "b", tmp_path / "b" / "c")) == 2
    with pytest.raises(UserError, match="typo"):
        load(tmp_path / "a", tmp_path / "typo")


@pytest.mark.parametrize(
    "text", ["", "{", '{"method": "aw', "[1, 2]", '{"results": {"lambada": 0.3}}', '"\ud83d"', "null"]
)
def test_a_file_that_is_no_whole_row_is_skipped_with_a_warning(text: str, tmp_path: Path, caplog) -> None:
    (tmp_path / "good").mkdir()
    RESULT.write(tmp_path / "good")
    (tmp_path / "results.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    with caplog.at_level(logging.WARNING):
        assert len(load(tmp_path)) == 1
    assert str(tmp_path / "results.json") in caplog.text


def test_no_runs_are_an_empty_table_and_no_folder_is_the_users_mistake(tmp_path: Path) -> None:
    assert load(tmp_path).empty
    assert set(CONTRACT) <= set(load(tmp_path).columns)
    with pytest.raises(UserError, match="no folder"):
        load(tmp_path / "typo")


def test_ten_thousand_rows_load_quickly(tmp_path: Path) -> None:
    """The figure is 10,000 rows in 2 s; writing so many takes longer, so here a tenth, and slack."""
    row = (RESULT.write(tmp_path)).read_bytes()
    for number in range(1_000):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "results.json").write_bytes(row)
    start = time.perf_counter()
    assert len(load(tmp_path)) == 1_001
    assert time.perf_counter() - start < 2


def test_the_ledger_reads_back_what_each_block_appended(tmp_path: Path) -> None:
    ledger = Ledger.create(tmp_path / "ledger.jsonl")
    ledger.append([{"layer": "0.q", "error": 0.5, "fallback": None}, {"layer": "0.k", "error": math.inf}])
    assert len(read_ledger(ledger.path)) == 2  # on disk before the next block
    ledger.append([{"layer": "1.q", "error": 0.25, "shape": [8, 4]}])
    df = read_ledger(ledger.path)
    assert df["layer"].tolist() == ["0.q", "0.k", "1.q"]
    assert df["error"].tolist() == [0.5, math.inf, 0.25]
    assert df["shape"][2] == [8, 4]


def test_a_new_ledger_replaces_an_old_one(tmp_path: Path) -> None:
    Ledger.create(tmp_path / "l").append([{"layer": "old"}])
    assert read_ledger(Ledger.create(tmp_path / "l").path).empty


def test_a_resumed_ledger_equals_one_never_interrupted(tmp_path: Path) -> None:
    blocks = [[{"layer": f"{block}.{name}"} for name in "qkv"] for block in range(3)]
    whole, killed = Ledger.create(tmp_path / "whole"), Ledger.create(tmp_path / "killed")
    for block in blocks:
        whole.append(block)
    killed.append(blocks[0])
    killed.append(blocks[1][:1])  # then killed in the middle of a line
    with killed.path.open("a") as file:
        file.write('{"layer": "1.')
    resumed = Ledger.resume(killed.path, rows=3)
    for block in blocks[1:]:
        resumed.append(block)
    assert resumed.path.read_bytes() == whole.path.read_bytes()
    with pytest.raises(ValueError, match="9 rows, not the 10"):
        Ledger.resume(whole.path, rows=10)


def test_a_torn_ledger_line_is_skipped_with_a_warning(tmp_path: Path, caplog) -> None:
    ledger = Ledger.create(tmp_path / "l")
    ledger.append([{"layer": "0.q"}])
    with ledger.path.open("a") as file:
        file.write('{"layer": "0.')
    with caplog.at_level(logging.WARNING):
        assert read_ledger(ledger.path)["layer"].tolist() == ["0.q"]
    assert "line 2" in caplog.text


def test_a_result_cannot_be_changed_after_the_fact() -> None:
    with pytest.raises(AttributeError):
        RESULT.bits = 3  # pyright: ignore[reportAttributeAccessIssue]
    assert [field.name for field in fields(Result)] == [*CONTRACT, "error", *FORMATS, "forecast"]


def test_a_row_of_before_there_were_number_formats_is_read(tmp_path: Path) -> None:
    row = json.loads(RESULT.write(tmp_path).read_text())
    del row["grid"]
    (tmp_path / "results.json").write_text(json.dumps(row))
    assert Result.read(tmp_path / "results.json").grid is None


def test_a_table_of_all_rows_less_its_copies_is_what_load_gives(tmp_path) -> None:
    row = replace(RESULT, manifest={"run": "a"})
    for name in ("one", "two", "three/.hidden", "four"):
        (tmp_path / name).mkdir(parents=True)
        row.write(tmp_path / name)
    (tmp_path / "four" / "results.json").write_text("{}")
    every = load(tmp_path, copies=True)
    assert (len(every), count(tmp_path)) == (2, 3)
    assert list(without_copies(every)["path"]) == list(load(tmp_path)["path"])
