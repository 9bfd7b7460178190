"""Map from a causal language model's last hidden states to its logits, a few tokens at a time.

The logits of a window are large (2048 tokens x 49152 words are 400 MB) while its hidden states are small (5 MB), so
scores keep hidden states and recompute logits in chunks. Models differ in what they do between the two (see
models/decoder_head.py), so a split is used only after it has reproduced the model's logits on a probe. A model without
such a split is scored all the same: its logits are kept in place of hidden states.
"""

import hashlib
import logging
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from gptq_awq.errors import UserError
from gptq_awq.evaluation.precision import lowered, lowered_head
from gptq_awq.kernels.threads import match_torch
from gptq_awq.models.blocks import BlockCalls, find_blocks
from gptq_awq.models.decoder_head import decoder_of, logits
from gptq_awq.models.offload import offloaded, resident
from gptq_awq.runtime.profiling import phase
from gptq_awq.storage.checksummed import tensor_bytes

log = logging.getLogger(__name__)
CHUNK_LOGITS = 2**23
"""Number of logits per chunk of whole rows: 32 MB in fp32."""
TILE_TOKENS, TILE_WORDS = 2048, 528
"""Tokens and vocabulary words per tile of logits: 4 MB in fp32, which stay in a CPU's cache until they are read.

The output layer is laid out for products once for so many tokens, hidden states once; words come in whole panels."""
PROBE_TOKENS = 8
"""Length of the input on which a split is compared with the whole model."""
TOLERANCE = 1e-3
"""Largest difference allowed on the probe, relative to the largest logit."""

Parameters = Mapping[str, Tensor]
"""A module's parameters by name."""


@dataclass(frozen=True)
class Head:
    """A model split in two: `hidden` runs the decoder, calling the head maps its hidden states to logits.

    Attributes:
        model: the whole model.
        decoder: its decoder, from token ids to last hidden states; the whole model where it has no such split, and
            "hidden states" are logits.
        template: an output of the decoder; the head's forward reads hidden states from a copy of it.
        output: its output layer; an identity where it names none.
        vocab: number of logits per token.
        divisible: whether the logits of a part of the vocabulary can be computed alone.
        compute_dtype: dtype of the decoder's products (see `precision`).
        shared: what calls lay out for products, where they share it (`laying_out_once`).
    """

    model: PreTrainedModel
    decoder: nn.Module
    template: ModelOutput
    output: nn.Module
    vocab: int
    divisible: bool = False
    compute_dtype: torch.dtype = torch.float32
    shared: AbstractContextManager[Any] | None = field(default=None, repr=False, compare=False)

    @classmethod
    def of(cls, model: PreTrainedModel, compute_dtype: torch.dtype = torch.float32) -> "Head":
        """Split `model` into decoder and head, and check that together they reproduce its logits.

        Raises UserError where the model computes no logits, or is offloaded and has no such split.
        """
        match_torch()
        named = model.get_output_embeddings()
        output = nn.Identity() if named is None else named
        with torch.no_grad(), resident(output), _without_absent_blocks(model):
            ids, expected = _probed(model)
            whole = cls(model, model, ModelOutput(), output, expected.shape[-1], compute_dtype=compute_dtype)
            if (split := whole._split(ids, expected)) is not None:
                return split
        if offloaded(model):
            raise _unsupported(model, "has no decoder and head that reproduce its logits, block by block")
        log.warning(
            "%s has no decoder and head that reproduce its logits, so that all logits are kept in memory while "
            "it is scored",
            type(model).__name__,
        )
        return whole

    def _split(self, ids: Int[Tensor, "1 tokens"], expected: Float[Tensor, "tokens vocab"]) -> "Head | None":
        """This head with the decoder apart, if the logits of any part of the positions are those `expected`."""
        if (decoder := decoder_of(self.model)) is None:
            return None
        template = decoder(input_ids=ids, use_cache=False, return_dict=True)
        if not isinstance(template, ModelOutput) or "last_hidden_state" not in template:
            return None
        head, states, cut = replace(self, decoder=decoder, template=template), template["last_hidden_state"][0], 3
        try:  # in two parts, as a head might read another output of the decoder, which the template holds
            found = torch.cat([head(states[:cut]), head(states[cut:])])
        except (RuntimeError, IndexError):
            return None
        return replace(head, divisible=head._divides(states, expected)) if _same(found, expected) else None

    @property
    def whole(self) -> bool:
        """Whether the model has no split, and hidden states are its logits."""
        return self.decoder is self.model

    @torch.no_grad()
    def hidden(
        self, ids: Int[Tensor, "batch tokens"], mask: Int[Tensor, "batch tokens"] | None = None
    ) -> Float[Tensor, "batch tokens width"]:
        """The decoder's last hidden states, in the model's dtype and on its device."""
        with phase("score/forward", *ids.shape), lowered(self.compute_dtype):
            output = self.decoder(input_ids=ids, attention_mask=mask, use_cache=False, return_dict=True)
        return output["logits" if self.whole else "last_hidden_state"]

    @torch.no_grad()
    def __call__(
        self, hidden: Float[Tensor, "tokens width"], words: slice | None = None, output: Parameters | None = None
    ) -> Float[Tensor, "tokens words"]:
        """Logits in fp32 of the hidden states, with the parameters `output` in the output layer (None: its own).

        `words` selects a part of the vocabulary, for a divisible head only (None: all of it).
        """
        hidden = hidden.to(self.model.device)[None]
        if self.whole:
            return hidden[0].float()
        if words is not None and len(range(self.vocab)[words]) < self.vocab:
            output = {name: value[words] for name, value in (output or dict(self.output.named_parameters())).items()}
        size = (hidden.shape[1],) if words is None else (hidden.shape[1], words.stop - words.start)
        lower = self.shared or lowered_head(self.compute_dtype, self.model.device)
        with self.with_output(output), phase("score/head", *size), lower:
            return logits(self.model, self.decoder, self.template, hidden)[0].float()

    @contextmanager
    def with_output(self, parameters: Parameters | None) -> Iterator[None]:
        """Context in which the output layer has the given parameters; None leaves it its own."""
        own = dict(self.output.named_parameters())
        kept = {name: own[name].data for name in parameters or {}}
        for name, value in (parameters or {}).items():
            own[name].data = value
        try:
            yield
        finally:
            for name, value in kept.items():
                own[name].data = value

    def laying_out_once(self) -> "Head":
        """This head, whose calls share what they lay out for products: states and the output layer must not change."""
        return replace(self, shared=lowered_head(self.compute_dtype, self.model.device))

    def chunks(self, tokens: int) -> Iterator[slice]:
        """Cut `tokens` positions into chunks of at most `CHUNK_LOGITS` logits."""
        step = max(1, CHUNK_LOGITS // self.vocab)
        for start in range(0, tokens, step):
            yield slice(start, min(start + step, tokens))

    def tiles(self, tokens: int) -> Iterator[tuple[slice, list[slice]]]:
        """Cut the logits of `tokens` positions into tiles: a slice of positions, and the slices of the vocabulary."""
        if not self.divisible:
            yield from ((rows, [slice(0, self.vocab)]) for rows in self.chunks(tokens))
            return
        words = [slice(first, min(first + TILE_WORDS, self.vocab)) for first in range(0, self.vocab, TILE_WORDS)]
        for start in range(0, tokens, TILE_TOKENS):
            yield slice(start, min(start + TILE_TOKENS, tokens)), words

    def _divides(self, states: Float[Tensor, "tokens width"], expected: Float[Tensor, "tokens vocab"]) -> bool:
        """Whether two uneven parts of the vocabulary, computed apart, equal the logits of the whole."""
        if any(p.shape[:1] != (self.vocab,) for p in self.output.parameters()):
            return False
        cut = self.vocab // 3
        try:
            parts = [self(states, slice(0, cut)), self(states, slice(cut, self.vocab))]
        except (RuntimeError, IndexError):  # its forward indexes the whole vocabulary
            return False
        return [p.shape[-1] for p in parts] == [cut, self.vocab - cut] and _same(torch.cat(parts, -1), expected)

    def sha256(self) -> str:
        """Content hash of the output layer's state dict: of what turns hidden states into logits."""
        digest = hashlib.sha256()
        if self.whole:
            return digest.hexdigest()
        for name, value in sorted(self.output.state_dict().items()):
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            digest.update(tensor_bytes(value))
        return digest.hexdigest()


@contextmanager
def _without_absent_blocks(model: PreTrainedModel) -> Iterator[None]:
    """Context in which the blocks of an offloaded model are skipped: a head is checked on any hidden states."""
    if not offloaded(model):
        yield
        return
    with BlockCalls(model, find_blocks(model)[1]).skipped():
        yield


def _same(logits: Float[Tensor, "tokens vocab"], expected: Float[Tensor, "tokens vocab"]) -> bool:
    """Whether logits agree within `TOLERANCE`, relative to the largest of them."""
    error = (logits - expected).abs().max() / expected.abs().max().clamp(min=1e-12)
    return not error > TOLERANCE  # NaN passes: scoring reports logits that are not finite, with their window


def _probed(model: PreTrainedModel) -> tuple[Int[Tensor, "1 tokens"], Float[Tensor, "tokens vocab"]]:
    """Probe's token ids and the model's logits. Raises UserError where the model computes none."""
    ids = torch.arange(1, PROBE_TOKENS + 1, device=model.device)[None]
    try:
        return ids, model(input_ids=ids, use_cache=False).logits[0].float()
    except Exception as error:  # whatever a model's own code raises
        why = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise _unsupported(model, f"computes no logits of {PROBE_TOKENS} tokens ({why})") from error


def _unsupported(model: PreTrainedModel, why: str) -> UserError:
    """The error for a model that can't be scored."""
    name = model.config.name_or_path or type(model).__name__
    return UserError(
        f"model={name}: {type(model).__name__} {why}, so its perplexity and KL cannot be measured here; set eval=none "
        "to quantize it all the same"
    )
