"""GPTQ on a GPU: time of each step of an 8B Llama's quantization, and the speed-up by the Triton kernels.

    python benchmarks/gpu.py [--blocks 4] [--out FILE]
    python benchmarks/gpu.py --device cpu --tiny            the same steps at toy size: a check, no measurement

Weights and tokens are random: nothing that is timed depends on their values. Blocks are alike, so the time of all
is extrapolated from a few. All 32 blocks take 16 GB, which leaves room for the rest on an 80 GB device.
"""

import argparse
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig

from gptq_awq import quantize_model
from gptq_awq.calibration.activations import Activations, open_activations
from gptq_awq.calibration.block_inputs import Settings
from gptq_awq.calibration.moments import Moments, MomentsSum
from gptq_awq.calibration.sequential import staged_forward
from gptq_awq.data.tokens import make_token_set
from gptq_awq.grids.arithmetic import KINDS
from gptq_awq.grids.base import Grid
from gptq_awq.grids.integer import IntGrid
from gptq_awq.kernels import gpu
from gptq_awq.kernels.columns import sweep_columns as sweep_on_cpu
from gptq_awq.models.blocks import find_blocks
from gptq_awq.models.linear import Site, matrix
from gptq_awq.models.topology import observe_sites
from gptq_awq.numerics.dtypes import resolve_compute_dtype
from gptq_awq.quantization.method import Method
from gptq_awq.runtime import memory
from gptq_awq.solvers.gptq import GPTQ

TILES = ((2, 1), (4, 1), (8, 1), (8, 2), (8, 4), (16, 1), (16, 4))
"""Candidate tiles of the sweep kernel: (rows, warps) of one program."""


@dataclass(frozen=True)
class Geometry:
    """Sizes of a Llama and of its calibration."""

    width: int
    ffn: int
    heads: int
    kv_heads: int
    blocks: int
    vocabulary: int
    samples: int
    seqlen: int
    group_size: int
    block_size: int

    def model(self, blocks: int, device: torch.device) -> nn.Module:
        """Make the model with random bfloat16 weights, directly on `device`."""
        config = LlamaConfig(
            hidden_size=self.width,
            intermediate_size=self.ffn,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            num_hidden_layers=blocks,
            vocab_size=self.vocabulary,
            max_position_embeddings=self.seqlen,
        )
        with device:
            return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval().requires_grad_(False)

    def tokens(self) -> Tensor:
        """Random calibration tokens, int64 (samples, seqlen)."""
        draw = torch.Generator().manual_seed(0)
        return torch.randint(3, self.vocabulary, (self.samples, self.seqlen), generator=draw)

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """Shapes (out, in) of a block's linears."""
        kv = self.width // self.heads * self.kv_heads
        return {
            "q, o": (self.width, self.width),
            "k, v": (kv, self.width),
            "gate, up": (self.ffn, self.width),
            "down": (self.width, self.ffn),
        }


LLAMA_8B = Geometry(4096, 14336, 32, 8, 32, 32000, 128, 2048, 128, 128)
TINY = Geometry(64, 160, 4, 2, 2, 64, 4, 32, 32, 32)


@dataclass
class Stopwatch:
    """Seconds by phase; work queued on a GPU counts for the phase that queued it."""

    device: torch.device

    def __post_init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._last = self._now()

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def lap(self, phase: str) -> None:
        """Attribute the time since the last lap to `phase`, once the GPU has finished."""
        now = self._now()
        self.seconds[phase] += now - self._last
        self._last = now


def seconds(device: torch.device, step: Callable[[], object], warm: bool = True) -> float:
    """Time of one call in seconds, after an untimed one if `warm`."""
    if warm:
        step()
    watch = Stopwatch(device)
    step()
    watch.lap("step")
    return watch.seconds["step"]


def table(header: str, rows: Sequence[Sequence[object]]) -> str:
    """Render a Markdown table whose columns, except the first, are right-aligned."""
    count = header.count("|") - 1
    lines = [header, "|:---" + "|---:" * (count - 1) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(map(str, row)) + " |" for row in rows)])


# 1. The column sweep


@dataclass(frozen=True)
class Columns:
    """Column blocks of one weight, each with its scales and zeros, and the upper factor `u` shared by all."""

    grid: Grid
    u: Tensor
    blocks: list[tuple[Tensor, Tensor, Tensor]]

    @classmethod
    def random(cls, geometry: Geometry, shape: tuple[int, int], device: torch.device) -> "Columns":
        """Draw a random weight of the given shape (out, in), with fitted scales and zeros."""
        width = geometry.block_size
        grid = IntGrid(4, geometry.group_size, scale_dtype="float16")
        u = 0.1 * torch.randn(width, width, device=device).triu(1) + torch.eye(width, device=device)
        blocks = []
        for _ in range(0, shape[1], width):
            w = torch.randn(shape[0], width, device=device)
            fitted = grid.fit(w)
            blocks.append((w, *(x.expand(w.shape).contiguous() for x in (fitted.scales, fitted.zeros))))
        return cls(grid, u, blocks)

    def by_kernel(self, tile: tuple[int, int] | None = None, turned: bool = False) -> list[Tensor]:
        """Codes by the compiled kernel of the device; `turned` stores the tensors column-major first."""
        arithmetic, codes = self.grid.arithmetic, []
        for w, scale, zero in self.blocks:
            if turned:
                w, scale, zero = (x.T.contiguous().T for x in (w, scale, zero))
            q, e, levels = torch.empty_like(w), torch.empty_like(w), w.new_tensor(arithmetic.levels)
            kind = KINDS.index(arithmetic.kind)
            if gpu.available(w.device):
                from gptq_awq.kernels.triton_columns import sweep_columns

                x, u, s, z, c, d = (x[None] for x in (w, self.u, scale, zero, q, e))
                sweep_columns(x, u, s, z, arithmetic.max_code, kind, levels, 0, c, d, tile)
            else:
                x, u, s, z, c, d = (x[None].numpy() for x in (w.clone(), self.u, scale, zero, q, e))
                sweep_on_cpu(x, u, s, z, x.dtype.type(arithmetic.max_code), kind, levels.numpy(), 0, c, d)
            codes.append(q)
        return codes

    def by_columns(self) -> list[Tensor]:
        """Codes by a loop of tensor operations over columns, the reference for the kernel."""
        codes = []
        for weight, scale, zero in self.blocks:
            w, q, e = weight.clone(), torch.empty_like(weight), torch.empty_like(weight)
            for i in range(w.shape[1]):
                x, params = w[:, i : i + 1], (scale[:, i : i + 1], zero[:, i : i + 1])
                q[:, i : i + 1] = self.grid.encode(x, params)
                e[:, i : i + 1] = (x - self.grid.decode(q[:, i : i + 1], params)) / self.u[i, i]
                w[:, i + 1 :] -= e[:, i : i + 1] * self.u[i, i + 1 :]
            codes.append(q)
        return codes


def sweeps(geometry: Geometry, device: torch.device) -> str:
    """Table of the kernel's time against a loop over columns, at the shape of every linear."""
    rows = []
    for name, shape in geometry.shapes.items():
        columns = Columns.random(geometry, shape, device)
        kernel = seconds(device, columns.by_kernel)
        replace(columns, blocks=columns.blocks[:1]).by_columns()  # warms up
        loop = seconds(device, columns.by_columns, warm=False)
        pairs = zip(columns.by_kernel(), columns.by_columns(), strict=True)
        differing = sum(int((a != b).sum()) for a, b in pairs)
        size = f"{shape[0]} × {shape[1]}"
        rows.append((name, size, f"{1e3 * kernel:.2f}", f"{1e3 * loop:.1f}", f"{loop / kernel:.1f}", differing))
    return table("| linear | shape | kernel, ms | loop over columns, ms | ratio | codes that differ |", rows)


def tiles(geometry: Geometry, device: torch.device) -> str:
    """Table of the kernel's time by tile and memory order, on the widest linear."""
    columns, rows = Columns.random(geometry, geometry.shapes["gate, up"], device), []
    for tile in TILES:
        times = [seconds(device, lambda t=tile, x=turned: columns.by_kernel(t, x)) for turned in (False, True)]
        rows.append((f"{tile[0]} rows, {tile[1]} warps", *(f"{1e3 * t:.2f}" for t in times)))
    return table("| tile | row by row, ms | column by column (turning included), ms |", rows)


# 2. Moments


def moments(geometry: Geometry, device: torch.device) -> str:
    """Table of time and error of Σ x xᵀ for bfloat16 activations: by a float32 product, and by `MomentsSum`."""
    rows = []
    for width in (geometry.width, geometry.ffn):
        x = torch.randn(4 * geometry.seqlen, width, device=device, dtype=torch.bfloat16)
        exact = x[:, :64].double().T @ x.double()
        plain, total = torch.zeros(width, width, device=device), MomentsSum(width, device)
        in_float32 = seconds(device, lambda p=plain, x=x: p.addmm_(x.float().T, x.float()))
        ours = seconds(device, lambda t=total, x=x: t.add(x, None))
        sums = plain[:64] / 2, total.finish("benchmark").hessian[:64] * len(x)
        errors = [f"{float((s - exact).norm() / exact.norm()):.1e}" for s in sums]
        times = (f"{1e3 * in_float32:.2f}", f"{1e3 * ours:.2f}", f"{in_float32 / ours:.1f}")
        rows.append((f"{len(x)} × {width}", *times, *errors))
    return table("| tokens × width | float32, ms | ours, ms | ratio | error of float32 | ours |", rows)


# 3. A block's phases, and everything together


def phases(model: nn.Module, geometry: Geometry, solver: GPTQ, grid: Grid, settings: Settings) -> dict[str, float]:
    """Seconds by phase of quantizing `model` with GPTQ; the GPU is synchronized after each."""
    device = next(model.parameters()).device
    _, blocks = find_blocks(model)
    tokens = make_token_set("random", geometry.tokens(), None, "random")
    watch = Stopwatch(device)
    dtype = resolve_compute_dtype(settings.compute_dtype, device)
    activations = open_activations(model.to(dtype), blocks, tokens, settings.tokens_per_batch, dtype)
    watch.lap("embedding")
    for index, block in enumerate(blocks):
        _one_block(block, index, activations, solver, grid, watch)
    return dict(watch.seconds)


def _one_block(
    block: nn.Module, index: int, activations: Activations, solver: GPTQ, grid: Grid, watch: Stopwatch
) -> None:
    sites = observe_sites(block, activations.probe_input(), activations.probe.calls[index], absorbers=False)
    watch.lap("topology")
    with torch.no_grad():
        for batch in activations.batches:
            batch.calls[index].run(block, batch.hidden)
    watch.lap("forward alone")

    def solve(site: Site, moments: Moments) -> None:
        watch.lap("forward and moments")
        moments.inverse_factor(solver.damping, solver.act_order)
        watch.lap("factor")
        for name in site.linears:
            weight = matrix(block.get_submodule(name))
            weight.copy_(solver.solve(weight.float(), moments, grid).quantized.dequantize())
        watch.lap("solve")

    staged_forward(block, index, sites, activations, solve)
    watch.lap("forward and moments")


def whole(geometry: Geometry, blocks: int, device: torch.device, options: argparse.Namespace) -> str:
    """Table of seconds by phase and of `quantize_model`, for some blocks and extrapolated to all."""
    solver = GPTQ(act_order=True, static_groups=options.static_groups, block_size=geometry.block_size)
    grid = IntGrid(4, geometry.group_size, search=options.search, scale_dtype="float16")
    settings = Settings(tokens_per_batch=options.tokens_per_batch)
    torch.manual_seed(0)
    found = phases(geometry.model(blocks, device), geometry, solver, grid, settings)
    once, alone = found.pop("embedding"), found.pop("forward alone")

    def scaled(x: float) -> float:
        return x * geometry.blocks / blocks

    rows = [("embedding", f"{once:.2f}", f"{once:.1f}")]
    rows += [(name, f"{x:.2f}", f"{scaled(x):.1f}") for name, x in found.items()]
    rows.append(("(forward alone)", f"{alone:.2f}", f"{scaled(alone):.1f}"))
    model = geometry.model(blocks, device)
    memory.reset_peak(device)
    method = Method("gptq", solver)
    took = seconds(
        device,
        lambda: quantize_model(model, geometry.tokens(), method, grid=grid, settings=settings),
        warm=False,
    )
    everything = once + scaled(took - once)
    rows.append(("**quantize_model**, ledger included", f"{took:.2f}", f"{everything:.1f}"))
    peak = f"Peak memory of quantize_model with {blocks} blocks: {memory.peak_bytes(device) / 1e9:.1f} GB."
    header = f"| phase | {blocks} blocks, s | {geometry.blocks} blocks, s |"
    return f"{table(header, rows)}\n\n{peak}"


def report(options: argparse.Namespace) -> str:
    """Run all measurements; returns their tables as Markdown."""
    device, geometry = torch.device(options.device), TINY if options.tiny else LLAMA_8B
    torch.set_float32_matmul_precision("highest")
    on_gpu = device.type == "cuda"
    name = torch.cuda.get_device_name(device) if on_gpu else torch.cpu.get_capabilities().get("cpu_name")
    kernel = "Triton" if gpu.available(device) else "numba"
    parts = [
        f"torch {torch.__version__}, {name}, {torch.get_num_threads()} threads, kernel: {kernel}; {geometry}",
        "## Column sweep",
        sweeps(geometry, device),
    ]
    if gpu.available(device):
        parts += ["## Tiles of the sweep", tiles(geometry, device)]
    parts += [
        "## Second moments",
        moments(geometry, device),
        f"## GPTQ, 4 bits, groups of {geometry.group_size}, act_order, grid.search={options.search}",
        whole(geometry, min(options.blocks, geometry.blocks), device, options),
    ]
    return "\n\n".join(parts) + "\n"


def main() -> None:
    """Print all tables as Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="toy size")
    parser.add_argument("--blocks", type=int, default=4, help="blocks to measure, of 32; others are alike")
    parser.add_argument("--search", default="minmax", choices=["minmax", "mse", "hessian"])
    parser.add_argument("--static-groups", action="store_true")
    parser.add_argument("--tokens-per-batch", type=int, default=8192)
    parser.add_argument("--out", type=Path, help="also write the tables there")
    options = parser.parse_args()
    if options.blocks < 1:
        parser.error(f"--blocks {options.blocks}: give at least one")
    if torch.device(options.device).type == "cuda" and not torch.cuda.is_available():
        parser.error("there is no CUDA device here; --device cpu --tiny checks the steps without one")
    text = report(options)
    print(text, end="")
    if options.out:
        options.out.write_text(text)


if __name__ == "__main__":
    main()
