"""What the phases of a run take at the least, in operations and bytes, and how fast this machine multiplies and copies.

A phase can't be faster than its operations at the machine's matmul rate, nor than its bytes at its copy rate: how much
of that limit it reaches is what `profile=true` and benchmarks/roofline.py say.
"""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from gptq_awq.models.blocks import find_blocks
from gptq_awq.models.linear import is_linear, matrix
from gptq_awq.runtime.profiling import Cost, Profile, Recorder, Span, by_op, by_phase, spans

Dtype = torch.dtype
SOLVER = torch.float32


@dataclass(frozen=True)
class Costs:
    """Of the steps that `profiling.phase` marks with a size, on one model.

    Attributes:
        block_weights: in the linears of a block, on average over the blocks.
        block_edges: inputs and outputs of these linears, per token.
        blocks: how many there are.
        attention: width of all heads together.
        width: of the hidden states.
        vocab: rows of the output head.
        largest: (out, in) of the block's largest linear.
        compute: dtype of calibration forwards.
        weights: dtype of the model, and of evaluation.
    """

    block_weights: float
    block_edges: float
    blocks: int
    attention: int
    width: int
    vocab: int
    largest: tuple[int, int]
    compute: Dtype
    weights: Dtype

    @classmethod
    def of(cls, model: Any, compute: Dtype) -> "Costs":
        """Count the model's linears."""
        _, blocks = find_blocks(model)
        shapes: list[tuple[int, int]] = [(len(w), w.shape[1]) for w in map(matrix, filter(is_linear, blocks.modules()))]
        config = model.config.get_text_config()
        heads = config.num_attention_heads * (getattr(config, "head_dim", None) or 0)
        return cls(
            block_weights=sum(o * i for o, i in shapes) / len(blocks),
            block_edges=sum(o + i for o, i in shapes) / len(blocks),
            blocks=len(blocks),
            attention=heads or config.hidden_size,
            width=config.hidden_size,
            vocab=config.vocab_size,
            largest=max(shapes, key=lambda shape: shape[0] * shape[1]),
            compute=compute,
            weights=next(model.parameters()).dtype,
        )

    def __call__(self, step: Span) -> Cost | None:
        """What one marked step takes; None where it was marked without a size, or is not counted."""
        count: Callable[..., Cost] | None = {
            "forward": self._forward,
            "moments": self._moments,
            "factor": self._factor,
            "search": self._search,
            "solve": self._solve,
            "score/forward": self._score,
            "score/head": self._head,
        }.get(step.phase)
        return count(*step.size) if count and step.size else None

    def _forward(self, rows: int, tokens: int) -> Cost:
        """One block on a batch of `rows` windows of `tokens`."""
        return self._blocks(1, rows, tokens, self.compute)

    def _score(self, rows: int, tokens: int) -> Cost:
        """All blocks on a batch of `rows` windows of `tokens`."""
        return self._blocks(self.blocks, rows, tokens, self.weights)

    def _blocks(self, blocks: int, rows: int, tokens: int, dtype: Dtype) -> Cost:
        """Linears: 2 per weight and token. Causal attention: QKᵀ and PV, half of 2 x 2 tokens² width each."""
        n, size = rows * tokens, dtype.itemsize
        flops = 2 * n * self.block_weights + 2 * n * tokens * self.attention
        traffic = size * (self.block_weights + n * self.block_edges)
        return Cost(blocks * flops, blocks * traffic, _named(dtype))

    def _moments(self, tokens: int, width: int, cross: int = 0) -> Cost:
        """Σ x xᵀ on and above its diagonal, and the whole of Σ x̃ xᵀ; sums are read and written in float32."""
        products = width * (width + 1) / 2 + cross * width**2
        traffic = self.compute.itemsize * tokens * width * (1 + cross) + 2 * 4 * products
        return Cost(2 * tokens * products, traffic, _named(self.compute))

    def _factor(self, width: int, count: int = 1) -> Cost:
        """Cholesky factorizations and the inverses of their factors, n³/3 each."""
        return Cost(count * 2 * width**3 / 3, count * 2 * 4 * width**2, _named(SOLVER))

    def _solve(self, out: int, width: int) -> Cost:
        """Every error goes to the columns after it: out x in²/2 multiplications and additions."""
        return Cost(out * width**2, 4 * (2 * out * width + width**2 / 2), _named(SOLVER))

    def _search(self, out: int, width: int) -> Cost:
        """One candidate's tr(ΔHΔᵀ), of one half of H; candidates are only compared, so rough products do."""
        return Cost(out * width * (width + 2), 4 * (out * width + width**2 / 2), _named(self.compute))

    def _head(self, tokens: int, words: int | None = None) -> Cost:
        """Logits of `tokens` hidden states, for all words or so many of them."""
        size, words = self.weights.itemsize, words or self.vocab
        traffic = size * (self.width * (words + tokens) + tokens * words)
        return Cost(2 * tokens * self.width * words, traffic, _named(self.weights))


def matmul_rate(dtype: Dtype, rows: int, inner: int, columns: int, device: torch.device, seconds: float = 0.3) -> float:
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


def matmul_rates(costs: Costs, device: torch.device, tokens: int = 2048) -> dict[str, float]:
    """Operations per second by dtype, of the model's largest linear on a batch of tokens."""
    out, width = costs.largest
    dtypes = {SOLVER, costs.compute, costs.weights}
    return {_named(d): matmul_rate(d, tokens, width, out, device) for d in sorted(dtypes, key=str)}


def profiled(recorder: Recorder, model: Any, compute: Dtype, device: torch.device) -> Profile:
    """Stop recording, measure the machine, and say where the time of a run on `model` went."""
    recorder.stop()
    costs = Costs.of(model, compute)
    phases = by_phase(spans(recorder.events), recorder.seconds, costs)
    ops = by_op(recorder.events)
    rates = matmul_rates(costs, device)
    recorder.profile = Profile(
        *(recorder.seconds, phases, rates, ops, recorder.close_seconds, machine(device), recorder.events)
    )
    return recorder.profile


def machine(device: torch.device) -> str:
    """One line: version, processor, threads."""
    name = torch.cpu.get_capabilities().get("cpu_name")
    if device.type == "cuda":
        waits = os.environ.get("CUDA_LAUNCH_BLOCKING") == "1"
        name = torch.cuda.get_device_name(device) + ("" if waits else " (phases end when their work is queued)")
    return f"torch {torch.__version__}, {name}, {torch.get_num_threads()} threads"


def _named(dtype: Dtype) -> str:
    return str(dtype).removeprefix("torch.")
