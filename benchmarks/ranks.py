"""Speed-up of GPTQ by two ranks: seconds of quantizing the same model on the same tokens with one rank and with two.

    python benchmarks/ranks.py [--samples 32 --seqlen 512] [--repeat 1] [-- method=gptq model=local model.path=DIR …]

Every rank has one core and one thread, so the ratio is the gain from a second core that is a rank of its own. Options
of run.py follow `--`. Only the baseline is read from the cache; evaluation is short.
"""

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def main() -> None:
    """Time one rank and two in turns, and print the ratio of their medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--repeat", type=int, default=1)
    parser.add_argument("options", nargs="*", help="options of run.py, after --")
    asked = parser.parse_args()
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        parser.error("two ranks want two cores")
    options = ["method=gptq", "resume=false", f"data.samples={asked.samples}", f"data.seqlen={asked.seqlen}"]
    options += ["eval.perplexity.windows=1", *asked.options]
    seconds: dict[int, list[float]] = {1: [], 2: []}
    with tempfile.TemporaryDirectory() as folder:
        for turn in range(asked.repeat):
            for size, found in seconds.items():
                out = Path(folder) / f"{size}-{turn}"
                found.append(quantized(cores[:size], [*options, f"out={out}"], out))
                print(f"{size} rank{'s' * (size > 1)}: quantize {found[-1]:.1f} s", flush=True)
    one, two = (statistics.median(found) for found in seconds.values())
    print(f"one rank {one:.1f} s, two ranks {two:.1f} s, ratio {one / two:.2f} (target 1.6)")


def quantized(cores: list[int], options: list[str], out: Path) -> float:
    """Quantization time in seconds with one rank on each of the given cores."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    single = dict.fromkeys(("OMP_NUM_THREADS", "NUMBA_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    ranks = []
    for rank, core in enumerate(cores):
        place = {"RANK": str(rank), "WORLD_SIZE": str(len(cores)), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        command = ["taskset", "-c", str(core), sys.executable, str(ROOT / "run.py"), *options]
        ranks.append(subprocess.Popen(command, env=os.environ | single | place, stdout=subprocess.DEVNULL))
    if any([process.wait() for process in ranks]):  # a list, so that all ranks are waited for
        raise SystemExit("a rank failed")
    return json.loads((out / "results.json").read_text())["seconds"]["quantize"]


if __name__ == "__main__":
    main()
