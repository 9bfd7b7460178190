"""Second moments of a site's input: the statistics of the calibration data that GPTQ and AWQ use.

For tokens x₁…x_n that enter a site:  H = 1/n Σ x xᵀ,  and the mean magnitude a = 1/n Σ |x|. The output error of
a weight change Δ is then tr(ΔHΔᵀ) per token, whatever the number of tokens. H is GPTQ's Hessian (arXiv 2210.17323) up
to a factor, a is AWQ's activation scale (arXiv 2306.00978).

Where the layers before a site are quantized already, its input is x̃ where the full-precision model has x. Then H is
1/n Σ x̃ x̃ᵀ, and C = 1/n Σ x̃ xᵀ is the cross-covariance that GPTAQ (arXiv 2504.02692) and Qronos (arXiv 2505.11695)
use: the target W x, projected on the input x̃, is W Cᵀ H⁻¹ x̃.
"""

import functools
from collections.abc import Callable, Hashable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from gptq_awq.errors import UserError
from gptq_awq.kernels import rank_k
from gptq_awq.kernels.rank_k import RankK
from gptq_awq.numerics.distributed import ONE, Ranks
from gptq_awq.numerics.linalg import NotPositiveDefiniteError, inverse_cholesky, inverse_choleskys
from gptq_awq.runtime.profiling import phase

# H is symmetric: only blocks on and above its diagonal are computed. Wider blocks waste more work below the diagonal,
# narrower ones leave the matrix unit idle.
BLOCK = 384


@dataclass(frozen=True)
class Moments:
    """Finished statistics of one site's input.

    Attributes:
        hessian: H, (in, in) float32.
        mean_abs: a, (in,) float32.
        tokens: n, the number of real (unpadded) tokens.
        max_abs: max |x|, (in,) float32, for SmoothQuant; None where it was not gathered.
        cross: C, (in, in) float32, rows x̃ and columns x; None where no full-precision forward ran.
        routed: number of real tokens that the router sent to this expert; None for an ordinary site.
        policy: the policy that was applied to an expert that few tokens reached; None: none was.
        keep: reads or keeps factors of H across runs, by H itself; the default keeps none.

    Factors and shared values belong to this H: moments made by `dataclasses.replace` begin without any.
    """

    hessian: Float[Tensor, "in in"]
    mean_abs: Float[Tensor, "in"]
    tokens: int
    max_abs: Float[Tensor, "in"] | None = None
    cross: Float[Tensor, "in in"] | None = None
    routed: int | None = None
    policy: str | None = None
    keep: "Keep" = field(default=lambda _hessian, _key, compute: compute(), repr=False, compare=False)
    _factors: dict = field(default_factory=dict, init=False, repr=False, compare=False)
    _shared: dict = field(default_factory=dict, init=False, repr=False, compare=False)

    @classmethod
    def none(cls, routed: int, policy: str) -> "Moments":
        """Moments of no token, with empty H and a: the site is rounded to nearest."""
        return cls(torch.empty(0, 0), torch.empty(0), 0, routed=routed, policy=policy)

    def rescaled(self, scales: Float[Tensor, "in"]) -> "Moments":
        """The moments of x / s, for a site whose input a transform has divided by `scales`."""
        s = scales.to(self.hessian)
        largest = None if self.max_abs is None else self.max_abs / s
        products = s[:, None] * s[None, :]
        cross = None if self.cross is None else self.cross / products
        mean = self.mean_abs / s
        return Moments(self.hessian / products, mean, self.tokens, largest, cross, self.routed, self.policy)

    def drift(self) -> Float[Tensor, "in in"]:
        """D = 1/n Σ (x - x̃) x̃ᵀ = Cᵀ - H: covariance of the input's deviation from full precision with the input.

        Raises:
            ValueError: C was not gathered.
        """
        if self.cross is None:
            raise ValueError("the solver needs C: give Moments their `cross`")
        return self.cross.T - self.hessian

    def once(self, key: Hashable, compute: Callable[[], Any]) -> Any:
        """The value of `compute` under `key`, computed for the site's first linear and shared by its other linears.

        Only the last key's value is kept.
        """
        if key not in self._shared:
            self._shared.clear()
            self._shared[key] = compute()
        return self._shared[key]

    def dead(self) -> Bool[Tensor, "in"]:
        """True at columns whose input was always zero: diag(H) = 0."""
        return self.hessian.diagonal() == 0

    def inverse_factor(self, damping: float, act_order: bool, unit: int = 1) -> "Factor":
        """Upper Cholesky factor U of the damped inverse Hessian, shared by the site's linears.

        Args:
            damping: λ, relative to the mean of diag(H); raised where H + λ mean(diag H) I does not factor.
            act_order: permute columns by descending diag(H) first.
            unit: number of neighbouring columns that stay together in that order, by their mean.

        Returns:
            U (in, in); the column order it is in (None: natural); the damping used.

        Raises:
            NotPositiveDefiniteError: see `linalg.inverse_cholesky`.
        """
        key = (damping, act_order, unit if act_order else 1)
        if key not in self._factors:
            self._remember(key, lambda: self._factor(*key))
        return self._factors[key]

    def _remember(self, key: "FactorKey", compute: Callable[[], "Factor"]) -> None:
        factor = self.keep(self.hessian, key, compute)
        self._factors.clear()  # one factor at a time: they are as large as H
        self._factors[key] = factor

    def forget_factors(self) -> None:
        """Free the factor and the values that the site's linears shared, each as large as H, once all are solved."""
        self._factors.clear()
        self._shared.clear()

    def _factor(self, damping: float, act_order: bool, unit: int) -> "Factor":
        order = self._order(act_order, unit)
        with phase("factor", len(self.hessian)):
            factor, used = inverse_cholesky(self.hessian, damping, order)
        return factor, order, used

    def _order(self, act_order: bool, unit: int = 1) -> Int[Tensor, "in"] | None:
        """Order in which GPTQ visits columns: descending diag(H) with act_order, else None (natural order).

        Columns of a unit stay together, in their natural order, by their mean.
        """
        if not act_order:
            return None
        diagonal = torch.where(self.dead(), 1.0, self.hessian.diagonal())
        if unit == 1:
            return torch.argsort(diagonal, descending=True)
        order = torch.argsort(diagonal.view(-1, unit).mean(1), descending=True)
        return (order[:, None] * unit + torch.arange(unit, device=order.device)).flatten()


def factor_together(sites: Sequence[Moments], damping: float, act_order: bool, unit: int = 1) -> None:
    """Compute `inverse_factor` of several sites of one width in one batched factorization, for later calls.

    A site for which this damping does not suffice is factored by itself; one that does not factor at all is left out.
    """
    key = (damping, act_order, unit if act_order else 1)
    missing = [site for site in sites if key not in site._factors]
    if len(missing) < 2:
        return

    @functools.cache
    def found() -> list[Factor | None]:
        orders = [site._order(act_order, unit) for site in missing]
        with phase("factor", len(missing[0].hessian), len(missing)):
            factors = inverse_choleskys([site.hessian for site in missing], damping, orders)
        return [None if U is None else (U, order, damping) for U, order in zip(factors, orders, strict=True)]

    for i, site in enumerate(missing):
        with suppress(NotPositiveDefiniteError):
            site._remember(key, lambda i=i, site=site: found()[i] or site._factor(*key))


Factor = tuple[Float[Tensor, "in in"], Int[Tensor, "in"] | None, float]
"""Upper factor U of the damped inverse Hessian, the column order it is in (None: natural), and the damping used."""
FactorKey = tuple[float, bool, int]
"""Damping, act_order, and the number of columns that stay together in that order."""
Keep = Callable[[Tensor, FactorKey, Callable[[], Factor]], Factor]
"""Maps H, what a factor is asked for by, and a function that computes it to the factor, kept from earlier or new."""


class MomentsSum:
    """Accumulates Σ x xᵀ, Σ |x|, max |x| and, with full precision, Σ x̃ xᵀ over batches; padding is left out.

    Products are summed in float32, whatever the activations' precision: relative errors are 1e-7 (bfloat16: 3e-6;
    benchmarks/moments.py), far below damping. The sum of fewer tokens than columns is singular, but never indefinite
    beyond these errors. Where x̃ = x, C = H: bit for bit in bfloat16, to 1e-6 in float32.

    Args:
        width: columns of the input.
        device: device of the sums.
    """

    def __init__(self, width: int, device: torch.device) -> None:
        self._width, self._device = width, device
        self._native: RankK | None = (
            None  # Σ of bfloat16 activations, where the CPU has an instruction for their products
        )
        self._xx: Tensor | None = None  # Σ x xᵀ of all other activations
        self._cross: Tensor | None = None
        self._abs = torch.zeros(width, device=device)
        self._max = torch.zeros(width, device=device)
        self._tokens = 0

    @property
    def tokens(self) -> int:
        """Number of real tokens added so far."""
        return self._tokens

    def add(
        self,
        x: Float[Tensor, "*batch in"],
        mask: Bool[Tensor, "*batch"] | None,
        full: Float[Tensor, "*batch in"] | None = None,
    ) -> None:
        """Add a batch of inputs x (x̃); `mask` is True at real tokens, `full` is x of the full-precision model."""
        x = _real_tokens(x, mask)
        if not len(x):
            return
        paired = () if full is None else (_real_tokens(full, mask),)
        with phase("moments", *x.shape, *(1 for _ in paired)):
            if x.dtype == torch.bfloat16 and x.device.type == "cpu" and rank_k.available():
                self._native = self._native or RankK(self._width)
                self._native.add(*(part.contiguous().view(torch.uint16).numpy() for part in (x, *paired)))
            else:
                self._add_products(x)
                for other in paired:
                    self._add_cross(x, other)
                self._max = torch.maximum(self._max, torch.maximum(x.amax(0), -x.amin(0)).float())
        self._tokens += x.shape[0]

    def _add_products(self, x: Float[Tensor, "tokens in"]) -> None:
        """Add a batch to the blocks of Σ x xᵀ on and above the diagonal, and to Σ |x|."""
        if self._xx is None:
            self._xx = self._zeros()
        if x.device.type == "cuda" and x.dtype != torch.float32:
            self._xx += torch.mm(x.T, x, out_dtype=torch.float32)
        else:
            add_upper_products(self._xx, x.float())
        self._abs += x.abs().sum(0, dtype=torch.float32)

    def _add_cross(self, x: Float[Tensor, "tokens in"], full: Float[Tensor, "tokens in"]) -> None:
        """Add a batch to Σ x̃ xᵀ."""
        if self._cross is None:
            self._cross = self._zeros()
        if x.device.type == "cuda" and x.dtype != torch.float32:
            self._cross += torch.mm(x.T, full, out_dtype=torch.float32)
        else:
            self._cross.addmm_(x.float().T, full.float())

    @phase("moments")
    def finish(self, where: str, ranks: Ranks = ONE) -> Moments:
        """Divide the sums, over the tokens of all `ranks`, by the number of tokens; the sums are used up.

        Args:
            where: names the site in errors.
            ranks: the processes whose sums are added.

        Raises:
            UserError: an activation was NaN or infinite, or there was no token.
        """
        products, self._xx = self._xx, None
        cross, self._cross = self._cross, None
        if self._native is not None:
            own = torch.from_numpy(self._native.products)[: self._width, : self._width]
            products = own.contiguous() if products is None else products.add_(own)
            self._abs += torch.from_numpy(self._native.magnitude)[: self._width]
            self._max = torch.maximum(self._max, torch.from_numpy(self._native.largest)[: self._width])
            if self._native.cross is not None:
                cross = torch.from_numpy(self._native.cross)[: self._width, : self._width].contiguous()
        products, cross = self._sum_over_ranks(products, cross, ranks)
        if self._tokens == 0 or products is None:
            raise UserError("calibration holds no real token: check data.path and data.packing")
        if not torch.isfinite(self._abs).all() or (cross is not None and not torch.isfinite(cross).all()):
            raise UserError(
                f"non-finite activations enter {where}: try dtype=float32 compute_dtype=float32, or check the model"
            )
        cross = None if cross is None else cross.div_(self._tokens)
        mean = self._abs / self._tokens
        return Moments(mirrored(products.div_(self._tokens)), mean, self._tokens, self._max, cross)

    def _sum_over_ranks(
        self, products: Tensor | None, cross: Tensor | None, ranks: Ranks
    ) -> tuple[Tensor | None, Tensor | None]:
        """The sums of all ranks; a rank of which no token reached the site contributes zeros."""
        if ranks.size == 1:
            return products, cross
        counts = ranks.sum_(torch.tensor([self._tokens, cross is not None]))
        self._tokens = int(counts[0])
        ranks.sum_(self._abs)
        ranks.maximum_(self._max)
        products = self._zeros() if products is None else products
        for a in range(0, self._width, BLOCK):  # on and above the diagonal
            b = min(a + BLOCK, self._width)
            products[a:b, a:] = ranks.sum_(products[a:b, a:].contiguous())
        if counts[1]:
            cross = ranks.sum_(self._zeros() if cross is None else cross)
        return products, cross

    def _zeros(self) -> Float[Tensor, "in in"]:
        return torch.zeros(self._width, self._width, device=self._device)


def _real_tokens(x: Float[Tensor, "*batch in"], mask: Bool[Tensor, "*batch"] | None) -> Float[Tensor, "tokens in"]:
    """The inputs of real tokens as rows."""
    if mask is None:
        return x.reshape(-1, x.shape[-1])
    return x[mask if mask.numel() != x.shape[:-1].numel() else mask.view(x.shape[:-1])]  # batch 1 tokens: MLA


def add_upper_products(into: Float[Tensor, "n n"], x: Float[Tensor, "tokens n"]) -> None:
    """Add Σ x xᵀ to the blocks on and above the diagonal, which is half the work of the whole."""
    for a in range(0, x.shape[1], BLOCK):
        b = min(a + BLOCK, x.shape[1])
        into[a:b, a:].addmm_(x[:, a:b].T, x[:, a:])


def upper_products(x: Float[Tensor, "tokens n"]) -> Float[Tensor, "n n"]:
    """Σ x xᵀ in float32 on and above the diagonal, whatever the dtype of x; other entries are undefined."""
    if x.dtype == torch.bfloat16 and x.device.type == "cpu" and rank_k.available():
        sums = RankK(x.shape[1])
        sums.add(x.contiguous().view(torch.uint16).numpy())
        return torch.from_numpy(sums.products)[: x.shape[1], : x.shape[1]]
    into = torch.zeros(x.shape[1], x.shape[1], device=x.device)
    add_upper_products(into, x.float())
    return into


def mirrored(upper: Float[Tensor, "n n"]) -> Float[Tensor, "n n"]:
    """Complete a symmetric matrix, in place, from its part on and above the diagonal."""
    for a in range(0, len(upper), BLOCK):
        b = min(a + BLOCK, len(upper))
        corner = upper[a:b, a:b].triu()
        upper[a:b, a:b] = corner + corner.triu(1).T
        upper[b:, a:b] = upper[a:b, b:].T
    return upper


def pack_symmetric(matrix: Float[Tensor, "n n"]) -> Float[Tensor, "packed"]:
    """Flatten a symmetric matrix's blocks on and above the diagonal into one vector, for storing."""
    return torch.cat([matrix[a : a + BLOCK, a:].flatten() for a in range(0, len(matrix), BLOCK)])


def unpack_symmetric(packed: Float[Tensor, "packed"], n: int) -> Float[Tensor, "n n"]:
    """Restore an n x n symmetric matrix from `pack_symmetric`'s vector, bit for bit."""
    matrix, start = packed.new_empty(n, n), 0
    for a in range(0, n, BLOCK):
        rows, columns = min(BLOCK, n - a), n - a
        block = packed[start : start + rows * columns].view(rows, columns)
        matrix[a : a + rows, a:] = block
        matrix[a + rows :, a : a + rows] = block[:, rows:].T
        start += rows * columns
    return matrix
