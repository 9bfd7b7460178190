"""Calibration policy for experts that few tokens reach.

The moments of an expert that fewer than `min_tokens` calibration tokens reach say little of its inputs. The policies:

route    all calibration tokens are sent through that expert; its moments are of all of them
shared   its first linears take the moments of all tokens that enter the experts; its later linears, whose inputs no
         other expert has, keep the moments of the tokens that reached it
rtn      it is rounded to nearest
keep     its moments are of the tokens that reached it, however few

An expert that no token reaches, and whose moments the policy does not replace, is rounded to nearest. The ledger names
what was done.
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

import torch
from annotated_types import Ge
from jaxtyping import Bool, Float
from torch import Tensor, nn

from gptq_awq.calibration.activations import BatchActivations
from gptq_awq.calibration.moments import Moments, MomentsSum
from gptq_awq.errors import UserError
from gptq_awq.models.blocks import hooks
from gptq_awq.models.experts import Experts, holder
from gptq_awq.models.linear import Site, is_linear
from gptq_awq.numerics.distributed import ONE, Ranks
from gptq_awq.runtime.options import checked_dataclass
from gptq_awq.runtime.profiling import phase

log = logging.getLogger(__name__)


@checked_dataclass
class ExpertPolicy:
    """The policy for experts that fewer than `min_tokens` calibration tokens reach.

    Attributes:
        policy: "route", "shared", "rtn" or "keep", as the module's docstring explains them.
        min_tokens: number of routed tokens from which on an expert is calibrated like any other linear.

    Raises:
        UserError: an unknown policy; a `min_tokens` that is no whole number from 0 on.
    """

    policy: Literal["route", "shared", "rtn", "keep"] = "route"
    min_tokens: Annotated[int, Ge(0)] = 128


class _ReachedError(Exception):
    """Ends a forward that has reached the site it was run for."""


Arguments = tuple[tuple, dict[str, Any]]
"""Positional and keyword arguments of one call."""


class Routes:
    """The inputs of a block's experts, batch by batch, for the moments of experts that too few tokens reach.

    As long as the block is worked on it holds the arguments that every batch calls the experts with: one hidden state
    per token.

    Args:
        block: the block that forwards run through.
        sites: the block's sites.
        batches: all batches; of several ranks, those of this one.
        policy: which experts have too few tokens, and what calibrates them.
        where: names the block in errors.
        ranks: the processes whose tokens count together.
        full: the block in full precision, where its inputs are paired with the quantized block's.
    """

    def __init__(
        self,
        block: nn.Module,
        sites: Sequence[Site],
        batches: Sequence[BatchActivations],
        policy: ExpertPolicy,
        where: str,
        ranks: Ranks = ONE,
        full: nn.Module | None = None,
    ) -> None:
        self._full = full
        self._full_calls: dict[str, dict[int, Arguments]] = {}
        self._block, self._policy, self._where, self._ranks = block, policy, where, ranks
        self._masks = {batch.number: batch.mask for batch in batches}
        self._batches = {batch.number: batch for batch in batches}
        self._experts = {site.linears: _Expert.of(block, site) for site in sites if site.expert is not None}
        self._calls: dict[str, dict[int, Arguments]] = {}
        self._shared: dict[str, Moments] = {}
        self._told: set[str] = set()  # owners whose experts can't be made up for, which was said
        self._rows: dict[str, bool] = {}  # owner → whether its experts read rows of its input, one for each token
        self._entries: set[tuple[str, ...]] = set()  # linears of each expert's first site
        known: set[tuple[str, int]] = set()
        for linears, expert in self._experts.items():
            if (expert.owner, expert.number) not in known:
                self._entries.add(linears)
            known.add((expert.owner, expert.number))

    def hooked(self, number: Callable[[], int | None]) -> AbstractContextManager[None]:
        """Context in which every batch's arguments of the experts are kept, where they may be wanted.

        `number` returns the number of the batch whose forward is running; None outside of such a forward.
        """

        def keep(kept: dict[str, dict[int, Arguments]], path: str):
            calls = kept.setdefault(path, {})

            def hook(_module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
                batch = number()
                if batch is not None:
                    calls[batch] = (args, kwargs)

            return hook

        wanted = self._policy.policy in ("route", "shared") or self._full is not None
        paths = {path for each in self._experts.values() for path in each.above} if wanted else set()
        blocks = [(self._block, self._calls)]
        blocks += [(self._full, self._full_calls)] if self._full not in (None, self._block) else []
        return hooks(
            block.get_submodule(path).register_forward_pre_hook(keep(kept, path), with_kwargs=True)
            for block, kept in blocks
            for path in paths
        )

    def forced(self, site: Site, number: int) -> Callable[[], Any] | None:
        """A call of full precision's experts, on its own inputs, with the choices of the quantized router.

        None for experts that are not called together, with one row for each token; the log says so.
        """
        owner = self._experts[site.linears].owner
        own, full = self._calls.get(owner, {}).get(number), self._full_calls.get(owner, {}).get(number)
        if own is None or full is None or self._full is None or not self._rows.get(owner, False):
            if owner not in self._told:
                log.warning("%s, %s: these experts are solved without drift from full precision", self._where, owner)
                self._told.add(owner)
            return None
        module, (args, kwargs), inputs = self._full.get_submodule(owner), own, _first_tensor(full)
        given = _first_tensor(own)
        args = tuple(inputs if each is given else each for each in args)
        kwargs = {key: inputs if each is given else each for key, each in kwargs.items()}
        return lambda: module(*args, **kwargs)

    def finish(self, site: Site, total: MomentsSum) -> Moments:
        """The moments of a site's input, as the policy has it for an expert that few tokens reached.

        Moments of no token mean that the site is rounded to nearest.

        Raises:
            UserError: an ordinary site that no token reaches; experts that can't be called one by one.
        """
        where, ranks, policy = f"{self._where}, {site.name}", self._ranks, self._policy.policy
        if site.expert is None:
            return total.finish(where, ranks)
        routed = int(ranks.sum_(torch.tensor(total.tokens)))
        if routed >= max(1, self._policy.min_tokens):
            return replace(total.finish(where, ranks), routed=routed)
        try:
            if policy in ("route", "shared") and site.linears in self._entries:
                return replace(self._moments_of_all_tokens(site), routed=routed, policy=policy)
            if policy == "route":
                return replace(self._moments_of_rerouted(site), routed=routed, policy=policy)
        except UserError as error:
            owner = self._experts[site.linears].owner
            if owner not in self._told:
                log.warning("%s: so they keep the moments of the tokens that reach them", error)
                self._told.add(owner)
        if policy == "rtn" or not routed:
            return Moments.none(routed, "rtn")
        return replace(total.finish(where, ranks), routed=routed, policy="keep")

    def check(self, site: Site, x: Float[Tensor, "rows in"], number: int) -> None:
        """Check, once per group of experts, that they read rows of the group's input, as "route" and "shared" suppose.

        Args:
            site: an expert's site; only an expert's first one is looked at.
            x: its input in the forward of batch `number`.
            number: number of the batch.
        """
        expert = self._experts[site.linears]
        if expert.owner in self._rows or site.linears not in self._entries or not len(x) or not self._calls:
            return
        source = self._find_input(expert, number, self._calls)
        self._rows[expert.owner] = (
            source is not None
            and source.shape == (self._batches[number].hidden.shape[:2].numel(), x.shape[-1])
            and bool((source == x.reshape(-1, x.shape[-1])[0]).all(-1).any())
        )

    def _moments_of_all_tokens(self, site: Site) -> Moments:
        """The moments of all tokens that enter the experts: one object for all experts, which share its factor too."""
        expert = self._experts[site.linears]
        if expert.owner not in self._shared:
            total = MomentsSum(site.width, next(self._block.parameters()).device)
            for number, mask in self._masks.items():
                rows = [_real_tokens(self._input(expert, number, calls), mask) for calls in self._each_calls()]
                total.add(rows[0], None, *rows[1:])
            self._shared[expert.owner] = total.finish(f"{self._where}, {site.name}", self._ranks)
        return self._shared[expert.owner]

    def _each_calls(self) -> list[dict[str, dict[int, Arguments]]]:
        """Arguments of the experts in the quantized block and, where the two are paired, in full precision."""
        return [self._calls] if self._full is None else [self._calls, self._full_calls]

    def _moments_of_rerouted(self, site: Site) -> Moments:
        """The moments of an expert's later site, with all calibration tokens sent through that expert."""
        total = MomentsSum(site.width, next(self._block.parameters()).device)
        blocks = [self._block] if self._full is None else [self._block, self._full]
        for number in self._masks:
            with phase("forward"):
                rows = [
                    self._inner_input(block, calls, site, number)
                    for block, calls in zip(blocks, self._each_calls(), strict=True)
                ]
            total.add(rows[0], None, *rows[1:])
        return total.finish(f"{self._where}, {site.name}", self._ranks)

    def _inner_input(self, block: nn.Module, calls: dict[str, dict[int, Arguments]], site: Site, number: int) -> Tensor:
        """Input of an expert's later site, as all tokens of batch `number` that enter the experts meet it."""
        expert = self._experts[site.linears]
        hidden, mask = self._input(expert, number, calls), self._masks[number]
        seen: list[Tensor] = []

        def reached(_module: nn.Module, args: tuple) -> None:
            seen.append(args[0].reshape(-1, site.width))
            raise _ReachedError

        with hooks([block.get_submodule(site.linears[0]).register_forward_pre_hook(reached)]), suppress(_ReachedError):
            if expert.alone is not None:
                block.get_submodule(expert.alone)(_real_tokens(hidden, mask))
            else:
                owner, (args, kwargs) = block.get_submodule(expert.owner), calls[expert.owner][number]
                for choices in (1, 2):  # some can't be called with a single choice for each token
                    own, named = _routed_to(expert.number, args, kwargs, hidden, mask, choices)
                    with suppress(ValueError, IndexError, RuntimeError):
                        owner(*own, **named)
        if not seen:
            raise UserError(
                f"{self._where}: {expert.owner} can't be called for one expert alone; "
                "choose experts.policy=shared, rtn or keep"
            )
        return seen[0]

    def _input(
        self, expert: "_Expert", number: int, calls: dict[str, dict[int, Arguments]]
    ) -> Float[Tensor, "tokens width"]:
        """Hidden states of all tokens of batch `number` that enter the experts, padding included.

        Raises:
            UserError: the experts do not read rows of it.
        """
        hidden = self._find_input(expert, number, calls)
        if hidden is None or not self._rows.get(expert.owner, False):
            raise UserError(
                f"{self._where}: the experts of {expert.owner} do not read rows of what enters it, so few tokens "
                f"can't be made up for with experts.policy={self._policy.policy}; choose rtn or keep"
            )
        return hidden

    def _find_input(
        self, expert: "_Expert", number: int, calls: dict[str, dict[int, Arguments]]
    ) -> Float[Tensor, "tokens width"] | None:
        """Hidden states that batch `number` calls the experts with; None where no module above them was called."""
        for path in expert.above:
            call = calls.get(path, {}).get(number)
            if call is not None:
                hidden = _first_tensor(call)
                return hidden.reshape(-1, hidden.shape[-1])
        return None


@dataclass(frozen=True)
class _Expert:
    """Names of an expert's modules within its block.

    Attributes:
        number: index of the expert.
        alone: the expert's own module; None where its weights are slices of parameters that it shares with others.
        owner: the module that holds all experts.
        above: modules whose input may be the experts' input, innermost first.
    """

    number: int
    alone: str | None
    owner: str
    above: tuple[str, ...]

    @classmethod
    def of(cls, block: nn.Module, site: Site) -> "_Expert":
        """The expert of a site, by the names of the site's linears."""
        parts = site.linears[0].split(".")
        hole = max(i for i, part in enumerate(parts) if part == str(site.expert))
        above = [".".join(parts[:i]) for i in range(hole, 0, -1)]
        own = ".".join(parts[: hole + 1])
        if is_linear(block.get_submodule(own)):
            fused = isinstance(block.get_submodule(above[0]), Experts)
            above = above[1:] if fused and len(above) > 1 else above
            owner = holder(block, above[0])
            return cls(int(site.expert or 0), None, owner, (owner,))
        return cls(int(site.expert or 0), own, above[0], tuple(above))


def _first_tensor(call: Arguments) -> Tensor:
    """The first tensor among a call's arguments: hidden states."""
    return next(t for t in (*call[0], *call[1].values()) if isinstance(t, Tensor))


def _real_tokens(
    x: Float[Tensor, "tokens width"], mask: Bool[Tensor, "batch tokens"] | None
) -> Float[Tensor, "real width"]:
    return x if mask is None else x[mask.flatten()]


def _routed_to(
    expert: int, args: tuple, kwargs: Mapping[str, Any], hidden: Tensor, mask: Tensor | None, choices: int
) -> tuple[tuple, dict[str, Any]]:
    """A call's arguments with all real tokens routed to one expert, as often as `choices`, in place of the router's."""
    chosen = [t for t in _integers((*args, *kwargs.values())) if t.dim() == 2 and len(t) == len(hidden)]
    shape = chosen[0].shape if chosen else None

    def changed(value: Any) -> Any:
        if not isinstance(value, Tensor) or value.dim() != 2 or len(value) != len(hidden):
            return value
        if value.shape == shape:
            value = value[:, :choices] if value.is_floating_point() else torch.full_like(value[:, :choices], expert)
        return _real_tokens(value, mask)

    return tuple(map(changed, args)), {key: changed(value) for key, value in kwargs.items()}


def _integers(values: Sequence[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor) and not value.is_floating_point():
            yield value
