"""Finding a finished run without loading its model: by the files that go into it instead of by their content.

The hash of a run (context.py) is made of content, for which model and texts are read. The cache remembers it under a
cheaper key: the config, the code, the packages, and path, size and times of every file that is read. Where the key is
known the content is; where it is not, or files can't be told without a network, the content is read.
"""

import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from gptq_awq.data.corpora import HubText, LocalText, WikiText2
from gptq_awq.evaluation.protocol import Evaluation
from gptq_awq.experiment.input_squares import needs_inputs
from gptq_awq.experiment.plan import Plan
from gptq_awq.experiment.registry import Run
from gptq_awq.models.load import AssetModel, LocalModel
from gptq_awq.numerics.dtypes import resolve_compute_dtype
from gptq_awq.quantization.quantize import needs_calibration
from gptq_awq.runtime.fingerprint import run_sha256
from gptq_awq.runtime.source import code_sha256
from gptq_awq.storage.assets import ASSETS, cache_dir
from gptq_awq.storage.notes import note, noted

log = logging.getLogger(__name__)
MOST_FILES = 10_000


class _UnknownError(Exception):
    """Raised where the files that an object reads can't be told without loading it."""


def key_of(plan: Plan) -> str | None:
    """Key of a run by the files that go into it; None where they aren't known without loading it."""
    try:
        files = sorted(set(_files(plan)))
        seen = [(str(path.resolve()), *_identity(path)) for path in files]
    except (_UnknownError, OSError):
        return None
    data = {
        "files": seen,
        "device": plan.device.type,
        "compute_dtype": str(plan.compute_dtype),
        "eval_dtype": str(resolve_compute_dtype(plan.evaluation.compute_dtype, plan.device)),
    }
    return run_sha256(plan.config, data, code_sha256(plan.config))


def known(key: str | None, out: Path) -> Run | None:
    """The run that `key` was remembered for, in the folder `out`; None where it is not known."""
    if key is None:
        return None
    sha256 = noted(_memory(key)).get("run")
    return Run(sha256, out) if isinstance(sha256, str) else None


def remember(key: str | None, run: Run) -> None:
    """Remember which run `key` stands for."""
    if key is None:
        return
    try:
        note(_memory(key), {"run": run.sha256})
    except OSError as error:
        log.debug("not remembered: %s", error)


def _memory(key: str) -> Path:
    return cache_dir() / "runs" / "by-files" / f"{key}.json"


def _identity(path: Path) -> tuple[int, ...]:
    """Size and times of a file; the time of its inode changes with any write, whatever its other time is set to."""
    status = path.stat()
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns


def _files(plan: Plan) -> Iterator[Path]:
    """Files that a run reads. Raises _UnknownError, OSError."""
    yield from _files_of(plan.model)
    if needs_calibration(plan.method, plan.grid) or needs_inputs(plan):
        own = plan.data.imatrix
        yield from _files_of(plan.data) if own is None else [Path(own).expanduser()]
    yield from _evaluated(plan.evaluation)


def _evaluated(evaluation: Evaluation) -> Iterator[Path]:
    if evaluation.tasks or type(evaluation) is not Evaluation:  # lm-eval fetches what it likes
        raise _UnknownError
    own = evaluation.perplexity
    yield from () if evaluation.samples is None else (Path(evaluation.samples).expanduser(),)
    if own is None:
        return
    texts = [evaluation.texts] if isinstance(evaluation.texts, str) else evaluation.texts
    for entry in texts:
        corpus = evaluation.corpora.get(entry)
        yield from [Path(entry).expanduser()] if corpus is None else _files_of(corpus)
    if not texts:
        yield from _files_of(own.text) if own.path is None else [Path(own.path).expanduser()]


def _files_of(source: Any) -> Iterator[Path]:
    """Files that a model or a corpus is read from. Raises _UnknownError for one of another class, such as a user's."""
    find = _READ.get(type(source))
    if find is None:
        raise _UnknownError
    yield from find(source)


def _asset(name: str) -> Iterator[Path]:
    path = cache_dir() / "assets" / ASSETS[name].filename
    yield from (path, path.with_name(f"{path.name}.json"))


def _folder_or_file(model: LocalModel) -> Iterator[Path]:
    path = Path(model.path or "").expanduser()
    if model.path is None or path.is_file():
        yield path
        return
    count = 0
    for folder, folders, files in os.walk(path):
        folders[:] = [name for name in folders if not name.startswith(".")]
        count += len(files) + len(folders)
        if count > MOST_FILES:
            raise _UnknownError
        yield from (Path(folder, name) for name in files)


def _local_text(text: LocalText) -> Iterator[Path]:
    if text.path is None:
        raise _UnknownError
    yield Path(text.path).expanduser()


def _on_the_hub(_: HubText) -> Iterator[Path]:
    raise _UnknownError


_READ: dict[type, Callable[[Any], Iterator[Path]]] = {
    LocalModel: _folder_or_file,
    AssetModel: lambda model: _asset(model.asset),
    LocalText: _local_text,
    WikiText2: lambda text: _asset(f"wikitext2-{text.split}"),
    HubText: _on_the_hub,
}
"""Class of a model or a corpus → the files that it is read from; of these very classes, and of none derived."""
