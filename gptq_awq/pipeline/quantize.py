"""The block loop: observe, transform, solve, advance.

    for block in model.blocks:
        moments ← one forward of all calibration batches          (only if a transform needs them)
        for transform in transforms: transform.apply(block, …)
        for site in block.sites:                                   qkv → o → gate/up → down
            moments ← staged forward up to the site                (only if the solver needs them)
            for linear in site: linear.weight ← solver.solve(linear.weight, moments, grid)
        advance the streams to the next block

Weights change in the model that was passed in; forwards run in `compute_dtype` on a copy of one block.
"""

import copy
import logging
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from gptq_awq.data import TokenSet
from gptq_awq.errors import UserError
from gptq_awq.grids.base import Grid, GridChoice, QuantizedWeight
from gptq_awq.linalg import NotPositiveDefiniteError
from gptq_awq.models.blocks import find_blocks, hooks
from gptq_awq.models.linear import Site, is_linear, matrix
from gptq_awq.models.topology import observe_sites
from gptq_awq.moments import Moments
from gptq_awq.pipeline.ledger import LinearReport
from gptq_awq.pipeline.method import Method
from gptq_awq.pipeline.places import landing
from gptq_awq.pipeline.staged import observe_forward, staged_forward
from gptq_awq.pipeline.streams import Streams, open_streams
from gptq_awq.progress import Track, no_track
from gptq_awq.solvers.rtn import RTN
from gptq_awq.transforms.base import Scaling

log = logging.getLogger(__name__)
Row = dict[str, Any]


@dataclass(frozen=True)
class Settings:
    """How calibration computes; none of it changes what is minimised.

    Attributes:
        compute_dtype: precision of calibration forwards ("auto": bfloat16 where the hardware has it).
        tokens_per_batch: calibration tokens per forward.
    """

    compute_dtype: str = "auto"
    tokens_per_batch: int = 2048


@dataclass(frozen=True)
class BlockResult:
    """One finished block.

    Attributes:
        index: its number.
        weights: module name → codes, scales, zeros.
        rows: its part of the ledger, one row per linear.
    """

    index: int
    weights: dict[str, QuantizedWeight] = field(repr=False)
    rows: list[Row] = field(repr=False)


def quantize(
    model: nn.Module,
    tokens: TokenSet | None,
    method: Method,
    grid: GridChoice,
    settings: Settings = Settings(),
    track: Track = no_track,
) -> Iterator[BlockResult]:
    """Quantize every linear in the model's blocks, in place, one block per step of the iterator.

    A mix of grids may round the embedding and the output head too; they come first, as block -1.

    Nothing is kept of a block that was handed out, so a caller that needs no codes pays no memory for them.

    Args:
        model: a causal LM in eval mode.
        tokens: calibration data; may be None where the method needs none (`needs_calibration`).
        method: transforms and solver.
        grid: where weights may land.
        settings: how to compute.
        track: wraps the loop over blocks, to report progress.

    Raises:
        UserError: no calibration data where the method needs some; non-finite values; H that won't factor; a width
            that a grid has no room for.
    """
    name, blocks = find_blocks(model)
    device = next(model.parameters()).device
    dtype = resolve_compute_dtype(settings.compute_dtype, device)
    if method.solver is None:
        if method.cast is not None:
            _cast(model, getattr(torch, method.cast))
        return
    grids = landing(model, grid)
    ends = _round_ends(model, grids, name, method)
    if ends.weights:
        yield ends
    streams = None
    if needs_calibration(method, grid):
        if tokens is None:
            raise UserError(f"method={method.name} calibrates: give it tokens (data=…)")
        streams = open_streams(model, blocks, tokens, settings.tokens_per_batch, dtype, track)
    heads = getattr(getattr(model, "config", None), "num_attention_heads", None)
    for index, block in enumerate(track(blocks, f"quantize ({method.name})", len(blocks))):
        step = _BlockStep(block, index, f"{name}.{index}", method, grids, streams, dtype, heads)
        with torch.no_grad():
            step.run()
        yield BlockResult(index, step.weights, step.rows)


def needs_calibration(method: Method, grid: GridChoice) -> bool:
    """Whether any part of the method looks at calibration data."""
    solver = method.solver
    return solver is not None and (bool(method.transforms) or solver.needs_hessian or grid.needs_hessian)


def resolve_compute_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype of calibration forwards; "auto" is bfloat16 where matrix units multiply it natively.

    Raises:
        UserError: unknown name.
    """
    if name == "auto":
        if device.type == "cuda":
            return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
        native = torch.cpu.get_capabilities()
        has_bf16 = device.type == "cpu" and (native.get("avx512_bf16") or native.get("amx_bf16"))
        return torch.bfloat16 if has_bf16 else torch.float32
    if name not in ("float32", "bfloat16", "float16"):
        raise UserError(f"compute_dtype={name}: choose auto, float32, bfloat16 or float16")
    return getattr(torch, name)


class _BlockStep:
    """One turn of the loop: everything that happens to one block."""

    def __init__(
        self,
        block: nn.Module,
        index: int,
        name: str,
        method: Method,
        grids: Mapping[str, Grid],
        streams: Streams | None,
        compute_dtype: torch.dtype,
        heads: int | None,
    ) -> None:
        self.block, self.index, self.name = block, index, name
        self.method, self.streams = method, streams
        self.grids = {n.removeprefix(f"{name}."): grid for n, grid in grids.items() if n.startswith(f"{name}.")}
        self.heads = heads
        same = next(block.parameters()).dtype == compute_dtype
        self.runner = block if same or streams is None else copy.deepcopy(block).to(compute_dtype)
        self.weights: dict[str, QuantizedWeight] = {}
        self.rows: list[Row] = []
        self._scalings: dict[str, dict[str, Scaling]] = {}

    def run(self) -> None:
        assert self.method.solver is not None
        if self.streams is None:
            for site in _each_linear(self.block):
                self._solve(site, None)
            return
        hidden, call = self.streams.probe_input(), self.streams.probe.calls[self.index]
        sites = observe_sites(self.block, hidden, call, bool(self.method.transforms), self.heads)
        _check_coverage(self.block, sites, self.name)
        if self.method.error_propagation and self.method.solver.needs_hessian:
            if self.method.transforms:
                self._observe_and_transform(sites)
            staged_forward(self.runner, self.index, sites, self.streams, self._solve)
            return
        for site, stats in zip(sites, self._observe_and_transform(sites), strict=True):
            self._solve(site, stats)
        if self.method.error_propagation:
            self.streams.advance(self.runner, self.index)

    def _observe_and_transform(self, sites: list[Site]) -> list[Moments]:
        """Moments of all sites' inputs, as they are after the transforms."""
        assert self.streams is not None
        advance = not self.method.error_propagation
        inputs = self._sampled_inputs()
        moments = observe_forward(self.runner, self.index, sites, self.streams, advance)
        for transform in self.method.transforms.values():
            scalings = transform.apply(self.block, sites, moments, self.grids, inputs)
            for site, scaling in zip(sites, scalings, strict=True):
                self._scalings.setdefault(site.name, {})[transform.name] = scaling
            moments = [
                m if scaling.scales is None else m.rescaled(scaling.scales)
                for m, scaling in zip(moments, scalings, strict=True)
            ]
        if self.runner is not self.block:
            self.runner.load_state_dict(self.block.state_dict())
        return moments

    def _sampled_inputs(self):
        """A function that shows a submodule's calls on the first batch, with the untransformed weights."""
        assert self.streams is not None
        first, index = self.streams.batches[0], self.index
        hidden, call = first.hidden, first.calls[index]

        def inputs(submodule: str) -> list[tuple[tuple, dict[str, Any]]]:
            block = self.block
            calls: list[tuple[tuple, dict[str, Any]]] = []
            keep = block.get_submodule(submodule).register_forward_pre_hook(
                lambda _module, args, kwargs: calls.append((args, kwargs)), with_kwargs=True
            )
            with hooks([keep]):
                call.run(block, hidden.to(next(block.parameters()).dtype))
            return calls

        return inputs

    def _solve(self, site: Site, moments: Moments | None) -> None:
        """Land the site's linears on the grid, in the model and in the copy that computes."""
        assert self.method.solver is not None
        for name in site.linears:
            started = time.perf_counter()
            target = matrix(self.block.get_submodule(name))
            weight = target.float()
            full_name = f"{self.name}.{name}"
            if not torch.isfinite(weight).all():
                raise UserError(f"model: {full_name} has non-finite weights")
            try:
                solution = self.method.solver.solve(weight, moments, self.grids[name])
            except NotPositiveDefiniteError as error:
                raise UserError(
                    f"{full_name}: {error}; raise method.solver.damping, give more calibration text "
                    "(data.samples), or allow method.solver.fallback=rtn"
                ) from error
            dequantized = solution.quantized.dequantize()
            report = LinearReport(full_name, self.index, site, self.method, moments, self._scalings.get(site.name, {}))
            self.rows.append(report.row(weight, dequantized, solution, time.perf_counter() - started))
            self.weights[full_name] = solution.quantized
            target.copy_(dequantized)
            if self.runner is not self.block:
                matrix(self.runner.get_submodule(name)).copy_(dequantized)


@torch.no_grad()
def _cast(model: nn.Module, dtype: torch.dtype) -> None:
    """Round every parameter to what a 16-bit checkpoint holds, in place; computation stays as it was."""
    for name, parameter in model.named_parameters():
        parameter.copy_(parameter.to(dtype))
        if not torch.isfinite(parameter).all():
            raise UserError(f"method.cast: {name} overflows {dtype}; bfloat16 has float32's range")


@torch.no_grad()
def _round_ends(model: nn.Module, grids: Mapping[str, Grid], blocks: str, method: Method) -> BlockResult:
    """Round to nearest, in place, what lies outside of the blocks and has a grid: the embedding, the output head."""
    ends = BlockResult(-1, {}, [])
    for name, grid in grids.items():
        if name.startswith(f"{blocks}."):
            continue
        started = time.perf_counter()
        target = model.get_submodule(name).get_parameter("weight").data
        weight = target.float()
        solution = RTN().solve(weight, None, grid)
        dequantized = solution.quantized.dequantize()
        target.copy_(dequantized)
        report = LinearReport(name, -1, Site((name,), weight.shape[1]), method, None, {})
        ends.rows.append(report.row(weight, dequantized, solution, time.perf_counter() - started))
        ends.weights[name] = solution.quantized
    return ends


def _check_coverage(block: nn.Module, sites: list[Site], name: str) -> None:
    """Refuse a block with linears that no token reaches: they would stay unquantized without a word.

    Raises:
        UserError: such as in a mixture of experts, where the probe's tokens reach few of them.
    """
    reached = {linear for site in sites for linear in site.linears}
    missed = [site.linears[0] for site in _each_linear(block) if site.linears[0] not in reached]
    fused = [n for n, p in block.named_parameters() if p.dim() > 2]
    if missed or fused:
        raise UserError(
            f"model: {name}.{(missed + fused)[0]} is not a linear that every token passes; "
            "mixtures of experts are not supported yet (method=rtn leaves fused experts alone)"
        )


def _each_linear(block: nn.Module) -> Iterator[Site]:
    """Every linear as a site by itself: enough where nothing is calibrated."""
    for name, module in block.named_modules():
        if is_linear(module):
            yield Site((name,), matrix(module).shape[1])
