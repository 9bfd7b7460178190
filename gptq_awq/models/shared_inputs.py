"""Which linears of the blocks read one input tensor, seen in one forward of two tokens.

Engines fuse such linears (q, k and v; gate and up) into one matrix. What a format stores once per matrix, such as
NVFP4's scale of a tensor, has to be the same for all of them.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gptq_awq.models.blocks import find_blocks, hooks
from gptq_awq.models.linear import is_linear

PROBE_TOKENS = 2


@torch.no_grad()
def linears_by_input(model: Any) -> list[tuple[str, ...]]:
    """Full names of the blocks' linears, those that read one tensor together; experts that no token reaches: none."""
    prefix, blocks = find_blocks(model)
    readers: dict[tuple[int, int], list[str]] = {}
    alive: list[Tensor] = []  # so that no later tensor gets the id of an earlier one

    def seen(name: str, x: Tensor) -> None:
        alive.append(x)
        readers.setdefault((id(x), x._version), []).append(name)

    def hook(name: str) -> Any:
        return lambda _module, args: seen(f"{prefix}.{name}", args[0])

    linears: Sequence[tuple[str, nn.Module]] = [(n, m) for n, m in blocks.named_modules() if is_linear(m)]
    device = model.get_input_embeddings().weight.device
    with hooks([module.register_forward_pre_hook(hook(name)) for name, module in linears]):
        model(torch.zeros(1, PROBE_TOKENS, dtype=torch.long, device=device), use_cache=False)
    return [tuple(names) for names in readers.values()]
