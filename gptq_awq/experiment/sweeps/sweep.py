"""A run as part of a sweep: its folder, the row it leaves when it fails, and what a search minimizes."""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from gptq_awq.data.tokens import TokenSet
from gptq_awq.errors import UserError
from gptq_awq.evaluation.metrics.choice import chosen, metrics_of
from gptq_awq.evaluation.protocol import Evaluation
from gptq_awq.experiment.registry import alone_in
from gptq_awq.results import FAILURE, FILE_NAME, Result

if TYPE_CHECKING:
    from gptq_awq.evaluation.harness import Tasks

OF_ROW = ("bits_per_weight", "size_bytes")
"""Numbers of a results row, beside its metrics, that a search may minimize."""


def sweep_folder() -> Path | None:
    """Folder of the sweep that this run is part of; None for a single run."""
    if not HydraConfig.initialized() or HydraConfig.get().mode != RunMode.MULTIRUN:
        return None
    return Path(HydraConfig.get().sweep.dir)


def job_number() -> int:
    """Number of this run within its sweep; 0 for a single run."""
    return 0 if sweep_folder() is None else HydraConfig.get().job.num


def objective(result: Result, name: str | Sequence[str | None] | None) -> float | tuple[float, ...]:
    """Value that a search minimizes: a metric, a number of the row such as `bits_per_weight`, or several of them.

    None is the first KL, else the first perplexity; nan where nothing was measured.

    Raises:
        UserError: the run has no such number.
    """
    if not (name is None or isinstance(name, str)):
        return tuple(_objective(result, one) for one in name)
    return _objective(result, name)


def check_objective(
    name: str | Sequence[str | None] | None,
    evaluation: Evaluation,
    windows: Sequence[TokenSet] | None = None,
    tasks: "Tasks | None" = None,
) -> None:
    """Refuse an objective that no run with this evaluation has, before anything is computed.

    Args:
        name: the option.
        evaluation: what a run is scored on.
        windows: the texts, once they are loaded: metrics go by their names; None: not yet.
        tasks: lm-eval's tasks, once they are loaded.

    Raises:
        UserError: naming the option and what there is.
    """
    known = list(_known_numbers(evaluation, windows, tasks))
    for one in [name] if name is None or isinstance(name, str) else name:
        fits = one is None or one in OF_ROW or any(re.fullmatch(pattern, one) for _, pattern in known)
        if not fits or str(one).endswith("ci95"):
            raise UserError(f"objective={one}: choose one of {', '.join([*OF_ROW, *(shown for shown, _ in known)])}")


def _known_numbers(
    evaluation: Evaluation, windows: Sequence[TokenSet] | None, tasks: "Tasks | None"
) -> Iterator[tuple[str, str]]:
    """Numbers that a run will have: how to show them to people, and a pattern that fits their names."""
    if windows is None and evaluation.perplexity is not None:
        for metric in chosen(evaluation.metrics, evaluation.metric):
            yield f"TEXT/{metric.name}", rf".+/{re.escape(metric.name)}([@/].+)?"
    for text in windows or ():
        for metric in metrics_of(text):
            shown = f"{text.name}/{metric.key(text)}"
            yield shown, rf"{re.escape(shown)}(/.+)?"
    if tasks is not None:
        for task in (*tasks.loaded["tasks"], *tasks.loaded.get("groups", ())):
            yield f"lm_eval/{task}/METRIC", rf"lm_eval/{re.escape(task)}/.+"
    elif windows is None and evaluation.tasks:
        yield "lm_eval/TASK/METRIC", "lm_eval/.+/.+"


def no_objective(name: str | Sequence[str | None] | None) -> float | tuple[float, ...]:
    """Value of a failed run in a search: infinitely bad."""
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
    """Build the results row of a run that ended in an error, from its resolved config, whose options may be wrong."""
    reason = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
    model = config["model"]
    bits, group_size, sym = (config[name] for name in ("bits", "group_size", "sym"))
    return Result(
        method=config["method"]["name"],
        bits=bits if isinstance(bits, int | float) else None,
        bits_per_weight=None,
        group_size=group_size if isinstance(group_size, int) else None,
        sym=sym if isinstance(sym, bool) else None,
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
    """Store a row that says why a run of a sweep has no results; the results of an earlier one stay.

    Nothing is stored where another run is at work in the folder.
    """
    out, name = Path(cfg.out), FILE_NAME
    config: Any = OmegaConf.to_container(cfg, resolve=True)
    with suppress(OSError), alone_in(out, None):
        with suppress(OSError, ValueError):
            if Result.read(out / FILE_NAME).status == "done":
                name = FAILURE
        failed(config, error).write(out, name)
