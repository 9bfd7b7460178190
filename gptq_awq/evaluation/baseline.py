"""The full-precision scores of a model, computed once and kept on disk by content hash.

A file's name is the hash of all that its content depends on: the model's weights, dtype, device type and
attention code, the token ids, the versions of torch and transformers, and `SCHEMA`. Files are written whole
or not at all, carry their own checksum, and one that is damaged is never used: it is computed anew, with a
warning.
"""

import hashlib
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import PreTrainedModel

from gptq_awq.assets import scratch_folder
from gptq_awq.data import TokenSet
from gptq_awq.evaluation.head import tensor_bytes
from gptq_awq.evaluation.perplexity import TokenScores, token_losses
from gptq_awq.progress import Track, no_track

log = logging.getLogger(__name__)

SCHEMA = 1
"""Raised whenever the meaning of a stored number changes."""
Answers = dict[str, Any]
"""A model's answers to lm-eval's requests, by the hash of the request."""


def baseline_scores(
    model: PreTrainedModel,
    model_sha256: str,
    tokens: TokenSet,
    folder: Path | None,
    track: Track = no_track,
) -> TokenScores:
    """The full-precision scores of `tokens`: from `folder` where they are there, else computed and kept
    there.

    `model_sha256` stands for the weights. `folder=None` keeps nothing. Raises UserError as `token_losses`
    does.
    """
    if folder is None:
        return token_losses(model, tokens, track)
    path = folder / f"{_key(model, model_sha256, tokens.sha256)}.safetensors"
    scores = _read_scores(path, tokens)
    if scores is None:
        scores = token_losses(model, tokens, track)
        _write_scores(path, scores)
    return scores


def read_answers(model: PreTrainedModel, model_sha256: str, folder: Path) -> Answers:
    """The answers this full-precision model gave before; none where the file is missing or damaged."""
    path = _answers_path(model, model_sha256, folder)
    try:
        kept = json.loads(path.read_text())
        if kept["sha256"] != _json_sha256(kept["answers"]):
            raise ValueError("checksum mismatch")
        return kept["answers"]
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError) as error:
        log.warning("the cached lm-eval baseline %s is damaged (%s): computing it anew", path, error)
        return {}


def write_answers(model: PreTrainedModel, model_sha256: str, folder: Path, answers: Answers) -> None:
    """Add `answers` to those kept. Where two runs write at once, the later one's remain."""
    answers = read_answers(model, model_sha256, folder) | answers
    text = json.dumps({"sha256": _json_sha256(answers), "answers": answers})
    with scratch_folder(folder) as scratch:
        (scratch / "answers").write_text(text)
        (scratch / "answers").replace(_answers_path(model, model_sha256, folder))


def _read_scores(path: Path, tokens: TokenSet) -> TokenScores | None:
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
            scores = TokenScores(file.get_tensor("nll"), file.get_tensor("hidden"), metadata["head_sha256"])
        if metadata["sha256"] != _scores_sha256(scores):
            raise ValueError("checksum mismatch")
        windows, length = tokens.ids.shape
        if scores.nll.shape != (windows, length - 1) or scores.hidden.shape[:2] != scores.nll.shape:
            raise ValueError(f"scores of shape {tuple(scores.nll.shape)} for tokens {tuple(tokens.ids.shape)}")
    except Exception as error:  # safetensors raises its own types; whatever it is, the file is not to be used
        log.warning("the cached baseline %s is damaged (%s): computing it anew", path, error)
        return None
    log.info("%s: full-precision scores read from %s", tokens.name, path)
    return scores


def _write_scores(path: Path, scores: TokenScores) -> None:
    metadata = {"head_sha256": scores.head_sha256, "sha256": _scores_sha256(scores)}
    with scratch_folder(path.parent) as scratch:
        save_file({"nll": scores.nll, "hidden": scores.hidden}, scratch / path.name, metadata)
        (scratch / path.name).replace(path)


def _scores_sha256(scores: TokenScores) -> str:
    digest = hashlib.sha256(scores.head_sha256.encode())
    for x in (scores.nll, scores.hidden):
        digest.update(tensor_bytes(x))
    return digest.hexdigest()


def _answers_path(model: PreTrainedModel, model_sha256: str, folder: Path) -> Path:
    return folder / f"{_key(model, model_sha256, 'lm_eval')}.json"


def _key(model: PreTrainedModel, model_sha256: str, what: str) -> str:
    depends_on = {
        "schema": SCHEMA,
        "model": model_sha256,
        "dtype": str(model.dtype),
        "device": model.device.type,
        "attention": model.config._attn_implementation,
        "what": what,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    return _json_sha256(depends_on)


def _json_sha256(value: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
