"""Experts that few tokens reach, and the declared policy for what calibrates them.

An expert that fewer than `min_tokens` calibration tokens reach knows little of its inputs. What is done then:

route    all calibration tokens go through it, called by its number alone; its moments are of all of them
shared   its first linears borrow the moments of all tokens that enter the experts; later ones, whose inputs no other
         expert has, keep what there is
rtn      it is rounded to nearest
keep     what there is serves, however little

Without a single token, and with nothing borrowed, it is rounded to nearest. The ledger names what was done.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from gptq_awq.calibration.activations import BatchActivations
from gptq_awq.calibration.moments import Moments, MomentsSum
from gptq_awq.errors import UserError
from gptq_awq.models.blocks import hooks
from gptq_awq.models.experts import Experts
from gptq_awq.models.linear import Site, is_linear
from gptq_awq.numerics.distributed import ONE, Ranks
from gptq_awq.runtime.profiling import phase


@dataclass(frozen=True)
class ExpertPolicy:
    """What calibrates an expert that few tokens reach.

    Attributes:
        policy: route, shared, rtn or keep, see the module.
        min_tokens: fewer are few.

    Raises:
        UserError: another word, a negative number.
    """

    policy: str = "route"
    min_tokens: int = 128

    def __post_init__(self) -> None:
        if self.policy not in ("route", "shared", "rtn", "keep"):
            raise UserError(f"experts.policy={self.policy}: choose route, shared, rtn or keep")
        if isinstance(self.min_tokens, bool) or not isinstance(self.min_tokens, int) or self.min_tokens < 0:
            raise UserError(f"experts.min_tokens={self.min_tokens}: give a whole number from 0 on")


def no_pairing(who: str) -> UserError:
    """What to say where full precision would have to go beside the quantized model, token by token."""
    return UserError(
        f"{who} compares every token with full precision, which sends it to other experts; mixtures of experts need a "
        "method without that, such as method=gptq"
    )


class _ReachedError(Exception):
    """A forward has come as far as it was wanted to."""


Arguments = tuple[tuple, dict[str, Any]]


class Routes:
    """What enters a block's experts, batch by batch: for those that too few tokens reach by themselves.

    It holds what every batch's experts are called with, one hidden state per token, as long as the block is worked on.

    Args:
        block: the block as it is computed with.
        sites: the block's.
        activations: all batches, or this rank's.
        policy: see `ExpertPolicy`.
        where: names the block in errors.
        ranks: whose tokens count together.
    """

    def __init__(
        self,
        block: nn.Module,
        sites: Sequence[Site],
        batches: Sequence[BatchActivations],
        policy: ExpertPolicy,
        where: str,
        ranks: Ranks = ONE,
    ) -> None:
        self._block, self._policy, self._where, self._ranks = block, policy, where, ranks
        self._masks = {batch.number: batch.mask for batch in batches}
        self._batches = {batch.number: batch for batch in batches}
        self._experts = {site.linears: _Expert.of(block, site) for site in sites if site.expert is not None}
        self._calls: dict[str, dict[int, Arguments]] = {}
        self._shared: dict[str, Moments] = {}
        self._rows: dict[str, bool] = {}  # owner → whether its experts read rows of what enters it, one for each token
        self._entries: set[tuple[str, ...]] = set()
        known: set[tuple[str, int]] = set()
        for linears, expert in self._experts.items():
            if (expert.owner, expert.number) not in known:
                self._entries.add(linears)
            known.add((expert.owner, expert.number))

    def hooked(self, number: Callable[[], int | None]):
        """Within: what enters the experts is kept; `number` says whose batch's forward is running, if one is."""

        def keep(path: str):
            calls = self._calls.setdefault(path, {})

            def hook(_module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
                batch = number()
                if batch is not None:
                    calls[batch] = (args, kwargs)

            return hook

        wanted = self._policy.policy in ("route", "shared")
        paths = {path for each in self._experts.values() for path in each.above} if wanted else set()
        return hooks(
            self._block.get_submodule(path).register_forward_pre_hook(keep(path), with_kwargs=True) for path in paths
        )

    def finish(self, site: Site, total: MomentsSum) -> Moments:
        """The moments of a site's input, by the policy where few tokens have come; of no token: round to nearest.

        Raises:
            UserError: an ordinary site that no token reaches; experts that can't be called by their number.
        """
        where, ranks, policy = f"{self._where}, {site.name}", self._ranks, self._policy.policy
        if site.expert is None:
            return total.finish(where, ranks)
        routed = int(ranks.sum_(torch.tensor(total.tokens)))
        if routed >= max(1, self._policy.min_tokens):
            return replace(total.finish(where, ranks), routed=routed)
        entry = site.linears in self._entries
        if policy in ("route", "shared") and entry:
            return replace(self._of_all(site), routed=routed, policy=policy)
        if policy == "route":
            return replace(self._through(site), routed=routed, policy=policy)
        if policy == "rtn" or not routed:
            return Moments.none(routed, "rtn")
        return replace(total.finish(where, ranks), routed=routed, policy="keep")

    def check(self, site: Site, x: Float[Tensor, "rows in"], number: int) -> None:
        """Look, once, whether experts read rows of what enters them, as borrowing supposes."""
        expert = self._experts[site.linears]
        if expert.owner in self._rows or site.linears not in self._entries or not len(x) or not self._calls:
            return
        source = self._entered(expert, number)
        self._rows[expert.owner] = (
            source is not None
            and source.shape == (self._batches[number].hidden.shape[:2].numel(), x.shape[-1])
            and bool((source == x.reshape(-1, x.shape[-1])[0]).all(-1).any())
        )

    def _of_all(self, site: Site) -> Moments:
        """Of all tokens that enter the experts; one and the same for all of them, its factor too."""
        expert = self._experts[site.linears]
        if expert.owner not in self._shared:
            total = MomentsSum(site.width, next(self._block.parameters()).device)
            for number, mask in self._masks.items():
                total.add(_real(self._entering(expert, number), mask), None)
            self._shared[expert.owner] = total.finish(f"{self._where}, {site.name}", self._ranks)
        return self._shared[expert.owner]

    def _through(self, site: Site) -> Moments:
        """Of a later site of an expert, when all tokens go through that expert."""
        total = MomentsSum(site.width, next(self._block.parameters()).device)

        def reached(_module: nn.Module, args: tuple) -> None:
            total.add(args[0].reshape(-1, site.width), None)
            raise _ReachedError

        with hooks([self._block.get_submodule(site.linears[0]).register_forward_pre_hook(reached)]):
            for number in self._masks:
                with phase("forward"):
                    self._call(site, number)
        return total.finish(f"{self._where}, {site.name}", self._ranks)

    def _call(self, site: Site, number: int) -> None:
        """Call one expert with all of a batch's tokens, up to the site."""
        expert = self._experts[site.linears]
        hidden, mask = self._entering(expert, number), self._masks[number]
        try:
            if expert.alone is not None:
                self._block.get_submodule(expert.alone)(_real(hidden, mask))
            else:
                args, kwargs = self._calls[expert.owner][number]
                args, kwargs = _by_number(args, kwargs, hidden, mask, expert.number)
                self._block.get_submodule(expert.owner)(*args, **kwargs)
        except _ReachedError:
            return
        raise UserError(
            f"{self._where}: {expert.owner} can't be called for one expert alone; "
            "choose experts.policy=shared, rtn or keep"
        )

    def _entering(self, expert: "_Expert", number: int) -> Float[Tensor, "tokens width"]:
        """What enters the experts, of one batch.

        Raises:
            UserError: it is not what they read.
        """
        hidden = self._entered(expert, number)
        if hidden is None or not self._rows.get(expert.owner, False):
            raise UserError(
                f"{self._where}: the experts of {expert.owner} do not read rows of what enters it, so few tokens "
                f"can't be made up for with experts.policy={self._policy.policy}; choose rtn or keep"
            )
        return hidden

    def _entered(self, expert: "_Expert", number: int) -> Float[Tensor, "tokens width"] | None:
        """What one batch calls the experts with; None where nobody calls them."""
        for path in expert.above:
            call = self._calls.get(path, {}).get(number)
            if call is not None:
                hidden = next(t for t in (*call[0], *call[1].values()) if isinstance(t, Tensor))
                return hidden.reshape(-1, hidden.shape[-1])
        return None


@dataclass(frozen=True)
class _Expert:
    """Where in a block an expert is.

    Attributes:
        number: of the expert.
        alone: the expert's own module; None where its weights are slices of parameters that it shares with others.
        owner: the module that holds all experts.
        above: modules that what enters the experts may enter, innermost first.
    """

    number: int
    alone: str | None
    owner: str
    above: tuple[str, ...]

    @classmethod
    def of(cls, block: nn.Module, site: Site) -> "_Expert":
        parts = site.linears[0].split(".")
        hole = max(i for i, part in enumerate(parts) if part == str(site.expert))
        above = [".".join(parts[:i]) for i in range(hole, 0, -1)]
        own = ".".join(parts[: hole + 1])
        if is_linear(block.get_submodule(own)):
            fused = isinstance(block.get_submodule(above[0]), Experts)
            above = above[1:] if fused and len(above) > 1 else above
            return cls(int(site.expert or 0), None, above[0], tuple(above[:1]))
        return cls(int(site.expert or 0), own, above[0], tuple(above))


def _real(x: Float[Tensor, "tokens width"], mask: Bool[Tensor, "batch tokens"] | None) -> Float[Tensor, "real width"]:
    return x if mask is None else x[mask.flatten()]


def _by_number(
    args: tuple, kwargs: Mapping[str, Any], hidden: Tensor, mask: Tensor | None, expert: int
) -> tuple[tuple, dict[str, Any]]:
    """Arguments that send all real tokens to one expert, in place of the tokens' own choices (tokens, k)."""
    chosen = [t for t in _integers((*args, *kwargs.values())) if t.dim() == 2 and len(t) == len(hidden)]
    shape = chosen[0].shape if chosen else None

    def changed(value: Any) -> Any:
        if not isinstance(value, Tensor) or value.dim() != 2 or len(value) != len(hidden):
            return value
        if value.shape == shape:
            value = value[:, :1] if value.is_floating_point() else torch.full_like(value[:, :1], expert)
        return _real(value, mask)

    return tuple(map(changed, args)), {key: changed(value) for key, value in kwargs.items()}


def _integers(values: Sequence[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor) and not value.is_floating_point():
            yield value
