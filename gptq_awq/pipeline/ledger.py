"""One ledger row per linear: what was asked for, what was done, and what it cost."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from gptq_awq.grids.base import nearest, row_parts
from gptq_awq.linalg import quadratic
from gptq_awq.models.linear import Site
from gptq_awq.moments import Moments
from gptq_awq.pipeline.method import Method
from gptq_awq.profiling import phase
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
    def row(
        self,
        weight: Float[Tensor, "out in"],
        dequantized: Float[Tensor, "out in"],
        solution: Solution,
        seconds: float,
    ) -> dict[str, Any]:
        """The row, as JSON values.

        Errors are relative, ‖error‖² / ‖signal‖² of the linear's output: `error_before` of rounding the weight
        that the solver got to nearest without any search, `error_after` of what it answered. The signal, and with
        it both, is known to 0.3% (see `quadratic`).
        """
        grid, moments, columns = solution.quantized.grid, self.moments, weight.shape[1]
        size = columns if grid.group_size == -1 else grid.group_size
        last_group = columns % size or size
        row: dict[str, Any] = {
            "name": self.name,
            "block": self.block,
            "site": self.site.name,
            "shape": list(weight.shape),
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
            "weight_error": _squares(dequantized, weight) / max(_squares(weight), 1e-30),
            "seconds": round(seconds, 4),
        }
        if moments is not None and moments.routed is not None:
            row |= {"expert": self.site.expert, "experts": moments.policy, "calibrated_on": moments.tokens}
        if self.site.analogous and any(scaling.scales is not None for scaling in self.scalings.values()):
            row["absorber"] = "verified on another expert"
        if moments is not None and moments.tokens:
            signal = max(quadratic(weight, moments.hessian, rough=True), 1e-30)
            loss = solution.quantized.loss if solution.damping is None else None  # else it is of the damped H
            error = _error(dequantized, weight, moments.hessian) if loss is None else 2 * loss
            row["error_after"] = error / signal
            rounded = nearest(grid, weight)
            same = torch.equal(rounded, dequantized)
            before = error if same else quadratic(rounded.sub_(weight), moments.hessian, rough=True)
            row["error_before"] = before / signal
        return row


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
