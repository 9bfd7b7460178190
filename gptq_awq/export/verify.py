"""Verification that a checkpoint contains exactly the weights that were scored.

Every checkpoint has a verification.json: for each quantized weight the hash of its codes and of its dequantized values
in memory when the model was scored, the hash of every file, and a few windows of tokens with the in-memory model's
losses on them. `verify` decodes the checkpoint with an independent decoder and compares hashes.
"""

import hashlib
import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, is_dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from gptq_awq.errors import UserError
from gptq_awq.export.base import Decoded, Format, Source
from gptq_awq.export.formats import make_format
from gptq_awq.export.public import names_only
from gptq_awq.storage.assets import file_sha256
from gptq_awq.storage.bounded import RECORD_BYTES, read_json

log = logging.getLogger(__name__)
RECORD = "verification.json"
CARD = "README.md"
WEIGHT_FILES = ("*.safetensors", "*.gguf", "*.bin")
"""Patterns of files whose tensors a reader may take for the checkpoint's."""


@dataclass(frozen=True)
class Probe:
    """Fixed token windows and the in-memory model's losses on them, to compare engines with.

    Attributes:
        tokens: (windows, seqlen) token ids.
        nll: (windows, seqlen - 1) negative log-likelihood in nats of every token but each window's first.
        source: name of the data that the tokens are from.
    """

    tokens: Int[Tensor, "windows seqlen"]
    nll: Float[Tensor, "windows seqlen-1"]
    source: str

    @classmethod
    @torch.no_grad()
    def of(cls, model: PreTrainedModel, tokens: Int[Tensor, "windows seqlen"], source: str) -> "Probe":
        """Score the tokens with a model, one window at a time."""
        losses = [
            token_losses(model(input_ids=row[None].to(model.device), use_cache=False).logits[0], row) for row in tokens
        ]
        return cls(tokens, torch.stack(losses), source)


@dataclass(frozen=True)
class VerificationRecord:
    """Content of verification.json: hashes of weights and files, and a probe to compare engines with.

    Attributes:
        format: name of the format.
        target: import path of the format class that wrote the checkpoint, for people; it is never imported.
        options: fields of that class.
        weights: module name → sha256 of `codes` (absent where the format keeps none) and of `weight`.
        files: file name → sha256.
        tokens, nll, tokens_source: fields of the `Probe`.
        facts: provenance of the run: model, calibration data, method, grid, code version.
        notes: sentences for the model card.
    """

    format: str
    target: str
    options: Mapping[str, Any]
    weights: Mapping[str, Mapping[str, str]] = field(repr=False)
    files: Mapping[str, str] = field(repr=False)
    tokens: list[list[int]] = field(repr=False)
    nll: list[list[float]] = field(repr=False)
    tokens_source: str
    facts: Mapping[str, Any]
    notes: list[str] = field(default_factory=list)

    @classmethod
    def of(
        cls, format_: Format, source: Source, folder: Path, probe: Probe, facts: Mapping[str, Any]
    ) -> "VerificationRecord":
        """Record a checkpoint just written to `folder`; weights are hashed in memory, files on disk."""
        rounded = getattr(format_, "rounded", None)
        files = [path for path in sorted(folder.iterdir()) if path.name not in (RECORD, CARD)]
        weights, own_names = {}, getattr(format_, "stored", None)
        for name, weight in (own_names(source) if own_names else source.weights).items():
            dequantized = weight.dequantize()
            if rounded is not None:
                weights[name] = {"weight": tensor_sha256(rounded(dequantized))}
            else:
                weights[name] = {"codes": tensor_sha256(weight.codes), "weight": tensor_sha256(dequantized)}
        return cls(
            format=format_.name,
            target=f"{type(format_).__module__}.{type(format_).__qualname__}",
            options=names_only(asdict(format_)) if is_dataclass(format_) else {},  # pyright: ignore[reportArgumentType]
            weights=weights,
            files={path.name: file_sha256(path) for path in files},
            tokens=probe.tokens.tolist(),
            nll=[[round(x, 6) for x in row] for row in probe.nll.tolist()],
            tokens_source=names_only(probe.source),
            facts=names_only(facts),
        )

    def write(self, folder: Path) -> None:
        """Write verification.json into `folder`."""
        (folder / RECORD).write_text(json.dumps(asdict(self), indent=1, default=str) + "\n")

    @classmethod
    def read(cls, folder: Path) -> "VerificationRecord":
        """Read verification.json from `folder`. Raises UserError if it is missing or not readable by this version."""
        path = folder / RECORD
        try:
            content = read_json(path, RECORD_BYTES)
            if not isinstance(content, dict):
                raise TypeError("it is no map")
            record = cls(**content)
            record._check()
        except (FileNotFoundError, NotADirectoryError) as error:
            raise UserError(f"{folder}: holds no {RECORD}; name a folder that export.formats wrote") from error
        except (OSError, ValueError, TypeError) as error:
            raise UserError(f"{path}: cannot be read ({' '.join(str(error).split())})") from error
        return record

    def _check(self) -> None:
        """Raise TypeError or ValueError for a field that isn't what `of` writes."""
        if not all(isinstance(text, str) for text in (self.format, self.target, self.tokens_source)):
            raise TypeError("format, target and tokens_source must be text")
        if not all(isinstance(table, dict) for table in (self.options, self.weights, self.files, self.facts)):
            raise TypeError("options, weights, files and facts must be maps")
        for name, hashes in self.weights.items():
            codes, weight = (hashes.get(key, "") for key in ("codes", "weight")) if isinstance(hashes, dict) else (0, 0)
            if not isinstance(codes, str) or not isinstance(weight, str) or not weight:
                raise TypeError(f"weights: {name!r:.100} must have the hash of its weight")
        for name, sha256 in self.files.items():
            if Path(name).name != name or name in ("", "..") or "\\" in name or "\0" in name:
                raise ValueError(f"files: {name!r:.100} is no file of this folder")
            if not isinstance(sha256, str):
                raise TypeError(f"files: {name!r:.100} must have a hash")
        if not isinstance(self.notes, list) or not all(isinstance(note, str) for note in self.notes):
            raise TypeError("notes must be a list of sentences")
        _check_rows("tokens", self.tokens, int)
        _check_rows("nll", self.nll, (int, float))
        if any(not 0 <= token < 2**31 for row in self.tokens for token in row):
            raise ValueError("tokens must be ids")

    def make_format(self) -> Format:
        """Rebuild the format that wrote the checkpoint. Raises UserError for one that is not in the table of formats.

        The record may be a stranger's: what it names as `target` is not imported.
        """
        try:
            return make_format(self.format, self.options)
        except UserError as error:
            raise UserError(f"{RECORD}: {error}") from error


def _check_rows(name: str, rows: Any, kind: Any) -> None:
    """Raise TypeError unless `rows` is a list of lists of as many numbers each."""
    if not isinstance(rows, list) or not all(isinstance(row, list) for row in rows):
        raise TypeError(f"{name} must be a list of windows")
    if len({len(row) for row in rows}) > 1 or any(type(x) is bool or not isinstance(x, kind) for r in rows for x in r):
        raise TypeError(f"{name} must be windows of as many numbers each")


@dataclass(frozen=True)
class Verified:
    """Outcome of a successful verification, which `str` words for the log and the model card.

    Attributes:
        weights: number of weights that decoded to those in memory.
        files: number of files with unchanged hashes.
        decoder: name and version of the decoder.
        with_codes: whether integer codes were compared too.
    """

    weights: int
    files: int
    decoder: str
    with_codes: bool

    def __str__(self) -> str:
        what = "codes and dequantized weights" if self.with_codes else "weights"
        return (
            f"{what} of {self.weights} layers decoded with {self.decoder} equal those in memory bit for bit; "
            f"{self.files} files unaltered"
        )


def verify(folder: Path, format_: Format | None = None) -> Verified:
    """Decode a checkpoint and compare it with the hashes of the weights that were in memory when it was written.

    Args:
        folder: folder of the checkpoint.
        format_: format to decode it with; None: the one of this package that its record names.

    Raises:
        UserError: an altered or missing file; one that can't be decoded; a layer that is missing, unexpected or decodes
            to other values.
    """
    record = VerificationRecord.read(folder)
    _check_files(folder, record.files)
    format_, left = format_ or record.make_format(), dict(record.weights)
    with decoding(folder):
        for decoded in format_.decode(folder):
            expected = left.pop(decoded.name, None)
            if expected is None:
                raise UserError(
                    f"{folder}: {decoded.name} is quantized in the checkpoint, but was not in the scored model"
                )
            _check_equal(decoded, expected, folder)
    if left:
        raise UserError(f"{folder}: {next(iter(left))} is missing from the checkpoint ({len(left)} layers missing)")
    with_codes = any("codes" in hashes for hashes in record.weights.values())
    return Verified(len(record.weights), len(record.files), format_.decoder(), with_codes)


def _check_files(folder: Path, files: Mapping[str, str]) -> None:
    """Raise UserError for a file that is missing or altered, and for weights in a file that was not written."""
    for name, sha256 in files.items():
        path = folder / name
        if not path.is_file():
            raise UserError(f"{folder}: {name} is missing")
        if file_sha256(path) != sha256:
            raise UserError(f"{folder}: {name} is not the file that was written (sha256 differs)")
    for path in sorted(path for pattern in WEIGHT_FILES for path in folder.glob(pattern)):
        if path.name not in files:
            raise UserError(f"{folder}: {path.name} was not written with the checkpoint; move it elsewhere")


@contextmanager
def decoding(folder: Path) -> Iterator[None]:
    """Context manager that turns any exception of a decoder on a broken checkpoint into a UserError naming the folder.

    Files of strangers may break their format anywhere; formats' libraries raise whatever they meet.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        log.debug("decoding failed", exc_info=True)
        what = " ".join(str(error).split())[:200]
        raise UserError(f"{folder}: cannot be decoded ({type(error).__name__}: {what})") from error


def _check_equal(decoded: Decoded, expected: Mapping[str, str], folder: Path) -> None:
    if "codes" in expected and decoded.codes is not None and tensor_sha256(decoded.codes) != expected["codes"]:
        raise UserError(f"{folder}: the codes of {decoded.name} are not those that were scored")
    if tensor_sha256(decoded.weight) != expected["weight"]:
        raise UserError(f"{folder}: the weights of {decoded.name} are not those that were scored")


def token_losses(logits: Float[Tensor, "tokens vocab"], tokens: Int[Tensor, "tokens"]) -> Float[Tensor, "tokens-1"]:
    """Negative log-likelihood of each token but the first, in nats."""
    return torch.nn.functional.cross_entropy(logits[:-1].float(), tokens[1:].to(logits.device), reduction="none").cpu()


def tensor_sha256(tensor: Tensor) -> str:
    """Hash a tensor's values: codes as bytes, weights as float32, with -0 counted as 0."""
    tensor = tensor.detach().cpu()
    tensor = tensor.float() + 0.0 if tensor.is_floating_point() else tensor.to(torch.uint8)
    return hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest()
