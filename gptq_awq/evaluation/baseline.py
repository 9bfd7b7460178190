"""Cache of full-precision scores: computed once per model and text, kept on disk under a content hash.

A file's name is the hash of everything its content depends on (`gptq_awq.runtime.fingerprint`). Files are written
atomically and carry a checksum; a damaged file is never used but computed anew, with a warning. When several processes
want the same scores, one of them computes and the others wait.
"""

import hashlib
import json
import logging
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from gptq_awq.data.tokens import TokenSet
from gptq_awq.evaluation.perplexity import TokenScores, token_losses
from gptq_awq.runtime.fingerprint import answers_sha256, baseline_sha256, floor_sha256
from gptq_awq.runtime.progress import Track, no_track
from gptq_awq.storage.atomic import locked, replacing
from gptq_awq.storage.checksummed import ChecksummedFile, lock_path, once

log = logging.getLogger(__name__)
Answers = dict[str, Any]
"""Mapping from the hash of an lm-eval request to the model's answer."""


def baseline_scores(
    model: PreTrainedModel,
    model_sha256: str,
    tokens: TokenSet,
    folder: Path | None,
    track: Track = no_track,
    compute_dtype: torch.dtype = torch.float32,
) -> TokenScores:
    """Full-precision scores of `tokens`, read from `folder` if it holds them, else computed and stored there.

    `model_sha256` identifies the weights; `folder=None` stores nothing. Raises UserError as `token_losses` does.
    """
    if folder is None:
        return token_losses(model, tokens, track, compute_dtype)
    path = _scores_path(model, model_sha256, tokens, folder, compute_dtype)
    windows, length = tokens.ids.shape

    def compute() -> ChecksummedFile:
        scores = token_losses(model, tokens, track, compute_dtype)
        return ChecksummedFile({"nll": scores.nll, "hidden": scores.hidden}, {"head_sha256": scores.head_sha256})

    def fits(kept: ChecksummedFile) -> bool:
        return kept.tensors["nll"].shape == kept.tensors["hidden"].shape[:2] == (windows, length - 1)

    kept = once(path, f"baseline of {tokens.name}", compute, fits)
    return TokenScores(kept.tensors["nll"], kept.tensors["hidden"], kept.facts["head_sha256"])


def knows_scores(
    model: PreTrainedModel, model_sha256: str, tokens: TokenSet, folder: Path, compute_dtype: torch.dtype
) -> bool:
    """Whether `folder` has a file with the full-precision scores of `tokens`; its checksum is not verified."""
    return _scores_path(model, model_sha256, tokens, folder, compute_dtype).exists()


def _scores_path(
    model: PreTrainedModel, model_sha256: str, tokens: TokenSet, folder: Path, compute_dtype: torch.dtype
) -> Path:
    """Path of the file with the full-precision scores of `tokens`."""
    return folder / f"{baseline_sha256(model, model_sha256, tokens.sha256, compute_dtype)}.safetensors"


def floor_path(
    model: PreTrainedModel, model_sha256: str, tokens: TokenSet, folder: Path | None, dtype: torch.dtype
) -> Path | None:
    """Path of the stored noise floor of compute dtype `dtype` on `tokens` (see `floor`); None without a folder."""
    return None if folder is None else folder / f"{floor_sha256(model, model_sha256, tokens.sha256, dtype)}.safetensors"


@dataclass(frozen=True)
class AnswersFile:
    """The file of a full-precision model's lm-eval answers, which all runs with that model and tokenizer share.

    Attributes:
        path: the file; its folder need not exist yet.
    """

    path: Path

    @classmethod
    def of(
        cls,
        model: PreTrainedModel,
        model_sha256: str,
        tokenizer: Any,
        folder: Path,
        compute_dtype: torch.dtype = torch.float32,
    ) -> "AnswersFile":
        """The file in `folder` for these weights, this tokenizer and forwards in `compute_dtype`."""
        return cls(folder / f"{answers_sha256(model, model_sha256, tokenizer, compute_dtype)}.json")

    def read(self) -> Answers:
        """Stored answers; empty if the file is missing or damaged."""
        try:
            kept = json.loads(self.path.read_text())
            if kept["sha256"] != _json_sha256(kept["answers"]):
                raise ValueError("checksum mismatch")
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, KeyError, TypeError) as error:
            log.warning("the cached lm-eval baseline %s is damaged (%s) and is computed anew", self.path, error)
            return {}
        with suppress(OSError):  # the cache deletes what was not used for longest
            self.path.touch()
        return kept["answers"]

    def add(self, answers: Answers) -> None:
        """Merge `answers` into the stored ones, under a lock that concurrent writers share."""
        with locked(lock_path(self.path)):
            merged = self.read() | answers
            text = json.dumps({"sha256": _json_sha256(merged), "answers": merged})
            with replacing(self.path) as scratch:
                scratch.write_text(text)


def _json_sha256(value: Mapping[str, Any]) -> str:
    """SHA-256 of a value's JSON with sorted keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
