"""Finding fused experts in a model's blocks, and making them linears (models/experts.py).

Which parameters are fused experts, and which are transposed, is observed in one call of a block and verified: the
block's output must stay the same. There is no table of architectures.

A module beside the experts whose only linear has one output per expert, or a single one, is a router or a gate. It
stays in full precision: `is_linear` is false for its linear.
"""

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from gptq_awq.errors import UserError
from gptq_awq.models.blocks import PROBE_TOKENS, BlockCalls, Call, find_blocks, update_error
from gptq_awq.models.expert_layouts import Layout, fused_parameters, observe_layout
from gptq_awq.models.experts import Experts, holder
from gptq_awq.models.linear import ROUTER, is_linear, matrix
from gptq_awq.models.offload import offloaded, residence, resident
from gptq_awq.models.walk import Walk

TOLERANCE = 1e-2
"""Largest relative change of what a block adds to a token in 16 bits: only the rounding of products may differ."""
Kind = tuple[type[nn.Module], str]
"""Class of the module that holds a parameter, and the parameter's name there; a kind has one layout."""


def unfuse(model: nn.Module) -> None:
    """Replace all fused experts in a model's blocks by linears, in place, and mark the routers of all experts.

    Fused experts are computed one after the other from then on, as the model's own code does ("eager").

    Raises:
        UserError: a block's output changes.
    """
    prefix, blocks = find_blocks(model)
    pending = [(i, block) for i, block in enumerate(blocks) if fused_parameters(block)]
    if pending:
        compute_eagerly(model)
        _unfuse_all(model, prefix, blocks, pending)
    for block in blocks:
        for router in _routers(block):
            router.left = ROUTER  # pyright: ignore[reportArgumentType]


@torch.no_grad()
def _unfuse_all(model: nn.Module, prefix: str, blocks: nn.ModuleList, pending: Sequence[tuple[int, nn.Module]]) -> None:
    """Unfuse the experts of the pending blocks; one block of each kind is observed and verified.

    Experts that the probe doesn't call, as they are for images, have the layout of others of their kind.
    """
    ids = torch.arange(1, PROBE_TOKENS + 1, device=next(model.parameters()).device)[None]
    known: dict[Kind, Layout | None] = {}
    for index, block, hidden, call in _entered(model, blocks, ids, dict(pending)):
        kinds = {name: _kind(block, name) for name in fused_parameters(block)}
        if all(kind in known for kind in kinds.values()):
            unfuse_block(block, _known(kinds, known))
            continue
        with resident(block):
            expected = call.run(block, hidden)
            seen = observe_layout(block, hidden, call)
            known = dict.fromkeys(kinds.values()) | known | {kinds[name]: layout for name, layout in seen.items()}
            unfuse_block(block, _known(kinds, known))
            _check_same(call.run(block, hidden), expected, hidden, f"{prefix}.{index}")


def _entered(
    model: nn.Module, blocks: nn.ModuleList, ids: Tensor, pending: Mapping[int, nn.Module]
) -> Iterator[tuple[int, nn.Module, Tensor, Call]]:
    """The pending blocks, with hidden states and arguments of a call of each, whichever way they can be had."""
    try:
        hidden, calls = BlockCalls(model, blocks).record(ids)
        if not offloaded(model):
            for index, block in pending.items():
                calls[index].run(block, hidden)
    except (UserError, AttributeError, LookupError, RuntimeError, TypeError, ValueError):
        walk = Walk(model, blocks, ids)
        for index, block in pending.items():
            if walk.go_to(index, walk.hidden.dtype):
                yield index, block, walk.hidden, walk.call
        return
    yield from ((index, block, hidden, calls[index]) for index, block in pending.items())


def unfuse_block(block: nn.Module, layouts: Mapping[str, Layout]) -> None:
    """Replace a block's fused parameters by `Experts`, in place; `layouts`: name → layout."""
    for name, layout in layouts.items():
        path, _, attribute = name.rpartition(".")
        owner = block.get_submodule(path)
        fused = owner._parameters.pop(attribute)
        assert fused is not None
        experts = Experts(fused, layout)
        setattr(owner, attribute, experts)
        if (home := residence(block)) is not None:
            home.split(fused, experts.weights, experts.slices)


def _routers(block: nn.Module) -> Iterator[nn.Module]:
    """Linears of routers and gates: the only linear of a module beside experts, with an output per expert or one."""
    for path, experts in list(block.named_modules()):
        if not isinstance(experts, nn.ModuleList) or len(experts) < 2:
            continue
        fused = isinstance(experts, Experts)
        owner = holder(block, path.rpartition(".")[0] if fused else path)
        beside = block.get_submodule(owner.rpartition(".")[0]).children()
        for child in (each for each in beside if each is not block.get_submodule(owner)):
            linears = [m for m in child.modules() if is_linear(m)]
            if len(linears) == 1 and len(matrix(linears[0])) in (1, len(experts)):
                yield linears[0]


def compute_eagerly(model: nn.Module) -> None:
    """Set a transformers model to compute its experts one by one; models without that setting are left alone."""
    if not isinstance(model, PreTrainedModel):
        return
    if any(each not in (None, "eager") for each in model.get_experts_implementation().values()):
        model.set_experts_implementation("eager")


def _known(kinds: Mapping[str, Kind], layouts: Mapping[Kind, Layout | None]) -> dict[str, Layout]:
    """Layouts of those parameters that are experts."""
    return {name: layout for name, kind in kinds.items() if (layout := layouts[kind]) is not None}


def _kind(block: nn.Module, name: str) -> Kind:
    """Class of the module that holds a block's parameter, and the parameter's name there."""
    path, _, attribute = name.rpartition(".")
    return type(block.get_submodule(path)), attribute


def _check_same(now: Tensor, before: Tensor, hidden: Tensor, where: str) -> None:
    """Raise UserError where what a block adds to any token changed by more than the rounding of products."""
    error = update_error(now, before, hidden)
    limit = 1e-4 if before.dtype == torch.float32 else TOLERANCE
    if not error <= limit:
        raise UserError(f"model: {where} computes something else with its experts as linears (by {error:.1e})")
