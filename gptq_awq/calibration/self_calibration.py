"""Self-calibration: calibration text sampled from the full-precision model itself (Williams et al., arXiv 2410.17170),
as LLM-QAT (Liu et al., arXiv 2305.17888) did for training data.

Methods tuned end to end overfit a few thousand tokens of real text; samples of the model are without limit. Each window
begins with a few tokens of the calibration text, and is continued by

    y_t ~ softmax(logits(y_<t) / T)

The quantized model is then fitted to the full-precision model's outputs on these windows. End-of-text tokens are never
drawn, so that windows are full.
"""

import copy
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from gptq_awq.data.tokens import TokenSet, make_token_set
from gptq_awq.errors import UserError
from gptq_awq.models.attention import writing_attention
from gptq_awq.models.blocks import head_size, key_value_heads, text_config
from gptq_awq.models.offload import check_in_memory
from gptq_awq.models.reserved_cache import reserved_cache
from gptq_awq.numerics.sampling import sampled
from gptq_awq.runtime.memory import trim
from gptq_awq.runtime.options import PositiveFloat, PositiveInt, Seed, checked_dataclass
from gptq_awq.runtime.progress import Track, no_track


@checked_dataclass
class SelfCalibration:
    """Settings of self-calibration: windows sampled from the model, as long as those of the calibration text.

    Attributes:
        windows: number of windows to sample.
        prompt: number of tokens at the start of each window, taken from the calibration text at random places.
        temperature: T, the sampling temperature; below 1 likely tokens become more likely.
        batch_size: number of windows that are sampled at a time.
        seed: seed of the prompts' places and of the samples.

    Raises:
        UserError: a value out of range.
    """

    windows: PositiveInt = 96
    prompt: PositiveInt = 32
    temperature: PositiveFloat = 1.0
    batch_size: PositiveInt = 32
    seed: Seed = 0

    def check(self, model: Any, tokens: TokenSet) -> None:
        """Raise UserError where the model cannot generate text, or the calibration windows are too short or padded."""
        check_in_memory(model, "method.self_calibration: writing takes", "set it to null")
        if not model.can_generate():
            raise UserError(f"method.self_calibration: {type(model).__name__} can't generate; set it to null")
        if tokens.mask is not None:
            raise UserError("method.self_calibration: goes on from unpadded windows; choose data.packing=windows")
        if self.prompt >= tokens.ids.shape[1]:
            raise UserError(
                f"method.self_calibration.prompt={self.prompt}: must be below data.seqlen={tokens.ids.shape[1]}"
            )

    def unwritten(self, tokens: TokenSet) -> TokenSet:
        """A token set of the extended calibration data's size, with zeros for ids, for the memory forecast."""
        return replace(tokens, ids=tokens.ids.new_zeros(1).expand(len(tokens.ids) + self.windows, tokens.ids.shape[1]))

    def write(
        self, model: Any, tokens: TokenSet, dtype: torch.dtype, track: Track = no_track
    ) -> Int[Tensor, "windows seqlen"]:
        """Sample the windows from the model, each after a prompt from the calibration text.

        Args:
            model: a transformers causal LM in eval mode, in full precision.
            tokens: calibration windows, which prompts are taken from.
            dtype: dtype that forwards compute in.
            track: reports progress over tokens.

        Raises:
            UserError: the model cannot generate text; windows are too short or padded.
        """
        self.check(model, tokens)
        writer = model if model.dtype == dtype else copy.deepcopy(model).to(dtype)
        batches, new = self._prompts(tokens.ids).split(self.batch_size), tokens.ids.shape[1] - self.prompt
        steps = iter(track(range(len(batches) * new), "write calibration text", len(batches) * new))
        samplers = (_Drawn(self.temperature, self.seed + number, model.device, steps) for number in range(len(batches)))
        written = [_continued(writer, prompts, new, drawn) for prompts, drawn in zip(batches, samplers, strict=True)]
        deque(steps, maxlen=0)  # ends the progress bar
        del writer
        trim()  # keys and values take more memory than most of what calibration will ask for
        return torch.cat(written)

    def needed_bytes(self, model: Any, length: int, dtype: torch.dtype) -> int:
        """Bytes that sampling windows of `length` tokens allocates, at most.

        These are a batch's keys, values and logits, and a copy of the parameters where the model has another dtype.
        """
        config, rows = text_config(model), min(self.batch_size, self.windows)
        kept = 2 * config.num_hidden_layers * key_value_heads(config) * head_size(config)
        copied = sum(p.numel() for p in model.parameters()) if model.dtype != dtype else 0
        return (kept * rows * length + copied) * dtype.itemsize + 16 * rows * config.vocab_size

    def extend(self, model: Any, tokens: TokenSet, dtype: torch.dtype, track: Track = no_track) -> TokenSet:
        """The calibration windows followed by windows sampled from the model."""
        return self.added(tokens, self.write(model, tokens, dtype, track))

    def added(self, tokens: TokenSet, written: Int[Tensor, "windows seqlen"]) -> TokenSet:
        """The calibration windows followed by `written`, as one token set."""
        return make_token_set(f"{tokens.name}+self", torch.cat([tokens.ids, written]), None, tokens.source)

    def _prompts(self, ids: Int[Tensor, "n seqlen"]) -> Int[Tensor, "windows prompt"]:
        generator = torch.Generator().manual_seed(self.seed)
        rows = torch.randint(len(ids), (self.windows,), generator=generator)
        starts = torch.randint(ids.shape[1] - self.prompt + 1, (self.windows,), generator=generator)
        return torch.stack([ids[r, s : s + self.prompt] for r, s in zip(rows, starts, strict=True)])


def _continued(model: Any, prompts: Int[Tensor, "n prompt"], new: int, drawn: "_Drawn") -> Int[Tensor, "n length"]:
    """The prompts, each followed by `new` sampled tokens."""
    plain = GenerationConfig(
        do_sample=False, max_new_tokens=new, min_new_tokens=new, pad_token_id=0, repetition_penalty=1.0
    )
    prompts = prompts.to(model.device)
    seen = torch.ones_like(prompts)
    cache = reserved_cache(model, prompts.shape[1] + new)
    with torch.no_grad(), writing_attention(), _gapless_head(model):
        ids = model.generate(
            prompts,
            attention_mask=seen,
            generation_config=plain,
            logits_processor=LogitsProcessorList([drawn]),
            **({} if cache is None else {"past_key_values": cache}),
        )
    return ids.cpu()


@contextmanager
def _gapless_head(model: Any) -> Iterator[None]:
    """Context manager in which the head's inputs lie without gaps.

    After a prompt transformers slices the last token of each text; for such inputs torch copies the head once per text.
    """
    head = model.get_output_embeddings()
    if head is None:
        yield
        return
    hook = head.register_forward_pre_hook(lambda _, inputs: tuple(x.contiguous() for x in inputs))
    try:
        yield
    finally:
        hook.remove()


class _Drawn(LogitsProcessor):
    """Samples one token per window from softmax(logits / T), with a generator of its own.

    The scores it returns are one-hot, so that greedy generation takes the sampled token.
    """

    def __init__(self, temperature: float, seed: int, device: torch.device, steps: Iterator[int]) -> None:
        self._temperature, self._generator = temperature, torch.Generator(device).manual_seed(seed)
        self._steps = steps

    def __call__(self, input_ids: Tensor, scores: Float[Tensor, "n vocab"]) -> Float[Tensor, "n vocab"]:  # noqa: ARG002
        next(self._steps, None)
        token = sampled(scores, self._generator, self._temperature)
        return torch.zeros_like(scores, dtype=torch.float32).scatter_(1, token, 1.0)
