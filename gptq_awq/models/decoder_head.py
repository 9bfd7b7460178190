"""A causal language model split into its decoder, which returns hidden states, and its head, which returns logits.

Heads differ: most are a linear layer alone, Gemma 2 caps its logits, Granite and Cohere scale them. No table of
architectures is needed: the head is the model's own forward, with the decoder replaced by one that returns given hidden
states.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers.utils import ModelOutput


@contextmanager
def decoder_returning(
    decoder: nn.Module, template: ModelOutput, hidden: Float[Tensor, "batch tokens width"]
) -> Iterator[None]:
    """Context manager under which the decoder computes nothing and returns `hidden`, in an output like `template`."""
    output = type(template)(**{**template, "last_hidden_state": hidden})
    before = decoder.__dict__.get("forward")
    decoder.forward = lambda *_args, **_kwargs: output
    try:
        yield
    finally:
        del decoder.forward
        if before is not None:  # some libraries (accelerate) set an instance's forward too
            decoder.forward = before


def logits(
    model: nn.Module, decoder: nn.Module, template: ModelOutput, hidden: Float[Tensor, "batch tokens width"]
) -> Float[Tensor, "batch tokens vocab"]:
    """Logits of the model for the decoder's hidden states, in the model's dtype."""
    placeholder = torch.zeros(hidden.shape[:2], dtype=torch.long, device=hidden.device)
    with decoder_returning(decoder, template, hidden):
        return model(input_ids=placeholder, use_cache=False).logits
