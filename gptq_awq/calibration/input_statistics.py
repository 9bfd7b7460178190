"""Mean squares and largest magnitudes of what enters each linear of the full-precision model, in one forward.

The mean squares are the diagonal of H: all that llama.cpp's importance matrices hold. The largest magnitude fixes
static scales of activations. They are of full precision, whatever a method calibrates on.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from gptq_awq.data.tokens import TokenSet
from gptq_awq.models.blocks import find_blocks, hooks
from gptq_awq.models.linear import is_linear
from gptq_awq.runtime.progress import Track, no_track
from gptq_awq.storage.checksummed import ChecksummedFile


@dataclass(frozen=True)
class InputStatistics:
    """Statistics of the input of one linear.

    Attributes:
        squares: mean x², (in,) float32; zero where no token came.
        tokens: number of tokens that came.
        largest: largest |x|.
    """

    squares: Float[Tensor, "in"]
    tokens: int
    largest: float


@torch.no_grad()
def input_statistics(model: Any, tokens: TokenSet, track: Track = no_track) -> dict[str, InputStatistics]:
    """Statistics of the inputs of every linear in the model's blocks, and of its output head, by full name.

    Padding is left out, except of what enters routed experts, whose tokens have no place in their window any more.
    """
    prefix, blocks = find_blocks(model)
    linears = {f"{prefix}.{name}": module for name, module in blocks.named_modules() if is_linear(module)}
    names = {id(module): name for name, module in model.named_modules()}
    head = model.get_output_embeddings()
    if head is not None:
        linears[names[id(head)]] = head
    sums = {name: _Sum(module) for name, module in linears.items()}
    with hooks([module.register_forward_pre_hook(sums[name].hook) for name, module in linears.items()]):
        for row in track(range(len(tokens.ids)), "inputs of linears", len(tokens.ids)):
            mask = None if tokens.mask is None else tokens.mask[row : row + 1]
            for each in sums.values():
                each.mask = mask
            device = model.get_input_embeddings().weight.device
            options = {} if mask is None else {"attention_mask": mask.to(device)}
            model(tokens.ids[row : row + 1].to(device), use_cache=False, **options)
    return {name: each.finish() for name, each in sums.items()}


class _Sum:
    """Sums of one linear's inputs."""

    def __init__(self, linear: nn.Module) -> None:
        self._device = linear.get_parameter("weight").device
        self._squares: Tensor | None = None
        self._tokens, self._largest = 0, 0.0
        self.mask: Bool[Tensor, "1 tokens"] | None = None

    def hook(self, _module: nn.Module, args: tuple[Tensor, ...]) -> None:
        """Add one call's input."""
        x = args[0].float()
        if self.mask is not None and x.shape[:-1] == self.mask.shape:
            x = x[self.mask.to(x.device)]
        x = x.reshape(-1, x.shape[-1])
        if not len(x):
            return
        squares = x.square().sum(0, dtype=torch.float64)
        self._squares = squares if self._squares is None else self._squares + squares
        self._tokens += len(x)
        self._largest = max(self._largest, float(x.abs().max()))

    def finish(self) -> InputStatistics:
        """Means of all calls; empty where there was none."""
        squares = torch.empty(0) if self._squares is None else (self._squares / self._tokens).float().cpu()
        return InputStatistics(squares, self._tokens, self._largest)


def as_file(statistics: Mapping[str, InputStatistics]) -> ChecksummedFile:
    """Statistics as the cache keeps them."""
    facts = {name: [each.tokens, each.largest] for name, each in statistics.items()}
    return ChecksummedFile({name: each.squares for name, each in statistics.items()}, {"inputs": facts})


def from_file(content: ChecksummedFile) -> Iterator[tuple[str, InputStatistics]]:
    """Names and statistics in a file that `as_file` made."""
    for name, (tokens, largest) in content.facts["inputs"].items():
        yield name, InputStatistics(content.tensors[name], tokens, largest)
