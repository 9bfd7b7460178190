"""GPTQ (Frantar et al., arXiv 2210.17323): round column by column, later columns absorb the error.

With U the upper Cholesky factor of (H + λ mean(diag H) I)⁻¹, for columns i = 1…in:

    q_i = quant(w_i)                              nearest point on the grid
    e_i = (w_i - q_i) / U_ii                      the error in units of what it costs
    W_:,j ← W_:,j - e_i U_ij      for j > i       optimal update of the columns not yet rounded (eq. 2)

Updates inside a block of `block_size` columns are immediate, those beyond it are applied once per block
(sec. 3.3, lazy batch updates). A group's range is fitted when the sweep reaches its first column, to the weights as
the last lazy update left them: the original code's choice, so that results equal its own.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from gptq_awq.calibration.moments import Factor, Moments, factor_together
from gptq_awq.grids.arithmetic import KINDS, Params, in_numbers
from gptq_awq.grids.base import Grid, QuantizedWeight, group_of_columns, row_parts
from gptq_awq.grids.vectors import VectorGrid
from gptq_awq.kernels import gpu
from gptq_awq.kernels.columns import permute_columns, sweep_columns
from gptq_awq.numerics.linalg import NotPositiveDefiniteError, damped, reordered, ridge
from gptq_awq.runtime.options import NonNegative, NonNegativeInt, PositiveInt, checked_dataclass
from gptq_awq.runtime.profiling import phase
from gptq_awq.solvers.base import Solution, Solver
from gptq_awq.solvers.groups import Groups
from gptq_awq.solvers.refine import refined
from gptq_awq.solvers.rtn import RTN


@checked_dataclass
class GPTQ:
    """GPTQ: round columns in sequence, with Hessian-based error feedback onto the columns not yet rounded.

    Attributes:
        act_order: round columns in order of descending diag(H). Without `static_groups`, groups consist of
            columns adjacent in that order, and the checkpoint must store each column's group.
        static_groups: fit all groups before rounding, in natural column order, to the weights that the sweep starts
            from: GPTQ's are the original ones, those of solvers that correct drift are shifted (see `target`).
        damping: λ, a fraction of the mean diagonal of H (percdamp); raised tenfold as long as H does not factor.
        block_size: columns per lazy update.
        refine: passes of coordinate descent over codes and scales after the sweep (refine.py); 0: the paper's GPTQ.
        fallback: action where H factors at no damping: "none" fails the run, "rtn" rounds this linear to nearest
            and notes that in the ledger.
    """

    act_order: bool = False
    static_groups: bool = False
    damping: NonNegative = 0.01
    block_size: PositiveInt = 128
    refine: NonNegativeInt = 0
    fallback: Literal["none", "rtn"] = "none"
    name: str = "gptq"
    needs_hessian: bool = True
    needs_cross: bool = False

    def __init_subclass__(cls) -> None:
        """Disable `solve_together` in a subclass that overrides `solve` only: its weights are solved one at a time."""
        if "solve" in vars(cls) and "solve_together" not in vars(cls):
            cls.solve_together = None  # pyright: ignore[reportAttributeAccessIssue]

    @property
    def natural_groups(self) -> bool:
        """Whether groups consist of neighbouring columns, which every checkpoint format can store."""
        return self.static_groups or not self.act_order

    def solve(self, weight: Float[Tensor, "out in"], moments: Moments | None, grid: Grid) -> Solution:
        """Quantize one weight by the column sweep.

        Raises:
            NotPositiveDefiniteError: H could not be factored and no fallback is declared.
            ValueError: no moments are given.
        """
        return GPTQ.solve_together(self, [weight], [moments], grid)[0]

    def solve_together(
        self,
        weights: Sequence[Float[Tensor, "_ in"]],
        moments: Sequence[Moments | None],
        grid: Grid,
        coupled: "Coupled | None" = None,
    ) -> list[Solution]:
        """Quantize several weights in one column sweep, whose rows are independent; weights of one H form a stack.

        Args:
            weights: all of one width; the weights of each H have equally many rows in total.
            moments: moments of each weight's input; weights that read one input share one object.
            grid: grid of all weights; it must fit rows independently, unless there is only one weight.
            coupled: makes of the rounding of a block of columns one whose rows see each other's errors (yaqa.py).

        Raises:
            NotPositiveDefiniteError: an H could not be factored and no fallback is declared.
            ValueError: a weight comes without moments.
        """
        known = [each for each in moments if each is not None]
        if len(known) < len(weights):
            raise ValueError(f"{self.name} needs the moments of the layer's input")
        grid = grid.for_weights(weights)
        # Factor the inverse Hessians, with columns in rounding order.
        inputs = {id(each.hessian): each for each in known}
        factor_together(list(inputs.values()), self.damping, self.act_order, grid.unit)
        solutions: dict[int, Solution] = {}
        stacks: list[_Stack] = []
        for each in inputs.values():
            members = [i for i, own in enumerate(known) if own.hessian is each.hessian]
            try:
                factor = each.inverse_factor(self.damping, self.act_order, grid.unit)
            except NotPositiveDefiniteError as error:
                if self.fallback == "none":
                    raise
                for i in members:
                    rounded = RTN().solve(weights[i], each, grid).quantized
                    solutions[i] = Solution(rounded, "rtn", fallback=str(error))
            else:
                stacks.append(self._make_stack(members, [weights[i] for i in members], each, factor, grid))
        if stacks:
            solutions |= self._sweep_stacks(stacks, coupled)
        return [solutions[i] for i in range(len(weights))]

    def _sweep_stacks(self, stacks: list["_Stack"], coupled: "Coupled | None") -> dict[int, Solution]:
        """Run the column sweep on all stacks, and return each weight's solution by its index among the weights."""
        W = _stacked([stack.W for stack in stacks])
        rounding = _rounding(W.device, stacks[0].groups.grid)
        rounding = coupled(rounding) if coupled else rounding
        with phase("solve", W.shape[0] * W.shape[1], W.shape[2]):
            codes, losses = sweep(W, stacks, self.block_size, rounding)
        solutions = {}
        for stack, own, lost in zip(stacks, codes, losses, strict=True):
            damping = stack.factor[2]
            of_weight = coupled is None and type(self).target is GPTQ.target
            added = float(ridge(stack.moments.hessian, damping)) if of_weight else None
            raised = f"damping raised from {self.damping:g} to {damping:g}" if damping != self.damping else None
            rounded = stack.split_rows(own, lost)
            if stack.start is not None:
                rounded = stack.refined(rounded, self.refine)
            for i, weight in zip(stack.members, rounded, strict=True):
                solutions[i] = Solution(weight, self.name, damping, raised, added)
        return solutions

    def _make_stack(
        self, members: list[int], weights: list[Tensor], moments: Moments, factor: Factor, grid: Grid
    ) -> "_Stack":
        """Stack the weights that share one H: the weight to start from, its groups, and columns in rounding order."""
        U, order, _ = factor
        W = weights[0].clone() if len(weights) == 1 else torch.cat(weights)
        W = self.target(W, moments, U, order)
        # Columns whose input is always zero do not affect the output. Drift may give them one in full precision, whose
        # share of the output the target has moved to the other columns by now.
        W.masked_fill_(moments.dead(), 0)
        start = W.clone() if self.refine and grid.unit == 1 else None
        # Static groups are fitted now, in natural order; others when the sweep reaches them.
        hessian = moments.hessian if grid.needs_hessian else None
        group_of_column = group_of_columns(W.shape[1], grid.group_size)
        groups = Groups.empty(W, group_of_column, grid)
        if self.static_groups:
            groups.fit_all(W, hessian)
        if order is not None:
            _permute(W, order)
            if self.static_groups:
                group_of_column = group_of_column[order.cpu()]
            elif hessian is not None:
                hessian = reordered(hessian, order)
        rows = [len(w) for w in weights]
        return _Stack(members, rows, W, factor, hessian, group_of_column, groups, start, moments)

    def plain(self) -> "GPTQ":
        """This solver without refinement, which takes about a tenth off the error at every width: enough to compare."""
        return replace(self, refine=0)

    def two_sided(self, curvature: Float[Tensor, "out n"], tile: int, damping: float) -> Solver:
        """This solver with feedback among the rows of one weight, whose output-side curvature is H_O."""
        from gptq_awq.solvers.yaqa import TwoSided  # which imports this module

        return TwoSided(self, curvature, tile, damping)

    def target(
        self,
        W: Float[Tensor, "out in"],
        moments: Moments,  # noqa: ARG002
        U: Float[Tensor, "in in"],  # noqa: ARG002
        order: Int[Tensor, "in"] | None,  # noqa: ARG002
    ) -> Float[Tensor, "out in"]:
        """Weight that the sweep starts from, in natural column order: for GPTQ, the layer's own weight.

        Solvers that run the same sweep from another starting point (gptaq.py, qronos.py) override this.
        """
        return W


Rounding = Callable[[Tensor, Tensor, Grid, Params, Tensor, Tensor], None]
"""Rounds a block of columns: (W, U, grid, scales and zeros per column, codes, errors); it fills the last two."""
Coupled = Callable[[Rounding], Rounding]


@dataclass(frozen=True)
class _Stack:
    """Weights that share one Hessian, their rows stacked in one matrix, ready for the sweep.

    Attributes:
        members: index of each weight among those given to `solve_together`.
        rows: number of rows of each weight.
        W: weight that the sweep starts from, columns in rounding order.
        factor: U, the rounding order (None: natural) and the damping.
        hessian: H in rounding order, for ranges fitted during the sweep; None where the grid does not read it.
        group_of_column: group of each column, in rounding order.
        groups: scales and zeros of the groups.
        start: weight that the sweep starts from, columns in natural order; None where nothing is refined after it.
        moments: moments of the input, columns in natural order.
    """

    members: list[int]
    rows: list[int]
    W: Float[Tensor, "out in"]
    factor: Factor
    hessian: Float[Tensor, "in in"] | None
    group_of_column: Int[Tensor, "in"]
    groups: Groups
    start: Float[Tensor, "out in"] | None
    moments: Moments

    def refined(self, rounded: list[QuantizedWeight], passes: int) -> list[QuantizedWeight]:
        """The stack's quantized weights after coordinate descent towards the weight that the sweep started from."""
        assert self.start is not None
        hessian = damped(self.moments.hessian, self.factor[2])
        parts = zip(rounded, self.start.split(self.rows), strict=True)
        return [refined(weight, start, hessian, passes) for weight, start in parts]

    def split_rows(self, codes: UInt8[Tensor, "out in"], losses: Float[Tensor, "out"]) -> list[QuantizedWeight]:
        """Split the stack into its quantized weights, with columns back in natural order."""
        order, group_of_column = self.factor[1], self.group_of_column
        if order is not None:
            inverse = torch.argsort(order)
            _permute(codes, inverse)
            group_of_column = group_of_column[inverse.cpu()]
        grid, fitted = self.groups.grid, self.groups.all()
        sums = [float(part.sum()) / 2 for part in losses.split(self.rows)]
        if len(self.rows) == 1:
            return [QuantizedWeight.of(grid, codes, fitted, group_of_column, sums[0])]
        parts = zip(codes.split(self.rows), fitted.split(self.rows), sums, strict=True)
        return [QuantizedWeight.of(grid, own.clone(), its, group_of_column, lost) for own, its, lost in parts]


def sweep(
    W: Float[Tensor, "stacks out in"], stacks: Sequence[_Stack], block_size: int, round_columns: Rounding
) -> tuple[list[UInt8[Tensor, "out in"]], Float[Tensor, "stacks out"]]:
    """Round all columns of all stacks by the blocked column sweep, in the order in which columns are given.

    W is changed in place; groups that are not fitted yet are fitted when the sweep reaches them.

    Returns:
        Codes of each stack, and each row's Σ (w_i - q_i)² / U_ii² in float64: twice its loss.
    """
    columns, first = W.shape[2], stacks[0].groups
    grid, span_of_column = first.grid, first.span_of_group[stacks[0].group_of_column].tolist()
    codes = [torch.empty_like(own, dtype=torch.uint8) for own in W]
    losses = W.new_zeros(W.shape[:2], dtype=torch.float64)
    group_of_columns = [stack.group_of_column.to(W.device) for stack in stacks]
    factors = [stack.factor[0] for stack in stacks]
    for i1 in range(0, columns, block_size):
        i2 = min(i1 + block_size, columns)
        # Ranges are fitted to W, which changes only between blocks: all spans that begin in this one can be fitted now.
        new = [span for span in dict.fromkeys(span_of_column[i1:i2]) if span not in first.stores]
        _fit_spans(new, W, stacks, span_of_column)
        W1 = W[:, :, i1:i2].clone(memory_format=torch.contiguous_format)
        U1 = _stacked([U[i1:i2, i1:i2] for U in factors]).contiguous()
        Q1, E1 = torch.empty_like(W1), torch.empty_like(W1)
        params = [s.groups.per_column(groups[i1:i2]) for s, groups in zip(stacks, group_of_columns, strict=True)]
        scales, zeros = (_stacked(list(each)) for each in zip(*params, strict=True))
        round_columns(W1, U1, grid, (scales, zeros), Q1, E1)
        for own, rounded in zip(codes, Q1, strict=True):
            own[:, i1:i2] = rounded
        losses += E1.square().sum(2, dtype=torch.float64)
        if i2 < columns:
            _update(W[:, :, i2:], E1, [U[i1:i2, i2:] for U in factors])
    return codes, losses


def _fit_spans(
    spans: list[int], W: Float[Tensor, "stacks out in"], stacks: Sequence[_Stack], span_of_column: list[int]
) -> None:
    """Fit adjacent spans to the current weights of all stacks: spans of one width at once, as a call costs time."""
    grid, widths = stacks[0].groups.grid, [span_of_column.count(span) for span in spans]
    for width in dict.fromkeys(widths):
        alike = [span for span, own in zip(spans, widths, strict=True) if own == width]
        for together in [alike] if grid.rows_independent else [[span] for span in alike]:
            _fit_alike(together, width, span_of_column.index(together[0]), W, stacks)


def _fit_alike(
    spans: list[int], width: int, first: int, W: Float[Tensor, "stacks out in"], stacks: Sequence[_Stack]
) -> None:
    """Fit adjacent spans of one width, which begin at column `first` of W."""
    n = len(spans)
    count, ends = len(stacks) * n, [(a, a + width) for a in range(first, first + n * width, width)]
    blocks = [stack.hessian[a:b, a:b] for stack in stacks if stack.hessian is not None for a, b in ends]
    with phase("search"):
        # Row k belongs to span k mod n of stack (k div n) mod stacks, as `Grid.fit` expects.
        rows = W[:, :, first : first + n * width].unflatten(2, (n, width)).transpose(0, 1).reshape(-1, width)
        fitted = stacks[0].groups.grid.fit(rows, _stacked(blocks) if blocks else None)
    for i, stack in enumerate(stacks):
        for j, span in enumerate(spans):
            stack.groups.take(span, fitted if count == 1 else fitted.rows(slice(i * n + j, None, count)))


def _update(W: Float[Tensor, "stacks out cols"], E: Float[Tensor, "stacks out block"], U: list[Tensor]) -> None:
    """Let later columns absorb a block's errors, in place: W ← W - E U for each stack."""
    if len(U) == 1:
        W[0].addmm_(E[0], U[0], alpha=-1)
    else:
        W.baddbmm_(E, torch.stack(U), alpha=-1)


def _stacked(parts: Sequence[Tensor]) -> Tensor:
    """Stack tensors along a new first dimension; a single one is viewed, not copied."""
    return parts[0][None] if len(parts) == 1 else torch.stack(list(parts))


def _permute(matrix: Float[Tensor, "out in"] | UInt8[Tensor, "out in"], order: Int[Tensor, "in"]) -> None:
    """Reorder the columns in place: a second weight would not fit beside H and U of the largest layers."""
    if matrix.device.type == "cpu":
        permute_columns(matrix.numpy(), order.numpy())
        return
    for rows in row_parts(matrix):
        matrix[rows] = matrix[rows].index_select(1, order)


def _rounding(device: torch.device, grid: Grid) -> Rounding:
    if grid.unit > 1:
        return _round_vectors
    if gpu.available(device):
        return _round_triton
    return _round_compiled if device.type == "cpu" else _round_plain


def _round_vectors(W1: Tensor, U1: Tensor, grid: Grid, params: Params, Q1: Tensor, E1: Tensor) -> None:
    """Round the columns of a block vector by vector (grids/vectors.py)."""
    assert isinstance(grid, VectorGrid)
    grid.sweep(W1, U1, params[0], Q1, E1)


def _round_triton(W1: Tensor, U1: Tensor, grid: Grid, params: Params, Q1: Tensor, E1: Tensor) -> None:
    """Round the columns of a block by the compiled GPU kernel (kernels/triton_columns.py)."""
    from gptq_awq.kernels.triton_columns import sweep_columns  # Triton is not available everywhere

    arithmetic = grid.arithmetic
    sweep_columns(
        W1,
        U1,
        scale=params[0],
        zero=params[1],
        max_code=arithmetic.max_code,
        kind=KINDS.index(arithmetic.kind),
        levels=W1.new_tensor(arithmetic.levels),
        first=0,
        codes=Q1,
        errors=E1,
    )


def _round_plain(W1: Tensor, U1: Tensor, grid: Grid, params: Params, Q1: Tensor, E1: Tensor) -> None:
    """Round the columns of a block in plain PyTorch, on any device: the module's equations, one line each."""
    for w, u, scales, zeros, q, e in zip(W1, U1, *params, Q1, E1, strict=True):
        for i in range(scales.shape[1]):
            group = scales[:, i : i + 1], zeros[:, i : i + 1]
            code = grid.encode(w[:, i : i + 1], group)
            error = (w[:, i : i + 1] - grid.decode(code, group)) / u[i, i]
            w[:, i + 1 :] -= error * u[i, i + 1 :]
            q[:, i : i + 1], e[:, i : i + 1] = code, error


def _round_compiled(W1: Tensor, U1: Tensor, grid: Grid, params: Params, Q1: Tensor, E1: Tensor) -> None:
    """Round the columns of a block by the compiled CPU kernel (kernels/columns.py)."""
    scale, zero = (p.contiguous().numpy() for p in params)
    max_code, kind, levels = in_numbers(grid.arithmetic)
    sweep_columns(W1.numpy(), U1.numpy(), scale, zero, max_code, kind, levels, 0, Q1.numpy(), E1.numpy())
