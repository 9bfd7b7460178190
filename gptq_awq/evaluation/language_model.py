"""Adapter of a model in memory to lm-eval's language-model interface.

Unlike lm-eval's own wrapper, it computes logits only at the positions of a continuation, runs requests that share
their input (the one-token choices of a multiple-choice question) once, and reports progress to a `Track`.
"""

import json
import textwrap
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch import Tensor
from transformers import PreTrainedModel, StoppingCriteria, StoppingCriteriaList

from gptq_awq.data.text import without_surrogates
from gptq_awq.errors import UserError
from gptq_awq.evaluation.head import Head
from gptq_awq.runtime.progress import Track, no_track

DEFAULT_CONTEXT = 2048
"""Context length of a model whose config has none, as in lm-eval."""
DEFAULT_NEW_TOKENS = 256
"""Number of tokens generated for a task that sets none, as in lm-eval."""
Encoded = tuple[Any, list[int], list[int]]
"""An encoded request: the strings that lm-eval caches it by, and the token ids of context and continuation."""


class LanguageModel(TemplateLM):
    """Language model of lm-eval that scores and generates text with `model`, `batch_size` inputs at a time."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: Any,
        batch_size: int = 8,
        track: Track = no_track,
        compute_dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self._model = model
        self._head = Head.of(model, compute_dtype)
        self._batch_size = batch_size
        self._track = track
        self._device = model.device
        self._vocabulary = len(model.get_input_embeddings().get_parameter("weight"))
        self._put_behind = special_tokens_behind(tokenizer)
        self.max_length: int = (
            getattr(model.config.get_text_config(), "max_position_embeddings", None) or DEFAULT_CONTEXT
        )

    @property
    def eot_token_id(self) -> int:
        """Token id that ends a text."""
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """Token id that replaces an empty context: BOS, else EOS. Raises UserError if the tokenizer has neither."""
        ids = (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id)
        found = next((token for token in ids if token is not None), None)
        if found is None:
            raise UserError("eval.tasks: scoring text without context needs a tokenizer with a BOS or EOS token")
        return found

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Token ids of `string`, by default after the tokenizer's special tokens unless it begins with BOS.

        Special tokens that the tokenizer puts behind a text, such as EOS, are left out: the text goes on.
        """
        string = without_surrogates(string)
        if add_special_tokens is None:
            bos = self.tokenizer.bos_token
            add_special_tokens = not (bos and string.startswith(bos))
        ids = self.tokenizer.encode(string, add_special_tokens=add_special_tokens)
        return ids[: len(ids) - self._put_behind] if add_special_tokens and self._put_behind else ids

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Token ids of context and continuation, encoded as one text and cut where the context ends.

        A continuation that one token spans together with the context's end is encoded alone, as lm-eval's fix has it.
        """
        context_ids, continuation_ids = super()._encode_pair(context, continuation)
        if not continuation_ids:
            continuation_ids = self.tok_encode(continuation, add_special_tokens=False)
        return context_ids or [self.prefix_token_id], continuation_ids  # of spaces alone nothing is left as context

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """Log probability of each continuation given its context, in nats, and whether greedy decoding produces it.

        Raises:
            UserError: quoting a continuation that has no tokens.
        """
        for request in requests:
            arguments: Any = request.args
            context, continuation = arguments
            if not context and not self.tok_encode(continuation, add_special_tokens=False):
                raise _nothing_to_score(context, continuation)
        return super().loglikelihood(requests, disable_tqdm=disable_tqdm)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = True) -> list[float]:  # noqa: ARG002
        """Log probability of each text in nats, over windows as long as the context that score each token once."""
        owners, windows = [], []
        for owner, request in enumerate(requests):
            tokens = self.tok_encode(request.args[0], add_special_tokens=False)
            if tokens[:1] == [self.prefix_token_id]:  # written in the text itself: context, as BOS always is
                tokens = tokens[1:]
            rolling = get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length, context_len=1)
            for window in map(make_disjoint_window, rolling):
                owners.append(owner)
                windows.append((None, *window))
        totals = [0.0] * len(requests)
        for owner, (logprob, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
            totals[owner] += logprob
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:  # noqa: ARG002
        """Text that the model generates after each context, cut off before the first stop string."""
        texts = [""] * len(requests)
        by_options = defaultdict(list)
        for index, request in enumerate(requests):
            context, options = request.arguments
            by_options[json.dumps(options, sort_keys=True)].append((index, self.tok_encode(context)))
        self._check_ids(prompt for prompts in by_options.values() for _, prompt in prompts)
        batches = []
        for options, prompts in by_options.items():
            prompts.sort(key=lambda prompt: -len(prompt[1]))
            batches += [(json.loads(options), batch) for batch in _batches(prompts, self._batch_size)]
        for options, batch in self._track(batches, "lm-eval: generating", len(batches)):
            written = self._generate([prompt for _, prompt in batch], options)
            for (index, _), text in zip(batch, written, strict=True):
                texts[index] = text
        return texts

    def _loglikelihood_tokens(self, requests: Sequence[Encoded], **_: Any) -> list[tuple[float, bool]]:
        """Log probability of each continuation and whether it is the greedy one; equal inputs are run once."""
        by_input: dict[tuple[int, ...], list[int]] = defaultdict(list)
        self._check_ids(ids for _, context, continuation in requests for ids in (context, continuation))
        for index, (request, context, continuation) in enumerate(requests):
            if not continuation:
                raise _nothing_to_score(*request)
            if len(continuation) > self.max_length:
                raise UserError(
                    f"eval.tasks: a continuation of {len(continuation)} tokens cannot be scored "
                    f"in the model's context of {self.max_length}"
                )
            # The last token is only predicted, so it is no input. Too long a context is cut on the left, as in lm-eval.
            by_input[tuple((context + continuation)[-(self.max_length + 1) : -1])].append(index)
        answers: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        batches = _batches(sorted(by_input, key=len, reverse=True), self._batch_size)
        for batch in self._track(batches, "lm-eval: scoring", len(batches)):
            owners = [(row, index) for row, tokens in enumerate(batch) for index in by_input[tokens]]
            scored = self._score(batch, [(row, requests[index][2]) for row, index in owners])
            for (_row, index), answer in zip(owners, scored, strict=True):
                answers[index] = answer
        return answers

    def _score(self, inputs: Sequence[Sequence[int]], targets: list[tuple[int, list[int]]]) -> list[tuple[float, bool]]:
        """Log probability of each (row of `inputs`, continuation) in `targets`, and whether it is the greedy one."""
        ids, mask = self._padded(inputs, side="right")
        hidden = self._head.hidden(ids, mask)
        # A continuation of n tokens is predicted by the last n positions of its input.
        longest = [max(len(tokens) for row, tokens in targets if row == i) for i in range(len(inputs))]
        states = torch.cat(
            [hidden[i, len(x) - n : len(x)] for i, (x, n) in enumerate(zip(inputs, longest, strict=True))]
        )
        ends = torch.tensor(longest).cumsum(0).tolist()
        rows = torch.cat([torch.arange(ends[row] - len(tokens), ends[row]) for row, tokens in targets])
        words = torch.tensor([word for _, tokens in targets for word in tokens])
        logprobs, greedy = self._predictions(states, rows, words)
        lengths = [len(tokens) for _, tokens in targets]
        pairs = zip(logprobs.split(lengths), greedy.split(lengths), strict=True)
        return [(float(logprob.sum()), bool(best.all())) for logprob, best in pairs]

    def _predictions(
        self, states: Float[Tensor, "states width"], rows: Int[Tensor, "words"], words: Int[Tensor, "words"]
    ) -> tuple[Float[Tensor, "words"], Bool[Tensor, "words"]]:
        """Log probability of each word given the state of its row, and whether it is that state's most likely word."""
        logprobs, greedy = torch.empty(len(rows)), torch.empty(len(rows), dtype=torch.bool)
        for part in self._head.chunks(len(states)):
            log_p = self._head(states[part]).log_softmax(-1).cpu()
            here = (rows >= part.start) & (rows < part.stop)
            row = rows[here] - part.start
            logprobs[here] = log_p[row, words[here]]
            greedy[here] = log_p.argmax(-1)[row] == words[here]
        if not logprobs.isfinite().all():
            raise UserError("the model's logits are not finite (eval.tasks): try dtype=float32, or more bits")
        return logprobs, greedy

    def _generate(self, prompts: Sequence[list[int]], options: dict[str, Any]) -> list[str]:
        """Text generated after each prompt with lm-eval's generation options, cut off before the first stop string."""
        options = dict(normalize_gen_kwargs(options, DEFAULT_NEW_TOKENS))
        stops, new_tokens = [stop for stop in options.pop("until") if stop], options.pop("max_gen_toks")
        room = self.max_length - new_tokens
        if room < 1:
            raise UserError(f"eval.tasks: generating {new_tokens} tokens does not fit the context of {self.max_length}")
        if not options["do_sample"]:  # without sampling transformers warns about these
            options = {k: v for k, v in options.items() if k not in ("temperature", "top_p", "top_k")}
        ids, mask = self._padded([prompt[-room:] for prompt in prompts], side="left")
        decode = partial(self._decode, start=ids.shape[1])
        output = self._model.generate(  # type: ignore[operator]
            ids,
            attention_mask=mask,
            max_new_tokens=new_tokens,
            pad_token_id=self._pad_token_id,
            stopping_criteria=StoppingCriteriaList([_AnyStop(stops, decode)]),
            **options,
        )
        return [_until(text, stops) for text in decode(output)]

    def _decode(self, ids: Int[Tensor, "batch tokens"], start: int) -> list[str]:
        """Text of each row from position `start` on, without special tokens."""
        return self.tokenizer.batch_decode(ids[:, start:], skip_special_tokens=True)

    @property
    def _pad_token_id(self) -> int:
        """Token id that fills shorter rows: padding, else EOS, else 0; 0 where the model has no such token."""
        pad = self.tokenizer.pad_token_id or self.tokenizer.eos_token_id or 0
        return pad if pad < self._vocabulary else 0

    def _check_ids(self, encoded: Iterable[Sequence[int]]) -> None:
        """Raise UserError before any forward if a token has no row in the model's embedding."""
        largest = max((max(ids, default=0) for ids in encoded), default=0)
        if largest >= self._vocabulary:
            token = self.tokenizer.convert_ids_to_tokens(largest)
            raise UserError(
                f"eval.tasks: the token {token!r} ({largest}) is none of the model's {self._vocabulary}: its embedding "
                "was not resized to this tokenizer, or the tokenizer is another model's"
            )

    def _padded(
        self, rows: Sequence[Sequence[int]], side: str
    ) -> tuple[Int[Tensor, "batch tokens"], Int[Tensor, "batch tokens"]]:
        """Token ids and attention mask of rows padded on one side, on the model's device."""
        width = max(map(len, rows))
        ids = torch.full((len(rows), width), self._pad_token_id)
        mask = torch.zeros_like(ids)
        for i, row in enumerate(rows):
            span = slice(0, len(row)) if side == "right" else slice(width - len(row), width)
            ids[i, span], mask[i, span] = torch.tensor(row), 1
        return ids.to(self._device), mask.to(self._device)


def special_tokens_behind(tokenizer: Any) -> int:
    """Number of special tokens that a tokenizer puts behind a text, such as EOS."""
    for text in ("a", "A", "1", "."):  # a small vocabulary may lack some of them
        plain, whole = tokenizer.encode(text, add_special_tokens=False), tokenizer.encode(text, add_special_tokens=True)
        added = len(whole) - len(plain)
        if plain and added > 0:
            return next((added - i for i in range(added + 1) if whole[i : i + len(plain)] == plain), 0)
    return 0


def _nothing_to_score(context: str | None, continuation: str) -> UserError:
    """The error of a continuation without tokens."""
    after = f" after {textwrap.shorten(context, 60, placeholder=' …')!r}" if context else ""
    return UserError(
        f"eval.tasks: the continuation {continuation!r}{after} has no tokens, so there is nothing to score: "
        "leave that item out of the task"
    )


class _AnyStop(StoppingCriteria):
    """Stopping criterion that ends a row once its text contains one of the stop strings.

    transformers' own criterion first embeds the whole vocabulary, which not every tokenizer supports.
    """

    def __init__(self, stops: Sequence[str], decode: Callable[[Tensor], list[str]]) -> None:
        self._stops = stops
        self._decode = decode

    def __call__(self, input_ids: Int[Tensor, "batch tokens"], *_: Any, **__: Any) -> Bool[Tensor, "batch"]:
        done = [_until(text, self._stops) != text for text in self._decode(input_ids)]
        return torch.tensor(done, device=input_ids.device)


def _batches(items: Sequence[Any], size: int) -> list[Sequence[Any]]:
    """Consecutive batches of at most `size` items."""
    return [items[start : start + size] for start in range(0, len(items), size)]


def _until(text: str, stops: Iterable[str]) -> str:
    """The beginning of `text` before the first stop string in it."""
    for stop in stops:
        text = text.split(stop)[0]
    return text
