"""lm-eval (EleutherAI's lm-evaluation-harness) on the model in memory, item by item.

LAMBADA's rows come from the project's own asset, so `lambada_openai` runs without the hub. Other tasks are
lm-eval's own, whose data come from the hub or its cache, or the user's (`eval.include_path`, a folder of task
yaml files).
"""

import difflib
import hashlib
import json
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import lm_eval.api.task
import numpy as np
import torch
import yaml
from datasets.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
from huggingface_hub import constants as hub
from jaxtyping import Float
from lm_eval.evaluator import evaluate
from lm_eval.tasks import TaskManager
from transformers import PreTrainedModel

from gptq_awq.errors import UserError
from gptq_awq.evaluation.language_model import LanguageModel
from gptq_awq.evaluation.recorded import RecordedLM, request_sha256
from gptq_awq.runtime.progress import Track, no_track
from gptq_awq.storage.assets import ASSETS, fetch, hub_reachable

log = logging.getLogger(__name__)

LAMBADA = "lambada_openai"
TASKS = Path(__file__).parent / "tasks"
Spec = str | Mapping[str, Any]
"""A task: its name, a yaml file's path, or its whole config."""


@dataclass(frozen=True)
class Tasks:
    """Tasks with their data loaded, ready to be run on any number of models.

    `loaded`: lm-eval's `TaskDict`. `limit`: items per task, the first ones (None: all). `seed` draws few-shot
    examples. `sources`: who served the data, by task, where that was ours to choose.
    """

    loaded: dict[str, Any]
    limit: int | None
    batch_size: int
    seed: int
    sources: dict[str, str]

    def sha256(self) -> str:
        """Hash of the tasks' configs and items: what changes an answer, before any is asked for."""
        digest = hashlib.sha256()
        for name, task in sorted(self.loaded["tasks"].items()):
            config = json.dumps(task.dump_config(), sort_keys=True, default=str)
            digest.update(re.sub(r" at 0x[0-9a-f]+", "", f"{name} {config}").encode())  # a function's address
            for item in islice(task.eval_docs, self.limit):
                digest.update(json.dumps(item, sort_keys=True, default=str).encode())
        return digest.hexdigest()


@dataclass(frozen=True)
class TaskScore:
    """One metric of one task or group. `items`: its value for every item, None where an item has no number.

    `stderr` is that of a mean; None where the metric is not the mean of its items.
    """

    value: float
    stderr: float | None
    items: Float[np.ndarray, "items"] | None


@dataclass(frozen=True)
class TaskResults:
    """`scores` by "TASK/METRIC"; `sha256` by task: the hash of all that the model was asked."""

    scores: dict[str, TaskScore]
    sha256: dict[str, str]


def load_tasks(
    specs: Sequence[Spec],
    limit: int | None = None,
    num_fewshot: int | None = None,
    include_path: str | Path | None = None,
    batch_size: int = 8,
    seed: int = 0,
    lambada: Path | None = None,
) -> Tasks:
    """Load tasks and their data; `num_fewshot` overrides what a task says, save an explicit 0.

    `lambada`: its rows as jsonl; None fetches the project's asset.
    Raises UserError (naming eval.tasks, eval.include_path or eval.limit) where a task is unknown, its data
    cannot be reached, or lm-eval refuses it.
    """
    if limit is not None and limit < 1:
        raise UserError(f"eval.limit={limit}: the number of items per task must be at least 1, or null for all")
    if include_path is not None and not Path(include_path).is_dir():
        raise UserError(f"eval.include_path={include_path}: there is no such folder")
    sources = {}
    if LAMBADA in specs and lambada is None:
        served = fetch(ASSETS["lambada"], hint="set eval.tasks to other tasks, or eval=ppl")
        lambada, sources[LAMBADA] = served.path, served.source
    loaded: dict[str, Any] = {"tasks": {}, "groups": {}, "group_map": {}}
    with _quiet(logging.ERROR):
        index = _index([spec for spec in specs if isinstance(spec, str) and spec != LAMBADA], include_path)
        for spec in specs:
            found = _load(index, _lambada(lambada) if spec == LAMBADA and lambada else spec)
            for kind in loaded:
                loaded[kind] |= found.get(kind, {})
    for task in loaded["tasks"].values():
        if num_fewshot is not None and task.get_config("num_fewshot") != 0:
            task.set_config("num_fewshot", num_fewshot)
    return Tasks(loaded, limit, batch_size, seed, sources)


def run_tasks(
    model: PreTrainedModel,
    tokenizer: Any,
    tasks: Tasks,
    answers: dict[str, Any] | None = None,
    track: Track = no_track,
    compute_dtype: torch.dtype = torch.float32,
) -> TaskResults:
    """Score `model` on all items. `answers`: its earlier answers, used where the question is the same;
    extended. `compute_dtype`: of forwards (see `precision`); text is generated in the model's own.

    Raises UserError where a logit is not finite or a prompt cannot be scored.
    """
    lm = LanguageModel(model, tokenizer, tasks.batch_size, track, compute_dtype)
    for task in tasks.loaded["tasks"].values():  # each model is shown the same few-shot examples
        task.set_fewshot_seed(tasks.seed)
    with _quiet(logging.WARNING):
        results = evaluate(
            lm if answers is None else RecordedLM(lm, answers),
            tasks.loaded,
            limit=tasks.limit,
            bootstrap_iters=0,
        )
    return TaskResults(dict(_scores(results)), {name: _asked(task) for name, task in tasks.loaded["tasks"].items()})


def _index(names: Sequence[str], include_path: str | Path | None) -> TaskManager:
    """lm-eval's index of tasks, its own 14,000 left out where the user's folder has all of `names`."""
    own = TaskManager(include_path=include_path and str(include_path), include_defaults=False)
    if all(name in own.all_subtasks or Path(name).is_file() for name in names):
        return own
    log.info("indexing lm-eval's tasks, which takes a while")
    index = TaskManager(include_path=include_path and str(include_path))
    for name in names:
        if name not in index.all_tasks and not Path(name).is_file():
            close = difflib.get_close_matches(name, index.all_tasks, n=5)
            hint = f": did you mean {', '.join(close)}?" if close else ""
            raise UserError(f"eval.tasks: lm-eval knows no task {name!r}{hint} Your own go in eval.include_path=FOLDER")
    return index


def _load(index: TaskManager, spec: Spec) -> dict[str, Any]:
    """One task, tag or group. With the hub away its cache is used at once, without retries."""
    name = spec if isinstance(spec, str) else spec.get("task", spec.get("group"))
    local = not isinstance(spec, str) and spec.get("dataset_path") == "json"
    offline = hub.HF_HUB_OFFLINE or (not local and not hub_reachable())
    try:
        with _replaced(hub, "HF_HUB_OFFLINE", offline):
            return dict(index.load([dict(spec) if isinstance(spec, Mapping) else spec]))
    except Exception as error:  # whatever the task's yaml, its python and its data may raise
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        hint = "the Hugging Face hub does not answer; use" if offline else "check the task, or use"
        raise UserError(
            f"eval.tasks: {name} cannot be loaded ({reason}): {hint} tasks whose yaml and data are local "
            f"(eval.include_path=FOLDER), or {LAMBADA}, which needs no hub"
        ) from error


def _lambada(rows: Path) -> dict[str, Any]:
    config = yaml.safe_load((TASKS / f"{LAMBADA}.yaml").read_text())
    return config | {"dataset_kwargs": {"data_files": {"test": str(rows)}}}


def _scores(results: Any) -> Iterator[tuple[str, TaskScore]]:
    for task, metrics in results["results"].items():
        leaves = _leaves(task, results["group_subtasks"])
        for key, value in metrics.items():
            metric, _, filtered = key.partition(",")
            if not filtered or metric.endswith("_stderr") or not isinstance(value, (int, float)):
                continue
            name = f"{task}/{metric}" if filtered == "none" else f"{task}/{key}"
            items = _items([results["samples"][leaf] for leaf in leaves], metric, filtered)
            yield name, TaskScore(float(value), _stderr(float(value), items), items)


def _leaves(task: str, subtasks: Mapping[str, Sequence[str]]) -> list[str]:
    """The tasks below a group; a task itself."""
    children = subtasks.get(task, [])
    return [leaf for child in children for leaf in _leaves(child, subtasks)] if children else [task]


def _items(samples: Sequence[Sequence[dict[str, Any]]], metric: str, filtered: str) -> np.ndarray | None:
    values = [
        sample.get(metric)
        for task in samples
        for sample in sorted(task, key=lambda sample: sample["doc_id"])
        if sample["filter"] == filtered
    ]
    if values and all(isinstance(value, (bool, int, float, np.number)) for value in values):
        return np.asarray(values, dtype=np.float64)
    return None


def _stderr(value: float, items: np.ndarray | None) -> float | None:
    if items is None or len(items) < 2 or not np.isclose(items.mean(), value):
        return None
    return float(items.std(ddof=1) / np.sqrt(len(items)))


def _asked(task: Any) -> str:
    digest = hashlib.sha256()
    for request in task.instances:
        digest.update(request_sha256(request.request_type, request.args).encode())
    return digest.hexdigest()


@contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Within: `owner.name` is `value`."""
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


@contextmanager
def _quiet(level: int) -> Iterator[None]:
    """Within: lm-eval and datasets draw no bars, and log nothing below `level`."""
    logger, shown = logging.getLogger("lm_eval"), not are_progress_bars_disabled()
    before = logger.level
    logger.setLevel(level)
    disable_progress_bars()
    try:
        with _replaced(lm_eval.api.task, "tqdm", lambda items, **_: items):
            yield
    finally:
        logger.setLevel(before)
        if shown:
            enable_progress_bars()
