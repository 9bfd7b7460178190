"""The plan of a run: its config turned into objects, which refuse what they cannot do. Nothing slow happens here."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from gptq_awq.calibration.block_inputs import Settings
from gptq_awq.calibration.expert_policy import ExpertPolicy
from gptq_awq.errors import UserError
from gptq_awq.evaluation.protocol import Evaluation
from gptq_awq.experiment.options import check_options
from gptq_awq.experiment.sweeps.tracking import Tracking
from gptq_awq.export.write import Exports
from gptq_awq.grids.allocated import BudgetedGrid
from gptq_awq.grids.base import GridChoice
from gptq_awq.grids.dynamic import DynamicGrid, Unrounded
from gptq_awq.grids.protected import AUTO, ProtectedGrid
from gptq_awq.models.load import checked_device
from gptq_awq.numerics.distributed import ONE, Ranks
from gptq_awq.numerics.dtypes import resolve_compute_dtype
from gptq_awq.quantization.method import Method
from gptq_awq.quantization.quantize import check_ranks
from gptq_awq.runtime import memory
from gptq_awq.runtime.fingerprint import config_sha256


@dataclass(frozen=True)
class Plan:
    """Everything that a run was asked for, checked as far as it can be without loading anything."""

    config: Mapping[str, Any]
    method: Method
    grid: GridChoice
    act: DynamicGrid
    kv: DynamicGrid
    settings: Settings
    stream: bool | None
    forecast: bool | None
    experts: ExpertPolicy
    model: Any
    data: Any
    evaluation: Evaluation
    tracking: Tracking
    exports: Exports
    device: torch.device
    dtype: str
    seed: int
    resume: bool
    profile: bool
    cache_bytes: int
    out: Path

    @property
    def compute_dtype(self) -> torch.dtype:
        """Dtype of calibration's forwards."""
        return resolve_compute_dtype(self.settings.compute_dtype, self.device)

    @property
    def room(self) -> int | None:
        """Bytes that the model's weights may take; a larger one is offloaded. None: there is no limit."""
        if self.stream is None:
            return self.settings.free_bytes(torch.device("cpu")) // 2
        return 0 if self.stream else None


def preflight(cfg: DictConfig, ranks: Ranks = ONE) -> Plan:
    """Turn the config into objects, and check that all ranks were asked for one run.

    Raises:
        UserError: naming the option.
    """
    check_options(cfg)
    torch.manual_seed(cfg.seed)
    device = ranks.device(resolve_device(cfg.device))
    try:
        plan = Plan(
            config=OmegaConf.to_container(cfg, resolve=True),  # pyright: ignore[reportArgumentType]
            method=_method(cfg),
            grid=_grid(cfg),
            act=_build(cfg.act) if "act" in cfg else Unrounded(),  # a replayed run may be older than the option
            kv=_build(cfg.kv) if "kv" in cfg else Unrounded(),
            settings=Settings(
                compute_dtype=cfg.compute_dtype,
                tokens_per_batch=cfg.tokens_per_batch,
                activations=cfg.get("activations", "auto"),
                memory_budget=_memory_budget(cfg),
                ranks=ranks,
            ),
            stream=_by_size(cfg.get("stream", False)),
            forecast=_by_size(cfg.get("forecast", False)),
            experts=ExpertPolicy(**cfg.get("experts", {})),
            model=_build(cfg.model),
            data=_build(cfg.data),
            evaluation=_build(cfg.eval),
            tracking=_build(cfg.tracking),
            exports=_build(cfg.export),
            device=device,
            dtype=cfg.dtype,
            seed=cfg.seed,
            resume=cfg.resume,
            profile=cfg.get("profile", False),
            cache_bytes=int(cfg.cache_gb * 1e9),
            out=Path(cfg.out),
        )
    except OmegaConfBaseException as error:
        raise UserError(str(error).splitlines()[0]) from error
    _check_meant(plan)
    check_ranks(plan.method, ranks)
    if len(set(ranks.gather(config_sha256(plan.config)))) > 1:
        raise UserError(
            "the ranks were given different options: start all with the same ones, and a search without ranks, "
            "or with hydra/launcher=slurm hydra.launcher.tasks_per_node=N"
        )
    try:
        plan.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"out={plan.out}: cannot be written ({error.strerror})") from error
    return plan


def resolve_device(name: str) -> torch.device:
    """Device of that name, "auto" being a GPU where there is one. Raises UserError for one that isn't there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return checked_device(name)


def _check_meant(plan: Plan) -> None:
    """Refuse bits=… and the like beside a grid that has its own: the user would get something else.

    Raises:
        UserError: naming both options.
    """
    if not HydraConfig.initialized() or plan.method.solver is None:
        return
    for override in HydraConfig.get().overrides.task:
        key, _, value = override.partition("=")
        if key not in ("bits", "group_size", "sym"):
            continue
        own = getattr(plan.grid, key, None)
        if own != plan.config[key]:
            raise UserError(f"{key}={value}: grid={plan.grid.label} has its own ({key}={own}); leave {key} out")


def _method(cfg: DictConfig) -> Method:
    """Instantiate the method with what becomes of the output head; a replayed run may be older than that option."""
    untie_head = cfg.get("untie_head", False)
    return replace(_build(cfg.method), head=cfg.get("head"), untie_head=untie_head)


def _grid(cfg: DictConfig) -> GridChoice:
    """Instantiate the grid, without the linears that stay in full precision; see `_method` for older options.

    Raises:
        UserError: a grid with a budget, which gives sensitive linears more bits.
    """
    grid, protect = _build(cfg.grid), cfg.get("protect")
    if protect is None:
        return grid
    if isinstance(grid, BudgetedGrid):
        raise UserError("protect: a grid with a budget spends it where rounding costs most; leave protect out")
    return ProtectedGrid(grid, protect if protect == AUTO else tuple(protect), cfg.protect_share)


def _build(node: Any) -> Any:
    """Instantiate a config node; a UserError raised inside comes out as itself."""
    try:
        return instantiate(node, _convert_="all")
    except Exception as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, UserError):
            cause = cause.__cause__
        if cause is not None:
            raise cause from None
        raise UserError(str(error).splitlines()[0]) from error


def _memory_budget(cfg: DictConfig) -> int | None:
    """Bytes that this process may take; None: all that is free. Raises UserError for too little."""
    value = cfg.get("memory_budget")
    if value is None:
        return None
    if (budget := memory.parse_bytes(str(value))) < 10**9:
        raise UserError(f"memory_budget={value}: this process takes half a GB by itself; give 1GB or more")
    return budget


def _by_size(value: Any) -> bool | None:
    return None if value == "auto" else value
