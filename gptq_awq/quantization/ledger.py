"""One ledger row per linear: what was asked for, what was done, and what it cost."""

from collections.abc import Mapping
from dataclasses import astuple, dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from gptq_awq.calibration.moments import Moments
from gptq_awq.grids.base import nearest, row_parts
from gptq_awq.models.linear import Site
from gptq_awq.numerics.linalg import quadratic
from gptq_awq.quantization.method import Method
from gptq_awq.runtime.profiling import phase
from gptq_awq.solvers.base import Solution
from gptq_awq.transforms.base import Scaling


@dataclass(frozen=True)
class LinearReport:
    """What is known of a linear before it is solved.

    Attributes:
        name: of the module in the model.
        block: index of its block.
        site: the linears it shares an input with.
        method: as requested.
        moments: of its input; None for methods without calibration.
        scalings: what each transform did at its site.
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
        """What the solver's answer costs, of all rows or of some."""
        sums = Errors(_squares(weight), _squares(dequantized, weight))
        if self.moments is None or not self.moments.tokens:
            return sums
        hessian = self.moments.hessian
        loss = solution.quantized.loss if solution.damping is None else None  # else it is of the damped H
        after = _error(dequantized, weight, hessian) if loss is None else 2 * loss
        rounded = nearest(solution.quantized.grid, weight)
        same = torch.equal(rounded, dequantized)
        before = after if same else quadratic(rounded.sub_(weight), hessian, rough=True)
        return replace(sums, signal=quadratic(weight, hessian, rough=True), before=before, after=after)

    def row(self, solution: Solution, errors: "Errors", seconds: float) -> dict[str, Any]:
        """The row, as JSON values.

        Errors are relative, ‖error‖² / ‖signal‖² of the linear's output: `error_before` of rounding the weight
        that the solver got to nearest without any search, `error_after` of what it answered. The signal, and with
        it both, is known to 0.3% (see `quadratic`).
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
            "damping": solution.damping,
            "tokens": _tokens(moments),
            "loss": solution.quantized.loss,
            "codes_sha256": solution.quantized.sha256(),
            "weight_error": errors.changed / max(errors.weight, 1e-30),
            "seconds": round(seconds, 4),
        }
        if moments is not None and moments.routed is not None:
            row |= {"expert": self.site.expert, "experts": moments.policy, "calibrated_on": moments.tokens}
        if self.site.analogous and any(scaling.scales is not None for scaling in self.scalings.values()):
            row["absorber"] = "verified on another expert"
        if moments is not None and moments.tokens:
            signal = max(errors.signal, 1e-30)
            row |= {"error_after": errors.after / signal, "error_before": errors.before / signal}
        return row


@dataclass(frozen=True)
class Errors:
    """Sums of squares over some rows of a linear.

    Attributes:
        weight: of the weight.
        changed: of what rounding changed of it.
        signal: of its output.
        before: of the output's error, were the weight rounded to nearest.
        after: of the output's error.
    """

    weight: float
    changed: float
    signal: float = 0.0
    before: float = 0.0
    after: float = 0.0

    def __add__(self, other: "Errors") -> "Errors":
        """Of both rows."""
        return Errors(*map(sum, zip(astuple(self), astuple(other), strict=True)))


def _squares(a: Float[Tensor, "out in"], b: Float[Tensor, "out in"] | None = None) -> float:
    """‖a - b‖², or ‖a‖²."""
    parts = (a[rows] if b is None else a[rows] - b[rows] for rows in row_parts(a))
    return float(sum(part.square().sum() for part in parts))


def _error(a: Float[Tensor, "out in"], b: Float[Tensor, "out in"], hessian: Float[Tensor, "in in"]) -> float:
    """tr((a - b) H (a - b)ᵀ)."""
    return sum(quadratic(a[rows] - b[rows], hessian) for rows in row_parts(a))


def _tokens(moments: Moments | None) -> int | None:
    """That reached the linear by themselves."""
    if moments is None:
        return None
    return moments.tokens if moments.routed is None else moments.routed
