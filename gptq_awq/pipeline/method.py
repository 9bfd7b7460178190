"""A method: transforms, one solver, tuning. `configs/method/NAME.yaml` is such a preset; there is no other registry."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from gptq_awq.errors import UserError
from gptq_awq.solvers.base import Solver
from gptq_awq.transforms.base import ModelTransform, Transform
from gptq_awq.tuning.base import BlockTuning, ModelTuning


@dataclass(frozen=True)
class Method:
    """What happens to every block.

    Attributes:
        name: as tables print it.
        solver: lands weights on the grid; None leaves the model alone (full precision).
        transforms: applied in order, before the solver; those of the whole model before all others.
        error_propagation: calibrate every layer on the inputs it will see, those of the model quantized so
            far (GPTQ). False calibrates on full-precision inputs everywhere (AWQ's own code).
        cast: without a solver: the 16-bit type that all parameters are rounded to; None: none.
        tuning: applied in order, after the solver; those of the whole model after all blocks.

    Raises:
        UserError: a type there isn't; full precision beside the quantized model, without error propagation.
    """

    name: str
    solver: Solver | None
    transforms: Mapping[str, Transform | ModelTransform] = field(default_factory=dict)
    error_propagation: bool = True
    cast: str | None = None
    tuning: Mapping[str, BlockTuning | ModelTuning] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.cast not in (None, "bfloat16", "float16"):
            raise UserError(f"method.cast={self.cast}: choose bfloat16, float16 or null")
        if self.needs_full and not self.error_propagation:
            raise UserError(
                f"method.error_propagation=false: method={self.name} corrects what the layers before have lost, "
                "and without error propagation it sees no loss; set it to true"
            )

    @property
    def needs_full(self) -> bool:
        """Whether calibration carries full precision's hidden states beside the quantized model's."""
        return self.needs_cross or bool(self.tuning_of_blocks)

    @property
    def needs_cross(self) -> bool:
        """Whether the solver compares a site's inputs with full precision's; one that doesn't say so doesn't."""
        return bool(getattr(self.solver, "needs_cross", False))

    @property
    def tuning_of_blocks(self) -> list[BlockTuning]:
        """Tuning of each block in its turn."""
        return [each for each in self.tuning.values() if isinstance(each, BlockTuning)]

    @property
    def tuning_of_model(self) -> list[ModelTuning]:
        """Tuning of the whole model, after its last block."""
        return [each for each in self.tuning.values() if isinstance(each, ModelTuning)]

    @property
    def of_model(self) -> list[ModelTransform]:
        """Transforms of the whole model."""
        return [each for each in self.transforms.values() if isinstance(each, ModelTransform)]

    @property
    def of_blocks(self) -> list[Transform]:
        """Transforms of one block at a time, which look at calibration data."""
        return [each for each in self.transforms.values() if isinstance(each, Transform)]
