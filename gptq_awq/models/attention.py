"""Faster causal attention for calibration's forwards and for tuning's gradients, in place of torch's kernel.

Models call `scaled_dot_product_attention`, whatever their architecture, so that function is intercepted: under
`faster_attention_of`, a causal call in bfloat16 goes to kernels/attention.py on CPUs that multiply bfloat16 natively;
under `differentiable_attention`, causal attention of short windows is computed by matrix products; under
`writing_attention` that of one new token to those before it goes to kernels/new_token.py.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from gptq_awq.kernels import attention, new_token, rank_k
from gptq_awq.kernels.numbers import NUMBERS

MIN_TOKENS = 32
"""Shortest windows that go to the faster kernels: in shorter ones a panel of queries is mostly empty."""

MAX_TOKENS = 1024
"""Longest windows that are computed by matrix products: attention weights of longer ones outgrow a CPU's caches."""


class _Instead(TorchFunctionMode):
    """Mode that computes attention by another function wherever a call is one that this function takes.

    Args:
        takes: whether it takes a `scaled_dot_product_attention` call of these arguments.
        attention: the function, of q, k, v, the scale (None: 1/√d) and the mask.
    """

    def __init__(self, takes: Callable[..., bool], attention: Callable[..., Tensor]) -> None:
        super().__init__()
        self._takes, self._attention = takes, attention

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None):
        kwargs = kwargs or {}
        if func is scaled_dot_product_attention and self._takes(*args, **kwargs):
            return self._attention(*args, kwargs.get("scale"), kwargs.get("attn_mask"))
        return func(*args, **kwargs)


def differentiable_attention(dtype: torch.dtype) -> AbstractContextManager:
    """Context manager for causal attention of short windows by matrix products: gradients take half of torch's time."""

    def short(*args: Any, **kwargs: Any) -> bool:
        return attends(dtype, *args, **kwargs) and args[0].shape[2] <= MAX_TOKENS

    return _Instead(short, _in_products)


def _in_products(
    q: Float[Tensor, "batch heads tokens d"],
    k: Float[Tensor, "batch kv tokens d"],
    v: Float[Tensor, "batch kv tokens e"],
    scale: float | None,
    _mask: None,
) -> Float[Tensor, "batch heads tokens e"]:
    """Causal attention softmax(scale · Q Kᵀ) V; heads of Q share those of K and V in equal groups."""
    factor = scale or q.shape[3] ** -0.5
    (batch, heads, tokens, _), shared = q.shape, q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(shared, 1).flatten(0, 1) for x in (k, v))
    later = torch.full((tokens, tokens), -torch.inf, dtype=q.dtype, device=q.device).triu(1)
    scores = torch.baddbmm(later.expand(batch * heads, -1, -1), q.flatten(0, 1), k.transpose(1, 2), alpha=factor)
    return (scores.softmax(-1) @ v).unflatten(0, (batch, heads))


def writing_attention() -> AbstractContextManager:
    """Context manager for attention of one new token per text to a cache, compiled (kernels/new_token.py).

    On a CPU torch's kernel takes three times as long in float32, and thirteen times as long in bfloat16.
    """
    return _Instead(_is_new_token, _of_new_token)


def _is_new_token(*args: Any, **kwargs: Any) -> bool:
    """Whether a `scaled_dot_product_attention` call has one query per head, on the CPU, without dropout."""
    known = {"attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa"}
    if len(args) != 3 or not kwargs.keys() <= known or kwargs.get("dropout_p") or kwargs.get("is_causal"):
        return False
    q, k, v = args
    plain = all(x.dim() == 4 and x.device.type == "cpu" and x.dtype == q.dtype and len(x) == len(q) for x in args)
    read = plain and k.stride(3) == v.stride(3) == 1 and not q.requires_grad and q.dtype in NUMBERS
    return read and q.shape[2] == 1 and q.shape[1] % k.shape[1] == 0 and k.shape[:3] == v.shape[:3]


def _of_new_token(
    q: Float[Tensor, "batch heads 1 d"],
    k: Float[Tensor, "batch kv tokens d"],
    v: Float[Tensor, "batch kv tokens e"],
    scale: float | None,
    mask: Tensor | None,
) -> Float[Tensor, "batch heads 1 e"]:
    """Attention softmax(scale · q Kᵀ) V of a single query; heads of q share those of K and V in equal groups."""
    factor = np.float32(q.shape[3] ** -0.5 if scale is None else scale)
    heads = k.shape[1]
    added = torch.zeros(1, 1, 1, 1) if mask is None else mask
    if added.dtype == torch.bool:
        added = torch.zeros(added.shape).masked_fill_(~added, -torch.inf)
    added = added.float().expand(*q.shape[:3], k.shape[2]).squeeze(2).unflatten(1, (heads, -1))
    shared = q.squeeze(2).unflatten(1, (heads, -1)).contiguous()
    out = torch.empty(*shared.shape[:3], v.shape[3], dtype=q.dtype)
    queries, keys, values, written = (x.view(NUMBERS[q.dtype]).numpy() for x in (shared, _memory(k), _memory(v), out))
    places = (keys, k.stride()[:3], values, v.stride()[:3])
    new_token.new_token_attention(queries, *places, q.dtype == torch.bfloat16, factor, added.numpy(), written)
    return out.flatten(1, 2)[:, :, None]


def _memory(x: Tensor) -> Float[Tensor, "numbers"]:
    """The memory that a tensor lies in, from its first number to its last."""
    last = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    return x.as_strided((last + 1,), (1,))


def faster_attention_of(block: nn.Module) -> AbstractContextManager:
    """Context manager for the fastest attention in forwards of `block`, given its present dtype and device.

    It must not be entered inside of a greenlet.
    """
    parameter = next(block.parameters())
    native = parameter.dtype == torch.bfloat16 and parameter.device.type == "cpu" and rank_k.available()
    return _Instead(partial(attends, torch.bfloat16), attend) if native else nullcontext()


def attends(dtype: torch.dtype, *args: Any, **kwargs: Any) -> bool:
    """Whether a `scaled_dot_product_attention` call is plain causal self-attention in `dtype` on the CPU.

    Plain: without mask and dropout. The faster kernels also require `MIN_TOKENS` tokens or more, and an even head size.
    """
    known = {"attn_mask": None, "dropout_p": 0.0, "is_causal": True, "scale": None, "enable_gqa": False}
    if len(args) != 3 or not kwargs.get("is_causal") or not kwargs.keys() <= known.keys():
        return False
    if kwargs.get("attn_mask") is not None or kwargs.get("dropout_p") or (kwargs.get("scale") or 1.0) <= 0:
        return False
    q, k, v = args
    plain = all(x.dim() == 4 and x.dtype == dtype and x.device.type == "cpu" for x in args)
    same = plain and k.shape[:3] == v.shape[:3] and q.shape[::2] == k.shape[::2] and q.shape[3] == k.shape[3]
    return same and q.shape[1] % k.shape[1] == 0 and q.shape[2] >= MIN_TOKENS and q.shape[3] % 2 == 0


def attend(
    q: Float[Tensor, "batch heads tokens d"],
    k: Float[Tensor, "batch kv tokens d"],
    v: Float[Tensor, "batch kv tokens e"],
    scale: float | None,
    _mask: None = None,
) -> Float[Tensor, "batch heads tokens e"]:
    """Causal attention softmax(scale · Q Kᵀ) V of bfloat16 tensors on the CPU; `scale` None: 1/√d."""

    def bits(x: Tensor) -> np.ndarray:
        return x.contiguous().view(torch.uint16).numpy()

    out = torch.empty(q.shape[0], q.shape[2], q.shape[1], v.shape[3], dtype=q.dtype)
    factor = np.float32(q.shape[3] ** -0.5 if scale is None else scale)
    words = bits(q).view(np.uint32), bits(k).view(np.uint32)
    attention.causal_attention(*words, bits(v), factor, attention.WIDTH, bits(out))
    return out.transpose(1, 2)
