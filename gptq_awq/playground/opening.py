"""Quantized models to try, opened from a run's folder, a checkpoint or a folder of full precision.

A run keeps the hashes of its codes and not the codes, unless it exported a checkpoint. Without one it is quantized
again by its stored config, on the moments that the cache still has, and layers are compared with the ledger's hashes.
"""

import json
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gptq_awq.errors import UserError
from gptq_awq.experiment.allocating import allocated
from gptq_awq.experiment.context import load, record_of, self_calibrated
from gptq_awq.experiment.folder import CHECKPOINTS, LEDGER, VERIFICATION
from gptq_awq.experiment.input_squares import input_statistics_of, largest_inputs
from gptq_awq.experiment.plan import Plan, preflight
from gptq_awq.export.loading import load_checkpoint
from gptq_awq.models.activations import quantized_activations
from gptq_awq.models.load import LoadedModel, LocalModel
from gptq_awq.quantization.quantize import quantize
from gptq_awq.replay.replay import stored_run
from gptq_awq.results import FILE_NAME, Result
from gptq_awq.runtime.progress import Track
from gptq_awq.runtime.runlog import Clock

EXACT = ("gptq", "awq", "compressed_tensors", "gguf", "mlx", "bnb", "hf")
"""Formats to open a run from, the first that it has; the last one rounds weights to bfloat16."""


@dataclass(frozen=True)
class Opened:
    """A model to try.

    Attributes:
        name: to call it by.
        model: a causal LM in eval mode, whose weights are the dequantized ones.
        tokenizer: of the model.
        computing: context manager within which it computes as it was scored, with rounded activations and cache.
    """

    name: str
    model: Any
    tokenizer: Any
    computing: Callable[[], Any]


@dataclass(frozen=True)
class StoredRun:
    """A finished run, to be opened with and without its quantization.

    Attributes:
        folder: of the run.
        result: its row.
        plan: its stored config as objects.
    """

    folder: Path
    result: Result
    plan: Plan

    @classmethod
    def read(cls, folder: Path, scratch: Path, trust: bool = False) -> "StoredRun":
        """Read a run's folder; `scratch` stands for its output folder. Raises UserError as `replay` does."""
        result, config = stored_run(folder, trust)
        config.out, config.resume = str(scratch), False
        return cls(folder, result, replace(preflight(config), config=result.config))

    @property
    def label(self) -> str:
        """The run's method, bits and folder."""
        bits = "" if self.result.bits is None else f" {self.result.bits:g} bits"
        return f"{self.result.method}{bits} ({self.folder.name})"

    def full(self) -> LoadedModel:
        """Load the full-precision model."""
        plan = self.plan
        return plan.model.load(dtype=plan.dtype, device=str(plan.device), room=plan.room)

    def quantized(self, track: Track, say: Callable[[str], object]) -> Opened:
        """Open the run as it was scored: from a checkpoint, or quantized again."""
        exported = [self.folder / CHECKPOINTS / name for name in EXACT]
        folder = next((path for path in exported if (path / VERIFICATION).is_file()), None)
        if folder is not None and not self.plan.act.static:  # whose scales need the full-precision model
            opened = open_checkpoint(folder)
            return replace(opened, name=self.label, computing=self._computing(opened.model))
        say(f"{self.folder} has no checkpoint to open: quantizing again by its stored config")
        return self._again(track, say)

    def _again(self, track: Track, say: Callable[[str], object]) -> Opened:
        context = self_calibrated(self.plan, load(self.plan), track)
        plan, _, _ = allocated(self.plan, context, Clock(), track, say)
        model, stored, others = context.loaded.model, self._hashes(), 0
        largest = largest_inputs(plan, input_statistics_of(plan, context.loaded, context.tokens, track))
        record = record_of(plan, context)
        for block in quantize(model, context.tokens, plan.method, plan.grid, plan.settings, track, record=record):
            others += sum(stored.get(row["name"]) != row.get("codes_sha256") for row in block.rows)
        if others:
            say(f"{self.folder}: {others} layers have other codes than those that were scored (replay names the first)")
        return Opened(self.label, model, context.loaded.tokenizer, self._computing(model, largest))

    def _hashes(self) -> dict[str, str | None]:
        rows = [json.loads(line) for line in (self.folder / LEDGER).read_text().splitlines()]
        return {row["name"]: row.get("codes_sha256") for row in rows}

    def _computing(self, model: Any, largest: Mapping[str, float] | None = None) -> Callable[[], Any]:
        return lambda: quantized_activations(model, self.plan.act, self.plan.kv, largest)


@contextmanager
def nothing_rounded() -> Iterator[None]:
    """Context manager of a model that computes in full precision."""
    yield


def open_model(
    path: Path, track: Track, say: Callable[[str], object], full: bool = False, trust: bool = False
) -> Opened:
    """Open whatever a folder or file holds.

    Args:
        path: folder of a run, a checkpoint that `export.formats` wrote, or a transformers folder or GGUF file.
        track: reports progress.
        say: hears what takes long.
        full: of a run: open the full-precision model instead.
        trust: allow code of others that a run's config names.

    Raises:
        UserError: it holds none of these, or can't be loaded.
    """
    if (path / FILE_NAME).is_file():
        with tempfile.TemporaryDirectory() as scratch:
            run = StoredRun.read(path, Path(scratch), trust)
            if not full:
                return run.quantized(track, say)
            loaded = run.full()
            return Opened(f"{loaded.name}, full precision", loaded.model, loaded.tokenizer, nothing_rounded)
    if (path / VERIFICATION).is_file():
        return open_checkpoint(path)
    if not path.exists():
        raise UserError(f"{path}: there is no such folder or file")
    if path.is_dir() and not (path / "config.json").is_file():
        raise UserError(f"{path}: holds no run (results.json), no checkpoint and no model (config.json)")
    loaded = LocalModel(path=str(path)).load("float32", "cpu")
    return Opened(loaded.name, loaded.model, loaded.tokenizer, nothing_rounded)


def open_checkpoint(folder: Path) -> Opened:
    """Open a checkpoint of `export.formats`, with the weights that it decodes to, in float32. Raises UserError."""
    model, tokenizer = load_checkpoint(folder)
    return Opened(f"{folder.parent.parent.name} {folder.name}", model, tokenizer, nothing_rounded)
