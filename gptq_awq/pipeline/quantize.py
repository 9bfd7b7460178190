"""The block loop: observe, transform, solve, advance.

    for transform in transforms of the whole model: transform.prepare(model)
    for block in model.blocks:
        moments ← one forward of all calibration batches          (only if a transform needs them)
        for transform in transforms: transform.apply(block, …)
        for site in block.sites:                                   qkv → o → gate/up → down
            moments ← staged forward up to the site                (only if the solver needs them;
                      of full precision beside it too, if the method compares the two)
            for linear in site: linear.weight ← solver.solve(linear.weight, moments, grid)
        for tuning in tuning of blocks: tuning.apply_block(block, …)
        advance the streams to the next block
    for tuning in tuning of the whole model: tuning.apply(model, …)

Weights change in the model that was passed in; forwards run in `compute_dtype` on a copy of one block.
"""

import copy
import time
from collections.abc import Generator, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from gptq_awq.data import TokenSet
from gptq_awq.errors import UserError
from gptq_awq.grids.base import Grid, GridChoice, QuantizedWeight
from gptq_awq.journal import Journal
from gptq_awq.kernels.threads import match_torch
from gptq_awq.linalg import NotPositiveDefiniteError
from gptq_awq.models.blocks import find_blocks, hooks
from gptq_awq.models.linear import Site, is_linear, matrix
from gptq_awq.moments import Moments
from gptq_awq.pipeline.inputs import Inputs, Settings, resolve_compute_dtype
from gptq_awq.pipeline.ledger import LinearReport
from gptq_awq.pipeline.method import Method
from gptq_awq.pipeline.observe import Observation, Record
from gptq_awq.pipeline.places import landing
from gptq_awq.pipeline.progress import BlockResult, Progress, Row, restore
from gptq_awq.pipeline.staged import staged_forward
from gptq_awq.pipeline.streams import Streams
from gptq_awq.pipeline.tuned import entering, examples, noted, tuned_model
from gptq_awq.profiling import phase
from gptq_awq.progress import Track, no_track
from gptq_awq.solvers.rtn import RTN
from gptq_awq.transforms.base import ModuleInputs, Scaling
from gptq_awq.tuning.teacher import Teacher


def quantize(
    model: nn.Module,
    tokens: TokenSet | None,
    method: Method,
    grid: GridChoice,
    settings: Settings = Settings(),  # noqa: B008 (frozen)
    track: Track = no_track,
    record: Record | None = None,
    progress: Journal | None = None,
) -> Generator[BlockResult]:
    """Quantize every linear in the model's blocks, in place, one block per step of the iterator.

    A mix of grids may round the embedding and the output head too; they come first, as block -1.

    Nothing is kept in memory of a block that was handed out, so a caller that needs no codes pays no memory for them.

    Args:
        model: a causal LM in eval mode.
        tokens: calibration data; may be None where the method needs none (`needs_calibration`).
        method: transforms and solver.
        grid: where weights may land.
        settings: how to compute.
        track: wraps the loop over blocks, to report progress.
        record: keeps what methods without error propagation look at, for other runs on the same model and tokens.
        progress: keeps finished blocks; those it holds are restored, not computed.

    Raises:
        UserError: no calibration data where the method needs some; non-finite values; H that won't factor; a width
            that a grid has no room for.
    """
    match_torch()
    if method.solver is None:
        if method.cast is not None:
            _cast(model, getattr(torch, method.cast))
        return
    if not method.tuning_of_model:
        yield from _blocks(model, tokens, method, grid, settings, track, record, progress)
        return
    if tokens is None:
        raise _wants_tokens(method)
    teacher = Teacher(model, tokens, resolve_compute_dtype(settings.compute_dtype, next(model.parameters()).device))
    results = list(_blocks(model, tokens, method, grid, settings, track, record, progress))
    yield from tuned_model(model, method, results, teacher, tokens, track)


def _blocks(
    model: nn.Module,
    tokens: TokenSet | None,
    method: Method,
    grid: GridChoice,
    settings: Settings,
    track: Track,
    record: Record | None,
    progress: Journal | None,
) -> Iterator[BlockResult]:
    """The block loop."""
    prefix, blocks = find_blocks(model)
    prepared = {each.name: Scaling(None, each.prepare(model)) for each in method.of_model}
    grids = landing(model, grid)
    for tuning in method.tuning.values():
        for each in {each for name, each in grids.items() if name.startswith(f"{prefix}.")}:
            tuning.check(each)
    ends = _round_ends(model, grids, prefix, method)
    if ends.weights:
        yield ends
    kept = Progress(progress)
    inputs = None
    if needs_calibration(method, grid):
        if tokens is None:
            raise _wants_tokens(method)
        inputs = Inputs(
            *(model, blocks, tokens, settings, method.error_propagation, bool(method.of_blocks)),
            record=record,
            track=track,
            full=method.needs_full,
        )
    finished = kept.finished(blocks, inputs.streams if inputs else None)
    yield from restore(finished, prefix, blocks, grids)
    rest = range(len(finished), len(blocks))
    for index in track(rest, f"quantize ({method.name})", len(rest)):
        step = _BlockStep(blocks[index], index, f"{prefix}.{index}", method, grids, prepared)
        with torch.no_grad():
            step.run(inputs)
        done = BlockResult(index, step.weights, step.rows)
        kept.save(f"{prefix}.{index}", blocks[index], done, inputs.streams if inputs else None)
        yield done


def _wants_tokens(method: Method) -> UserError:
    return UserError(f"method={method.name} calibrates: give it tokens (data=…)")


def needs_calibration(method: Method, grid: GridChoice) -> bool:
    """Whether any part of the method looks at calibration data."""
    solver = method.solver
    return solver is not None and (
        bool(method.of_blocks or method.tuning) or solver.needs_hessian or grid.needs_hessian
    )


class _BlockStep:
    """One turn of the loop: everything that happens to one block."""

    def __init__(
        self,
        block: nn.Module,
        index: int,
        name: str,
        method: Method,
        grids: Mapping[str, Grid],
        prepared: dict[str, Scaling],
    ) -> None:
        self.block, self.runner, self.index, self.name, self.method = block, block, index, name, method
        self.grids = {n.removeprefix(f"{name}."): grid for n, grid in grids.items() if n.startswith(f"{name}.")}
        self.weights: dict[str, QuantizedWeight] = {}
        self.rows: list[Row] = []
        self._prepared = prepared
        self._scalings: dict[str, dict[str, Scaling]] = {}
        self._full: nn.Module | None = None

    def run(self, inputs: Inputs | None) -> None:
        assert self.method.solver is not None
        if inputs is None:
            for site in _each_linear(self.block):
                self._solve(site, None)
            return
        if inputs.streams is not None:
            self.runner = inputs.runner(self.block)
        tuning = self.method.tuning_of_blocks
        entered = entering(inputs.streams, bool(tuning))
        self._solve_all(inputs)
        if tuning and inputs.streams is not None:
            self._tune(inputs.streams, entered)

    def _solve_all(self, inputs: Inputs) -> None:
        assert self.method.solver is not None
        if self.method.error_propagation and self.method.solver.needs_hessian:
            self._run_staged(inputs)
        else:
            seen = self._observe(inputs)
            transformed = self._transform(seen)
            full = self._full_precision()
            for site, moments in zip(seen.sites, transformed, strict=True):
                self._solve(site, moments)
            if self.method.error_propagation and inputs.streams is not None:
                inputs.streams.advance(self.runner, self.index, full)

    def _run_staged(self, inputs: Inputs) -> None:
        assert inputs.streams is not None
        if self.method.of_blocks:
            seen = self._observe(inputs)
            self._transform(seen)
            sites = seen.sites
        else:
            sites = inputs.sites(self.block, self.index)
            _check_coverage(self.block, sites, self.name)
        full = self._full_precision()
        paired = self.method.needs_cross
        staged_forward(
            *(self.runner, self.index, sites, inputs.streams, self._solve, inputs.keeps_activations),
            full=full if paired else None,
        )
        if full is not None and not paired:
            inputs.streams.advance_full(full, self.index)

    def _full_precision(self) -> nn.Module | None:
        """The block as it is before it is solved, in the basis that transforms gave it; None where no one asks."""
        self._full = copy.deepcopy(self.runner) if self.method.needs_full else None
        return self._full

    def _tune(self, streams: Streams, entered: list[Tensor]) -> None:
        """Let the solved block learn from full precision's outputs, and what enters the next block with it."""
        assert self._full is not None
        seen = examples(streams, self.index, entered)
        weights = {name.removeprefix(f"{self.name}."): weight for name, weight in self.weights.items()}
        originals = {name: matrix(self._full.get_submodule(name)).float() for name in weights}
        for tuning in self.method.tuning_of_blocks:
            with phase("tune"):
                weights, details = tuning.apply_block(self.block, weights, originals, seen)
            self.weights = {f"{self.name}.{name}": weight for name, weight in weights.items()}
            self.rows = noted(self.rows, self.weights, tuning.name, details)
        if self.runner is not self.block:
            self.runner.load_state_dict(self.block.state_dict())
        for stream, hidden in zip(streams.batches, entered, strict=True):
            stream.hidden = hidden
        streams.advance(self.runner, self.index)

    def _observe(self, inputs: Inputs) -> Observation:
        seen = inputs.observe(self.block, self.runner, self.index)
        _check_coverage(self.block, seen.sites, self.name)
        return seen

    def _transform(self, seen: Observation) -> list[Moments]:
        """Moments of all sites' inputs, as they are after the transforms."""
        moments = seen.moments
        for transform in self.method.of_blocks:
            scalings = transform.apply(self.block, seen.sites, moments, self.grids, self._inputs_of(seen))
            for site, scaling in zip(seen.sites, scalings, strict=True):
                self._scalings.setdefault(site.name, {})[transform.name] = scaling
            moments = [
                m if scaling.scales is None else m.rescaled(scaling.scales)
                for m, scaling in zip(moments, scalings, strict=True)
            ]
        if self.runner is not self.block:
            self.runner.load_state_dict(self.block.state_dict())
        return moments

    def _inputs_of(self, seen: Observation) -> ModuleInputs:
        """A function that shows a submodule's calls on the first batch, with the untransformed weights."""

        def inputs(submodule: str) -> list[tuple[tuple, dict[str, Any]]]:
            block = self.block
            calls: list[tuple[tuple, dict[str, Any]]] = []
            keep = block.get_submodule(submodule).register_forward_pre_hook(
                lambda _module, args, kwargs: calls.append((args, kwargs)), with_kwargs=True
            )
            with hooks([keep]):
                seen.call.run(block, seen.hidden.to(next(block.parameters()).dtype))
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
            if not torch.isfinite(torch.stack(torch.aminmax(weight))).all():  # a NaN is both extremes
                raise UserError(f"model: {full_name} has non-finite weights")
            try:
                with phase("solve"):
                    solution = self.method.solver.solve(weight, moments, self.grids[name])
            except NotPositiveDefiniteError as error:
                raise UserError(
                    f"{full_name}: {error}; raise method.solver.damping, give more calibration text "
                    "(data.samples), or allow method.solver.fallback=rtn"
                ) from error
            dequantized = solution.quantized.dequantize()
            report = LinearReport(
                full_name, self.index, site, self.method, moments, self._prepared | self._scalings.get(site.name, {})
            )
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
