"""Zero- and few-shot tasks of lm-eval (EleutherAI's lm-evaluation-harness) on a model in memory, with item scores.

The rows of LAMBADA are an asset of this project, so `lambada_openai` runs without the hub. Other tasks are lm-eval's
own, with data from the hub or its cache, or the user's (`eval.include_path`, a folder of task yaml files).
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
"""A task's name, the path of its yaml file, or its whole config."""


@dataclass(frozen=True)
class Tasks:
    """Tasks with their data loaded, ready to be run on any number of models.

    Attributes:
        loaded: lm-eval's `TaskDict`.
        limit: number of items per task, the first ones; None: all.
        batch_size: number of inputs per forward.
        seed: seed that draws few-shot examples.
        sources: server of the data, by task, for data that this project fetches itself.
    """

    loaded: dict[str, Any]
    limit: int | None
    batch_size: int
    seed: int
    sources: dict[str, str]

    def sha256(self) -> str:
        """Hash of the tasks' configs and items, which determine every request before a model runs."""
        digest = hashlib.sha256()
        for name, task in sorted(self.loaded["tasks"].items()):
            config = json.dumps(task.dump_config(), sort_keys=True, default=str)
            digest.update(re.sub(r" at 0x[0-9a-f]+", "", f"{name} {config}").encode())  # a function's address
            for item in islice(task.eval_docs, self.limit):
                digest.update(json.dumps(item, sort_keys=True, default=str).encode())
        return digest.hexdigest()


@dataclass(frozen=True)
class TaskScore:
    """One metric of one task or group.

    Attributes:
        value: the metric.
        stderr: standard error of the mean over items; None if the metric is not that mean.
        items: the metric of every item; None if some item has no number.
    """

    value: float
    stderr: float | None
    items: Float[np.ndarray, "items"] | None


@dataclass(frozen=True)
class TaskResults:
    """Scores by "TASK/METRIC", and by task the hash of all requests that the model answered."""

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
    """Load tasks and their data; `num_fewshot` overrides a task's own number, unless that is an explicit 0.

    `lambada`: jsonl file of LAMBADA's rows; None fetches the project's asset. Raises UserError (naming eval.tasks,
    eval.include_path or eval.limit) if a task is unknown, its data cannot be reached, or lm-eval refuses it.
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
    """Score `model` on all items of `tasks`.

    Args:
        model: the model to score.
        tokenizer: its tokenizer.
        tasks: loaded tasks.
        answers: the model's earlier answers by request hash, looked up first and extended in place; None: no cache.
        track: reports progress.
        compute_dtype: dtype of forwards that score text (see `precision`); text is generated in the model's own dtype.

    Raises:
        UserError: a logit is not finite, or a prompt cannot be scored.
    """
    lm = LanguageModel(model, tokenizer, tasks.batch_size, track, compute_dtype)
    for task in tasks.loaded["tasks"].values():  # all models get the same few-shot examples
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
    """lm-eval's index of tasks, without its own 14,000 if the user's folder has all of `names`."""
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
    """Load one task, tag or group; if the hub does not answer, its local cache is used at once, without retries."""
    name = spec if isinstance(spec, str) else spec.get("task", spec.get("group"))
    local = not isinstance(spec, str) and spec.get("dataset_path") == "json"
    offline = hub.HF_HUB_OFFLINE or (not local and not hub_reachable())
    try:
        with _replaced(hub, "HF_HUB_OFFLINE", offline):
            return dict(index.load([dict(spec) if isinstance(spec, Mapping) else spec]))
    except Exception as error:  # a task's yaml, code and data may raise anything
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        hint = "the Hugging Face hub does not answer; use" if offline else "check the task, or use"
        raise UserError(
            f"eval.tasks: {name} cannot be loaded ({reason}): {hint} tasks whose yaml and data are local "
            f"(eval.include_path=FOLDER), or {LAMBADA}, which needs no hub"
        ) from error


def _lambada(rows: Path) -> dict[str, Any]:
    """Config of lambada_openai with its data in the jsonl file `rows`."""
    config = yaml.safe_load((TASKS / f"{LAMBADA}.yaml").read_text())
    return config | {"dataset_kwargs": {"data_files": {"test": str(rows)}}}


def _scores(results: Any) -> Iterator[tuple[str, TaskScore]]:
    """Name and score of every numeric metric in lm-eval's results; the name has the filter, if it isn't "none"."""
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
    """All tasks below a group; of a task, the task itself."""
    children = subtasks.get(task, [])
    return [leaf for child in children for leaf in _leaves(child, subtasks)] if children else [task]


def _items(samples: Sequence[Sequence[dict[str, Any]]], metric: str, filtered: str) -> np.ndarray | None:
    """Values of a metric for every item, in the order of items; None unless all are numbers."""
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
    """Standard error of a metric that is the mean of its items; None for any other."""
    if items is None or len(items) < 2 or not np.isclose(items.mean(), value):
        return None
    return float(items.std(ddof=1) / np.sqrt(len(items)))


def _asked(task: Any) -> str:
    """Content hash of all requests of a task."""
    digest = hashlib.sha256()
    for request in task.instances:
        digest.update(request_sha256(request.request_type, request.args).encode())
    return digest.hexdigest()


@contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Context in which `owner.name` is `value`."""
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


@contextmanager
def _quiet(level: int) -> Iterator[None]:
    """Context in which lm-eval and datasets draw no progress bars, and lm-eval logs nothing below `level`."""
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
