"""QuaRot's offline rotation (Ashkboos et al., arXiv 2404.00456): a random Hadamard basis for the residual stream.

With Q orthogonal, the model is rewritten so that its residual stream is Qᵀx instead of x:

    norms        their weights go into the linears that read them (SliceGPT, arXiv 2401.15024); Q commutes with the rest
    embeddings   E ← E Q            writers   W ← Qᵀ W,  b ← Qᵀ b   (attention's and the MLP's last linear)
    readers      W ← W Q            head      W ← W Q               (a tied one becomes a matrix of its own)

Q = diag(±1) H/√n. Outliers of single channels, of activations and of weights, are spread over all of them. With
`heads`, each value head is rotated too: W_v ← HᵀW_v by rows, W_o ← W_o H by columns. A LayerNorm, which subtracts the
mean, commutes with every Q that has Q1 = 1: a reflection after Q makes it so.

Readers, writers and the rows of each value head are observed (models/topology.py), and every rotated block must give
the rotated output of the original block. QuaRot's online rotations (inputs of down_proj, keys, all heads together) need
other engines than those we export to, and are left out.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from gptq_awq.errors import UserError
from gptq_awq.models.blocks import (
    PROBE_TOKENS,
    BlockCalls,
    Call,
    find_blocks,
    head_size,
    heads_of,
    text_config,
    update_error,
)
from gptq_awq.models.embeddings import Ends, untie
from gptq_awq.models.experts import experts_in
from gptq_awq.models.linear import Site, is_linear, matrix
from gptq_awq.models.topology import VERIFY_TOLERANCE, observe_sites, relative_error
from gptq_awq.numerics.hadamard import largest_order, times_hadamard
from gptq_awq.runtime.options import Seed, checked_dataclass
from gptq_awq.runtime.profiling import phase

LOGITS_TOLERANCE = {torch.float32: 1e-3}
"""Largest accepted relative change of the logits, by the model's dtype."""
ROUNDED_TOLERANCE = 0.1
"""Tolerance in 16 bits, where rotated weights are rounded again, which changes far more than float32 does."""


@dataclass(frozen=True)
class Rotation:
    """Orthogonal matrix Q = diag(±1) H/√n, followed by a reflection where Q 1 = 1 is needed.

    Attributes:
        signs: (n,) ±1, the random diagonal.
        mean_kept: whether Q 1 = 1, as models whose norms subtract the mean need.
    """

    signs: Float[Tensor, "n"]
    mean_kept: bool = False

    def __call__(self, x: Float[Tensor, "*rows n"]) -> Float[Tensor, "*rows n"]:
        """Multiply the last dimension by Q from the right: X Q, for X in float32 or wider."""
        y = times_hadamard(x * self.signs.to(x))
        if not self.mean_kept:
            return y
        unit = torch.full_like(self.signs, len(self.signs) ** -0.5, dtype=x.dtype, device=x.device)
        w = unit - times_hadamard(unit * self.signs.to(x))  # the reflection maps one to the other
        length = w.square().sum()
        return y - 2 * (y @ w)[..., None] * w / length if length > 0 else y


@checked_dataclass
class QuaRot:
    """QuaRot: rotate the residual stream and the value heads of a whole model, before the block loop.

    Attributes:
        seed: seed of the random signs.
        heads: whether the value heads are rotated too.
    """

    seed: Seed = 0
    heads: bool = True
    name: str = "quarot"

    @phase("rotate")
    @torch.no_grad()
    def prepare(self, model: nn.Module) -> dict[str, Any]:
        """Rotate a causal LM in place, preserving its logits; returns JSON values for the ledger.

        Raises:
            UserError: the rotation would change this model's function. A block named in the message is unchanged.
        """
        if experts_in(model):
            raise UserError("method=quarot: does not rotate routers; mixtures of experts need another method")
        prefix, blocks = find_blocks(model)
        device = next(model.parameters()).device
        ids = torch.arange(1, PROBE_TOKENS + 1, device=device)[None]
        before = model(ids, use_cache=False).logits.float()
        ends = Ends.of(model, ids)
        draw = torch.Generator().manual_seed(self.seed)
        Q = Rotation(_signs(ends.width, draw), ends.subtracts_mean())
        hidden, calls = BlockCalls(model, blocks).record(ids)
        hidden, sites, order = hidden.float(), [], 0
        heads: int | None = heads_of(model)
        for index, block in enumerate(blocks):
            copied = _BlockCopy(f"{prefix}.{index}", copy.deepcopy(block).float(), calls[index], hidden)
            copied.sites = sites = observe_sites(block, hidden, calls[index], True, heads, sites)
            if self.heads:
                order = _rotate_heads(copied, head_size(text_config(model)), draw)
            hidden = _rotate_block(copied, Q)
            block.load_state_dict(copied.block.state_dict())
        untie(model)
        _rotate_embeddings_and_head(ends, Q)
        error = relative_error(model(ids, use_cache=False).logits.float(), before)
        if error > LOGITS_TOLERANCE.get(next(model.parameters()).dtype, ROUNDED_TOLERANCE):
            raise _not_rotatable(f"the logits of {type(model).__name__}", error)
        return {"order": largest_order(ends.width), "heads_order": order, "seed": self.seed, "logits_error": error}


@dataclass
class _BlockCopy:
    """Float32 copy of one block while it is rotated, with the original block's call and input hidden states."""

    name: str
    block: nn.Module
    call: Call
    hidden: Float[Tensor, "1 tokens width"]
    sites: Sequence[Site] = ()

    def run(self, hidden: Tensor) -> Tensor:
        return self.call.run(self.block, hidden)


def _rotate_block(copied: _BlockCopy, Q: Rotation) -> Float[Tensor, "1 tokens width"]:
    """Fuse a block's norms, rotate its readers and writers, and verify; returns the original block's output."""
    width, expected, readers = copied.hidden.shape[-1], copied.run(copied.hidden), set()
    for site in copied.sites:
        norm = site.absorber and copied.block.get_submodule(site.absorber.producer)
        if site.absorber is None or norm is None or is_linear(norm) or site.width != width:
            continue
        linears = [copied.block.get_submodule(name) for name in site.linears]
        fuse(norm, site.absorber.unit_offset, site.absorber.rows, linears)
        for linear in linears:
            matrix(linear).copy_(Q(matrix(linear)))
        rotate_bias(norm, Q)
        readers.update(site.linears)
    for name, linear in copied.block.named_modules():
        if is_linear(linear) and name not in readers and len(matrix(linear)) == width:
            matrix(linear).copy_(Q(matrix(linear).T).T)
            rotate_bias(linear, Q)
    rotated = Q(copied.hidden)
    error = update_error(copied.run(rotated), Q(expected), rotated)
    if not error < VERIFY_TOLERANCE:
        raise _not_rotatable(copied.name, error)
    return expected


def _rotate_embeddings_and_head(ends: Ends, Q: Rotation) -> None:
    """Rotate the embeddings and the head in place, after fusing the last norm's weight into the head."""
    for embedding in ends.embeddings:
        embedding.weight.data.copy_(Q(embedding.weight.data.float()))
    fuse(ends.norm, ends.unit_offset(), torch.arange(ends.width), [ends.head])
    rotate_bias(ends.norm, Q)
    matrix(ends.head).copy_(Q(matrix(ends.head).float()))


def fuse(norm: nn.Module, unit_offset: bool, rows: Int[Tensor, "in"], linears: Sequence[nn.Module]) -> None:
    """Fuse a norm's weight into the linears that read it, in place, and divide the norm's bias by the weight.

    Raises:
        UserError: the norm has a bias and a weight of 0, which the bias cannot be divided by.
    """
    offset = 1.0 if unit_offset else 0.0
    weight, bias = norm.get_parameter("weight").data, getattr(norm, "bias", None)
    factor = weight + offset
    for linear in linears:
        matrix(linear).mul_(factor[rows.to(factor.device)].to(matrix(linear)))
    if bias is not None:
        if bool((factor == 0).any()):
            raise UserError("method=quarot: a norm has weights of 0 beside a bias, so it can't be fused")
        bias.data.div_(factor)
    weight.fill_(1.0 - offset)


def rotate_bias(module: nn.Module, Q: Rotation) -> None:
    """Rotate a module's bias in place, b ← Qᵀ b; nothing happens where it has none."""
    bias = getattr(module, "bias", None)
    if bias is not None:
        bias.data.copy_(Q(bias.data.float()))


def _rotate_heads(copied: _BlockCopy, size: int, draw: torch.Generator) -> int:
    """Rotate the value heads between each linear and the site that it feeds head by head; returns the Hadamard order.

    Every candidate pair is rotated, and restored where the block's output changes: a nonlinearity between the two, as
    in an MLP, does not commute with a rotation.

    Raises:
        UserError: the block has no such pair.
    """
    expected, H = copied.run(copied.hidden), Rotation(_signs(size, draw))
    found = False
    for site in copied.sites:
        absorber = site.absorber
        producer = absorber and copied.block.get_submodule(absorber.producer)
        if absorber is None or producer is None or not is_linear(producer) or site.width % size:
            continue
        touched = [producer, *(copied.block.get_submodule(name) for name in site.linears)]
        kept = [copy.deepcopy(module.state_dict()) for module in touched]
        _rotate_rows(producer, absorber.rows.view(-1, size), H)
        for linear in touched[1:]:
            W = matrix(linear)
            W.copy_(H(W.unflatten(1, (-1, size))).flatten(1))
        if update_error(copied.run(copied.hidden), expected, copied.hidden) < VERIFY_TOLERANCE:
            found = True
        else:
            for module, state in zip(touched, kept, strict=True):
                module.load_state_dict(state)
    if not found:
        raise UserError(f"method=quarot: {copied.name} has no values to rotate head by head; set heads=false")
    return largest_order(size)


def _rotate_rows(producer: nn.Module, heads: Int[Tensor, "heads size"], H: Rotation) -> None:
    """Rotate each value head's output channels, once where several heads of the site share them (grouped queries)."""
    bias = getattr(producer, "bias", None)
    for rows in torch.unique(heads, dim=0):
        matrix(producer)[rows] = H(matrix(producer)[rows].T).T
        if bias is not None:
            bias.data[rows] = H(bias.data[rows])


def _signs(n: int, draw: torch.Generator) -> Float[Tensor, "n"]:
    return torch.randint(0, 2, (n,), generator=draw).mul(2).sub(1).float()


def _not_rotatable(what: str, error: float) -> UserError:
    return UserError(
        f"method=quarot: a rotated residual stream changes {what} by {error:.1g}: a norm after attention or the MLP "
        "(Gemma 2 and 3, post-norm OPT) does not commute with a rotation; choose another method"
    )
