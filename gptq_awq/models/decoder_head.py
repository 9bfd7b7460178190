"""A causal language model split into its decoder, which returns hidden states, and its head, which returns logits.

Heads differ: most are a linear layer alone, Gemma 2 caps its logits, Granite and Cohere scale them. No table of
architectures is needed: the head is the model's own forward, with the decoder replaced by one that returns given hidden
states. Some heads read more than those (ProphetNet's reads its second stream), and have no such split.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import ModelOutput


def decoder_of(model: PreTrainedModel) -> nn.Module | None:
    """The part of a model that turns token ids into last hidden states; None where it can't be told apart.

    What the model names its decoder is believed where it holds a list of blocks and no head (ModernBERT's decoder names
    its head, Llama 4 itself); else it is the outermost module that holds such a list and the input embeddings.
    """
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()

    def holds(module: nn.Module, part: Any) -> bool:
        return part is not None and any(each is part for each in module.modules())

    def fits(module: nn.Module) -> bool:
        blocks = any(isinstance(each, nn.ModuleList) for each in module.modules())
        return blocks and module is not model and not holds(module, head)

    named = model.get_decoder()
    if named is not None and fits(named):
        return named
    return next((each for each in model.modules() if fits(each) and holds(each, embeddings)), None)


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
