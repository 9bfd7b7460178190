"""Texts and token ids as users have them, made the windows that calibration and scoring read."""

from collections.abc import Sequence
from typing import Any

from jaxtyping import Int
from torch import Tensor

from gptq_awq.data.text import make_text
from gptq_awq.data.tokens import TokenSet, evaluation_windows, make_token_set
from gptq_awq.errors import UserError
from gptq_awq.models.context_length import context_length

Texts = Sequence[str] | str
SEQLEN = 512


def token_set(
    given: "Int[Tensor, 'n seqlen'] | TokenSet | Texts | None", tokenizer: Any, seqlen: int, name: str, model: Any
) -> TokenSet | None:
    """Make windows of tokens of whatever was given.

    Args:
        given: token ids, one row per window; texts, which are joined by blank lines and cut into windows; a token set,
            which is taken as it is; None.
        tokenizer: for texts.
        seqlen: tokens per window of texts. Where they have fewer, one window has them all.
        name: of the token set.
        model: whose context windows of texts fit into.

    Raises:
        UserError: texts without a tokenizer or too short; ids that are no matrix of integers.
    """
    if given is None or isinstance(given, TokenSet):
        return given
    if isinstance(given, Tensor):
        if given.dim() != 2 or given.is_floating_point():
            raise UserError(f"{name}: token ids of shape {tuple(given.shape)}: give integers, one row per window")
        return make_token_set(name, given.cpu(), None, "memory")
    texts = [given] if isinstance(given, str) else list(given)
    if not texts or not all(isinstance(text, str) for text in texts):
        raise UserError(f"{name}: give a list of texts, or token ids with one row per window")
    if tokenizer is None:
        raise UserError(f"{name}: texts need a tokenizer: pass tokenizer=…, or token ids instead of texts")
    text = make_text(name, texts, "memory")
    length = len(tokenizer(text.joined)["input_ids"])
    if length < 2:
        raise UserError(f"{name}: the texts have {length} tokens; give more text")
    return evaluation_windows(text, tokenizer, min(seqlen, length, context_length(model) or seqlen), option=name)
