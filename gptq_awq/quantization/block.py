"""One step of the block loop: a block is transformed, its linears are solved, and it is tuned."""

import copy
import functools
import logging
import operator
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
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
from gptq_awq.models.left import MARKS
from gptq_awq.models.linear import NOT_PASSED, Site, is_linear, matrix
from gptq_awq.numerics.distributed import ONE, Ranks
from gptq_awq.quantization.batching import RowSlice, batches, shared
from gptq_awq.quantization.ledger import Errors, LinearReport, left_row
from gptq_awq.quantization.method import Method, solved_together
from gptq_awq.quantization.resume import Row
from gptq_awq.quantization.tuning_step import examples, hidden_states, with_tuning
from gptq_awq.runtime.profiling import phase
from gptq_awq.solvers.base import Coupling, Solution, Solver
from gptq_awq.solvers.rtn import RTN
from gptq_awq.transforms.base import ModuleInputs, Scaling, SiteTransform, Transform, absorb_scaling

log = logging.getLogger(__name__)

UNREACHED = Scaling(None, {"skipped": "no calibration token reaches this expert"})
"""A transform's scaling at a site that no token reached: none."""


class BlockStep:
    """Quantizes one block in place, and gathers its quantized weights and ledger rows.

    Args:
        block: the block; changed in place.
        index: its number.
        name: its name in the model.
        method: transforms, solver and tuning.
        grids: module name in the model → grid.
        prepared: details of the whole model's transforms, by name, for the ledger.
        ranks: the processes that share the work.
        curvatures: H_O (out, n) by the name of the linear in the model, each forgotten once it is used; None: of none.
        fused: full names of linears that read one input, for grids that fuse them without calibration.
        squares: mean squares of the linears' inputs by full name, for range searches without calibration.
    """

    def __init__(
        self,
        block: nn.Module,
        index: int,
        name: str,
        method: Method,
        grids: Mapping[str, Grid],
        prepared: dict[str, Scaling],
        ranks: Ranks = ONE,
        curvatures: dict[str, Tensor] | None = None,
        fused: Sequence[tuple[str, ...]] = (),
        squares: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.block, self.runner, self.index, self.name, self.method = block, block, index, name, method
        self.grids = {n.removeprefix(f"{name}."): grid for n, grid in grids.items() if n.startswith(f"{name}.")}
        self.weights: dict[str, QuantizedWeight] = {}
        self.rows: list[Row] = []
        self._prepared, self._ranks, self._curvatures = prepared, ranks, curvatures or {}
        self._fused = [
            tuple(n.removeprefix(f"{name}.") for n in names) for names in fused if names[0].startswith(f"{name}.")
        ]
        self._squares = squares or {}
        self._scalings: dict[str, dict[str, Scaling]] = {}
        self._full: nn.Module | None = None

    def run(self, inputs: Inputs | None) -> None:
        """Transform, solve and tune the block, and advance `inputs` to the next one; None: without calibration."""
        assert self.method.solver is not None
        for name, module in self.block.named_modules():
            if (why := getattr(module, "left", None)) in MARKS:
                self.leave(name, str(why))
        if inputs is None:
            for site in self._own(_each_linear(self.block)):
                self._solve_sites([(site, self._diagonal(site.linears[0]))])
            return
        if not inputs.enter(self.index):
            return  # the model calls it for images only
        if inputs.activations is not None:
            self.runner = inputs.runner(self.block)
        tuning = self.method.block_tunings
        block_inputs = hidden_states(inputs.activations) if tuning and inputs.activations is not None else []
        self._transform_and_solve(inputs)
        if tuning and inputs.activations is not None:
            self._tune(inputs.activations, block_inputs)

    def leave(self, name: str, why: str) -> None:
        """Add the ledger row of a linear that stays as it is."""
        weight = matrix(self.block.get_submodule(name))
        self.rows.append(left_row(f"{self.name}.{name}", self.index, name, self.method, weight, why))

    def _diagonal(self, linear: str) -> Moments | None:
        """Moments of which only the mean squares are known, of an importance matrix; None: it has none."""
        squares = self._squares.get(f"{self.name}.{linear}")
        if squares is None:
            return None
        squares = squares.to(matrix(self.block.get_submodule(linear)).device)
        return Moments(squares.diag(), squares.sqrt(), 1)

    def _transform_and_solve(self, inputs: Inputs) -> None:
        """Transform the block and solve its sites: site by site on quantized inputs, or all from one observation."""
        assert self.method.solver is not None
        if self.method.error_propagation and self.method.solver.needs_hessian:
            self._solve_staged(inputs)
        else:
            seen = self._observe(inputs)
            moments = self._transform(seen)
            full = self._full_precision()
            self._solve_sites(list(zip(seen.sites, moments, strict=True)))
            if self.method.error_propagation and inputs.activations is not None:
                inputs.activations.advance(self.runner, self.index, full)

    def _solve_staged(self, inputs: Inputs) -> None:
        """Transform the block, then solve each site on its inputs as the sites before it, quantized, leave them."""
        assert inputs.activations is not None
        if self.method.block_transforms:
            seen = self._observe(inputs)
            self._transform(seen)
            sites = seen.sites
        else:
            sites = self._own(inputs.sites(self.block, self.index))
            self._leave_missed(sites)
        full = self._full_precision()
        paired = self.method.needs_cross
        staged_forward(
            block=self.runner,
            index=self.index,
            sites=sites,
            activations=inputs.activations,
            on_site=lambda site, moments: self._solve_sites([(site, moments)]),
            keep=inputs.keeps_activations,
            full=full if paired else None,
            policy=inputs.experts,
        )
        if full is not None and not paired:
            inputs.activations.advance_full(full, self.index)

    def _full_precision(self) -> nn.Module | None:
        """A copy of the transformed block from before it is solved; None where the method needs none."""
        self._full = copy.deepcopy(self.runner) if self.method.needs_full else None
        return self._full

    def _tune(self, activations: Activations, block_inputs: list[Tensor]) -> None:
        """Tune the solved block towards full precision's outputs, then advance the activations through it again."""
        assert self._full is not None
        seen = examples(activations, self.index, block_inputs)
        weights = {name.removeprefix(f"{self.name}."): weight for name, weight in self.weights.items()}
        originals = {name: matrix(self._full.get_submodule(name)).float() for name in weights}
        for tuning in self.method.block_tunings:
            with phase("tune"):
                weights, details = tuning.apply_block(self.block, weights, originals, seen)
            self.weights = {f"{self.name}.{name}": weight for name, weight in weights.items()}
            self.rows = with_tuning(self.rows, self.weights, tuning.name, details)
        if self.runner is not self.block:
            self.runner.load_state_dict(self.block.state_dict())
        for batch, hidden in zip(activations.batches, block_inputs, strict=True):
            batch.hidden = hidden
        activations.advance(self.runner, self.index)

    def _observe(self, inputs: Inputs) -> Observation:
        seen = inputs.observe(self.block, self.runner, self.index)
        pairs = zip(seen.sites, seen.moments, strict=True)
        own = [(site, moments) for each, moments in pairs for site in self._own([each])]
        self._leave_missed([site for site, _ in own])
        return replace(seen, sites=[site for site, _ in own], moments=[moments for _, moments in own])

    def _own(self, sites: Iterable[Site]) -> list[Site]:
        """Sites without linears that have no grid, as they are protected, or were solved with an earlier block.

        A site that keeps some in full precision has no absorber: the scales of its input would be theirs, too.
        """
        found = []
        for site in sites:
            own = tuple(name for name in site.linears if name in self.grids)
            found += [site] if own == site.linears else [replace(site, linears=own, absorber=None)] if own else []
        return found

    def _leave_missed(self, sites: Sequence[Site]) -> None:
        """Leave, and name in log and ledger, linears that are in no site: no token passed them here."""
        reached = {linear for site in sites for linear in site.linears}
        for name in (name for name in self.grids if name not in reached):
            self.block.get_submodule(name).left = NOT_PASSED  # pyright: ignore[reportArgumentType]
            log.warning("%s.%s stays as it is: %s", self.name, name, NOT_PASSED)
            self.leave(name, NOT_PASSED)

    def _transform(self, seen: Observation) -> list[Moments]:
        """Apply the block's transforms in place; returns the moments of all sites' transformed inputs."""
        moments = {site.linears: m for site, m in zip(seen.sites, seen.moments, strict=True)}
        known = [site for site in seen.sites if moments[site.linears].tokens]
        for transform in self.method.block_transforms:
            scalings = self._apply(transform, known, [moments[site.linears] for site in known], self._inputs_of(seen))
            for site in seen.sites:
                self._scalings.setdefault(site.name, {})[transform.name] = UNREACHED
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
        """Apply one transform to the block in place; returns the scaling of each site.

        Ranks share the sites of a transform that searches site by site without `inputs`. Any other is computed by rank
        0, which has the first batch.
        """
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
        """A function from a submodule's name to the arguments of its calls, in a forward of the first batch."""

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
        """Quantize the linears of some sites: each rank solves its share of rows, then all exchange their results."""
        for names in self._fused or [site.linears for site, _ in sites]:
            self._share_scales(names)
        linears = [self._whole_linear(name, site, moments) for site, moments in sites for name in site.linears]
        own: list[_Solved] = []
        mine = batches(shared(linears, self._ranks))
        for i, batch in enumerate(mine):
            needed = {id(each.known.hessian) for later in mine[i + 1 :] for each in later if each.known}
            own += self._solve(batch, needed)
        solved: dict[str, list[_Solved]] = {}
        for rank, parts in enumerate(self._ranks.gather(own)):
            for part in parts:
                solved.setdefault(part.name, []).append(part)
                if rank != self._ranks.rank:
                    self._write(part)
        for linear in linears:
            whole = _joined(solved[linear.name])
            self.weights[f"{self.name}.{linear.name}"] = whole.solution.quantized
            self.rows.append(self._report(linear).row(whole.solution, whole.errors, whole.seconds))

    def _share_scales(self, names: Sequence[str]) -> None:
        """Let the linears of one input that are on one grid choose together what it stores once per tensor."""
        shared_grids = {name: self.grids[name] for name in names if name in self.grids}
        for grid in {grid for grid in shared_grids.values() if grid.shared_by_tensor}:
            alike = [name for name, own in shared_grids.items() if own == grid]
            chosen = grid.for_weights([matrix(self.block.get_submodule(name)) for name in alike])
            self.grids |= dict.fromkeys(alike, chosen)

    def _whole_linear(self, name: str, site: Site, moments: Moments | None) -> RowSlice:
        """All rows of a linear; they are rounded to nearest where no token reached it, else solved by the method."""
        assert self.method.solver is not None
        rows, columns = matrix(self.block.get_submodule(name)).shape
        linear = RowSlice(name, site, moments, self.method.solver, self.grids[name], columns, (0, rows))
        if moments is None or moments.tokens:
            return replace(linear, solver=self._solver(name, linear.grid))
        grid = linear.grid.without_search() if linear.grid.needs_hessian else linear.grid
        return replace(linear, solver=RTN(), grid=grid)  # an expert's, as experts.policy has it

    def _solver(self, name: str, grid: Grid) -> Solver:
        """The method's solver, with feedback among the rows of a linear whose H_O is known."""
        solver, settings = self.method.solver, self.method.output_curvature
        assert solver is not None
        curvature = self._curvatures.pop(f"{self.name}.{name}", None)
        if settings is None or curvature is None:
            return solver
        if not grid.rows_independent:
            raise UserError(
                f"method.output_curvature: grid={grid.label} fits all rows together; choose another, or null"
            )
        assert isinstance(solver, Coupling)
        return solver.two_sided(curvature, settings.tile, settings.damping)

    def _report(self, linear: RowSlice) -> LinearReport:
        return LinearReport(
            name=f"{self.name}.{linear.name}",
            block=self.index,
            site=linear.site,
            method=self.method,
            moments=linear.moments,
            scalings=self._prepared | self._scalings.get(linear.site.name, {}),
        )

    def _solve(self, batch: Sequence[RowSlice], needed: set[int]) -> "list[_Solved]":
        """Solve a batch of row slices and write them into the block.

        `needed` holds the ids of Hessians that later batches are solved with; factors of all others are freed.
        """
        started, first = time.perf_counter(), batch[0]
        weights = [matrix(self.block.get_submodule(each.name))[slice(*each.rows)].float() for each in batch]
        names = [f"{self.name}.{each.name}" for each in batch]
        solutions = solved_together(first.solver, names, weights, [each.known for each in batch], first.grid)
        for each in batch:
            if each.known and id(each.known.hessian) not in needed:
                each.known.forget_factors()
        parts = []
        for each, weight, solution in zip(batch, weights, solutions, strict=True):
            if each.grid is not self.grids[each.name]:  # without search: the format is the same
                solution = replace(solution, quantized=replace(solution.quantized, grid=self.grids[each.name]))
            dequantized = solution.quantized.dequantize()
            errors = self._report(each).errors(weight, dequantized, solution)
            parts.append(_Solved(each.name, each.rows[0], solution, errors))
            self._write(parts[-1], dequantized)
        seconds, rows = time.perf_counter() - started, sum(each.count for each in batch)
        return [replace(part, seconds=seconds * each.count / rows) for each, part in zip(batch, parts, strict=True)]

    def _write(self, part: "_Solved", dequantized: Tensor | None = None) -> None:
        """Write solved rows, dequantized, into the block, and into its copy that forwards run through."""
        dequantized = part.solution.quantized.dequantize() if dequantized is None else dequantized
        rows = slice(part.first, part.first + len(dequantized))
        matrix(self.block.get_submodule(part.name))[rows] = dequantized
        if self.runner is not self.block:
            matrix(self.runner.get_submodule(part.name))[rows] = dequantized


@dataclass(frozen=True)
class _Solved:
    """Some rows of a linear, solved.

    Attributes:
        name: name of the linear within the block.
        first: index of the first row.
        solution: the solver's solution for these rows.
        errors: sums of squares over these rows.
        seconds: seconds that solving them took, on one rank.
    """

    name: str
    first: int
    solution: Solution
    errors: Errors
    seconds: float = 0.0


def _joined(parts: "Sequence[_Solved]") -> "_Solved":
    """Join a linear's solved rows; damping and fallback are the first part's, as all ranks factor the same H."""
    parts = sorted(parts, key=lambda part: part.first)
    first = parts[0]
    solution = replace(first.solution, quantized=QuantizedWeight.concat_rows([p.solution.quantized for p in parts]))
    errors = functools.reduce(operator.add, (part.errors for part in parts))
    return _Solved(first.name, 0, solution, errors, sum(part.seconds for part in parts))


def _each_linear(block: nn.Module) -> Iterator[Site]:
    """Each of the block's linears as a site of its own, for methods without calibration."""
    for name, module in block.named_modules():
        if is_linear(module):
            yield Site((name,), matrix(module).shape[1])
