"""Second moments of a site's input: all that GPTQ and AWQ need to know of the calibration data.

For tokens x₁…x_n that enter a site:  H = 1/n Σ x xᵀ,  and the mean magnitude a = 1/n Σ |x|. The output error of
a weight change Δ is then tr(ΔHΔᵀ) per token, whatever the number of tokens.

Where the layers before it are quantized already, a site sees x̃ where full precision sees x. H is of x̃ then, and
C = 1/n Σ x̃ xᵀ says how the two go together: what the layer should answer, W x, projected on what it is given.
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

# H is symmetric: only blocks on and above its diagonal are computed. Wider blocks waste more work below
# the diagonal, narrower ones leave the matrix unit idle.
BLOCK = 384


@dataclass(frozen=True)
class Moments:
    """Finished statistics of one site.

    Attributes:
        hessian: H, (in, in) float32.
        mean_abs: a, (in,) float32.
        tokens: n, real (unpadded) tokens seen.
        max_abs: max |x|, (in,) float32, for SmoothQuant; None where nobody counted it.
        cross: C, (in, in) float32, rows x̃ and columns x; None where full precision did not run beside.
        routed: of an expert: real tokens that reached it by themselves; None: of an ordinary site.
        policy: what was done as these were few; None: nothing.
        keep: where factors of H are kept for other runs; by default nowhere.
    """

    hessian: Float[Tensor, "in in"]
    mean_abs: Float[Tensor, "in"]
    tokens: int
    max_abs: Float[Tensor, "in"] | None = None
    cross: Float[Tensor, "in in"] | None = None
    routed: int | None = None
    policy: str | None = None
    keep: "Keep" = field(default=lambda _key, compute: compute(), repr=False, compare=False)
    _factors: dict = field(default_factory=dict, repr=False, compare=False)
    _shared: dict = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def none(cls, routed: int, policy: str) -> "Moments":
        """Of no token: nothing is known of the input."""
        return cls(torch.empty(0, 0), torch.empty(0), 0, routed=routed, policy=policy)

    def rescaled(self, scales: Float[Tensor, "in"]) -> "Moments":
        """The moments of x / s, as they are after a transform divided the site's input by `scales`."""
        s = scales.to(self.hessian)
        largest = None if self.max_abs is None else self.max_abs / s
        products = s[:, None] * s[None, :]
        cross = None if self.cross is None else self.cross / products
        mean = self.mean_abs / s
        return Moments(self.hessian / products, mean, self.tokens, largest, cross, self.routed, self.policy)

    def drift(self) -> Float[Tensor, "in in"]:
        """D = 1/n Σ (x - x̃) x̃ᵀ = Cᵀ - H: what full precision has and this site lacks, as far as x̃ can tell.

        Raises:
            ValueError: C was not gathered.
        """
        if self.cross is None:
            raise ValueError("the solver needs C: give Moments their `cross`")
        return self.cross.T - self.hessian

    def once(self, key: Hashable, compute: Callable[[], Any]) -> Any:
        """What a solver computes for a site's first linear, for its other ones. The last key's value is kept."""
        if key not in self._shared:
            self._shared.clear()
            self._shared[key] = compute()
        return self._shared[key]

    def dead(self) -> Bool[Tensor, "in"]:
        """Columns whose input was always zero."""
        return self.hessian.diagonal() == 0

    def inverse_factor(self, damping: float, act_order: bool) -> "Factor":
        """Upper factor U of the damped inverse Hessian, shared by the site's linears (see linalg).

        Returns:
            U (in, in); the column order it is in (None: natural); the damping used.

        Raises:
            NotPositiveDefiniteError: see `linalg.inverse_cholesky`.
        """
        key = (damping, act_order)
        if key not in self._factors:
            self._remember(key, lambda: self._factor(damping, act_order))
        return self._factors[key]

    def _remember(self, key: tuple[float, bool], compute: Callable[[], "Factor"]) -> None:
        factor = self.keep(key, compute)
        self._factors.clear()  # one factor at a time: they are as large as H
        self._factors[key] = factor

    def forget_factors(self) -> None:
        """All linears of the site are solved: what they shared, which is as large as H, is not wanted any more."""
        self._factors.clear()
        self._shared.clear()

    def _factor(self, damping: float, act_order: bool) -> "Factor":
        order = self._order(act_order)
        with phase("factor", len(self.hessian)):
            factor, used = inverse_cholesky(self.hessian, damping, order)
        return factor, order, used

    def _order(self, act_order: bool) -> Int[Tensor, "in"] | None:
        """That columns are rounded in; None: as they are."""
        diagonal = torch.where(self.dead(), 1.0, self.hessian.diagonal())
        return torch.argsort(diagonal, descending=True) if act_order else None


def factor_together(sites: Sequence[Moments], damping: float, act_order: bool) -> None:
    """Find what `inverse_factor` will be asked for, of several sites of one width at once.

    Where that damping does not suffice a site is factored by itself; one that won't factor at all is left out.
    """
    key = (damping, act_order)
    missing = [site for site in sites if key not in site._factors]
    if len(missing) < 2:
        return

    @functools.cache
    def found() -> list[Factor | None]:
        orders = [site._order(act_order) for site in missing]
        with phase("factor", len(missing[0].hessian), len(missing)):
            factors = inverse_choleskys([site.hessian for site in missing], damping, orders)
        return [None if U is None else (U, order, damping) for U, order in zip(factors, orders, strict=True)]

    for i, site in enumerate(missing):
        with suppress(NotPositiveDefiniteError):
            site._remember(key, lambda i=i, site=site: found()[i] or site._factor(damping, act_order))


Factor = tuple[Float[Tensor, "in in"], Int[Tensor, "in"] | None, float]
"""U, the column order it is in, the damping used."""
Keep = Callable[[tuple[float, bool], Callable[[], Factor]], Factor]
"""(damping, act_order), how to compute that factor → the factor."""


class MomentsSum:
    """Streams activations into Σ x xᵀ, Σ |x| and max |x|, and Σ x̃ xᵀ; each token is counted once, padding never.

    Products are summed in float32, whatever the activations' precision: errors of 1e-7 (bfloat16: 3e-6), relative
    (benchmarks/moments.py), far under damping. The sum of few tokens is singular, but never indefinite beyond that.
    Where x̃ and x are one, so are H and C: bit for bit in bfloat16, to 1e-6 in float32.
    """

    def __init__(self, width: int, device: torch.device) -> None:
        self._width, self._device = width, device
        self._native: RankK | None = None  # sums of bfloat16 activations, where the CPU has an instruction for it
        self._xx: Tensor | None = None  # all others'
        self._cross: Tensor | None = None
        self._abs = torch.zeros(width, device=device)
        self._max = torch.zeros(width, device=device)
        self._tokens = 0

    @property
    def tokens(self) -> int:
        """How many have been counted."""
        return self._tokens

    def add(
        self,
        x: Float[Tensor, "*batch in"],
        mask: Bool[Tensor, "*batch"] | None,
        full: Float[Tensor, "*batch in"] | None = None,
    ) -> None:
        """Add a batch of inputs; `full`: what full precision has in their place."""
        x = _real(x, mask)
        if not len(x):
            return
        paired = () if full is None else (_real(full, mask),)
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
        """Add to the upper blocks of Σ x xᵀ, and to Σ |x|."""
        if self._xx is None:
            self._xx = self._zeros()
        if x.device.type == "cuda" and x.dtype != torch.float32:
            self._xx += torch.mm(x.T, x, out_dtype=torch.float32)
        else:
            x = x.float()
            for a in range(0, x.shape[1], BLOCK):
                b = min(a + BLOCK, x.shape[1])
                self._xx[a:b, a:].addmm_(x[:, a:b].T, x[:, a:])
        self._abs += x.abs().sum(0, dtype=torch.float32)

    def _add_cross(self, x: Float[Tensor, "tokens in"], full: Float[Tensor, "tokens in"]) -> None:
        """Add to Σ x̃ xᵀ."""
        if self._cross is None:
            self._cross = self._zeros()
        if x.device.type == "cuda" and x.dtype != torch.float32:
            self._cross += torch.mm(x.T, full, out_dtype=torch.float32)
        else:
            self._cross.addmm_(x.float().T, full.float())

    @phase("moments")
    def finish(self, where: str, ranks: Ranks = ONE) -> Moments:
        """Normalize by the token count; `where` names the site in errors. Of several `ranks`: of all their tokens.

        Raises:
            UserError: an activation was NaN or infinite, or no token was seen.
        """
        products, self._xx = self._xx, None
        cross, self._cross = self._cross, None
        if self._native is not None:
            own = torch.from_numpy(self._native.products)[: self._width, : self._width]
            products = own.contiguous() if products is None else products.add_(own)
            self._abs += torch.from_numpy(self._native.magnitude)[: self._width]
            if self._native.cross is not None:
                cross = torch.from_numpy(self._native.cross)[: self._width, : self._width].contiguous()
        products, cross = self._of_all(products, cross, ranks)
        if self._tokens == 0 or products is None:
            raise UserError("calibration holds no real token: check data.path and data.packing")
        if not torch.isfinite(self._abs).all() or (cross is not None and not torch.isfinite(cross).all()):
            raise UserError(
                f"non-finite activations enter {where}: try dtype=float32 compute_dtype=float32, or check the model"
            )
        cross = None if cross is None else cross.div_(self._tokens)
        mean = self._abs / self._tokens
        return Moments(_mirrored(products.div_(self._tokens)), mean, self._tokens, self._max, cross)

    def _of_all(
        self, products: Tensor | None, cross: Tensor | None, ranks: Ranks
    ) -> tuple[Tensor | None, Tensor | None]:
        """The sums over all ranks; one that saw no token here has none of its own."""
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


def _real(x: Float[Tensor, "*batch in"], mask: Bool[Tensor, "*batch"] | None) -> Float[Tensor, "tokens in"]:
    """The real tokens, one after the other."""
    if mask is None:
        return x.reshape(-1, x.shape[-1])
    return x[mask if mask.numel() != x.shape[:-1].numel() else mask.view(x.shape[:-1])]  # batch 1 tokens: MLA


def _mirrored(upper: Float[Tensor, "n n"]) -> Float[Tensor, "n n"]:
    """The symmetric matrix, in place, whose part on and above the diagonal is given."""
    for a in range(0, len(upper), BLOCK):
        b = min(a + BLOCK, len(upper))
        corner = upper[a:b, a:b].triu()
        upper[a:b, a:b] = corner + corner.triu(1).T
        upper[b:, a:b] = upper[a:b, b:].T
    return upper


def pack_symmetric(matrix: Float[Tensor, "n n"]) -> Float[Tensor, "packed"]:
    """A symmetric matrix as its blocks on and above the diagonal, for storing."""
    return torch.cat([matrix[a : a + BLOCK, a:].flatten() for a in range(0, len(matrix), BLOCK)])


def unpack_symmetric(packed: Float[Tensor, "packed"], n: int) -> Float[Tensor, "n n"]:
    """The inverse of `pack_symmetric`, bit for bit."""
    matrix, start = packed.new_empty(n, n), 0
    for a in range(0, n, BLOCK):
        rows, columns = min(BLOCK, n - a), n - a
        block = packed[start : start + rows * columns].view(rows, columns)
        matrix[a : a + rows, a:] = block
        matrix[a + rows :, a : a + rows] = block[:, rows:].T
        start += rows * columns
    return matrix
