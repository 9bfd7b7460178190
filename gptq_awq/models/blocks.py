"""A causal LM as a list of blocks, and the exact arguments that each block is called with.

Nothing here knows an architecture. The blocks are the `nn.ModuleList` with linears that holds most parameters; their
arguments (positions, masks, per-layer attention kinds) are recorded from a real call of the model, with every block
replaced by a stub that passes the hidden states through.
"""

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from gptq_awq.errors import UserError
from gptq_awq.models.linear import is_linear

PROBE_TOKENS = 16
"""Length of the short forwards by which a model's structure is observed."""
TEXT = ("input_ids", "inputs_embeds", "decoder_input_ids")
"""Name of the main input of a model of text."""


@dataclass(frozen=True)
class Call:
    """Arguments of one call of a block, all but the hidden states.

    Attributes:
        args: positional arguments after the hidden states.
        kwargs: keyword arguments.
        keyword: name of the argument that the hidden states are passed by; None: they are the first positional one.
    """

    args: tuple = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    keyword: str | None = None

    def run(self, block: nn.Module, hidden: Float[Tensor, "batch tokens width"]) -> Tensor:
        """Call `block` on `hidden` with these arguments, cast to `hidden`'s dtype; return its output hidden states."""
        return hidden_of(self.whole(block, hidden))

    def whole(self, block: nn.Module, hidden: Float[Tensor, "batch tokens width"]) -> Any:
        """Call `block` as `run` does; return all that it returns."""
        dtype = hidden.dtype
        args = tuple(_cast(a, dtype) for a in self.args)
        kwargs = {k: _cast(v, dtype) for k, v in self.kwargs.items()}
        if self.keyword is None:
            return block(hidden, *args, **kwargs)
        return block(*args, **kwargs, **{self.keyword: hidden})


def call_of_windows(chosen: Sequence[tuple[Call, int, int]]) -> Call:
    """One call for windows of several batches.

    Tensors with a row for each window, such as masks and embeddings of a layer's own, are put together from the rows of
    these windows. All else is the first batch's.

    Args:
        chosen: for each window its batch's call, its row in that batch, and the batch's size.
    """

    def rows(values: Sequence[Any]) -> Any:
        first = values[0]
        if isinstance(first, tuple):
            return tuple(rows(each) for each in zip(*values, strict=True))
        if isinstance(first, dict):
            return {key: rows([value[key] for value in values]) for key in first}
        pairs = list(zip(values, chosen, strict=True))
        if isinstance(first, Tensor) and first.dim() > 1 and all(len(x) == size for x, (_, _, size) in pairs):
            return torch.stack([x[row] for x, (_, row, _) in pairs])
        return first

    calls = [call for call, _, _ in chosen]
    return Call(rows([c.args for c in calls]), rows([c.kwargs for c in calls]), calls[0].keyword)


def take(args: tuple, kwargs: Mapping[str, Any]) -> tuple[Tensor, Call]:
    """Split a block's arguments into its hidden states and the others.

    Hidden states are the argument of that name, else the first one, else the first tensor of numbers.
    """
    others = dict(kwargs)
    if "hidden_states" in others:
        hidden = others.pop("hidden_states")
        return hidden, Call(args, others, "hidden_states")
    if args:
        return args[0], Call(args[1:], others)
    name = next(n for n, x in others.items() if isinstance(x, Tensor) and x.is_floating_point())
    return others.pop(name), Call((), others, name)


def hidden_of(output: Any) -> Tensor:
    """The hidden states in what a block returns: by themselves, under that name, or first of several."""
    if isinstance(output, Tensor):
        return output
    named = getattr(output, "hidden_states", None)
    return output[0] if named is None else named


def update_error(
    found: Float[Tensor, "batch tokens width"],
    expected: Float[Tensor, "batch tokens width"],
    hidden: Float[Tensor, "batch tokens width"],
) -> float:
    """Largest relative error among the tokens of what a block adds to their hidden states `hidden`.

    In the norm of the whole output, the residual of one token with a massive activation hides the errors of all others.
    The rounding of outputs in their dtype is no error; NaN where any value is.
    """
    rounding = 4 * torch.finfo(expected.dtype).eps
    found, expected, hidden = found.float(), expected.float(), hidden.float()
    error = (found - expected).norm(dim=-1) - rounding * expected.norm(dim=-1)
    return float((error.clamp(min=0) / (expected - hidden).norm(dim=-1).clamp(min=1e-30)).max())


def _cast(value: Any, dtype: torch.dtype) -> Any:
    """Convert floating tensors (rotary tables, additive masks) to `dtype`, also inside of tuples; keep other values."""
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.to(dtype)
    return tuple(_cast(v, dtype) for v in value) if isinstance(value, tuple) else value


def find_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Name and list of the model's transformer blocks: the ModuleList with linears that holds most parameters.

    In a multimodal model only the language model is searched: a vision tower may be the larger one.

    Raises:
        UserError: the model has no such list.
    """

    def size(modules: nn.ModuleList) -> int:
        return sum(p.numel() for p in modules.parameters())

    within = {id(m) for m in language_modules(model)}
    lists = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.ModuleList) and id(m) in within]
    lists = [(name, m) for name, m in lists if any(is_linear(x) for x in m.modules())]
    if not lists:
        raise UserError(f"model: found no list of transformer blocks in {type(model).__name__}")
    return max(lists, key=lambda item: size(item[1]))


def text_config(model: nn.Module) -> Any:
    """The config of a model's language model; None for a model without a config."""
    config: Any = getattr(model, "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def heads_of(model: nn.Module) -> int | None:
    """Number of attention heads in a model's blocks; None where its config doesn't say."""
    return getattr(text_config(model), "num_attention_heads", None)


def head_size(config: Any) -> int:
    """Number of channels of one attention head, from a language model's config."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def key_value_heads(config: Any) -> int:
    """Number of key and value heads: fewer than query heads in grouped-query attention."""
    return getattr(config, "num_key_value_heads", None) or getattr(config, "num_attention_heads", None) or 1


def language_modules(model: nn.Module) -> list[nn.Module]:
    """The modules of the decoder, which turns tokens into hidden states, without towers that see or hear.

    What a model names its decoder is believed where it holds a list of modules; else all of the model is looked at.
    """
    decoder = model.get_decoder() if isinstance(model, PreTrainedModel) else None
    if decoder is None or not any(isinstance(m, nn.ModuleList) for m in decoder.modules()):
        decoder = model
    others = [m for m in decoder.modules() if isinstance(m, PreTrainedModel) and m.main_input_name not in TEXT]
    towers = {id(part) for tower in others if tower is not decoder for part in tower.modules()}
    return [m for m in decoder.modules() if id(m) not in towers]


def in_dtype(block: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The block in `dtype`: itself where its parameters have it, else a copy."""
    return block if next(block.parameters()).dtype == dtype else copy.deepcopy(block).to(dtype)


@contextmanager
def hooks(handles: Iterable[Any]) -> Iterator[None]:
    """Context manager that removes the given hooks on exit."""
    held = list(handles)
    try:
        yield
    finally:
        for handle in held:
            handle.remove()


class Stub(nn.Module):
    """Replacement of a block while the model runs: calls go to `answer`, attributes are the block's."""

    def __init__(self, block: nn.Module, answer: Callable[..., Any]) -> None:
        super().__init__()
        self._stands_for = (block,)  # in a tuple, or it would be a child
        self._answer = answer

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return `answer` of the arguments."""
        return self._answer(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self._stands_for[0], name)


class _AllSeenError(Exception):
    """Signal that ends a forward once every block was called."""


class BlockCalls:
    """A model run with stubs for its blocks, to record the blocks' inputs and to finish a forward from their output.

    Args:
        model: a causal language model, or its decoder.
        blocks: the model's transformer blocks.
    """

    def __init__(self, model: nn.Module, blocks: nn.ModuleList) -> None:
        self._model, self._blocks = model, blocks
        self._there = tuple(blocks)
        self._device = next(model.parameters()).device
        self._outputs: dict[type, Any] = {}  # class of block → an example of its output
        self._see_outputs()

    @torch.no_grad()
    def record(
        self, ids: Int[Tensor, "batch tokens"], mask: Bool[Tensor, "batch tokens"] | None = None
    ) -> tuple[Float[Tensor, "batch tokens width"], list[Call]]:
        """Run the model up to its last block; return the first block's input and each block's other arguments.

        Raises:
            UserError: the model does not call all of its blocks.
        """
        entered: list[Tensor] = []
        calls: dict[int, Call] = {}

        def answer(index: int, *args: Any, **kwargs: Any) -> Any:
            hidden, calls[index] = take(args, kwargs)
            entered.append(hidden)
            if len(calls) == len(self._there):
                raise _AllSeenError
            return self._like(index, hidden)

        with self._answering(answer), suppress(_AllSeenError):
            self._run(ids, mask)
        if len(calls) < len(self._there):
            raise UserError(f"model: calls {len(calls)} of its {len(self._there)} blocks; all of them are needed")
        return entered[0], [calls[index] for index in range(len(self._there))]

    @torch.no_grad()
    def finish(self, ids: Int[Tensor, "batch tokens"], hidden: Float[Tensor, "batch tokens width"]) -> Any:
        """Return the model's output for the tokens `ids` when its last block returns `hidden`."""

        def answer(index: int, *args: Any, **kwargs: Any) -> Any:
            last = index == len(self._there) - 1
            return self._like(index, hidden if last else take(args, kwargs)[0])

        with self._answering(answer):
            return self._run(ids)

    @contextmanager
    def skipped(self) -> Iterator[None]:
        """Context manager under which every block returns the hidden states it is given."""

        def answer(index: int, *args: Any, **kwargs: Any) -> Any:
            return self._like(index, take(args, kwargs)[0])

        with self._answering(answer):
            yield

    @torch.no_grad()
    def _see_outputs(self) -> None:
        """Observe the output format of each class of block in one forward of two tokens.

        The forward ends there: later modules, such as the head, may be large, and offloaded.
        """
        classes = {type(block) for block in self._there}

        def answer(index: int, *args: Any, **kwargs: Any) -> Any:
            block = self._there[index]
            if type(block) in self._outputs:
                return self._like(index, take(args, kwargs)[0])
            output = self._outputs.setdefault(type(block), block(*args, **kwargs))
            if len(self._outputs) == len(classes):
                raise _AllSeenError
            return output

        with self._answering(answer), suppress(_AllSeenError):
            self._run(torch.zeros(1, 2, dtype=torch.long))

    def _like(self, index: int, hidden: Tensor) -> Any:
        """Put `hidden` into the output format of block `index`: by itself, or first in a tuple."""
        output = self._outputs[type(self._there[index])]
        if isinstance(output, list):
            return [hidden, *output[1:]]
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    def _run(self, ids: Tensor, mask: Tensor | None = None) -> Any:
        """Run the model on the device of its first parameter, without a key-value cache."""
        attention = None if mask is None else mask.to(self._device, torch.long)
        return self._model(input_ids=ids.to(self._device), attention_mask=attention, use_cache=False)

    @contextmanager
    def _answering(self, answer: Callable[..., Any]) -> Iterator[None]:
        """Context manager under which `answer(i, …)` is called in place of block i and its hooks."""
        try:
            for i, block in enumerate(self._there):
                self._blocks[i] = Stub(block, partial(answer, i))
            yield
        finally:
            for i, block in enumerate(self._there):
                self._blocks[i] = block
