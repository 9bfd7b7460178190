"""A forward of the whole model that pauses at each of its blocks, for the caller to run the block in its place.

What the model computes between two blocks stays the model's own: scalings, several hidden states per token, keys and
values or choices of tokens that one block leaves for another, blocks that are called twice or not at all. Each forward
is a greenlet, so as many may be under way as there are batches, each of them at the same block.
"""

from collections.abc import Callable
from typing import Any

import torch
from greenlet import GreenletExit, getcurrent, greenlet
from jaxtyping import Bool, Int
from torch import Tensor, nn

from gptq_awq.models.blocks import Call, Stub, in_dtype, take


class Walk:
    """One forward of a model, at one of its blocks.

    Args:
        model: a causal language model, or its decoder.
        blocks: its transformer blocks.
        ids: token ids.
        mask: True at real tokens; None when all are.

    Attributes:
        index: number of the block that the forward waits at; None once it has ended.
        hidden: what the block is called with first: its hidden states.
        call: the block's other arguments.
        output: the model's output, once the forward has ended.
    """

    def __init__(
        self,
        model: nn.Module,
        blocks: nn.ModuleList,
        ids: Int[Tensor, "batch tokens"],
        mask: Bool[Tensor, "batch tokens"] | None = None,
    ) -> None:
        self.index: int | None = None
        self.hidden: Tensor = ids
        self.call = Call()
        self.output: Any = None
        self._blocks, self._there = blocks, tuple(blocks)
        self._given = model, blocks, ids, mask
        self._stubs = [Stub(block, self._pausing(i)) for i, block in enumerate(blocks)]
        self._forward = greenlet(lambda: self._run(model, ids, mask))
        self._go_on(None)

    def go_to(self, index: int, dtype: torch.dtype, output: Any = None) -> bool:
        """Go on to block `index`; false where the model goes past it.

        Args:
            index: number of a block.
            dtype: dtype that blocks compute in.
            output: what the block that the forward waits at returns; None, and every further block on the way, such as
                one that an earlier run finished: it is run as it is now.
        """
        while self.index is not None and self.index < index:
            if output is None:
                block = self._there[self.index]
                output = self.call.whole(in_dtype(block, dtype), self.hidden.to(dtype))
            self.leave(output)
            output = None
        return self.index == index

    def later_calls(self, index: int, dtype: torch.dtype) -> list[tuple[Tensor, Call]]:
        """Hidden states and arguments of all calls of block `index` but the first, in the model as it is."""
        walk, found = Walk(*self._given), []
        while walk.index is not None:
            if walk.index == index:
                found.append((walk.hidden.to(dtype), walk.call))
            walk.leave(walk.call.whole(in_dtype(self._there[walk.index], dtype), walk.hidden.to(dtype)))
        return found[1:]

    def leave(self, output: Any) -> None:
        """Let the block that the forward waits at return `output`, and go on to the next block or to the end."""
        self._go_on(output)

    def _run(self, model: nn.Module, ids: Tensor, mask: Tensor | None) -> None:
        device = next(model.parameters()).device
        attention = None if mask is None else mask.to(device, torch.long)
        self.output = model(input_ids=ids.to(device), attention_mask=attention, use_cache=False)
        self.index, self.call = None, Call()

    def _pausing(self, index: int) -> Callable[..., Any]:
        def answer(*args: Any, **kwargs: Any) -> Any:
            self.index = index
            self.hidden, self.call = take(args, kwargs)
            dtype = self.hidden.dtype
            caller = getcurrent().parent
            assert caller is not None
            return cast(caller.switch(), dtype)

        return answer

    @torch.no_grad()
    def _go_on(self, output: Any) -> None:
        """Switch to the forward, with stubs in place of the blocks for as long as it runs."""
        self._forward.parent = getcurrent()
        try:
            for i, stub in enumerate(self._stubs):
                self._blocks[i] = stub
            self._forward.switch(output) if self._forward else self._forward.switch()
        finally:
            for i, block in enumerate(self._there):
                self._blocks[i] = block

    def __del__(self) -> None:
        if self._forward and not self._forward.dead:
            with torch.no_grad():  # contexts that the forward leaves now change this mode
                self._forward.throw(GreenletExit)


def cast(value: Any, dtype: torch.dtype) -> Any:
    """Convert the floating tensors of a block's output to `dtype`, inside of tuples and lists too."""
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, tuple) and not hasattr(value, "_fields"):
        return tuple(cast(each, dtype) for each in value)
    return [cast(each, dtype) for each in value] if isinstance(value, list) else value
