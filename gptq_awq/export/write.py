"""Write a quantized model in the requested formats: check, pack, verify, then rename into place."""

import logging
import shutil
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers import PreTrainedConfig, PreTrainedModel

from gptq_awq.errors import UserError
from gptq_awq.export.base import ChecksModel, Format, LinearSpec, Source
from gptq_awq.export.card import model_card
from gptq_awq.export.lint import FORMATS as PACKED
from gptq_awq.export.lint import lint
from gptq_awq.export.overflow import check_overflow
from gptq_awq.export.transformers_reader import unread
from gptq_awq.export.verify import Probe, VerificationRecord, verify
from gptq_awq.models.auto_class import also_sees
from gptq_awq.models.experts import experts_in
from gptq_awq.runtime.options import NamesBeside
from gptq_awq.runtime.progress import Track

log = logging.getLogger(__name__)
CARD = "README.md"
MULTIMODAL = ("hf", "compressed_tensors", "gguf", "mlx")
"""Formats for multimodal models: their configs name every layer that is quantized, or they hold the text part."""
MIXTURES = ("hf", "gguf", "compressed_tensors", "gptq", "awq", "mlx")
"""Formats for mixtures of experts."""


@dataclass(frozen=True)
class Exported:
    """Summary of one written checkpoint.

    Attributes:
        format: name of the format.
        path: folder of the checkpoint.
        size_bytes: total size of its files.
        seconds: time to pack and write, without verification.
        verified: outcome of the verification, as a sentence.
    """

    format: str
    path: Path
    size_bytes: int
    seconds: float
    verified: str


@dataclass(frozen=True)
class Exports:
    """Formats to export, and whether to verify them.

    Attributes:
        formats: formats in the order they were requested.
        decode: whether each checkpoint is verified with an independent decoder before it is renamed into place.
    """

    formats: tuple[Format, ...] = ()
    decode: bool = True

    @property
    def calibrate(self) -> bool:
        """Whether a format stores what calibration sees of the full-precision model's inputs."""
        return any(getattr(each, "calibrates", False) for each in self.formats)

    def check(self, linears: Sequence[LinearSpec], model: PreTrainedModel, tokenizer: Any) -> None:
        """Raise UserError for models or grids that a format can't store exactly; runs before calibration."""
        for format_ in self.formats:
            if not linears and format_.name not in ("hf", "gguf", "imatrix"):
                raise UserError(f"export.formats={format_.name}: nothing is quantized; hf and gguf hold plain weights")
            if format_.name not in MIXTURES and experts_in(model):
                raise UserError(
                    f"export.formats={format_.name}: its readers want no fused experts; choose "
                    f"export.formats=[{'] or ['.join(MIXTURES)}]"
                )
            if also_sees(model.config) and format_.name not in MULTIMODAL:
                raise UserError(
                    f"export.formats={format_.name}: its readers want a language model, and {type(model).__name__} "
                    f"holds more; choose export.formats=[{'] or ['.join(MULTIMODAL)}]"
                )
            format_.check(linears, model.config)
            check_overflow(format_, linears, model)
            if isinstance(format_, ChecksModel):
                for note in format_.check_model(linears, model, tokenizer):
                    log.warning("export.formats: %s", note)
            if format_.name in PACKED and (why := unread(model, linears, format_, tokenizer)):
                log.warning("export.formats: %s: %s", format_.name, why)
        for line in self.notes(linears, model.config):
            log.info("%s", line)

    def notes(self, linears: Sequence[LinearSpec], config: PreTrainedConfig) -> list[str]:
        """Engine compatibility warnings on these checkpoints, for the log and the model card."""
        return lint(linears, config.get_text_config(), [format_.name for format_ in self.formats])

    def write(self, source: Source, out: Path, probe: Probe, facts: Mapping[str, Any], track: Track) -> list[Exported]:
        """Write OUT/checkpoints/FORMAT for every format.

        Args:
            source: quantized model and its codes.
            out: output folder of the run.
            probe: token windows and the in-memory model's losses on them.
            facts: provenance of the run (method, data, code version), for verification.json and the model card.
            track: progress reporter.

        Raises:
            UserError: a folder that can't be written; a checkpoint that doesn't decode to the packed weights.
        """
        formats = track(self.formats, "export", len(self.formats)) if self.formats else ()
        return [self._write(format_, source, out / "checkpoints" / format_.name, probe, facts) for format_ in formats]

    def write_folder(self, source: Source, folder: Path, probe: Probe, facts: Mapping[str, Any]) -> Exported:
        """Write the one format as `folder`, which it replaces; see `write`."""
        (format_,) = self.formats
        return self._write(format_, source, folder, probe, facts)

    def _write(self, format_: Format, source: Source, folder: Path, probe: Probe, facts: Mapping[str, Any]) -> Exported:
        """Write one format into a scratch folder, verify it there, and rename it into place."""
        scratch = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}")
        try:
            scratch.mkdir(parents=True)
            if not getattr(format_, "holds_weights", True):
                source = replace(source, weights={})
            started = time.perf_counter()
            format_.write(source, scratch)
            seconds = time.perf_counter() - started
            VerificationRecord.of(format_, source, scratch, probe, facts).write(scratch)
            verified = str(verify(scratch, format_)) if self.decode else "not decoded again (export.decode=false)"
            write_card(scratch, None, [verified])
            _replace(scratch, folder)
        except (OSError, SafetensorError) as error:  # the latter where the disk is full
            why = (isinstance(error, OSError) and error.strerror) or " ".join(str(error).split())
            raise UserError(f"out: {folder.parent} cannot be written ({why:.200})") from error
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
        size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
        log.info("%s: %.1f MB in %.1f s, %s", folder, size / 1e6, seconds, verified)
        return Exported(format_.name, folder, size, round(seconds, 3), verified)


def make_exports(formats: NamesBeside = (), decode: bool = True, **available: Format) -> Exports:
    """Build the exports that configs/export/checkpoints.yaml describes. Raises UserError for an unknown format."""
    formats = [formats] if isinstance(formats, str) else formats
    for name in formats:
        if name not in available:
            raise UserError(f"export.formats={name}: choose among {', '.join(available)}")
    return Exports(tuple(available[name] for name in dict.fromkeys(formats)), decode)


def write_card(folder: Path, row: Mapping[str, Any] | None, notes: Sequence[str]) -> None:
    """Write or replace a checkpoint's model card; `row` is the results row, None before scoring."""
    record = VerificationRecord.read(folder)
    text = model_card(row, record.format, [*notes, *record.notes], record.facts)
    scratch = folder / f".{CARD}.{uuid.uuid4().hex[:8]}"
    scratch.write_text(text)
    scratch.replace(folder / CARD)


def _replace(scratch: Path, folder: Path) -> None:
    """Rename a finished checkpoint into place, and delete the one it replaces."""
    old = folder.with_name(f".{folder.name}.old-{uuid.uuid4().hex[:8]}")
    if folder.exists():
        folder.rename(old)
    scratch.rename(folder)
    shutil.rmtree(old, ignore_errors=True)
