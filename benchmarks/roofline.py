"""Share of this machine's limit that each phase of quantization reaches.

    python benchmarks/roofline.py [--methods gptq awq] [--model DIR] [--samples 32] [--seqlen 512] [--out FILE]

Measures, in one process, how fast this machine multiplies (float32 and bfloat16: the shapes of the model's linears on
a batch, and a large square; the faster counts) and copies, before and after. Then quantizes with the marks of
`gptq_awq.runtime.profiling` on, after a first block, not measured, that compiles what gets compiled. No phase can be
done in less than its operations at the matmul rate, nor its bytes at the copy rate (`Costs` counts both): the larger
of the two over the measured seconds is the share of the limit. Seconds are a phase's own, without those inside of it.
"""

import argparse
import copy
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from gptq_awq.api import load_method
from gptq_awq.calibration.block_inputs import Settings
from gptq_awq.data.corpora import WikiText2
from gptq_awq.data.tokens import TokenSet
from gptq_awq.models.blocks import find_blocks
from gptq_awq.models.linear import is_linear, matrix
from gptq_awq.models.load import AssetModel, LoadedModel, LocalModel
from gptq_awq.numerics.dtypes import resolve_compute_dtype
from gptq_awq.quantization.quantize import quantize
from gptq_awq.runtime.memory import keep_freed
from gptq_awq.runtime.profiling import PHASES, Recorder, Span, by_phase, machine, markdown_table

DTYPES = (torch.float32, torch.bfloat16)
SQUARE = 2048
NOT_CALIBRATION = ("factor", "search", "solve", "ledger")


@dataclass(frozen=True)
class Cost:
    """The least work of a step: operations (a multiplication and an addition are two) and bytes of memory moved.

    `rate` names the matmul rate that it can reach at most: a dtype.
    """

    flops: float = 0.0
    bytes: float = 0.0
    rate: str = ""

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.flops + other.flops, self.bytes + other.bytes, self.rate or other.rate)


@dataclass(frozen=True)
class Costs:
    """Costs of the steps that `profiling.phase` marks with a size while a model is quantized.

    Attributes:
        block_weights: weights in the linears of a block, on average over the blocks.
        block_edges: inputs and outputs of these linears, per token.
        attention: width of all heads together.
        compute: dtype of calibration forwards.
    """

    block_weights: float
    block_edges: float
    attention: int
    compute: torch.dtype

    @classmethod
    def of(cls, model: Any, compute: torch.dtype) -> "Costs":
        """Count the model's linears."""
        _, blocks = find_blocks(model)
        shapes = [tuple(matrix(module).shape) for module in blocks.modules() if is_linear(module)]
        config = model.config.get_text_config()
        heads = config.num_attention_heads * (getattr(config, "head_dim", None) or 0)
        return cls(
            block_weights=sum(out * width for out, width in shapes) / len(blocks),
            block_edges=sum(out + width for out, width in shapes) / len(blocks),
            attention=heads or config.hidden_size,
            compute=compute,
        )

    def __call__(self, step: Span) -> Cost:
        """Cost of one marked step; an empty one where it was marked without a size, or is not counted."""
        count: Callable[..., Cost] | None = {
            "forward": self._forward,
            "moments": self._moments,
            "factor": self._factor,
            "search": self._search,
            "solve": self._solve,
        }.get(step.phase)
        return count(*step.size) if count and step.size else Cost()

    def _forward(self, rows: int, tokens: int) -> Cost:
        """One block on a batch: 2 per weight and token; causal QKᵀ and PV, half of 2 x 2 tokens² width each."""
        n = rows * tokens
        flops = 2 * n * self.block_weights + 2 * n * tokens * self.attention
        return Cost(flops, self.compute.itemsize * (self.block_weights + n * self.block_edges), _named(self.compute))

    def _moments(self, tokens: int, width: int, cross: int = 0) -> Cost:
        """Σ x xᵀ on and above its diagonal, and the whole of Σ x̃ xᵀ; sums are read and written in float32."""
        products = width * (width + 1) / 2 + cross * width**2
        traffic = self.compute.itemsize * tokens * width * (1 + cross) + 2 * 4 * products
        return Cost(2 * tokens * products, traffic, _named(self.compute))

    def _factor(self, width: int, count: int = 1) -> Cost:
        """Cholesky factorizations and the inverses of their factors, n³/3 each."""
        return Cost(count * 2 * width**3 / 3, count * 2 * 4 * width**2, "float32")

    def _solve(self, out: int, width: int) -> Cost:
        """Feedback of every error to the columns after it: out x in²/2 multiplications and additions."""
        return Cost(out * width**2, 4 * (2 * out * width + width**2 / 2), "float32")

    def _search(self, out: int, width: int) -> Cost:
        """One candidate's tr(ΔHΔᵀ), of one half of H; candidates are only compared, so rough products do."""
        return Cost(out * width * (width + 2), 4 * (out * width + width**2 / 2), _named(self.compute))


def matmul_rate(
    dtype: torch.dtype, rows: int, inner: int, columns: int, device: torch.device, seconds: float = 0.3
) -> float:
    """Operations per second of (rows, inner) @ (inner, columns), the best of what `seconds` have room for."""
    a = torch.randn(rows, inner, device=device).to(dtype)
    b = torch.randn(inner, columns, device=device).to(dtype)
    return 2 * rows * inner * columns / _least_seconds(lambda: a @ b, device, seconds)


def copy_rate(device: torch.device, megabytes: int = 256, seconds: float = 0.3) -> float:
    """Bytes per second that a copy reads and writes, far outside of any cache."""
    source = torch.ones(megabytes * 2**18, device=device)
    target = torch.empty_like(source)
    return 2 * 4 * source.numel() / _least_seconds(lambda: target.copy_(source), device, seconds)


def _least_seconds(work: Callable[[], object], device: torch.device, seconds: float) -> float:
    def once() -> float:
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - start

    once()
    stop, taken = time.perf_counter() + seconds, [once()]
    while time.perf_counter() < stop:
        taken.append(once())
    return min(taken)


def _named(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@dataclass(frozen=True)
class Measured:
    """All steps of one phase: seconds without the phases inside of it, and the least work they are."""

    name: str
    seconds: float
    calls: int
    cost: Cost


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
        name = _named(dtype)
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
) -> tuple[float, list[Measured]]:
    """Quantize a copy of the model: seconds in all, and by phase."""
    preset, grid = load_method(method, bits)
    first = quantize(copy.deepcopy(loaded.model), tokens, preset, grid, settings)
    next(first)  # compiles
    first.close()
    steps = quantize(copy.deepcopy(loaded.model), tokens, preset, grid, settings)
    with Recorder(on=True) as recorder:
        for _ in steps:
            pass
    costs = Costs.of(loaded.model, resolve_compute_dtype(settings.compute_dtype, loaded.model.device))
    found = []
    for phase in by_phase(recorder.spans, recorder.seconds):
        cost = sum((costs(step) for step in recorder.spans if step.phase == phase.name), Cost())
        found.append(Measured(phase.name, phase.seconds, phase.calls, cost))
    return recorder.seconds, found


def table(seconds: float, phases: Sequence[Measured], limit: Machine) -> str:
    """One method's phases."""
    head = ("phase", "seconds", "share", "calls", "GFLOP", "GFLOP/s", "GB", "least seconds", "limited by")
    rows: list[tuple[str, ...]] = [(*head, "of the limit", "what it is")]
    for phase in phases:
        time_taken = (phase.name, f"{phase.seconds:.2f}", f"{phase.seconds / seconds:.1%}", str(phase.calls or ""))
        what = PHASES.get(phase.name, "what no mark covers")
        if not phase.cost.flops or phase.seconds <= 0:
            rows.append((*time_taken, *6 * [""], what))
            continue
        work = (
            f"{phase.cost.flops / 1e9:.1f}",
            f"{phase.cost.flops / phase.seconds / 1e9:.1f}",
            f"{phase.cost.bytes / 1e9:.2f}",
        )
        multiply, move = phase.cost.flops / limit.best(phase.cost.rate), phase.cost.bytes / limit.copied
        bound = f"{phase.cost.rate} matmul" if multiply > move else "memory"
        least = max(multiply, move)
        rows.append((*time_taken, *work, f"{least:.3f}", bound, f"{least / phase.seconds:.0%}", what))
    rows.append(("all", f"{seconds:.2f}", "100%", *8 * [""]))
    return markdown_table(rows)


def calibration(phases: Sequence[Measured], limit: Machine) -> str:
    """The share of the matmul limit over the whole of calibration."""
    named = {phase.name: phase for phase in phases}
    seconds = sum(phase.seconds for phase in phases if phase.name not in NOT_CALIBRATION)
    flops = sum(named[name].cost.flops for name in ("forward", "moments") if name in named)
    rate = named["forward"].cost.rate if "forward" in named else ""
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
    keep_freed()  # as the command does
    text = page(options)
    print(text)
    if options.out:
        options.out.write_text(text)


if __name__ == "__main__":
    main()
