"""Range search: the choice among candidate ranges of a group, for `grid.search=mse` and `grid.search=hessian`.

mse      least Σ|ŵ - w|^2.4, as the GPTQ code does (IST-DASLab/gptq quant.py; arXiv 2210.17323);
hessian  least output error (ŵ - w) H_gg (ŵ - w)ᵀ, H_gg the group's diagonal block of the Hessian: AWQ's clip
         search (arXiv 2306.00978, sec. 3.2) without touching an activation.

`least_squares` needs few candidates: each stands for the codes that it rounds to, for which it solves for the scale.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from gptq_awq.grids.arithmetic import KINDS, Arithmetic, in_numbers
from gptq_awq.grids.base import Fitted, Grid
from gptq_awq.kernels import columns, gpu
from gptq_awq.kernels.quadratic import Quadratic

MSE_NORM = 2.4
STEPS, MAX_SHRINK = 20, 0.5


def shrinks(like: Tensor, steps: int = STEPS, most: float = MAX_SHRINK) -> Float[Tensor, "steps"]:
    """Factors by which a group's range is shrunk, the widest range first: 1, 1 - 1/steps, … 1 - most."""
    count = int(most * steps) + 1
    return torch.tensor([1 - i / steps for i in range(count)], dtype=like.dtype, device=like.device)


def even_steps(like: Tensor, codes: int, most: int = 31) -> Float[Tensor, "n"]:
    """Numbers of steps that a range of weights is divided into, so that an even lattice of up to `most` steps is held.

    Models that were trained or released in fewer bits lie on such a lattice, and a grid of more codes has room for it.
    """
    levels = min(codes, most)
    parts = 2 ** ((codes // levels).bit_length() - 1)  # a power of two, so that steps need no more bits
    return torch.tensor([parts * n for n in range(levels, levels // 2, -1)]).to(like)


def search_ranges(
    w: Float[Tensor, "rows cols"],
    scales: Float[Tensor, "rows n"],
    zeros: Float[Tensor, "rows n"],
    arithmetic: Arithmetic,
    search: str,
    hessian: Float[Tensor, "*spans _ cols"] | None,
) -> tuple[Float[Tensor, "rows 1"], Float[Tensor, "rows 1"]]:
    """Scale and zero per row, among n candidates, that round one group with the least error; the first on a tie.

    With a stack of m Hessian blocks, row k belongs to block k mod m.

    Raises:
        ValueError: `search` is "hessian" and no Hessian block is given.
    """
    if search != "hessian":
        h = None
    elif hessian is None:
        raise ValueError("grid.search=hessian needs the group's diagonal block of the Hessian")
    else:
        h = hessian.to(w).reshape(-1, *hessian.shape[-2:])  # a stack, of one if need be
    if gpu.available(w.device):
        chosen = _by_triton(w, scales, zeros, arithmetic, h)
    elif w.device.type == "cpu":
        chosen = _by_compiled(w, scales, zeros, arithmetic, h)
    else:
        chosen = _by_candidate(w, scales, zeros, arithmetic, h)
    return scales.gather(1, chosen[:, None]), zeros.gather(1, chosen[:, None])


def _by_compiled(w: Tensor, scales: Tensor, zeros: Tensor, arithmetic: Arithmetic, h: Tensor | None) -> Tensor:
    """Index of each row's best candidate, by the compiled CPU kernel in one pass (kernels/columns.py)."""
    h = w.new_empty(1, 0, 0) if h is None else h
    weights, scale, zero = (x.unflatten(0, (-1, len(h))).contiguous().float().numpy() for x in (w, scales, zeros))
    chosen = torch.empty(weights.shape[:2], dtype=torch.int64)
    max_code, kind, levels = in_numbers(arithmetic)
    block = h.contiguous().float().numpy()
    columns.best_range(weights, scale, zero, max_code, kind, levels, block, chosen.numpy())
    return chosen.flatten()


def _by_triton(w: Tensor, scales: Tensor, zeros: Tensor, arithmetic: Arithmetic, h: Tensor | None) -> Tensor:
    """Index of each row's best candidate, by the compiled GPU kernel in one launch (kernels/triton_columns.py)."""
    from gptq_awq.kernels.triton_columns import best_range

    groups = 1 if h is None else len(h)
    weights, scale, zero = (x.unflatten(0, (-1, groups)) for x in (w, scales, zeros))
    chosen = torch.empty(len(w), dtype=torch.int64, device=w.device)
    kind, levels = KINDS.index(arithmetic.kind), w.new_tensor(arithmetic.levels)
    best_range(weights, scale, zero, arithmetic.max_code, kind, levels, h, chosen)
    return chosen


def _by_candidate(w: Tensor, scales: Tensor, zeros: Tensor, arithmetic: Arithmetic, h: Tensor | None) -> Tensor:
    """Index of each row's best candidate, by plain PyTorch on any device, one candidate after the other."""
    least = w.new_full((len(w),), torch.inf)
    chosen = torch.zeros(len(w), dtype=torch.int64, device=w.device)
    for i in range(scales.shape[1]):
        params = scales[:, i : i + 1], zeros[:, i : i + 1]
        e = arithmetic.decode(arithmetic.encode(w, params), params) - w
        error = e.abs().pow(MSE_NORM).sum(1) if h is None else _output_error(e, h)
        better = error < least
        least = torch.where(better, error, least)
        chosen = torch.where(better, i, chosen)
    return chosen


def least_squares(
    w: Float[Tensor, "rows cols"],
    scales: Float[Tensor, "rows n"],
    arithmetic: Arithmetic,
    weights: Float[Tensor, "m cols"],
) -> Float[Tensor, "rows 1"]:
    """Scale per row with the least Σ h (ŵ - w)² for the codes that one of n candidates rounds to; 0 if all are 0.

    The search of llama.cpp's quantizers, with H's diagonal in place of the squares of inputs: for codes t it is
    s = Σ h w t / Σ h t². Of m rows of weights h, row k of w belongs to row k mod m.
    """
    if w.device.type != "cpu":
        return _least_squares_plain(w, scales, arithmetic, weights)
    own, scale = (x.unflatten(0, (-1, len(weights))).contiguous().float().numpy() for x in (w, scales))
    found = torch.empty(own.shape[:2])
    columns.least_squares(own, scale, *in_numbers(arithmetic), weights.contiguous().float().numpy(), found.numpy())
    return found.view(-1, 1).to(w.dtype)


def _least_squares_plain(w: Tensor, scales: Tensor, arithmetic: Arithmetic, weights: Tensor) -> Tensor:
    """Scales as `least_squares` finds them, by plain PyTorch on any device."""
    h, most, found = weights.repeat(len(w) // len(weights), 1), torch.zeros_like(w[:, :1]), torch.zeros_like(w[:, :1])
    for scale in scales.split(1, 1):
        params = scale, torch.zeros_like(scale)
        value = arithmetic.decode(arithmetic.encode(w, params), params)
        product, square = (h * value * w).sum(1, keepdim=True), (h * value * value).sum(1, keepdim=True)
        better = product * product > most * square
        best = torch.where(better, product / square, 0.0)
        most, found = torch.where(better, product * best, most), torch.where(better, scale * best, found)
    return found


def nearest_error(
    form: Quadratic,
    grid: Grid,
    fitted: Fitted,
    w: Float[Tensor, "rows cols"],
    divisor: Float[Tensor, "cols"],
) -> float:
    """Output error tr(ΔHΔᵀ) of rounding to nearest, Δ = (ŵ - w) / divisor, in one pass; H is given as its `form`.

    `fitted` holds the scales and zeros of groups of neighbouring columns.
    """
    size = w.shape[1] if grid.group_size == -1 else grid.group_size
    weight, scales, zeros, own = (x.contiguous().numpy() for x in (w, fitted.scales, fitted.zeros, divisor))
    return form.of_rounding(weight, scales, zeros, size, in_numbers(grid.arithmetic), own)


def least_error_together(
    w: Float[Tensor, "rows cols"],
    scales: Float[Tensor, "sets n"],
    set_of_row: Int[Tensor, "rows"],
    arithmetic: Arithmetic,
    search: str,
    hessian: Float[Tensor, "cols cols"] | None,
) -> Float[Tensor, "sets 1"]:
    """Scale of each set of rows, among n candidates, that rounds its rows with the least error; the first on a tie.

    Raises:
        ValueError: `search` is "hessian" and no Hessian block is given.
    """
    if search == "hessian" and hessian is None:
        raise ValueError("grid.search=hessian needs the group's diagonal block of the Hessian")
    h = None if search != "hessian" or hessian is None else hessian.to(w).reshape(1, *hessian.shape[-2:])
    errors = torch.zeros_like(scales)
    for i in range(scales.shape[1]):
        params = scales[set_of_row, i, None], torch.zeros_like(w[:, :1])
        e = arithmetic.decode(arithmetic.encode(w, params), params) - w
        rows = e.abs().pow(MSE_NORM).sum(1) if h is None else _output_error(e, h)
        errors[:, i].index_add_(0, set_of_row, rows)
    return scales.gather(1, errors.argmin(1, keepdim=True))


def _output_error(e: Float[Tensor, "rows cols"], h: Float[Tensor, "spans cols cols"]) -> Float[Tensor, "rows"]:
    e = e.view(-1, len(h), e.shape[1])
    return ((e.transpose(0, 1) @ h).transpose(0, 1) * e).sum(2).flatten()
