"""Whole runs on a device and on the CPU: seconds of both, and whether their scores agree.

    python benchmarks/end_to_end.py [--model FOLDER] [--text FILE] [--out FILE] [--folder RUNS]
    python benchmarks/end_to_end.py --device cpu --tiny         the same at toy size, without a GPU

Each method is a `run.py` of its own: load, calibrate, write and verify a checkpoint, score. Forwards compute in
float32 on both devices, as only then do differences have one source, the order of sums. Random weights are the
hardest case for this, since rounding ties are many. Without --model it is a random Llama of two blocks.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from helpers.tiny_models import save_tiny_folder  # noqa: E402  (tests/ is no package)

RUNS = {
    "gptq": ("method=gptq", "bits=4", "sym=true", "export.formats=[gptq,compressed_tensors]"),
    "awq": ("method=awq", "bits=4", "export.formats=[hf]"),
    "fast": ("method=fast", "bits=3", "export.formats=[hf]"),
}
WITHIN = 0.01
"""Perplexities may differ by this share of themselves, and KL by this plus a tenth of itself."""
WORDS = ("the", "a", "cat", "dog", "sees", "likes", "house", "tree", "red", "small", "and", "then", "runs", "old")


@dataclass(frozen=True)
class Done:
    """A run that ended: its seconds by the clock, and its metrics by name."""

    seconds: float
    metrics: dict[str, float]

    def of(self, kind: str) -> float:
        """The one metric of a kind, such as "ppl"."""
        return next(value for name, value in self.metrics.items() if name.partition("/")[2].split("@")[0] == kind)


def call(name: str, device: str, options: list[str], folder: Path) -> Done:
    """Do one run. Raises RuntimeError with the end of what it said where it fails."""
    out, began = folder / f"{name}-{device}", time.perf_counter()
    command = [sys.executable, str(ROOT / "run.py"), *RUNS[name], *options, f"device={device}", f"out={out}"]
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, cwd=folder)
    if done.returncode:
        raise RuntimeError(f"{name} on {device}: exit {done.returncode}\n{done.stderr[-2000:]}")
    return Done(time.perf_counter() - began, json.loads((out / "results.json").read_text())["metrics"])


def agree(ours: Done, theirs: Done) -> bool:
    """Whether perplexity and KL of the two are equal to what the order of sums changes."""
    ppl = abs(ours.of("ppl") / theirs.of("ppl") - 1)
    return ppl <= WITHIN and abs(ours.of("kl") - theirs.of("kl")) <= WITHIN + 0.1 * theirs.of("kl")


def made_text(folder: Path) -> Path:
    """A text of random words, as no corpus is needed to compare devices."""
    draw, path = random.Random(0), folder / "words.txt"
    path.write_text("\n".join(" ".join(draw.choices(WORDS, k=12)) + "." for _ in range(4000)))
    return path


def size(tiny: bool) -> list[str]:
    """Options for the number of windows and their length."""
    samples, seqlen, windows = (8, 32, 16) if tiny else (64, 128, 64)
    lengths = [f"data.seqlen={seqlen}", f"eval.perplexity.seqlen={seqlen}"]
    return [*lengths, f"data.samples={samples}", f"eval.perplexity.windows={windows}", "group_size=32", "seed=0"]


def table(done: Mapping[tuple[str, str], Done], device: str) -> str:
    """Markdown table of all methods, of which some have not been run yet or failed."""
    lines = [f"| run | {device}, s | cpu, s | ppl | on cpu | KL | on cpu | |", "|---|" + "--:|" * 6 + "---|"]
    for name in RUNS:
        pair = [done.get((name, where)) for where in (device, "cpu")]
        cells = ["" if each is None else f"{each.seconds:.1f}" for each in pair]
        for kind in ("ppl", "kl"):
            cells += ["" if each is None else f"{each.of(kind):.5g}" for each in pair]
        ours, theirs = pair
        word = "" if ours is None or theirs is None else "agree" if agree(ours, theirs) else "**differ**"
        lines.append("| " + " | ".join([name, *cells, word]) + " |")
    return "\n".join(lines) + "\n"


def main() -> int:
    """Do all runs and print their table as Markdown; returns 1 where a run failed or devices disagree."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="toy size")
    parser.add_argument("--model", type=Path, help="a transformers folder")
    parser.add_argument("--text", type=Path, help="a text to calibrate and to score on; default: random words")
    parser.add_argument("--out", type=Path, help="also write the table there")
    parser.add_argument("--folder", type=Path, help="keep the runs there")
    given = parser.parse_args()
    if torch.device(given.device).type == "cuda" and not torch.cuda.is_available():
        parser.error("there is no CUDA device here; --device cpu --tiny checks the steps without one")
    folder = (given.folder or Path(tempfile.mkdtemp(prefix="end-to-end-"))).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    model = given.model.resolve() if given.model else save_tiny_folder(folder / "model")
    corpus = given.text.resolve() if given.text else made_text(folder)
    options = [f"model.path={model}", f"data.path={corpus}", f"eval.perplexity.path={corpus}", *size(given.tiny)]
    options += ["model=local", "data=local", "compute_dtype=float32", "eval.compute_dtype=float32", "dtype=float32"]
    done, failed = dict[tuple[str, str], Done](), False
    for device in dict.fromkeys([given.device, "cpu"]):  # the device's first: time may be short
        for name in RUNS:
            try:
                done[name, device] = call(name, device, options, folder)
            except RuntimeError as error:
                failed = True
                print(error, file=sys.stderr)
            text = table(done, given.device)
            if given.out:
                given.out.write_text(text)
    print(text, end="")
    return int(failed or "differ" in text)


if __name__ == "__main__":
    sys.exit(main())
