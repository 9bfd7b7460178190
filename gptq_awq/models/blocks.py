"""A causal LM as a list of blocks, and the exact arguments that each block is called with.

Nothing here knows an architecture. The blocks are the largest list of modules that hold linears; what they
are called with (positions, masks, per-layer attention kinds) is recorded from a real call of the model, with
every block replaced by a stub that passes the hidden states through.
"""

from collections.abc import Callable, Iterable, Iterator
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


@dataclass(frozen=True)
class Call:
    """One call of a block: all arguments but the hidden states."""

    args: tuple = ()
    kwargs: dict[str, Any] = field(default_factory=dict)

    def run(self, block: nn.Module, hidden: Float[Tensor, "batch tokens width"]) -> Tensor:
        """The block's output hidden states."""
        dtype = hidden.dtype
        args = tuple(_cast(a, dtype) for a in self.args)
        kwargs = {k: _cast(v, dtype) for k, v in self.kwargs.items()}
        out = block(hidden, *args, **kwargs)
        return out[0] if isinstance(out, tuple) else out


def _cast(value: Any, dtype: torch.dtype) -> Any:
    """Floating tensors (rotary tables, additive masks) in the precision the block computes in."""
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.to(dtype)
    return tuple(_cast(v, dtype) for v in value) if isinstance(value, tuple) else value


def find_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The name and list of the model's blocks: the ModuleList with linears that holds most parameters.

    Of a model that also sees or hears, only its language model is looked at: a vision tower may be the larger one.

    Raises:
        UserError: the model has no such list.
    """

    def size(modules: nn.ModuleList) -> int:
        return sum(p.numel() for p in modules.parameters())

    decoder = language_model(model)
    within = {id(m) for m in decoder.modules()}
    lists = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.ModuleList) and id(m) in within]
    lists = [(name, m) for name, m in lists if any(is_linear(x) for x in m.modules())]
    if not lists:
        raise UserError(f"model: found no list of transformer blocks in {type(model).__name__}")
    return max(lists, key=lambda item: size(item[1]))


def text_config(model: nn.Module) -> Any:
    """The config of a model's language model; None where it has none."""
    config: Any = getattr(model, "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def heads_of(model: nn.Module) -> int | None:
    """Attention heads of a model's blocks, where it says."""
    return getattr(text_config(model), "num_attention_heads", None)


def head_size(config: Any) -> int:
    """Channels of one head, by a language model's config."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def key_value_heads(config: Any) -> int:
    """Heads that keys and values have: fewer than queries where several share them."""
    return getattr(config, "num_key_value_heads", None) or getattr(config, "num_attention_heads", None) or 1


def language_model(model: nn.Module) -> nn.Module:
    """The part of a model that turns tokens into hidden states; the model itself where it doesn't say."""
    decoder = model.get_decoder() if isinstance(model, PreTrainedModel) else None
    return model if decoder is None else decoder


@contextmanager
def hooks(handles: Iterable[Any]) -> Iterator[None]:
    """Within: the forward hooks that `handles` sets; afterwards they are gone."""
    held = list(handles)
    try:
        yield
    finally:
        for handle in held:
            handle.remove()


class _Stub(nn.Module):
    """Stands in a block's place while the model runs, and answers all else that it is asked as the block would."""

    def __init__(self, block: nn.Module, answer: Callable[..., Any]) -> None:
        super().__init__()
        self._stands_for = (block,)  # in a tuple, or it would be a child
        self._answer = answer

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As it was told."""
        return self._answer(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self._stands_for[0], name)


class _AllSeenError(Exception):
    """Ends a forward once every block was called."""


class BlockCalls:
    """A model run without its blocks: what enters the first, what each is called with, what becomes of the last's.

    Args:
        model: a causal language model, or its decoder.
        blocks: its blocks.
    """

    def __init__(self, model: nn.Module, blocks: nn.ModuleList) -> None:
        self._model, self._blocks = model, blocks
        self._there = tuple(blocks)
        self._device = next(model.parameters()).device
        self._outputs: dict[type, Any] = {}  # by class: what a block returns
        self._see_outputs()

    @torch.no_grad()
    def record(
        self, ids: Int[Tensor, "batch tokens"], mask: Bool[Tensor, "batch tokens"] | None = None
    ) -> tuple[Float[Tensor, "batch tokens width"], list[Call]]:
        """Hidden states that enter the first block, and one `Call` per block.

        Raises:
            UserError: the model does not call all of its blocks.
        """
        entered: list[Tensor] = []
        calls: dict[int, Call] = {}

        def answer(index: int, *args: Any, **kwargs: Any) -> Any:
            hidden = args[0] if args else kwargs.pop("hidden_states")
            entered.append(hidden)
            calls[index] = Call(args[1:], kwargs)
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
        """What the model returns for these tokens, if `hidden` is what its last block makes of them."""

        def answer(index: int, *args: Any, **kwargs: Any) -> Any:
            last = index == len(self._there) - 1
            return self._like(index, hidden if last else args[0] if args else kwargs["hidden_states"])

        with self._answering(answer):
            return self._run(ids)

    @contextmanager
    def skipped(self) -> Iterator[None]:
        """Within: blocks return what they are given, and the model runs without them."""

        def answer(index: int, *args: Any, **kwargs: Any) -> Any:
            return self._like(index, args[0] if args else kwargs["hidden_states"])

        with self._answering(answer):
            yield

    @torch.no_grad()
    def _see_outputs(self) -> None:
        """One forward of two tokens, through the first block of each class, shows what blocks return.

        It ends there: what follows, such as the head, may be large, and away.
        """
        classes = {type(block) for block in self._there}

        def answer(index: int, *args: Any, **kwargs: Any) -> Any:
            block = self._there[index]
            if type(block) in self._outputs:
                return self._like(index, args[0] if args else kwargs["hidden_states"])
            output = self._outputs.setdefault(type(block), block(*args, **kwargs))
            if len(self._outputs) == len(classes):
                raise _AllSeenError
            return output

        with self._answering(answer), suppress(_AllSeenError):
            self._run(torch.zeros(1, 2, dtype=torch.long))

    def _like(self, index: int, hidden: Tensor) -> Any:
        """`hidden` as the block would return it: alone, or before other things."""
        output = self._outputs[type(self._there[index])]
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    def _run(self, ids: Tensor, mask: Tensor | None = None) -> Any:
        attention = None if mask is None else mask.to(self._device, torch.long)
        return self._model(input_ids=ids.to(self._device), attention_mask=attention, use_cache=False)

    @contextmanager
    def _answering(self, answer: Callable[..., Any]) -> Iterator[None]:
        """Within: in place of block i, `answer(i, …)` is called; neither the block nor any of its hooks is."""
        try:
            for i, block in enumerate(self._there):
                self._blocks[i] = _Stub(block, partial(answer, i))
            yield
        finally:
            for i, block in enumerate(self._there):
                self._blocks[i] = block
