"""A causal LM as a list of blocks, and the exact arguments that each block is called with.

Nothing here knows an architecture. The blocks are the largest list of modules that hold linears; what they
are called with (positions, masks, per-layer attention kinds) is recorded from a real call of the model, with
every block replaced by a stub that passes the hidden states through.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

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

    Raises:
        UserError: the model has no such list.
    """

    def size(modules: nn.ModuleList) -> int:
        return sum(p.numel() for p in modules.parameters())

    lists = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.ModuleList)]
    lists = [(name, m) for name, m in lists if any(is_linear(x) for x in m.modules())]
    if not lists:
        raise UserError(f"model: found no list of transformer blocks in {type(model).__name__}")
    return max(lists, key=lambda item: size(item[1]))


@contextmanager
def hooks(handles: Iterable[Any]) -> Iterator[None]:
    """Within: the forward hooks that `handles` sets; afterwards they are gone."""
    held = list(handles)
    try:
        yield
    finally:
        for handle in held:
            handle.remove()


@contextmanager
def _stubbed(blocks: nn.ModuleList, outputs: list[Any], record: list[Any]) -> Iterator[None]:
    """Replace every block's forward by one that records its arguments and returns its hidden states.

    `outputs` are real outputs, whose structure (tensor or tuple) the stubs imitate.
    """

    def stub(index: int):
        def forward(*args, **kwargs):
            hidden = args[0] if args else kwargs.pop("hidden_states")
            record[index] = (hidden, Call(args[1:], kwargs))
            return (hidden, *outputs[index][1:]) if isinstance(outputs[index], tuple) else hidden

        return forward

    for i, block in enumerate(blocks):
        block.forward = stub(i)
    try:
        yield
    finally:
        for block in blocks:
            del block.forward


class BlockCalls:
    """Records, for a batch of tokens, the input of the first block and every block's other arguments."""

    def __init__(self, model: nn.Module, blocks: nn.ModuleList) -> None:
        self._model, self._blocks = model, blocks
        self._outputs: list[Any] = [None] * len(blocks)
        self._device = next(model.parameters()).device
        self._see_outputs()

    def _see_outputs(self) -> None:
        """One real forward of two tokens shows what each block returns."""

        def keep(index: int):
            def hook(_module, _args, output):
                self._outputs[index] = output

            return hook

        handles = (block.register_forward_hook(keep(i)) for i, block in enumerate(self._blocks))
        with hooks(handles), torch.no_grad():
            self._model(torch.zeros(1, 2, dtype=torch.long, device=self._device), use_cache=False)

    @torch.no_grad()
    def record(
        self, ids: Int[Tensor, "batch tokens"], mask: Bool[Tensor, "batch tokens"] | None = None
    ) -> tuple[Float[Tensor, "batch tokens width"], list[Call]]:
        """Hidden states that enter the first block, and one `Call` per block."""
        seen: list[Any] = [None] * len(self._blocks)
        attention = None if mask is None else mask.to(self._device, torch.long)
        # The head's logits are not wanted: one position is the least that models can be asked for.
        with _stubbed(self._blocks, self._outputs, seen):
            self._model(ids.to(self._device), attention_mask=attention, use_cache=False, logits_to_keep=1)
        return seen[0][0], [call for _, call in seen]
