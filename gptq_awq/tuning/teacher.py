"""Teacher of end-to-end tuning: the full-precision model's predictions, kept without its blocks."""

import copy
from collections.abc import Iterable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from gptq_awq.data.tokens import TokenSet
from gptq_awq.errors import UserError
from gptq_awq.models.attention import faster_attention_of
from gptq_awq.models.blocks import BlockCalls, find_blocks
from gptq_awq.models.decoder_head import decoder_of, logits
from gptq_awq.runtime.profiling import phase


class Teacher:
    """The full-precision model's predictions on the calibration tokens, kept as last hidden states and the head.

    They come from forwards of the whole model (`predict`), or from the hidden states that left its last block in
    calibration, which carries them already for some methods (`waiting`, then `finish`).

    Args:
        model: full-precision model, before transforms or quantization change it.
        tokens: calibration tokens.
        dtype: precision of the forward passes, the hidden states and the head.

    Attributes:
        hidden: last hidden states.
    """

    hidden: Float[Tensor, "n seqlen width"]

    def __init__(self, model: nn.Module, tokens: TokenSet, dtype: torch.dtype) -> None:
        self._model: Any = copy.deepcopy(model).to(dtype)
        self._decoder, self._device = tuned_decoder(self._model), next(self._model.parameters()).device
        self._tokens, self.dtype = tokens, dtype
        self._recorder: BlockCalls | None = None

    def predict(self) -> "Teacher":
        """Run the whole model on all tokens, then forget its blocks; returns the teacher."""
        states = []
        with torch.no_grad(), faster_attention_of(self._model):
            for row in range(len(self._tokens.ids)):
                with phase("forward", 1, self._tokens.ids.shape[1]):
                    states.append(self._forward(slice(row, row + 1))["last_hidden_state"])
            self._template = self._forward(slice(0, 1))
        self._keep_head(torch.cat(states))
        return self

    def waiting(self) -> "Teacher":
        """Forget the blocks' weights until `finish` brings what the last block returns; returns the teacher."""
        _, blocks = find_blocks(self._decoder)
        self._recorder = BlockCalls(self._decoder, blocks)
        _clear(blocks.modules())
        return self

    def finish(self, states: Iterable[Float[Tensor, "batch seqlen width"]]) -> None:
        """Take the hidden states that leave the full-precision model's last block, in batches of all tokens."""
        assert self._recorder is not None
        hidden, first = [], 0
        for batch in states:
            ids = self._tokens.ids[first : first + len(batch)].to(self._device)
            self._template = self._recorder.finish(ids, batch.to(self._device, self.dtype))
            hidden.append(self._template["last_hidden_state"])
            first += len(batch)
        self._recorder = None
        self._keep_head(torch.cat(hidden))

    def _forward(self, rows: slice) -> Any:
        return self._decoder(**inputs_of(self._tokens, rows, self._device), use_cache=False)

    def _keep_head(self, hidden: Tensor) -> None:
        """Keep the last hidden states; only the head is wanted from here on."""
        self.hidden = hidden
        kept = (self._model.get_input_embeddings(), self._model.get_output_embeddings())
        _clear(module for module in self._decoder.modules() if all(module is not each for each in kept))

    def logits(self, hidden: Float[Tensor, "tokens width"]) -> Float[Tensor, "tokens vocab"]:
        """Logits of the full-precision model, given its hidden states."""
        return logits(self._model, self._decoder, self._template, hidden[None])[0]


def _clear(modules: Iterable[nn.Module]) -> None:
    """Free modules' own parameters."""
    for module in modules:
        module._parameters.clear()


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
