"""Accuracy of forecasts: seconds by phase and peak memory of runs as forecast, beside what the runs took.

    python benchmarks/forecast.py --model DIR [--text FILE] [--methods rtn,gptq,awq,fast] [--only SUBSTRING] [run.py …]

Each run is one call of run.py with `forecast=true` and a cache of its own: the methods on the model in DIR, and two on
a random Llama, 1024 wide, that is offloaded from disk. Further options are run.py's, such as `data.samples=64`. A ratio
is taken / forecast: between 0.83 and 1.2 a forecast is within 20%. Threads are what the environment says.
"""

import argparse
import math
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from large_model import SMALL, make

from gptq_awq.results import Result
from gptq_awq.runtime.profiling import machine, markdown_table

RUN = Path(__file__).resolve().parent.parent / "run.py"
SETTINGS = ("group_size=32", "data.samples=64", "data.seqlen=256", "tokens_per_batch=2048")
SCORED = ("eval.perplexity.seqlen=256", "eval.perplexity.windows=32")
OFFLOADED = ("stream=true", "data.samples=32", "eval.perplexity.windows=8")
BLOCKS = 6
Row = tuple[str, ...]


def options(model: Path, text: Path | None) -> list[str]:
    """Options for the model and its calibration and evaluation texts: two parts of one text, or the defaults."""
    found = ["model=local", f"model.path={model}", *SETTINGS, *SCORED]
    return found if text is None else [*found, "data=local", f"data.path={text}", f"eval.perplexity.path={text}"]


def random_llama(folder: Path, like: Path) -> Path:
    """Write a random Llama, larger than the models that methods are tried on, with the tokenizer in `like`."""
    made = make(folder, SMALL | {"num_hidden_layers": BLOCKS})
    for file in like.glob("tokenizer*"):
        shutil.copy(file, made / file.name)
    return made


def measure(out: Path, *options: str) -> Result:
    """Make one run, with a forecast and a cache of its own."""
    environment = os.environ | {"GPTQ_AWQ_CACHE": str(out / ".cache")}
    command = [sys.executable, str(RUN), *options, "forecast=true", f"out={out}"]
    subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL)
    return Result.read(out / "results.json")


def rows(name: str, result: Result) -> list[Row]:
    """Rows of forecast, taken and ratio: seconds of every phase and of the run, and peak memory."""
    found, forecast = [], result.forecast
    if forecast is None:
        raise SystemExit(f"{name}: no forecast was made, see its run.log")
    for phase, expected in forecast["seconds"].items():
        found.append(_row(name, phase, expected, result.seconds[phase], "s"))
    made = result.seconds["forecast"] / result.seconds["total"]
    found.append((name, "forecast itself", "", f"{result.seconds['forecast']:.1f} s", f"{made:.0%} of all"))
    expected, taken = forecast["peak_memory_bytes"] / 1e9, (result.peak_memory_bytes or 0) / 1e9
    return [*found, _row(name, "peak memory", expected, taken, "GB")]


def _row(name: str, what: str, expected: float, taken: float, unit: str) -> Row:
    ratio = f"{taken / expected:.2f}" if expected else "" if taken < 0.5 else f"{math.inf}"
    digits = 1 if unit == "s" else 2
    return (name, what, f"{expected:.{digits}f} {unit}", f"{taken:.{digits}f} {unit}", ratio)


def main() -> None:
    """Make all runs, and print the table as it grows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="a transformers folder")
    parser.add_argument("--text", type=Path, help="a text file; by default WikiText-2, fetched")
    parser.add_argument("--methods", default="rtn,gptq,awq,fast", help="on the model in DIR")
    parser.add_argument("--only", default="", help="runs whose name has this in it, such as offloaded")
    arguments, more = parser.parse_known_args()
    print(machine(torch.device("cpu")))
    print(markdown_table([("run", "what", "forecast", "taken", "taken / forecast")]))
    with tempfile.TemporaryDirectory() as scratch:
        runs = {method: (arguments.model, method) for method in arguments.methods.split(",")}
        runs |= {f"offloaded {method}": (Path(scratch) / "llama", method) for method in ("gptq", "awq")}
        for name, (model, method) in runs.items():
            if arguments.only not in name:
                continue
            from_disk = model != arguments.model
            if from_disk and not model.exists():
                random_llama(model, arguments.model)
            given = [*options(model, arguments.text), *(OFFLOADED if from_disk else ()), f"method={method}", *more]
            result = measure(Path(scratch) / name.replace(" ", "-"), *given)
            for row in rows(name, result):
                print(f"| {' | '.join(row)} |", flush=True)


if __name__ == "__main__":
    main()
