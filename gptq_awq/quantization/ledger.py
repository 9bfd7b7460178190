"""The ledger, one row per linear: the method requested, the algorithm that ran, and the error it left."""

import logging
from collections.abc import Mapping
from dataclasses import astuple, dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from gptq_awq.calibration.moments import Moments
from gptq_awq.grids.base import QuantizedWeight, fit_all, nearest, row_parts
from gptq_awq.grids.scale_range import scales_out_of_range
from gptq_awq.grids.search import nearest_error
from gptq_awq.kernels.quadratic import Quadratic
from gptq_awq.models.linear import Site
from gptq_awq.numerics.linalg import quadratic, rough_form
from gptq_awq.quantization.method import Method
from gptq_awq.runtime.profiling import phase
from gptq_awq.solvers.base import Solution
from gptq_awq.transforms.base import Scaling

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LinearReport:
    """Facts of a linear from before it is solved, from which its errors and its ledger row are made.

    Attributes:
        name: name of the module in the model.
        block: index of its block; -1 outside of the blocks.
        site: the linears it shares an input with.
        method: the method requested.
        moments: second moments of its input; None for methods without calibration.
        scalings: transform name → what that transform did at the linear's site.
    """

    name: str
    block: int
    site: Site
    method: Method
    moments: Moments | None
    scalings: Mapping[str, Scaling]

    @phase("ledger")
    def errors(
        self, weight: Float[Tensor, "out in"], dequantized: Float[Tensor, "out in"], solution: Solution
    ) -> "Errors":
        """Sums of squared errors of a solution, over all rows of the linear or some.

        Args:
            weight: rows of the weight that the solver was given (float32).
            dequantized: the solution's rows, dequantized.
            solution: the solver's solution for these rows.
        """
        dead = self.moments.dead() if self.moments and self.moments.tokens else None
        unheld = scales_out_of_range(solution.quantized, weight, dead)
        sums = Errors(_squares(weight), _squares(dequantized, weight), scales_out_of_range=unheld)
        if self.moments is None or not self.moments.tokens:
            return sums
        hessian = self.moments.hessian
        after = self._after(solution, sums.changed)
        after = _error(dequantized, weight, hessian) if after is None else after
        form = rough_form(hessian)
        before = _nearest_error(weight, hessian, form, solution.quantized, dequantized)
        signal = _rough(weight, hessian, form)
        return replace(sums, signal=signal, before=after if before is None else before, after=after)

    def _after(self, solution: Solution, changed: float) -> float | None:
        """Output error of a solution as its loss tells it; None where that is of another weight, or another H.

        Damping adds `ridge` to H's diagonal, but to that of dead columns, which are zero in H, one more.
        """
        assert self.moments is not None
        loss, ridge = solution.quantized.loss, solution.ridge
        if loss is None or (solution.damping is not None and (ridge is None or self.moments.dead().any())):
            return None
        return 2 * loss - (ridge or 0) * changed

    def row(self, solution: Solution, errors: "Errors", seconds: float) -> dict[str, Any]:
        """The linear's ledger row, as JSON values; `seconds` is the time that solving it took.

        Errors are relative, ‖error‖² / ‖signal‖² of the linear's output: `error_before` is the error of rounding the
        solver's input to nearest without search, `error_after` that of its solution. The signal, and with it both, is
        known to 0.3% (see `quadratic`).
        """
        grid, moments, shape = solution.quantized.grid, self.moments, list(solution.quantized.codes.shape)
        size = shape[1] if grid.group_size == -1 else grid.group_size
        last_group = shape[1] % size or size
        row: dict[str, Any] = {
            "name": self.name,
            "block": self.block,
            "site": self.site.name,
            "shape": shape,
            "requested": self.method.name,
            "solver": solution.algorithm,
            "fallback": solution.fallback,
            "transforms": {name: scaling.details for name, scaling in self.scalings.items()},
            "bits": grid.bits,
            "bits_per_weight": solution.quantized.bits_per_weight,
            "group_size": grid.group_size,
            "groups": solution.quantized.scales.shape[1],
            "last_group": last_group,
            "ragged": last_group != size,
            "scales_out_of_range": errors.scales_out_of_range,
            "damping": solution.damping,
            "tokens": _tokens(moments),
            "loss": solution.quantized.loss,
            "codes_sha256": solution.quantized.sha256(),
            "weight_error": errors.changed / max(errors.weight, 1e-30),
            "seconds": round(seconds, 4),
        }
        if moments is not None and moments.routed is not None:
            row |= {"expert": self.site.expert, "experts": moments.policy, "calibrated_on": moments.tokens}
        if errors.scales_out_of_range:
            row["scales"] = note = _scale_note(solution.quantized, errors.scales_out_of_range)
            log.warning("%s: %s", self.name, note)
        if self.site.analogous and any(scaling.scales is not None for scaling in self.scalings.values()):
            row["absorber"] = "verified on another expert"
        if moments is not None and moments.tokens:
            signal = max(errors.signal, 1e-30)
            row |= {"error_after": errors.after / signal, "error_before": errors.before / signal}
        return row


def left_row(name: str, block: int, site: str, method: Method, weight: Tensor, why: str) -> dict[str, Any]:
    """Ledger row of a linear that stays as it is, and has no codes."""
    return {
        "name": name,
        "block": block,
        "site": site,
        "shape": list(weight.shape),
        "requested": method.name,
        "solver": None,
        "left": why,
        "bits": None,
        "bits_per_weight": 8 * weight.dtype.itemsize,
        "codes_sha256": "",
        "seconds": 0.0,
    }


@dataclass(frozen=True)
class Errors:
    """Sums of squares over some rows of a linear.

    Attributes:
        weight: ‖W‖², of the weight.
        changed: ‖Ŵ - W‖², of the difference that quantization made.
        signal: tr(W H Wᵀ), of the output per token.
        before: output error per token, were the weight rounded to nearest.
        after: tr((Ŵ - W) H (Ŵ - W)ᵀ), output error per token.
        scales_out_of_range: number of scales that the dtype they are stored in can't hold.
    """

    weight: float
    changed: float
    signal: float = 0.0
    before: float = 0.0
    after: float = 0.0
    scales_out_of_range: int = 0

    def __add__(self, other: "Errors") -> "Errors":
        """The sums over the rows of both."""
        return Errors(*map(sum, zip(astuple(self), astuple(other), strict=True)))


def _scale_note(quantized: QuantizedWeight, count: int) -> str:
    """Sentence on scales that were clamped or coarsely rounded, with the option that would hold them."""
    grid, all_ = quantized.grid, quantized.store.get("d", quantized.scales).numel()
    held = "grid.scale_dtype=float32" if hasattr(grid, "scale_dtype") else "grid=int grid.scale_dtype=float32"
    return f"{count} of {all_} scales were clamped: {grid.stored_dtype} cannot hold them; {held} can"


def _squares(a: Float[Tensor, "out in"], b: Float[Tensor, "out in"] | None = None) -> float:
    """Squared Frobenius norm ‖a - b‖², or ‖a‖² without b."""
    parts = (a[rows] if b is None else a[rows] - b[rows] for rows in row_parts(a))
    return float(sum(part.square().sum() for part in parts))


def _error(a: Float[Tensor, "out in"], b: Float[Tensor, "out in"], hessian: Float[Tensor, "in in"]) -> float:
    """Squared output error per token, tr((a - b) H (a - b)ᵀ)."""
    return sum(quadratic(a[rows] - b[rows], hessian) for rows in row_parts(a))


def _nearest_error(
    weight: Float[Tensor, "out in"],
    hessian: Float[Tensor, "in in"],
    form: Quadratic | None,
    solved: QuantizedWeight,
    dequantized: Float[Tensor, "out in"],
) -> float | None:
    """Output error of rounding to nearest without search, roughly; None where that makes the solved weight."""
    grid = solved.grid.without_search().for_weights([weight])
    fitted = fit_all(grid, weight, None)
    # Weights that were rounded with other scales aren't the same, so that theirs needn't be compared.
    if form is not None and grid.unit == 1 and not torch.equal(fitted.scales, solved.scales):
        return nearest_error(form, grid, fitted, weight, weight.new_ones(weight.shape[1]))
    rounded = nearest(grid, weight)
    return None if torch.equal(rounded, dequantized) else _rough(rounded.sub_(weight), hessian, form)


def _rough(delta: Float[Tensor, "out in"], hessian: Float[Tensor, "in in"], form: Quadratic | None) -> float:
    """Output error per token, in bfloat16 where there is a form for that."""
    return quadratic(delta, hessian) if form is None else form.of(delta.contiguous().numpy())


def _tokens(moments: Moments | None) -> int | None:
    """Number of tokens that reached the linear without any policy for experts; None without calibration."""
    if moments is None:
        return None
    return moments.tokens if moments.routed is None else moments.routed
