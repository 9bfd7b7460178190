"""A run as part of a sweep: its folder, the row it leaves when it fails, and what a search minimizes."""

import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from gptq_awq.errors import UserError
from gptq_awq.results import FAILURE, FILE_NAME, Result


def sweep_folder() -> Path | None:
    """The folder of the sweep that this run is part of; None where it is by itself."""
    if not HydraConfig.initialized() or HydraConfig.get().mode != RunMode.MULTIRUN:
        return None
    return Path(HydraConfig.get().sweep.dir)


def job_number() -> int:
    """Which of the sweep's runs this is, by its place; 0 where it is by itself."""
    return 0 if sweep_folder() is None else HydraConfig.get().job.num


def objective(result: Result, name: str | Sequence[str | None] | None) -> float | tuple[float, ...]:
    """What a search minimizes: a metric, or a number of the row such as `bits_per_weight`; a list for several at once.

    None is the first KL, else the first perplexity; nan where nothing was measured.

    Raises:
        UserError: the run has no such number.
    """
    if not (name is None or isinstance(name, str)):
        return tuple(_objective(result, one) for one in name)
    return _objective(result, name)


def no_objective(name: str | Sequence[str | None] | None) -> float | tuple[float, ...]:
    """What a failed run counts as: infinitely bad."""
    return math.inf if name is None or isinstance(name, str) else (math.inf,) * len(name)


def _objective(result: Result, name: str | None) -> float:
    row = {"bits_per_weight": result.bits_per_weight, "size_bytes": result.size_bytes} | dict(result.metrics)
    numbers = {key: float(value) for key, value in row.items() if isinstance(value, (int, float))}
    if name is None:
        likely = [key for part in ("/kl", "/ppl@") for key in numbers if part in key]
        return numbers[likely[0]] if likely else math.nan
    if name not in numbers:
        raise UserError(f"objective={name}: choose one of {', '.join(numbers)}")
    return numbers[name]


def failed(config: Mapping[str, Any], error: Exception) -> Result:
    """The row of a run that ended in an error, from its resolved config."""
    reason = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
    model = config["model"]
    return Result(
        method=config["method"]["name"],
        bits=config["bits"],
        bits_per_weight=None,
        group_size=config["group_size"],
        sym=config["sym"],
        model=model.get("name") or Path(model.get("path") or model.get("id") or "model").stem,
        status="failed",
        metrics={},
        size_bytes=None,
        baseline_size_bytes=None,
        seconds={},
        peak_memory_bytes=None,
        ledger=None,
        manifest={},
        config=config,
        error=reason.splitlines()[0],
    )


def store_failure(cfg: DictConfig, error: Exception) -> None:
    """Store a row that says why a run of a sweep has no results; the results of an earlier one stay."""
    out, name = Path(cfg.out), FILE_NAME
    with suppress(OSError, ValueError):
        if Result.read(out / FILE_NAME).status == "done":
            name = FAILURE
    config: Any = OmegaConf.to_container(cfg, resolve=True)
    with suppress(OSError):
        out.mkdir(parents=True, exist_ok=True)
        failed(config, error).write(out, name)
