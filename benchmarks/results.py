"""Time of loading thousands of results, and of reporting hundreds.

    python benchmarks/results.py RUN_DIR [--rows 10000] [--runs 500] [--blocks 30] [--text-blocks 128]

RUN_DIR is a finished run; its row, ledger and scores are multiplied with other settings, losses and hashes: rows as
large as real ones, ledgers of `--blocks` blocks, `--text-blocks` bootstrap blocks per text (128 is 8 windows of 2048
tokens). The report's time is that of the whole command with all four formats, Python's start included. On a busy
machine compare CPU seconds rather than wall time.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from gptq_awq.evaluation.scores import Scores
from gptq_awq.results import load

METHODS = ("rtn", "awq", "gptq", "awq_gptq")
BITS = (2, 3, 4, 8)
GROUPS = (-1, 128, 64, 32)


def main() -> None:
    """Time loading and reporting, and print seconds and sizes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--rows", type=int, default=10_000)
    parser.add_argument("--runs", type=int, default=500)
    parser.add_argument("--blocks", type=int, default=30)
    parser.add_argument("--text-blocks", type=int, default=128)
    options = parser.parse_args()
    row = json.loads((options.run / "results.json").read_text())
    ledger = [json.loads(line) for line in (options.run / "ledger.jsonl").read_text().splitlines()]
    with tempfile.TemporaryDirectory() as folder:
        time_loading(row, options.rows, Path(folder) / "rows")
        runs = Path(folder) / "runs"
        for index in range(options.runs):
            write_run(row, ledger, index, runs / str(index), options.blocks, options.text_blocks)
        time_report(runs, Path(folder) / "out", options.runs)


def time_loading(row: dict[str, Any], count: int, root: Path) -> None:
    """Write `count` rows once, and time loading them three times."""
    size = 0
    for index in range(count):
        (root / str(index // 100) / str(index)).mkdir(parents=True)
        text = json.dumps(varied_row(row, index), indent=1)
        (root / str(index // 100) / str(index) / "results.json").write_text(text)
        size += len(text)
    import pandas as pd

    assert pd is not None  # its import is not what is measured
    for _ in range(3):
        start, processor = time.perf_counter(), time.process_time()
        assert len(load(root)) == count
        wall, processor = time.perf_counter() - start, time.process_time() - processor
        print(f"{count} rows of {size / count / 1e3:.1f} kB load in {wall:.2f} s ({processor:.2f} s of processor)")


def time_report(runs: Path, out: Path, count: int) -> None:
    """Time the whole command `python -m gptq_awq.report`."""
    start, before = time.perf_counter(), processor_of_children()
    command = [sys.executable, "-m", "gptq_awq.report", str(runs), "--out", str(out)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wall, processor = time.perf_counter() - start, processor_of_children() - before
    size = (out / "report.html").stat().st_size
    print(f"report of {count} runs in {wall:.2f} s ({processor:.2f} s of processor), HTML of {size / 1e6:.2f} MB")


def processor_of_children() -> float:
    """CPU seconds of all finished child processes."""
    times = os.times()
    return times.children_user + times.children_system


def varied_row(row: dict[str, Any], index: int) -> dict[str, Any]:
    """Vary a row as if of another run of a sweep over method × bits × group size × seed."""
    method, bits = METHODS[index % 4], BITS[index // 4 % 4]
    group, seed = GROUPS[index // 16 % 4], index // 64
    config = row["config"] | {"bits": bits, "group_size": group, "seed": seed}
    config["method"] = config["method"] | {"name": method}
    factor = 1 + (0.5 + METHODS.index(method)) * 4.0**-bits
    metrics = {
        name: value * factor if isinstance(value, float) and not name.endswith("/baseline") else value
        for name, value in row["metrics"].items()
    }
    return row | {
        "method": method,
        "bits": bits,
        "group_size": group,
        "config": config,
        "metrics": metrics,
        "bits_per_weight": bits + (16 + bits) / (group if group > 0 else 512),
        "manifest": row["manifest"] | {"run": f"{index:064x}", "seed": seed},
    }


def write_run(
    row: dict[str, Any], ledger: list[dict[str, Any]], index: int, folder: Path, blocks: int, text_blocks: int
) -> None:
    """Write the folder of a varied run: row, ledger and scores."""
    folder.mkdir(parents=True)
    varied = varied_row(row, index)
    (folder / "results.json").write_text(json.dumps(varied, indent=1))
    first = [line for line in ledger if line["block"] == 0]
    with (folder / "ledger.jsonl").open("w") as file:
        for block in range(blocks):
            for line in first:
                name = line["name"].replace(".0.", f".{block}.", 1)
                error = 4.0 ** -varied["bits"] * (1 + block / blocks)
                file.write(json.dumps(line | {"name": name, "block": block, "error_after": error}) + "\n")
    rng = np.random.default_rng(index)
    arrays: dict[str, np.ndarray] = {}
    for text in {name.partition("/")[0] for name in row["metrics"] if "ppl" in name}:
        baseline = np.random.default_rng(0).normal(400, 60, text_blocks)
        loss = np.abs(rng.normal(400 * 4.0 ** -varied["bits"], 8, text_blocks))
        arrays |= {
            f"{text}/tokens": np.full(text_blocks, 128.0),
            f"{text}/nll": baseline + loss,
            f"{text}/nll/baseline": baseline,
            f"{text}/kl": loss,
            f"{text}/agree": 128 - np.minimum(loss, 128),
        }
    Scores(arrays).write(folder)


if __name__ == "__main__":
    main()
