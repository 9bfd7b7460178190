"""Writing a quantized model in the formats that were asked for: checked, packed, verified, then renamed into place."""

import logging
import shutil
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel

from gptq_awq.errors import UserError
from gptq_awq.export.base import Format, LinearSpec, Source
from gptq_awq.export.card import model_card
from gptq_awq.export.gguf import GGUFFormat
from gptq_awq.export.lint import lint
from gptq_awq.export.verify import Probe, VerificationRecord, verify
from gptq_awq.models.auto_class import also_sees
from gptq_awq.models.experts import experts_in
from gptq_awq.runtime.progress import Track

log = logging.getLogger(__name__)
CARD = "README.md"
WHOLE = ("hf", "compressed_tensors")
"""Formats that hold a model that also sees: they name every layer that is quantized, or that isn't."""


@dataclass(frozen=True)
class Exported:
    """One checkpoint that was written.

    Attributes:
        format: its name.
        path: its folder.
        size_bytes: of all its files.
        seconds: what packing and writing took.
        verified: how it was decoded again, in words.
    """

    format: str
    path: Path
    size_bytes: int
    seconds: float
    verified: str


@dataclass(frozen=True)
class Exports:
    """The formats to write, and how.

    Attributes:
        formats: in the order they were asked for.
        decode: read every checkpoint back with an independent decoder before it gets its name.
    """

    formats: tuple[Format, ...] = ()
    decode: bool = True

    def check(self, linears: Sequence[LinearSpec], model: PreTrainedModel, tokenizer: Any) -> None:
        """Raise UserError for what a format can't hold exactly, before anything slow has happened."""
        for format_ in self.formats:
            if not linears and format_.name not in ("hf", "gguf"):
                raise UserError(f"export.formats={format_.name}: nothing is quantized; hf and gguf hold plain weights")
            if format_.name != "hf" and experts_in(model):
                raise UserError(f"export.formats={format_.name}: mixtures of experts can be stored as hf only, so far")
            if also_sees(model.config) and format_.name not in WHOLE:
                raise UserError(
                    f"export.formats={format_.name}: its readers want a language model, and {type(model).__name__} "
                    f"holds more; choose export.formats=[{'] or ['.join(WHOLE)}]"
                )
            format_.check(linears, model.config)
            if isinstance(format_, GGUFFormat):
                format_.check_tokenizer(tokenizer, len(model.get_input_embeddings().get_parameter("weight")))
        for line in self.notes(linears, model.config):
            log.info("%s", line)

    def notes(self, linears: Sequence[LinearSpec], config: PreTrainedConfig) -> list[str]:
        """What engines would say to these checkpoints, for the log and the card."""
        return lint(linears, config.get_text_config(), [format_.name for format_ in self.formats])

    def write(self, source: Source, out: Path, probe: Probe, facts: Mapping[str, Any], track: Track) -> list[Exported]:
        """Write OUT/checkpoints/FORMAT for every format.

        Args:
            source: the model and its codes.
            out: the run's folder.
            probe: tokens, and what the model in memory makes of them.
            facts: of the run, for the record and the card: method, data, code version.
            track: reports progress.

        Raises:
            UserError: a folder that can't be written; a checkpoint that doesn't decode to what was packed.
        """
        formats = track(self.formats, "export", len(self.formats)) if self.formats else ()
        return [self._write(format_, source, out / "checkpoints", probe, facts) for format_ in formats]

    def _write(self, format_: Format, source: Source, parent: Path, probe: Probe, facts: Mapping[str, Any]) -> Exported:
        scratch = parent / f".{format_.name}.{uuid.uuid4().hex[:8]}"
        try:
            scratch.mkdir(parents=True)
            started = time.perf_counter()
            format_.write(source, scratch)
            seconds = time.perf_counter() - started
            VerificationRecord.of(format_, source, scratch, probe, facts).write(scratch)
            verified = str(verify(scratch)) if self.decode else "not decoded again (export.decode=false)"
            write_card(scratch, None, [verified])
            _replace(scratch, parent / format_.name)
        except OSError as error:
            raise UserError(f"out: {parent} cannot be written ({error.strerror or error})") from error
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
        path = parent / format_.name
        size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
        log.info("%s: %.1f MB in %.1f s, %s", path, size / 1e6, seconds, verified)
        return Exported(format_.name, path, size, round(seconds, 3), verified)


def make_exports(formats: Sequence[str] = (), decode: bool = True, **available: Format) -> Exports:
    """What configs/export/checkpoints.yaml stands for. Raises UserError for a format that there isn't."""
    formats = [formats] if isinstance(formats, str) else formats
    for name in formats:
        if name not in available:
            raise UserError(f"export.formats={name}: choose among {', '.join(available)}")
    return Exports(tuple(available[name] for name in dict.fromkeys(formats)), decode)


def write_card(folder: Path, row: Mapping[str, Any] | None, notes: Sequence[str]) -> None:
    """(Re)write a checkpoint's model card; `row` is the results row, once there is one."""
    record = VerificationRecord.read(folder)
    text = model_card(row, record.format, [*notes, *record.notes], record.facts)
    scratch = folder / f".{CARD}.{uuid.uuid4().hex[:8]}"
    scratch.write_text(text)
    scratch.replace(folder / CARD)


def _replace(scratch: Path, folder: Path) -> None:
    """Give a finished checkpoint its name, in place of an earlier one."""
    old = folder.with_name(f".{folder.name}.old-{uuid.uuid4().hex[:8]}")
    if folder.exists():
        folder.rename(old)
    scratch.rename(folder)
    shutil.rmtree(old, ignore_errors=True)
