"""A method: transforms, one solver, tuning. Each `configs/method/NAME.yaml` is a preset; there is no other registry."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import field
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from gptq_awq.calibration.moments import Moments
from gptq_awq.calibration.output_curvature import OutputCurvature
from gptq_awq.calibration.self_calibration import SelfCalibration
from gptq_awq.errors import UserError
from gptq_awq.grids.base import Grid
from gptq_awq.numerics.linalg import NotPositiveDefiniteError
from gptq_awq.runtime.options import checked_dataclass
from gptq_awq.runtime.profiling import phase
from gptq_awq.solvers.base import Coupling, Rowwise, Solution, Solver
from gptq_awq.transforms.base import ModelTransform, Transform
from gptq_awq.tuning.base import BlockTuning, ModelTuning


@checked_dataclass
class Method:
    """A quantization method: transforms, a solver and tuning, applied block by block, and options of calibration.

    Attributes:
        name: name of the method in tables.
        solver: quantizes each linear's weight; None leaves the model alone (full precision).
        transforms: applied in order, before the solver; those of the whole model before all others.
        error_propagation: calibrate every layer on the inputs it will see, those of the model quantized so
            far (GPTQ). False calibrates on full-precision inputs everywhere (AWQ's own code).
        cast: without a solver, the 16-bit dtype that all parameters are rounded to; None: no rounding.
        tuning: applied in order, after the solver; those of the whole model after all blocks.
        self_calibration: calibration windows sampled from the model, added to the given text; None: none.
        output_curvature: feedback among a linear's outputs, by what the end loss feels of each; None: none (GPTQ).
        head: quantization of the output head: None leaves it to the grid (most leave it in 16 bits), "rtn" rounds it
            to nearest, "solve" applies the solver to it as to a block's linears (see `quantization.embeddings`).
        untie_head: whether a head that is tied to the embedding may get a matrix of its own for that.

    Raises:
        UserError: an unknown `head` or `cast`; `untie_head` without `head`; a solver or tuning that compares with full
            precision, without error propagation.
    """

    name: str
    solver: Solver | None
    transforms: Mapping[str, Transform | ModelTransform] = field(default_factory=dict)
    error_propagation: bool = True
    cast: Literal["bfloat16", "float16"] | None = None
    tuning: Mapping[str, BlockTuning | ModelTuning] = field(default_factory=dict)
    self_calibration: SelfCalibration | None = None
    output_curvature: OutputCurvature | None = None
    head: Literal["rtn", "solve"] | None = None
    untie_head: bool = False

    def __post_init__(self) -> None:
        if self.untie_head and self.head is None:
            raise UserError("untie_head=true: only a head that is quantized needs it; choose head=solve or head=rtn")
        if self.output_curvature is not None:
            self._check_output_curvature()
        if self.needs_full and not self.error_propagation:
            raise UserError(
                f"method.error_propagation=false: method={self.name} corrects what the layers before have lost, "
                "and without error propagation it sees no loss; set it to true"
            )

    def _check_output_curvature(self) -> None:
        if not isinstance(self.solver, Coupling):
            raise UserError(
                "method.output_curvature: goes with GPTQ's sweep; choose method=gptq, gptaq or qronos, or null"
            )
        if self.block_transforms:
            raise UserError(
                f"method.output_curvature: {self.block_transforms[0].name} changes the outputs that it was gathered "
                "for; choose a method without it, or null"
            )

    @property
    def needs_full(self) -> bool:
        """Whether calibration carries the full-precision model's hidden states as well."""
        return self.needs_cross or bool(self.block_tunings)

    @property
    def needs_cross(self) -> bool:
        """Whether the solver uses the cross-covariance C; false for a solver without the attribute."""
        return bool(getattr(self.solver, "needs_cross", False))

    @property
    def block_tunings(self) -> list[BlockTuning]:
        """Tunings of each block, applied once its linears are solved."""
        return [each for each in self.tuning.values() if isinstance(each, BlockTuning)]

    @property
    def model_tunings(self) -> list[ModelTuning]:
        """Tunings of the whole model, applied after its last block."""
        return [each for each in self.tuning.values() if isinstance(each, ModelTuning)]

    @property
    def model_transforms(self) -> list[ModelTransform]:
        """Transforms of the whole model, applied before the block loop."""
        return [each for each in self.transforms.values() if isinstance(each, ModelTransform)]

    @property
    def block_transforms(self) -> list[Transform]:
        """Transforms of one block at a time, which use its calibration data."""
        return [each for each in self.transforms.values() if isinstance(each, Transform)]


def solved(solver: Solver, name: str, weight: Float[Tensor, "out in"], moments: Moments | None, grid: Grid) -> Solution:
    """Solve one weight, and name it in errors.

    Args:
        solver: solver to apply.
        name: name of the linear in the model.
        weight: its weight, float32.
        moments: second moments of its input; None without calibration.
        grid: grid to quantize to.

    Raises:
        UserError: the weight isn't finite, or its Hessian does not factor.
    """
    _check_finite(name, weight)
    try:
        with phase("solve"):
            return solver.solve(weight, moments, grid)
    except NotPositiveDefiniteError as error:
        raise UserError(
            f"{name}: {error}; raise method.solver.damping, give more calibration text "
            "(data.samples), or allow method.solver.fallback=rtn"
        ) from error


def solved_together(
    solver: Solver,
    names: Sequence[str],
    weights: Sequence[Float[Tensor, "_ in"]],
    moments: Sequence[Moments | None],
    grid: Grid,
) -> list[Solution]:
    """Solve several weights on one grid, in one call if the solver is `Rowwise`, and name them in errors.

    Raises:
        UserError: a weight isn't finite, or its Hessian does not factor.
    """
    if len(weights) > 1 and isinstance(solver, Rowwise):
        for name, weight in zip(names, weights, strict=True):
            _check_finite(name, weight)
        with suppress(NotPositiveDefiniteError), phase("solve"):  # solved one by one below, the error has a name
            return solver.solve_together(weights, moments, grid)
    return [solved(solver, name, weight, own, grid) for name, weight, own in zip(names, weights, moments, strict=True)]


def _check_finite(name: str, weight: Float[Tensor, "out in"]) -> None:
    if not torch.isfinite(torch.stack(torch.aminmax(weight))).all():  # a NaN is both extremes
        raise UserError(f"model: {name} has non-finite weights")
