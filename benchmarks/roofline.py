"""How near to this machine's limit each phase of quantization runs.

    python benchmarks/roofline.py [--methods gptq awq] [--model DIR] [--samples 32] [--seqlen 512] [--out FILE]

Measures, in one process, how fast this machine multiplies (float32 and bfloat16: the shapes of the model's linears on
a batch, and a large square; the faster counts) and copies, before and after. Then quantizes with the marks of
`gptq_awq.runtime.profiling` on, after a first block, not measured, that compiles what gets compiled. No phase can be
done in less than its operations at the matmul rate, nor its bytes at the copy rate
(gptq_awq/experiment/forecasting/costs.py counts both): the larger of the two over the measured seconds is the share of the limit. Seconds are a phase's own, without those inside of it.
"""

import argparse
import copy
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from gptq_awq.api import load_method
from gptq_awq.calibration.block_inputs import Settings
from gptq_awq.data.corpora import WikiText2
from gptq_awq.data.tokens import TokenSet
from gptq_awq.experiment.forecasting.costs import Costs, copy_rate, machine, matmul_rate
from gptq_awq.models.blocks import find_blocks
from gptq_awq.models.linear import is_linear, matrix
from gptq_awq.models.load import AssetModel, LoadedModel, LocalModel
from gptq_awq.numerics.dtypes import resolve_compute_dtype
from gptq_awq.quantization.quantize import quantize
from gptq_awq.runtime.profiling import PHASES, PhaseTime, Recorder, by_phase, markdown_table, spans

DTYPES = (torch.float32, torch.bfloat16)
SQUARE = 2048
NOT_CALIBRATION = ("factor", "search", "solve", "ledger")


@dataclass(frozen=True)
class Machine:
    """Operations per second by dtype, at the model's shapes and of a square; bytes copied per second."""

    model: Mapping[str, float]
    square: Mapping[str, float]
    copied: float

    def best(self, dtype: str) -> float:
        """The limit: the faster of the two."""
        return max(self.model[dtype], self.square[dtype])


def rates(loaded: LoadedModel, tokens: int, device: torch.device) -> Machine:
    """Measure the machine."""
    _, blocks = find_blocks(loaded.model)
    shapes = [tuple(matrix(m).shape) for m in blocks[0].modules() if is_linear(m)]
    model, square = {}, {}
    for dtype in DTYPES:
        name = str(dtype).removeprefix("torch.")
        least = {
            shape: 2 * tokens * shape[0] * shape[1] / matmul_rate(dtype, tokens, shape[1], shape[0], device)
            for shape in sorted(set(shapes))
        }
        work = sum(2 * tokens * out * width for out, width in shapes)
        model[name] = work / sum(least[shape] for shape in shapes)
        square[name] = matmul_rate(dtype, SQUARE, SQUARE, SQUARE, device)
    return Machine(model, square, copy_rate(device))


def faster(a: Machine, b: Machine) -> Machine:
    """The best of two measurements."""

    def of(x: Mapping[str, float], y: Mapping[str, float]) -> dict[str, float]:
        return {name: max(value, y[name]) for name, value in x.items()}

    return Machine(of(a.model, b.model), of(a.square, b.square), max(a.copied, b.copied))


def measure(
    loaded: LoadedModel, tokens: TokenSet, method: str, bits: int, settings: Settings
) -> tuple[float, list[PhaseTime]]:
    """Quantize a copy of the model: seconds in all, and by phase."""
    preset, grid = load_method(method, bits)
    for measured in (False, True):
        steps = quantize(copy.deepcopy(loaded.model), tokens, preset, grid, settings)
        if not measured:
            next(steps)
            steps.close()
            continue
        with Recorder(on=True) as recorder:
            start = time.perf_counter()
            for _ in steps:
                pass
            seconds = time.perf_counter() - start
    dtype = resolve_compute_dtype(settings.compute_dtype, loaded.model.device)
    return seconds, by_phase(spans(recorder.events), seconds, Costs.of(loaded.model, dtype))


def table(seconds: float, phases: Sequence[PhaseTime], limit: Machine) -> str:
    """One method's phases."""
    head = ("phase", "seconds", "share", "calls", "GFLOP", "GFLOP/s", "GB", "least seconds", "limited by")
    rows: list[tuple[str, ...]] = [(*head, "of the limit", "what it is")]
    for phase in phases:
        time_taken = (phase.name, f"{phase.seconds:.2f}", f"{phase.seconds / seconds:.1%}", str(phase.calls or ""))
        what = PHASES.get(phase.name, "what no mark covers")
        if not phase.flops or phase.seconds <= 0:
            rows.append((*time_taken, *6 * [""], what))
            continue
        work = (f"{phase.flops / 1e9:.1f}", f"{phase.flops / phase.seconds / 1e9:.1f}", f"{phase.bytes / 1e9:.2f}")
        multiply, move = phase.flops / limit.best(phase.rate), phase.bytes / limit.copied
        bound = f"{phase.rate} matmul" if multiply > move else "memory"
        least = max(multiply, move)
        rows.append((*time_taken, *work, f"{least:.3f}", bound, f"{least / phase.seconds:.0%}", what))
    rows.append(("all", f"{seconds:.2f}", "100%", *8 * [""]))
    return markdown_table(rows)


def calibration(phases: Sequence[PhaseTime], limit: Machine) -> str:
    """The share of the matmul limit over the whole of calibration."""
    named = {phase.name: phase for phase in phases}
    seconds = sum(phase.seconds for phase in phases if phase.name not in NOT_CALIBRATION)
    flops = sum(named[name].flops for name in ("forward", "moments") if name in named)
    rate = named["forward"].rate if "forward" in named else ""
    if not rate:
        return "No calibration: nothing went forward."
    least = flops / limit.best(rate)
    return (
        f"**Share of the matmul limit over the whole calibration (forward + moments): {least / seconds:.0%}** "
        f"({flops / 1e9:.0f} GFLOP at {limit.best(rate) / 1e9:.0f} GFLOP/s in {rate} are {least:.2f} s; all that is "
        f"not {', '.join(NOT_CALIBRATION)} took {seconds:.2f} s)"
    )


def page(options: argparse.Namespace) -> str:
    """Measure everything; the page in markdown."""
    source = LocalModel(path=options.model) if options.model else AssetModel(name="smollm2-135m", asset="smollm2-135m")
    loaded = source.load("float32", options.device)
    device, settings = loaded.model.device, Settings(tokens_per_batch=options.tokens_per_batch)
    tokens = WikiText2(split="valid", samples=options.samples, seqlen=options.seqlen).tokens(loaded.tokenizer, seed=0)
    batch = max(1, settings.tokens_per_batch // options.seqlen) * options.seqlen
    before = rates(loaded, batch, device)
    measured = {name: measure(loaded, tokens, name, options.bits, settings) for name in options.methods}
    limit = faster(before, rates(loaded, batch, device))
    head = ("what the machine reaches", "at the model's shapes", f"{SQUARE} x {SQUARE} square")
    reached = [
        (f"{name} matmul, GFLOP/s", f"{limit.model[name] / 1e9:.0f}", f"{limit.square[name] / 1e9:.0f}")
        for name in limit.model
    ]
    reached.append(("copy, GB/s read and written", f"{limit.copied / 1e9:.1f}", ""))
    parts = [
        "# Roofline of quantization",
        f"{machine(device)}. {loaded.name}, {options.bits} bits, {options.samples} x {options.seqlen} tokens in "
        f"batches of {batch}, calibrated in {resolve_compute_dtype('auto', device)}.",
        markdown_table([head, *reached]),
    ]
    for name, (seconds, phases) in measured.items():
        parts += [f"## {name}", table(seconds, phases, limit), calibration(phases, limit)]
    return "\n\n".join(parts) + "\n"


def main() -> None:
    """Print the page, or write it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", default=["gptq", "awq"])
    parser.add_argument("--model", help="a transformers folder; default: smollm2-135m")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--tokens-per-batch", type=int, default=Settings().tokens_per_batch)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, help="write the page here too")
    options = parser.parse_args()
    text = page(options)
    print(text)
    if options.out:
        options.out.write_text(text)


if __name__ == "__main__":
    main()
