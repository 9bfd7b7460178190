"""Time of a sweep against the same runs one by one, with nothing shared.

    python benchmarks/sweep.py [--methods rtn awq gptq] [--bits 2 3 4 8] [--alone 3] [--out FOLDER] [run.py options …]

A sweep (`run.py -m`, one process) with an empty cache, then separate runs (`run.py`, a process each), each with a cache
of its own that holds the model and nothing else. `--alone 3` runs only those of 3 bits alone and counts each for all
widths, as time does not depend on bits. Prints seconds by phase, the ratio, and whether both ways gave equal metrics.
Options are passed on: `method.error_propagation=false`, `model=local model.path=DIR …`.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from gptq_awq.results import Result
from gptq_awq.storage.assets import cache_dir

RUN = Path(__file__).resolve().parent.parent / "run.py"
PHASES = ("load", "baseline", "quantize", "evaluate")


def fresh_cache(folder: Path) -> Path:
    """Make a cache folder that has the downloads of the usual one, and nothing computed from them."""
    folder.mkdir(parents=True)
    for kind in ("assets", "models"):
        if (cache_dir() / kind).is_dir():
            (folder / kind).symlink_to(cache_dir() / kind)
    return folder


def timed(cache: Path, *options: str) -> float:
    """Run run.py once; returns its wall time in seconds."""
    environment = os.environ | {"GPTQ_AWQ_CACHE": str(cache)}
    start = time.perf_counter()
    subprocess.run([sys.executable, str(RUN), *options], env=environment, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def sweep(out: Path, methods: list[str], bits: list[int], options: list[str]) -> float:
    """Run all methods and bits as one sweep; returns its wall time in seconds."""
    grid = (f"method={','.join(methods)}", f"bits={','.join(map(str, bits))}")
    folders = (f"hydra.sweep.dir={out}", "hydra.sweep.subdir=${hydra:runtime.choices.method}_${bits}")
    return timed(fresh_cache(out / ".cache"), "-m", *grid, *options, *folders)


def alone(out: Path, methods: list[str], bits: list[int], options: list[str]) -> dict[str, float]:
    """Run every method and width by itself; returns seconds by folder name."""
    seconds = {}
    for method in methods:
        for width in bits:
            name = f"{method}_{width}"
            cache = fresh_cache(out / ".cache" / name)
            seconds[name] = timed(cache, f"method={method}", f"bits={width}", *options, f"out={out / name}")
            print(f"alone: {name} {seconds[name]:.1f} s", flush=True)
    return seconds


def phases(folder: Path, names: list[str]) -> str:
    """Format mean seconds by phase over the named runs, as cells of the table."""
    rows = [Result.read(folder / name / "results.json").seconds for name in names]
    return " | ".join(f"{sum(row.get(phase, 0) for row in rows) / len(rows):.1f}" for phase in PHASES)


def main() -> None:
    """Measure both ways and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", default=["rtn", "awq", "gptq"])
    parser.add_argument("--bits", nargs="+", type=int, default=[2, 3, 4, 8])
    parser.add_argument("--alone", nargs="+", type=int, help="widths to run alone; default: all")
    parser.add_argument("--out", type=Path, help="keep the runs here; default: a temporary folder")
    arguments, options = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as scratch:
        out = arguments.out or Path(scratch)
        together = sweep(out / "sweep", arguments.methods, arguments.bits, options)
        widths = arguments.alone or arguments.bits
        separate = alone(out / "alone", arguments.methods, widths, options)
        runs, counted = len(arguments.methods) * len(arguments.bits), len(arguments.bits) / len(widths)
        apart = sum(separate.values()) * counted
        print(f"\n| | runs | total | {' | '.join(PHASES)} |\n|:---|---:|---:|{'---:|' * len(PHASES)}")
        for method in arguments.methods:
            names = [f"{method}_{width}" for width in widths]
            print(f"| {method} in the sweep | | | {phases(out / 'sweep', names)} |")
            print(f"| {method} alone | | | {phases(out / 'alone', names)} |")
        print(f"| sweep | {runs} | {together:.0f} s |{' |' * len(PHASES)}")
        measured = "" if counted == 1 else f" ({len(separate)} measured)"
        print(f"| alone{measured} | {runs} | {apart:.0f} s |{' |' * len(PHASES)}")
        pairs = [
            [Result.read(out / way / name / "results.json").metrics for way in ("sweep", "alone")] for name in separate
        ]
        same = sum(a == b for a, b in pairs)
        print(f"\nsweep / alone = {together / apart:.2f}; equal metrics in {same} of {len(separate)} runs")


if __name__ == "__main__":
    main()
