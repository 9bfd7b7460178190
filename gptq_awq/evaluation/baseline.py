"""Cache of full-precision scores: computed once per model and text, kept on disk under a content hash.

A file's name is the hash of everything its content depends on: the model's weights, dtype, device type and
attention implementation, the compute dtype of its forwards, the token ids, the versions of torch and transformers, and
`SCHEMA`. Files are written atomically and carry a checksum; a damaged file is never used but computed anew, with a
warning. When several processes want the same scores, one of them computes and the others wait.
"""

import hashlib
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

from gptq_awq.data.tokens import TokenSet
from gptq_awq.evaluation.perplexity import TokenScores, token_losses
from gptq_awq.runtime.progress import Track, no_track
from gptq_awq.storage.atomic import locked, replacing
from gptq_awq.storage.checksummed import ChecksummedFile, lock_path, once

log = logging.getLogger(__name__)

SCHEMA = 4
"""Version of the stored numbers' meaning; incremented whenever it changes, so that older files are not found."""
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
    return folder / f"{_key(model, model_sha256, tokens.sha256, compute_dtype)}.safetensors"


def floor_path(
    model: PreTrainedModel, model_sha256: str, tokens: TokenSet, folder: Path | None, dtype: torch.dtype
) -> Path | None:
    """Path of the stored noise floor of compute dtype `dtype` on `tokens` (see `floor`); None without a folder."""
    key = _key(model, model_sha256, f"floor {tokens.sha256}", dtype)
    return None if folder is None else folder / f"{key}.safetensors"


def read_answers(
    model: PreTrainedModel, model_sha256: str, folder: Path, compute_dtype: torch.dtype = torch.float32
) -> Answers:
    """Stored lm-eval answers of this full-precision model; empty if the file is missing or damaged."""
    path = _answers_path(model, model_sha256, folder, compute_dtype)
    try:
        kept = json.loads(path.read_text())
        if kept["sha256"] != _json_sha256(kept["answers"]):
            raise ValueError("checksum mismatch")
        return kept["answers"]
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError) as error:
        log.warning("the cached lm-eval baseline %s is damaged (%s) and is computed anew", path, error)
        return {}


def write_answers(
    model: PreTrainedModel,
    model_sha256: str,
    folder: Path,
    answers: Answers,
    compute_dtype: torch.dtype = torch.float32,
) -> None:
    """Merge `answers` into the stored ones, under a lock that concurrent writers share."""
    path = _answers_path(model, model_sha256, folder, compute_dtype)
    with locked(lock_path(path)):
        merged = read_answers(model, model_sha256, folder, compute_dtype) | answers
        text = json.dumps({"sha256": _json_sha256(merged), "answers": merged})
        with replacing(path) as scratch:
            scratch.write_text(text)


def _answers_path(model: PreTrainedModel, model_sha256: str, folder: Path, compute_dtype: torch.dtype) -> Path:
    """Path of the file with this model's lm-eval answers."""
    return folder / f"{_key(model, model_sha256, 'lm_eval', compute_dtype)}.json"


def _key(model: PreTrainedModel, model_sha256: str, what: str, compute_dtype: torch.dtype) -> str:
    """Content hash that names a file: of the model, the versions it runs on, and `what` was computed with it."""
    depends_on = {
        "schema": SCHEMA,
        "model": model_sha256,
        "dtype": str(model.dtype),
        "compute_dtype": str(compute_dtype),
        "device": model.device.type,
        "attention": model.config._attn_implementation,
        "what": what,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    return _json_sha256(depends_on)


def _json_sha256(value: Mapping[str, Any]) -> str:
    """SHA-256 of a value's JSON with sorted keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
