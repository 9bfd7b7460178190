"""Gradients of the model's own loss by the outputs of its linears, summed up over the calibration tokens.

The loss at a token is -log p(y), y drawn from the model's distribution p. So the second moments of the gradients are
those of the Fisher information: to second order, they give the KL from the full-precision model that a small error of
an output causes.
"""

import copy
from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from gptq_awq.data.tokens import TokenSet
from gptq_awq.models.attention import differentiable_attention
from gptq_awq.models.blocks import find_blocks, hooks
from gptq_awq.models.linear import is_linear
from gptq_awq.numerics.sampling import sampled
from gptq_awq.runtime.progress import Track, no_track

Statistic = Callable[[Float[Tensor, "tokens out"]], Tensor]
"""A sum over tokens, in float32, of a function of the gradients in a linear's output."""


def mean_over_tokens(
    model: PreTrainedModel,
    tokens: TokenSet,
    statistic: Statistic,
    seed: int = 0,
    draws: int = 1,
    track: Track = no_track,
    dtype: torch.dtype | None = None,
) -> dict[str, Tensor]:
    """Mean over real tokens of a statistic of the output gradients, for every linear in the model's blocks.

    Linears that no token reaches (of experts) are left out.

    Args:
        model: a causal LM; its parameters get no gradients.
        tokens: calibration windows.
        statistic: sums a function of the gradients, (tokens, out) in `dtype`, over tokens.
        seed: seed of the labels y.
        draws: labels drawn per token, a backward pass each.
        track: reports progress over windows.
        dtype: dtype that the forward and the backward pass compute in; None: the model's.
    """
    if dtype not in (None, model.dtype):
        model = copy.deepcopy(model).to(dtype)  # pyright: ignore[reportArgumentType]
    prefix, blocks = find_blocks(model)
    names = [f"{prefix}.{name}" for name, module in blocks.named_modules() if is_linear(module)]
    sums: dict[str, Tensor] = {}
    draw = torch.Generator().manual_seed(seed)
    observed = [model.get_submodule(name).register_forward_hook(_summing(sums, name, statistic)) for name in names]
    entering: list[Tensor] = []  # the only leaves that gradients are computed for

    def begin(_module: nn.Module, _args: tuple, output: Tensor) -> Tensor:
        entering[:] = [output.detach().requires_grad_()]
        return entering[0].clone()  # models may write into it

    count = 0
    with hooks([*observed, model.get_input_embeddings().register_forward_hook(begin)]):
        for index, window in enumerate(track(tokens.ids.long(), "gradients", len(tokens.ids))):
            real = window if tokens.mask is None else window[tokens.mask[index]]
            _backward(model, real[None].to(model.device), draw, draws, entering)
            count += draws * len(real)
    return {name: sums[name] / count for name in names if name in sums}


def _backward(
    model: PreTrainedModel, ids: Int[Tensor, "1 tokens"], draw: torch.Generator, draws: int, entering: list[Tensor]
) -> None:
    with torch.enable_grad(), differentiable_attention(model.dtype):
        logits = model(input_ids=ids, use_cache=False).logits[0].float()
        for left in reversed(range(draws)):
            drawn = sampled(logits.detach(), draw)[:, 0]
            loss = torch.nn.functional.cross_entropy(logits, drawn, reduction="sum")
            loss.backward(inputs=entering, retain_graph=left > 0)


def _summing(sums: dict[str, Tensor], name: str, statistic: Statistic):
    """Build a forward hook that adds the statistic of a linear's output gradients to its sum."""

    def add(gradient: Tensor) -> None:
        summand = statistic(gradient.flatten(0, -2))
        if name in sums:
            sums[name] += summand
        else:
            sums[name] = summand

    def hook(_module: nn.Module, _args: tuple, output: Tensor) -> None:
        output.register_hook(add)

    return hook
