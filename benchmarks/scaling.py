"""Scaling of a method's time and memory with calibration tokens, width, depth and threads.

    python benchmarks/scaling.py [--methods gptq awq] [--quick] [--repeat 3] [--plot FILE.png] [--out FILE.md]

Quantizes randomly initialised Llamas (time does not depend on the weights) on random tokens. One axis is varied at a
time around a middle point; each point runs in a process of its own, after a warm-up on a model of one block for
compilation, `--repeat` times, of which the fastest counts. Memory is the process's peak beyond what it held with the
model loaded. An exponent is the slope of a line through log(seconds) over log(axis): 1 is proportional.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from gptq_awq import quantize_model
from gptq_awq.runtime import memory
from gptq_awq.runtime.profiling import machine, markdown_table

CPU = torch.device("cpu")
SEQLEN, VOCAB, HEAD = 256, 2048, 64


@dataclass(frozen=True)
class Point:
    """Sizes of one measurement: calibration tokens, width of the hidden states, number of blocks, threads."""

    tokens: int = 8192
    width: int = 512
    depth: int = 4
    threads: int = 1


AXES: dict[str, tuple[int, ...]] = {
    "tokens": (8192, 16384, 32768),
    "width": (256, 512, 768, 1024),
    "depth": (2, 4, 8),
    "threads": (1, 2),
}
QUICK: dict[str, tuple[int, ...]] = {"tokens": (2048, 4096), "width": (256, 512), "depth": (2, 4), "threads": (1, 2)}
QUICK_MIDDLE = Point(tokens=2048, width=256, depth=2)


@dataclass(frozen=True)
class Taken:
    """Result of one measurement: seconds, and peak bytes beyond the model."""

    seconds: float
    bytes: int


def llama(point: Point) -> LlamaForCausalLM:
    """Make a random Llama whose feed-forward layers are 8/3 as wide as its hidden states."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=point.width,
        intermediate_size=round(point.width * 8 / 3 / HEAD) * HEAD,
        num_hidden_layers=point.depth,
        num_attention_heads=point.width // HEAD,
        num_key_value_heads=point.width // HEAD,
        max_position_embeddings=SEQLEN,
    )
    return LlamaForCausalLM(config).eval().requires_grad_(False)


def measure(point: Point, method: str, repeat: int) -> Taken:
    """Measure a point by quantizing in this process."""
    ids = torch.randint(VOCAB, (point.tokens // SEQLEN, SEQLEN), generator=torch.Generator().manual_seed(0))
    quantize_model(llama(replace(point, depth=1)), ids[:1], method)
    seconds, most = math.inf, 0
    for _ in range(repeat):
        model = llama(point)
        memory.reset_peak(CPU)
        held = memory.peak_bytes(CPU)
        start = time.perf_counter()
        quantize_model(model, ids, method)
        seconds = min(seconds, time.perf_counter() - start)
        most = max(most, memory.peak_bytes(CPU) - held)
    return Taken(seconds, most)


def apart(point: Point, method: str, repeat: int) -> Taken:
    """Measure a point in a process of its own."""
    threads = {name: str(point.threads) for name in ("OMP_NUM_THREADS", "NUMBA_NUM_THREADS")}
    child = json.dumps(asdict(point) | {"method": method, "repeat": repeat})
    command = [sys.executable, __file__, "--child", child]
    done = subprocess.run(command, env=os.environ | threads, stdout=subprocess.PIPE, text=True, check=True)
    return Taken(**json.loads(done.stdout.splitlines()[-1]))


def exponent(xs: Sequence[float], ys: Sequence[float]) -> float:
    """Slope of the least-squares line through (log x, log y)."""
    a, b = [math.log(x) for x in xs], [math.log(y) for y in ys]
    mean_a, mean_b = sum(a) / len(a), sum(b) / len(b)
    covariance = sum((x - mean_a) * (y - mean_b) for x, y in zip(a, b, strict=True))
    return covariance / sum((x - mean_a) ** 2 for x in a)


Curve = list[tuple[int, Taken]]


def curves(method: str, middle: Point, axes: dict[str, tuple[int, ...]], repeat: int) -> dict[str, Curve]:
    """Measure all points, one axis varied at a time; a point that lies on several axes is measured once."""
    known: dict[Point, Taken] = {}

    def taken(point: Point) -> Taken:
        if point not in known:
            known[point] = apart(point, method, repeat)
            print(f"{method} {point}: {known[point].seconds:.2f} s", file=sys.stderr, flush=True)
        return known[point]

    return {
        axis: [(value, taken(replace(middle, **{axis: value}))) for value in values] for axis, values in axes.items()
    }


def table(method: str, by_axis: dict[str, Curve]) -> str:
    """Table of all points of a method, with the exponents of each axis in its last row."""
    rows: list[tuple[str, ...]] = [(method, "value", "seconds", "relative", "peak beyond the model", "exponents")]
    for axis, curve in by_axis.items():
        first = curve[0][1]
        for value, point in curve:
            numbers = (f"{point.seconds:.2f}", f"{point.seconds / first.seconds:.2f}", f"{point.bytes / 1e6:.0f} MB")
            rows.append((axis, str(value), *numbers, fitted(curve) if value == curve[-1][0] else ""))
    return markdown_table(rows)


def fitted(curve: Curve) -> str:
    """Exponents of seconds and memory along one axis, as text."""
    values = [value for value, _ in curve]
    seconds = f"seconds {exponent(values, [point.seconds for _, point in curve]):.2f}"
    most = [point.bytes for _, point in curve]
    return f"{seconds}, memory {exponent(values, most):.2f}" if min(most) > 0 else seconds


def plot(path: Path, measured: dict[str, dict[str, Curve]]) -> None:
    """Plot seconds over each axis, both logarithmic, one line per method."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot, ticker

    axes = list(next(iter(measured.values())))
    figure, panels = pyplot.subplots(
        1, len(axes), figsize=(3.2 * len(axes), 3), layout="constrained", squeeze=False, sharey=True
    )
    for panel, axis in zip(panels[0], axes, strict=True):
        for method, by_axis in measured.items():
            values = [value for value, _ in by_axis[axis]]
            panel.plot(values, [point.seconds for _, point in by_axis[axis]], marker="o", label=method)
        panel.set(xscale="log", yscale="log", xlabel=axis, xticks=values, xticklabels=[str(value) for value in values])
        panel.minorticks_off()
        panel.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
        panel.yaxis.set_major_formatter(ticker.FormatStrFormatter("%g"))
        panel.tick_params(labelleft=panel is panels[0][0])
    panels[0][0].set_ylabel("seconds")
    panels[0][0].legend()
    figure.savefig(path, dpi=150)


def parsed(arguments: Iterable[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", default=["gptq", "awq"])
    parser.add_argument("--quick", action="store_true", help="few, small points: a minute or two")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--plot", type=Path, help="draw here (needs the extra `plots`)")
    parser.add_argument("--out", type=Path, help="write the tables here too")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    return parser.parse_args(None if arguments is None else list(arguments))


def main() -> None:
    """Measure all points, print a table per method."""
    options = parsed()
    if options.child:
        asked: dict[str, Any] = json.loads(options.child)
        method, repeat = asked.pop("method"), asked.pop("repeat")
        print(json.dumps(asdict(measure(Point(**asked), method, repeat))))
        return
    middle, axes = (QUICK_MIDDLE, QUICK) if options.quick else (Point(), AXES)
    measured = {method: curves(method, middle, axes, options.repeat) for method in options.methods}
    around = ", ".join(f"{name} {value}" for name, value in asdict(middle).items())
    parts = ["# How quantization scales", f"{machine(CPU).rpartition(',')[0]}. 4 bits; around {around}."]
    parts += [table(method, by_axis) for method, by_axis in measured.items()]
    text = "\n\n".join(parts) + "\n"
    print(text)
    if options.out:
        options.out.write_text(text)
    if options.plot:
        plot(options.plot, measured)


if __name__ == "__main__":
    main()
