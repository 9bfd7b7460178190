"""Teacher of end-to-end tuning: the full-precision model's predictions, kept without its blocks."""

import copy
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from gptq_awq.data.tokens import TokenSet
from gptq_awq.errors import UserError
from gptq_awq.models.attention import faster_attention_of
from gptq_awq.models.decoder_head import decoder_of, logits
from gptq_awq.runtime.profiling import phase


class Teacher:
    """The full-precision model's predictions on the calibration tokens, kept as last hidden states and the head.

    Args:
        model: full-precision model, before transforms or quantization change it.
        tokens: calibration tokens.
        dtype: precision of the forward passes, the hidden states and the head.
    """

    def __init__(self, model: nn.Module, tokens: TokenSet, dtype: torch.dtype) -> None:
        full = copy.deepcopy(model).to(dtype)
        self._decoder, device = tuned_decoder(full), next(full.parameters()).device
        self.dtype = dtype
        states = []
        with torch.no_grad(), faster_attention_of(full):
            for row in range(len(tokens.ids)):
                with phase("forward", 1, tokens.ids.shape[1]):
                    out = self._decoder(**inputs_of(tokens, slice(row, row + 1), device), use_cache=False)
                states.append(out["last_hidden_state"])
            self._template = self._decoder(**inputs_of(tokens, slice(0, 1), device), use_cache=False)
        self.hidden: Float[Tensor, "n seqlen width"] = torch.cat(states)
        for module in self._decoder.modules():  # only the head is wanted from here on
            if module is not full.get_input_embeddings() and module is not full.get_output_embeddings():  # pyright: ignore
                module._parameters.clear()
        self._model = full

    def logits(self, hidden: Float[Tensor, "tokens width"]) -> Float[Tensor, "tokens vocab"]:
        """Logits of the full-precision model, given its hidden states."""
        return logits(self._model, self._decoder, self._template, hidden[None])[0]


def tuned_decoder(model: Any) -> nn.Module:
    """Decoder of a model, which ends in hidden states. Raises UserError where the model has none of its own."""
    if (decoder := decoder_of(model)) is None:
        raise UserError(f"method.tuning: {type(model).__name__} is not made of a decoder and a head")
    return decoder


def inputs_of(tokens: TokenSet, rows: slice | Tensor, device: torch.device) -> dict[str, Tensor]:
    """Model inputs of some windows: token ids and, where there is padding, the attention mask."""
    inputs = {"input_ids": tokens.ids[rows].to(device)}
    if tokens.mask is not None:
        inputs["attention_mask"] = tokens.mask[rows].to(device, torch.long)
    return inputs
