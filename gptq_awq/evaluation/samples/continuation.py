"""Continuations of a prompt: greedy ones with the probabilities of each step, and sampled ones for reading."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import GenerationConfig
from transformers.generation.streamers import BaseStreamer

from gptq_awq.errors import UserError
from gptq_awq.evaluation.samples.prompts import Prompt
from gptq_awq.runtime.options import checked_dataclass
from gptq_awq.runtime.progress import Track, no_track

LIKELIEST = 100
"""Tokens of each step whose probabilities are kept."""


@dataclass(frozen=True)
class Continuation:
    """Text that a model writes after a prompt when it takes the likeliest token each time.

    Attributes:
        prompt: that it goes on from.
        tokens: ids, the end-of-text token included where the model came to it.
        pieces: text that each token adds; joined, they are the continuation.
        likeliest: per token, (ids, probabilities) of the `LIKELIEST` tokens at that place, falling.
    """

    prompt: Prompt
    tokens: tuple[int, ...]
    pieces: tuple[str, ...]
    likeliest: tuple[tuple[Int[Tensor, "n"], Float[Tensor, "n"]], ...] = field(repr=False)

    @property
    def text(self) -> str:
        """The continuation as text, without marks such as the end of text."""
        return "".join(self.pieces)

    def probability(self, step: int, token: int) -> float:
        """Probability of a token at a step; of one that isn't among the likeliest, the least of those: a bound."""
        ids, probabilities = self.likeliest[step]
        found = (ids == token).nonzero()
        return float(probabilities[found[0, 0]] if len(found) else probabilities[-1])


@torch.no_grad()
def continue_greedily(
    model: Any, tokenizer: Any, prompts: Sequence[Prompt], tokens: int, track: Track = no_track
) -> list[Continuation]:
    """Let a model go on from each prompt by itself, with the likeliest token each time.

    Args:
        model: a causal LM in eval mode, as it is: quantized or not.
        tokenizer: of the model.
        prompts: to go on from.
        tokens: most tokens to write; fewer where the model ends its text.
        track: reports progress over prompts.

    Raises:
        UserError: a model that can't generate; a prompt that leaves no room in its context; logits that aren't finite.
    """
    return [
        _continued(model, tokenizer, prompt, tokens) for prompt in track(prompts, "write text samples", len(prompts))
    ]


def _continued(model: Any, tokenizer: Any, prompt: Prompt, tokens: int) -> Continuation:
    ids = _fitting(model, prompt.encode(tokenizer), tokens)
    config = GenerationConfig(
        do_sample=False,
        max_new_tokens=tokens,
        repetition_penalty=1.0,
        return_dict_in_generate=True,
        output_logits=True,
        **_ends(model, tokenizer),
    )
    written = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)
    chosen = written.sequences[0, ids.shape[1] :].tolist()
    likeliest = []
    for logits in written.logits:
        row = logits[0].float()
        if not torch.isfinite(row).any() or row.isnan().any():
            raise UserError("text samples: the model's logits are not finite")
        top = row.softmax(-1).topk(min(LIKELIEST, len(row)))
        likeliest.append((top.indices.cpu(), top.values.cpu()))
    return Continuation(prompt, tuple(chosen), pieces(tokenizer, chosen, int(ids[0, -1])), tuple(likeliest))


def pieces(tokenizer: Any, tokens: Sequence[int], after: int) -> tuple[str, ...]:
    """Text that each token adds to those before it, behind the token `after`.

    A character of several tokens comes with the last of them.
    """
    found, before = [], tokenizer.decode([after], skip_special_tokens=True)
    for count in range(1, len(tokens) + 1):
        text = tokenizer.decode([after, *tokens[:count]], skip_special_tokens=True)
        whole = text if count == len(tokens) else text.rstrip("\ufffd")
        found.append(whole[len(before) :] if whole.startswith(before) else "")
        before = whole if whole.startswith(before) else before
    return tuple(found)


@checked_dataclass
class Sampling:
    """How `write` chooses tokens.

    Attributes:
        temperature: 0: the likeliest token each time.
        top_p: tokens that together have this probability; 1: all.
        top_k: this many likeliest tokens; 0: all.
        seed: of what is drawn.
        tokens: most tokens to write.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    tokens: int = 128

    def __post_init__(self) -> None:
        limits = {
            "temperature": self.temperature >= 0,
            "top_p": 0 < self.top_p <= 1,
            "top_k": self.top_k >= 0,
            "tokens": self.tokens >= 1,
        }
        for name, fits in limits.items():
            if not fits:
                raise UserError(f"--{name.replace('_', '-')} {getattr(self, name):g}: is out of its range")

    def drawn(self) -> dict[str, Any]:
        """The options of transformers' generation that these stand for."""
        if self.temperature == 0:
            return {"do_sample": False}
        return {"do_sample": True, "temperature": self.temperature, "top_p": self.top_p, "top_k": self.top_k}


@torch.no_grad()
def write(model: Any, tokenizer: Any, prompt: Prompt, sampling: Sampling, say: Callable[[str], object]) -> str:
    """Let a model go on from a prompt; `say` hears the text as it comes, and it is returned.

    Raises:
        UserError: as `continue_greedily` does.
    """
    ids = _fitting(model, prompt.encode(tokenizer), sampling.tokens)
    config = GenerationConfig(
        max_new_tokens=sampling.tokens, repetition_penalty=1.0, **sampling.drawn(), **_ends(model, tokenizer)
    )
    torch.manual_seed(sampling.seed)
    teller = _Teller(tokenizer, say)
    model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config, streamer=teller)
    return "".join(teller.told)


class _Teller(BaseStreamer):
    """Passes text on as it is generated, as soon as its characters are whole."""

    def __init__(self, tokenizer: Any, say: Callable[[str], object]) -> None:
        self._tokenizer, self._say, self.told = tokenizer, say, list[str]()
        self._after, self._tokens = None, list[int]()

    def put(self, value: Tensor) -> None:
        """Called by transformers: first with the prompt, then with each token."""
        if self._after is None:
            self._after = int(value.flatten()[-1])
        else:
            self._tokens += value.flatten().tolist()
            self._tell(whole=False)

    def end(self) -> None:
        """Called by transformers."""
        self._tell(whole=True)

    def _tell(self, whole: bool) -> None:
        text = "".join(pieces(self._tokenizer, self._tokens, self._after or 0))
        text = (text if whole else text.rstrip("\ufffd"))[len("".join(self.told)) :]
        if text:
            self.told.append(text)
            self._say(text)


def _fitting(model: Any, ids: Int[Tensor, "1 tokens"], tokens: int) -> Int[Tensor, "1 tokens"]:
    """The prompt's ids on the model's device. Raises UserError where prompt and continuation exceed its context."""
    if not model.can_generate():
        raise UserError(f"{type(model).__name__} can't generate text")
    most = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if most is not None and ids.shape[1] + tokens > most:
        raise UserError(f"a prompt of {ids.shape[1]} tokens and {tokens} more exceed the model's context of {most}")
    return ids.to(model.device)


def _ends(model: Any, tokenizer: Any) -> dict[str, Any]:
    """Tokens that end a text, and one to pad with; its own config's further options, such as penalties, don't count."""
    ends = getattr(model.generation_config, "eos_token_id", None)
    ends = tokenizer.eos_token_id if ends is None else ends
    first = ends[0] if isinstance(ends, list) and ends else ends
    return {"eos_token_id": ends, "pad_token_id": 0 if first is None else first}
