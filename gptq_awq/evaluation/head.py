"""The map from a causal language model's last hidden states to its logits.

The logits of a window are large (2048 tokens x 49152 words are 400 MB) where its hidden states are small (5
MB), so scores keep hidden states and compute logits a few tokens at a time. What a model does between the two
differs: most apply a linear layer alone, Gemma 2 caps its logits, Granite and Cohere scale them. No table of
those here: the model's own forward is run with its decoder replaced by one that returns the given hidden
states, and is believed only after it has reproduced the model's logits on a probe.
"""

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from gptq_awq.errors import UserError
from gptq_awq.profiling import phase
from gptq_awq.sealed import tensor_bytes

CHUNK_LOGITS = 2**23
"""Logits computed at a time: 32 MB in fp32."""
PROBE_TOKENS = 8
TOLERANCE = 1e-3
"""Largest difference allowed on the probe, relative to the largest logit."""

Parameters = Mapping[str, Tensor]
"""Of a module, by name."""


@dataclass(frozen=True)
class Head:
    """A model in two halves: `hidden` runs the decoder, calling the head runs the rest."""

    model: PreTrainedModel
    decoder: nn.Module
    template: ModelOutput
    """What the decoder returns; the head's forward reads its hidden states from a copy of this."""
    output: nn.Module
    vocab: int

    @classmethod
    def of(cls, model: PreTrainedModel) -> "Head":
        """Split `model` into decoder and head, and check the halves against the whole.

        Raises UserError where the model is not made of a decoder and a head that work on their own.
        """
        output, decoder = model.get_output_embeddings(), model.get_decoder()
        if output is None or decoder is None or decoder is model:
            raise _unsupported(model)
        probe = torch.arange(1, PROBE_TOKENS + 1, device=model.device)[None]
        with torch.no_grad():
            template = decoder(input_ids=probe, use_cache=False, return_dict=True)
            expected = model(input_ids=probe, use_cache=False).logits[0].float()
            if not isinstance(template, ModelOutput) or "last_hidden_state" not in template:
                raise _unsupported(model)
            head = cls(model, decoder, template, output, expected.shape[-1])
            logits = head(template["last_hidden_state"][0])
        # Non-finite logits are for the scores to report, with the window they come from.
        error = (logits - expected).abs().max() / expected.abs().max().clamp(min=1e-12)
        if error > TOLERANCE:
            raise _unsupported(model)
        return head

    @torch.no_grad()
    def hidden(
        self, ids: Int[Tensor, "batch tokens"], mask: Int[Tensor, "batch tokens"] | None = None
    ) -> Float[Tensor, "batch tokens width"]:
        """The decoder's last hidden states, in the model's dtype and on its device."""
        with phase("score/forward", *ids.shape):
            output = self.decoder(input_ids=ids, attention_mask=mask, use_cache=False, return_dict=True)
        return output["last_hidden_state"]

    @torch.no_grad()
    def __call__(self, hidden: Float[Tensor, "tokens width"]) -> Float[Tensor, "tokens vocab"]:
        """The model's logits, in fp32."""
        hidden = hidden.to(self.model.device)[None]
        placeholder = torch.zeros(hidden.shape[:2], dtype=torch.long, device=hidden.device)
        with phase("score/head", hidden.shape[1]), self._decoder_returning(hidden):
            return self.model(input_ids=placeholder, use_cache=False).logits[0].float()

    @contextmanager
    def with_output(self, parameters: Parameters | None) -> Iterator[None]:
        """Within: the output layer has these parameters; None: its own."""
        own = dict(self.output.named_parameters())
        kept = {name: own[name].data for name in parameters or {}}
        for name, value in (parameters or {}).items():
            own[name].data = value
        try:
            yield
        finally:
            for name, value in kept.items():
                own[name].data = value

    def chunks(self, tokens: int) -> Iterator[slice]:
        """Cut `tokens` positions into runs whose logits fit the memory set aside for them."""
        step = max(1, CHUNK_LOGITS // self.vocab)
        for start in range(0, tokens, step):
            yield slice(start, min(start + step, tokens))

    def sha256(self) -> str:
        """Content hash of the output layer's weights."""
        digest = hashlib.sha256()
        for name, value in sorted(self.output.state_dict().items()):
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            digest.update(tensor_bytes(value))
        return digest.hexdigest()

    @contextmanager
    def _decoder_returning(self, hidden: Float[Tensor, "1 tokens width"]) -> Iterator[None]:
        """Within: the decoder does nothing and returns `hidden`."""
        output = type(self.template)(**{**self.template, "last_hidden_state": hidden})
        before = self.decoder.__dict__.get("forward")
        self.decoder.forward = lambda *_args, **_kwargs: output
        try:
            yield
        finally:
            del self.decoder.forward
            if before is not None:  # some libraries (accelerate) set an instance's forward too
                self.decoder.forward = before


def _unsupported(model: PreTrainedModel) -> UserError:
    name = model.config.name_or_path or type(model).__name__
    return UserError(
        f"model={name}: {type(model).__name__} cannot be split into a decoder and a head that reproduce its "
        "logits, so its perplexity and KL cannot be measured here; set eval=none to quantize it all the same"
    )
