"""One turn of the block loop: everything that happens to one block."""

import copy
import functools
import operator
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch import Tensor, nn

from gptq_awq.calibration.activations import Activations
from gptq_awq.calibration.block_inputs import Inputs
from gptq_awq.calibration.moments import Moments
from gptq_awq.calibration.observation import Observation
from gptq_awq.calibration.sequential import staged_forward
from gptq_awq.errors import UserError
from gptq_awq.grids.base import Grid, QuantizedWeight
from gptq_awq.models.blocks import hooks
from gptq_awq.models.linear import Site, is_linear, matrix
from gptq_awq.numerics.distributed import ONE, Ranks
from gptq_awq.quantization.batching import RowSlice, batches, shared
from gptq_awq.quantization.ledger import Errors, LinearReport
from gptq_awq.quantization.method import Method, solved_together
from gptq_awq.quantization.resume import Row
from gptq_awq.quantization.tuning_step import entering, examples, noted
from gptq_awq.runtime.profiling import phase
from gptq_awq.solvers.base import Solution
from gptq_awq.solvers.rtn import RTN
from gptq_awq.transforms.base import ModuleInputs, Scaling, SiteTransform, Transform, absorb_scaling

NOTHING_KNOWN = Scaling(None, {"skipped": "no calibration token reaches this expert"})


class BlockStep:
    """What becomes of one block: its weights, its part of the ledger."""

    def __init__(
        self,
        block: nn.Module,
        index: int,
        name: str,
        method: Method,
        grids: Mapping[str, Grid],
        prepared: dict[str, Scaling],
        ranks: Ranks = ONE,
    ) -> None:
        self.block, self.runner, self.index, self.name, self.method = block, block, index, name, method
        self.grids = {n.removeprefix(f"{name}."): grid for n, grid in grids.items() if n.startswith(f"{name}.")}
        self.weights: dict[str, QuantizedWeight] = {}
        self.rows: list[Row] = []
        self._prepared, self._ranks = prepared, ranks
        self._scalings: dict[str, dict[str, Scaling]] = {}
        self._full: nn.Module | None = None

    def run(self, inputs: Inputs | None) -> None:
        """Transform, solve and tune the block; `inputs` then enter the next one. None: nothing is calibrated."""
        assert self.method.solver is not None
        if inputs is None:
            self._solve_sites([(site, None) for site in _each_linear(self.block)])
            return
        if inputs.activations is not None:
            self.runner = inputs.runner(self.block)
        tuning = self.method.block_tunings
        entered = entering(inputs.activations, bool(tuning))
        self._solve_all(inputs)
        if tuning and inputs.activations is not None:
            self._tune(inputs.activations, entered)

    def _solve_all(self, inputs: Inputs) -> None:
        assert self.method.solver is not None
        if self.method.error_propagation and self.method.solver.needs_hessian:
            self._run_staged(inputs)
        else:
            seen = self._observe(inputs)
            transformed = self._transform(seen)
            full = self._full_precision()
            self._solve_sites(list(zip(seen.sites, transformed, strict=True)))
            if self.method.error_propagation and inputs.activations is not None:
                inputs.activations.advance(self.runner, self.index, full)

    def _run_staged(self, inputs: Inputs) -> None:
        assert inputs.activations is not None
        if self.method.block_transforms:
            seen = self._observe(inputs)
            self._transform(seen)
            sites = seen.sites
        else:
            sites = inputs.sites(self.block, self.index)
            _check_coverage(self.block, sites, self.name)
        full = self._full_precision()
        paired = self.method.needs_cross
        staged_forward(
            *(self.runner, self.index, sites, inputs.activations),
            lambda site, moments: self._solve_sites([(site, moments)]),
            inputs.keeps_activations,
            full=full if paired else None,
            policy=inputs.experts,
        )
        if full is not None and not paired:
            inputs.activations.advance_full(full, self.index)

    def _full_precision(self) -> nn.Module | None:
        """The block as it is before it is solved, in the basis that transforms gave it; None where no one asks."""
        self._full = copy.deepcopy(self.runner) if self.method.needs_full else None
        return self._full

    def _tune(self, activations: Activations, entered: list[Tensor]) -> None:
        """Let the solved block learn from full precision's outputs, and what enters the next block with it."""
        assert self._full is not None
        seen = examples(activations, self.index, entered)
        weights = {name.removeprefix(f"{self.name}."): weight for name, weight in self.weights.items()}
        originals = {name: matrix(self._full.get_submodule(name)).float() for name in weights}
        for tuning in self.method.block_tunings:
            with phase("tune"):
                weights, details = tuning.apply_block(self.block, weights, originals, seen)
            self.weights = {f"{self.name}.{name}": weight for name, weight in weights.items()}
            self.rows = noted(self.rows, self.weights, tuning.name, details)
        if self.runner is not self.block:
            self.runner.load_state_dict(self.block.state_dict())
        for batch, hidden in zip(activations.batches, entered, strict=True):
            batch.hidden = hidden
        activations.advance(self.runner, self.index)

    def _observe(self, inputs: Inputs) -> Observation:
        seen = inputs.observe(self.block, self.runner, self.index)
        _check_coverage(self.block, seen.sites, self.name)
        return seen

    def _transform(self, seen: Observation) -> list[Moments]:
        """Moments of all sites' inputs, as they are after the transforms."""
        moments = {site.linears: m for site, m in zip(seen.sites, seen.moments, strict=True)}
        known = [site for site in seen.sites if moments[site.linears].tokens]
        for transform in self.method.block_transforms:
            scalings = self._apply(transform, known, [moments[site.linears] for site in known], self._inputs_of(seen))
            for site in seen.sites:
                self._scalings.setdefault(site.name, {})[transform.name] = NOTHING_KNOWN
            for site, scaling in zip(known, scalings, strict=True):
                self._scalings[site.name][transform.name] = scaling
                if scaling.scales is not None:
                    moments[site.linears] = moments[site.linears].rescaled(scaling.scales)
        if self.method.block_transforms:
            for parameter in self.block.parameters():
                self._ranks.copy_(parameter.data)
        if self.runner is not self.block:
            self.runner.load_state_dict(self.block.state_dict())
        return list(moments.values())

    def _apply(
        self, transform: Transform, sites: list[Site], stats: list[Moments], inputs: ModuleInputs
    ) -> list[Scaling]:
        """Ranks share the sites where these are by themselves; else rank 0 transforms: it has the first batch."""
        if not isinstance(transform, SiteTransform) or not transform.by_site:
            return self._ranks.from_first(partial(transform.apply, self.block, sites, stats, self.grids, inputs))
        rows = [sum(len(matrix(self.block.get_submodule(name))) for name in site.linears) for site in sites]
        costs = [(site.absorber is not None) * site.width**2 * n for site, n in zip(sites, rows, strict=True)]
        search = partial(transform.search, self.block, grids=self.grids, inputs=inputs)
        mine = {i: search(sites[i], stats[i]) for i in self._ranks.share(costs)}
        found = {i: scaling for part in self._ranks.gather(mine) for i, scaling in part.items()}
        for i, site in enumerate(sites):
            absorb_scaling(self.block, site, found[i])
        return [found[i] for i in range(len(sites))]

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

    def _solve_sites(self, sites: Sequence[tuple[Site, Moments | None]]) -> None:
        """Land the sites' linears on the grid, with other ranks, which tell each other what came of it."""
        linears = [self._piece(name, site, moments) for site, moments in sites for name in site.linears]
        own: list[_Solved] = []
        mine = batches(shared(linears, self._ranks))
        for i, batch in enumerate(mine):
            wanted = {id(piece.known.hessian) for later in mine[i + 1 :] for piece in later if piece.known}
            own += self._solve(batch, wanted)
        solved: dict[str, list[_Solved]] = {}
        for rank, parts in enumerate(self._ranks.gather(own)):
            for part in parts:
                solved.setdefault(part.name, []).append(part)
                if rank != self._ranks.rank:
                    self._land(part)
        for piece in linears:
            whole = _joined(solved[piece.name])
            self.weights[f"{self.name}.{piece.name}"] = whole.solution.quantized
            self.rows.append(self._report(piece).row(whole.solution, whole.errors, whole.seconds))

    def _piece(self, name: str, site: Site, moments: Moments | None) -> RowSlice:
        """A linear that is to be solved."""
        assert self.method.solver is not None
        rows, columns = matrix(self.block.get_submodule(name)).shape
        piece = RowSlice(name, site, moments, self.method.solver, self.grids[name], columns, (0, rows))
        if moments is None or moments.tokens:
            return piece
        grid = piece.grid.without_search() if piece.grid.needs_hessian else piece.grid
        return replace(piece, solver=RTN(), grid=grid)  # an expert's, as experts.policy has it

    def _report(self, piece: RowSlice) -> LinearReport:
        scalings = self._prepared | self._scalings.get(piece.site.name, {})
        return LinearReport(f"{self.name}.{piece.name}", self.index, piece.site, self.method, piece.moments, scalings)

    def _solve(self, batch: Sequence[RowSlice], wanted: set[int]) -> "list[_Solved]":
        """Land some pieces that are solved together; `wanted`: the H that others will be solved with."""
        started, first = time.perf_counter(), batch[0]
        weights = [matrix(self.block.get_submodule(p.name))[slice(*p.rows)].float() for p in batch]
        names = [f"{self.name}.{piece.name}" for piece in batch]
        solutions = solved_together(first.solver, names, weights, [piece.known for piece in batch], first.grid)
        for piece in batch:
            if piece.known and id(piece.known.hessian) not in wanted:
                piece.known.forget_factors()
        parts = []
        for piece, weight, solution in zip(batch, weights, solutions, strict=True):
            if piece.grid is not self.grids[piece.name]:  # the format is the same
                solution = replace(solution, quantized=replace(solution.quantized, grid=self.grids[piece.name]))
            dequantized = solution.quantized.dequantize()
            errors = self._report(piece).errors(weight, dequantized, solution)
            parts.append(_Solved(piece.name, piece.rows[0], solution, errors))
            self._land(parts[-1], dequantized)
        seconds, rows = time.perf_counter() - started, sum(piece.count for piece in batch)
        return [replace(part, seconds=seconds * piece.count / rows) for piece, part in zip(batch, parts, strict=True)]

    def _land(self, part: "_Solved", dequantized: Tensor | None = None) -> None:
        """Put solved rows into the model, and into the copy that computes."""
        dequantized = part.solution.quantized.dequantize() if dequantized is None else dequantized
        rows = slice(part.first, part.first + len(dequantized))
        matrix(self.block.get_submodule(part.name))[rows] = dequantized
        if self.runner is not self.block:
            matrix(self.runner.get_submodule(part.name))[rows] = dequantized


@dataclass(frozen=True)
class _Solved:
    """Some rows of a linear that have landed.

    Attributes:
        name: of the linear within the block.
        first: row.
        solution: of these rows.
        errors: of these rows.
        seconds: that they took, on one rank.
    """

    name: str
    first: int
    solution: Solution
    errors: Errors
    seconds: float = 0.0


def _joined(parts: "Sequence[_Solved]") -> "_Solved":
    """A linear from its rows; ranks factor one and the same H, so what else there is to say is the same of all."""
    parts = sorted(parts, key=lambda part: part.first)
    first = parts[0]
    solution = replace(first.solution, quantized=QuantizedWeight.concat_rows([p.solution.quantized for p in parts]))
    errors = functools.reduce(operator.add, (part.errors for part in parts))
    return _Solved(first.name, 0, solution, errors, sum(part.seconds for part in parts))


def _check_coverage(block: nn.Module, sites: list[Site], name: str) -> None:
    """Refuse a block with linears that no token reaches: they would stay unquantized without a word.

    Raises:
        UserError: neither a token reached it, nor a linear that differs from it in the number of an expert.
    """
    reached = {linear for site in sites for linear in site.linears}
    missed = [site.linears[0] for site in _each_linear(block) if site.linears[0] not in reached]
    if missed:
        raise UserError(
            f"model: no token passes {name}.{missed[0]}, so nothing calibrates it; method=rtn needs no data"
        )


def _each_linear(block: nn.Module) -> Iterator[Site]:
    """Every linear as a site by itself: enough where nothing is calibrated."""
    for name, module in block.named_modules():
        if is_linear(module):
            yield Site((name,), matrix(module).shape[1])
