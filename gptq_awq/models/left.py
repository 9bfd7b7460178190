"""Linears that stay in full precision, found in one forward and one backward pass of a few tokens.

What only chooses    no gradient passes from the loss to its output: it picks tokens (the indexers of sparse attention).
Coefficients         fewer than `CHANNELS` inputs or outputs: gates and mixing coefficients, no channels.
What isn't passed    text passes it by (cross-attention of a decoder without its encoder), or the model multiplies by
                     its weight without calling it (Mamba's dt_proj), so that nothing calibrates it. Experts that those
                     few tokens miss are no such linears. A method without calibration rounds them.

Routers are found beside their experts (`models.unfuse`).
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from gptq_awq.models.blocks import PROBE_TOKENS, find_blocks, hooks
from gptq_awq.models.expert_sites import Seen, completed
from gptq_awq.models.linear import CHOOSES, COEFFICIENTS, NOT_PASSED, SHARED, Site, is_linear, matrix
from gptq_awq.models.offload import offloaded
from gptq_awq.models.steady import state_of

CHANNELS = 16
LONGER = 256
"""Tokens of a second forward, for linears that seem to do nothing in a short one."""
MARKED = "_marked_left"
"""Attribute of a model that says for which state of it the marks were made."""
MARKS = (CHOOSES, COEFFICIENTS, NOT_PASSED, SHARED)


def mark_left(model: nn.Module, calibrates: bool) -> None:
    """Mark the linears in a model's blocks that stay as they are (`left`), in place; `is_linear` is false for them.

    Earlier marks are taken away; where the model is as they left it, they stay. Of an offloaded model only coefficients
    and shared weights are found, as a forward would read it from disk.

    Args:
        model: a causal LM, its experts as linears.
        calibrates: whether the method calibrates, and so leaves what no token passes.
    """
    if vars(model).get(MARKED) != (calibrates, state_of(model)):
        _mark_left(model, calibrates)
        vars(model)[MARKED] = calibrates, state_of(model)


def _mark_left(model: nn.Module, calibrates: bool) -> None:
    """Mark the linears that stay as they are, whatever was marked before."""
    _, blocks = find_blocks(model)
    for module in blocks.modules():
        if getattr(module, "left", None) in MARKS:
            del module.left
    _mark(SHARED, _second_users(blocks))
    _mark(COEFFICIENTS, (m for m in blocks.modules() if is_linear(m) and min(matrix(m).shape) < CHANNELS))
    if offloaded(model):
        return
    outputs, idle = _passed(model, blocks, PROBE_TOKENS)
    if idle:  # what works on longer texts only, such as summaries of 128 tokens, is no choice
        idle &= _passed(model, blocks, LONGER)[1]
    if 2 * len(idle) < len({key for within in outputs for key in within}):  # else the model's forward keeps no graph
        _mark(CHOOSES, (m for m in blocks.modules() if id(m) in idle))
    if calibrates:
        owned: set[int] = set()  # of what blocks share, the first one that has it solves it
        for block, counts in zip(blocks, outputs, strict=True):
            missed = [m for m in _not_passed(block, counts) if id(m) not in owned]
            owned |= {id(m) for m in block.modules()}
            _mark(NOT_PASSED, missed)


def _mark(why: str, modules: Sequence[nn.Module] | Iterator[nn.Module]) -> None:
    for module in list(modules):
        module.left = why  # pyright: ignore[reportArgumentType]


def _second_users(blocks: nn.ModuleList) -> Iterator[nn.Module]:
    """Linears whose weight another linear before them has, which is rounded once."""
    first: dict[int, nn.Module] = {}
    for module in blocks.modules():
        if is_linear(module) and first.setdefault(id(module.weight), module) is not module:
            yield module


def _passed(model: nn.Module, blocks: nn.ModuleList, tokens: int) -> tuple[list[dict[int, int]], set[int]]:
    """For each block the number of tokens that each linear is called with, by its id, in order; ids of idle linears.

    An idle linear is called, and no logit depends on its output.
    """
    counts: list[dict[int, int]] = [{} for _ in blocks]
    within: list[dict[int, int]] = [{}]
    outputs: dict[int, list[Tensor]] = {}
    entering: list[Tensor] = []

    def begin(_module: nn.Module, _args: tuple, output: Tensor) -> Tensor:
        entering[:] = [output.detach().requires_grad_()]
        return entering[0].clone()

    def count(module: nn.Module, args: tuple, output: Tensor) -> None:
        within[0][id(module)] = args[0].shape[:-1].numel()
        if output.requires_grad:
            outputs.setdefault(id(module), []).append(output)

    embedding = model.get_input_embeddings()  # pyright: ignore[reportCallIssue]
    vocabulary = embedding.weight.shape[0]
    ids = (torch.arange(1, tokens + 1, device=next(model.parameters()).device) % vocabulary)[None]
    watched = [m.register_forward_hook(count) for m in blocks.modules() if is_linear(m)]
    watched += [
        block.register_forward_pre_hook(lambda *_, own=own: within.__setitem__(0, own))
        for block, own in zip(blocks, counts, strict=True)
    ]
    with hooks([*watched, embedding.register_forward_hook(begin)]), torch.enable_grad():
        logits = model(input_ids=ids, use_cache=False).logits
        flat = [output for each in outputs.values() for output in each]
        called = {key for own in counts for key in own}
        if not flat or not logits.requires_grad:
            return counts, called
        try:
            gradients = iter(torch.autograd.grad(logits.float().sum(), flat, allow_unused=True))
        except RuntimeError:  # a forward that writes into its own activations has no gradients
            return counts, called
    used = {key for key, each in outputs.items() if any([next(gradients) is not None for _ in each])}
    return counts, called - used


def _not_passed(block: nn.Module, counts: dict[int, int]) -> Iterator[nn.Module]:
    """Linears of a block that no token passed, nor another expert's like them."""
    names = {id(m): name for name, m in block.named_modules() if is_linear(m)}
    widths = {name: matrix(block.get_submodule(name)).shape[1] for name in names.values()}
    seen = [Seen(Site((names[key],), widths[names[key]]), count) for key, count in counts.items() if key in names]
    tokens = min(PROBE_TOKENS, max((each.tokens for each in seen), default=0))
    known = {name for site in completed(seen, widths, tokens) for name in site.linears}
    yield from (block.get_submodule(name) for name in widths if name not in known)
