"""Length of the context that a model was made for, and whether its positions go on beyond."""

from typing import Any

from gptq_awq.errors import UserError

NAMES = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "max_sequence_length")


def context_length(model: Any) -> int | None:
    """Number of tokens that the config of a model gives as its context; None where it gives none."""
    config = model.config.get_text_config()
    given = (getattr(config, name, None) for name in NAMES)
    return next((value for value in given if isinstance(value, int) and value > 0), None)


def goes_beyond(model: Any) -> bool:
    """Whether positions beyond the context can be computed: rotary ones and linear biases; learned ones have no row."""
    rotary = any(name.endswith("inv_freq") for name, _ in model.named_buffers())
    return rotary or bool(getattr(model.config.get_text_config(), "alibi", False))


def check_context(length: int, model: Any, option: str) -> str | None:
    """A sentence on rows that are longer than a model's context; None where they aren't.

    Raises:
        UserError: naming `option`, where the model has no positions beyond its context.
    """
    limit = context_length(model)
    if limit is None or length <= limit:
        return None
    if not goes_beyond(model):
        raise UserError(f"{option}={length} is longer than the model's context of {limit} tokens; lower it")
    return f"{option}={length} is longer than the model's context of {limit} tokens, which it was not trained beyond"
