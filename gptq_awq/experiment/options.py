"""Options of a run that belong to no group: their types and ranges, and the check of a whole composed config."""

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from annotated_types import Ge
from omegaconf import DictConfig, OmegaConf

from gptq_awq.errors import UserError
from gptq_awq.runtime.declarations import Built, declared_by
from gptq_awq.runtime.options import (
    Bits,
    ByteSize,
    ComputeDtype,
    Device,
    Fraction,
    GroupSize,
    NonNegative,
    PositiveFloat,
    PositiveInt,
    Seed,
    check_config,
)

Auto = bool | Literal["auto"]


@dataclass(frozen=True)
class RunOptions:
    """Top level of configs/config.yaml: what each option takes; groups are checked by their own `_target_`s."""

    method: Built
    grid: Built
    model: Built
    data: Built
    eval: Built
    act: Built | None
    kv: Built | None
    export: Built
    tracking: Built
    experts: Built
    bits: Bits = 4
    group_size: GroupSize = 64
    sym: bool = False
    budget: str | float = "q4_k_m"
    head: Literal["rtn", "solve"] | None = None
    untie_head: bool = False
    protect: Literal["auto"] | list[str] | None = None
    protect_share: Fraction = 0.02
    seed: Seed = 0
    device: Device = "auto"
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    compute_dtype: ComputeDtype = "auto"
    tokens_per_batch: PositiveInt = 2048
    memory_budget: PositiveFloat | ByteSize | None = None
    stream: Auto = "auto"
    forecast: Auto = "auto"
    activations: Literal["auto", "keep", "recompute"] = "auto"
    resume: bool = True
    profile: bool = False
    tables: bool = False
    dry_run: bool = False
    cache_gb: NonNegative = 20
    ranks_timeout_minutes: Annotated[float, Ge(0)] = 30
    time_budget: PositiveFloat | str | None = None
    recipes: list[str] | None = None
    objective: str | list[str | None] | None = None
    out: str = "."


WITHOUT_TARGET = {"experts": "gptq_awq.calibration.expert_policy.ExpertPolicy"}
"""Groups that are maps of options of one class, which their yaml need not name."""


def check_options(cfg: DictConfig) -> None:
    """Check every option of a composed config by its declaration; spellings such as `no` become what they mean.

    Raises:
        UserError: one line: the option, what it takes, the nearest name.
    """
    resolved = OmegaConf.to_container(cfg, resolve=True)
    assert isinstance(resolved, dict)
    config: dict[str, Any] = {str(key): value for key, value in resolved.items()}
    config = dict(sorted(config.items(), key=lambda item: isinstance(item[1], dict)))  # what groups refer to, first
    for key, target in WITHOUT_TARGET.items():
        if isinstance(group := config.get(key), dict):
            config[key] = {"_target_": target} | group
        elif group is not None:
            raise UserError(f"{key}={group}: give a map, such as {key}.policy=route")
    run_options = declared_by(f"{__name__}.{RunOptions.__name__}")
    assert run_options is not None
    for option, value in check_config(config, run_options):
        if not OmegaConf.is_interpolation(_parent(cfg, option), option.rpartition(".")[2]):
            OmegaConf.update(cfg, option, value, force_add=True)


def _parent(cfg: DictConfig, option: str) -> Any:
    path = option.rpartition(".")[0]
    return OmegaConf.select(cfg, path) if path else cfg
