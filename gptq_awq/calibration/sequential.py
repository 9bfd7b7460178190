"""Staged forward: true-sequential calibration (GPTQ, arXiv 2210.17323) for one forward per block.

A site's input depends only on the sites before it. So every batch's forward runs until it reaches the next site, adds
its input to that site's moments and pauses there. When all batches have arrived the site is solved, and they all go on
with its quantized weights. Usually true-sequential calibration repeats the forward once per site.

Each batch's forward runs in its own greenlet: an ordinary call of the block that can be left and re-entered. Paused
forwards hold several hidden states for every calibration token. Where these do not fit into memory, a forward is given
up once it has reached its site and begins anew for the next one: the same moments at several times the cost.

An expert is reached by some batches only, so a batch pauses at the next site that it does reach. Forwards that are
paused inside of the experts are kept even where activations are recomputed: they hold little, and experts are many.

Where the method compares with full precision, each batch has two forwards, of the quantized block and of a copy from
before it was solved. Both pause at the same sites, where their inputs are paired; within experts, a third one takes the
quantized router's choices (`_Batch`).
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from greenlet import getcurrent, greenlet
from torch import Tensor, nn
from torch.overrides import _get_current_function_mode_stack, _pop_mode, _push_mode

from gptq_awq.calibration.activations import Activations, BatchActivations
from gptq_awq.calibration.expert_masks import PickedRows
from gptq_awq.calibration.expert_policy import ExpertPolicy, Routes
from gptq_awq.calibration.moments import Moments, MomentsSum
from gptq_awq.errors import UserError
from gptq_awq.models.attention import faster_attention_of
from gptq_awq.models.blocks import hooks
from gptq_awq.models.linear import Site
from gptq_awq.runtime.profiling import phase

QUANTIZED, FULL, FORCED = "quantized", "full", "forced"
OnSite = Callable[[Site, Moments], None]
"""Called with a site and the moments of its input, once all batches wait there; it may change the site's weights."""


@torch.no_grad()
def staged_forward(
    block: nn.Module,
    index: int,
    sites: list[Site],
    activations: Activations,
    on_site: OnSite,
    keep: bool = True,
    full: nn.Module | None = None,
    policy: ExpertPolicy = ExpertPolicy(),  # noqa: B008 (frozen)
) -> None:
    """Advance the activations through `block`, calling `on_site` at each site once no batch is before it.

    Args:
        block: the block that forwards run through; `on_site` may change the weights of the site it is given.
        index: the block's number.
        sites: the block's sites in the order they run.
        activations: the block's inputs, replaced by its outputs.
        on_site: called once per site, in order, with the moments of its input.
        keep: hold every batch's activations while a site is solved; else compute them anew.
        full: the block in full precision, for the full-precision hidden states; moments then have a `cross`.
        policy: policy for experts that few tokens reach.

    Raises:
        UserError: a batch that doesn't pass an ordinary site, or passes sites in another order; experts that can't be
            called with the tokens of others, with `full`.
    """
    routes = Routes(block, sites, activations.batches, policy, f"block {index}", activations.ranks, full)
    stage = _Stage(sites, routes, f"block {index}")
    batches = [_Batch(batch, index, block, full, sites, routes) for batch in activations.batches]
    device, end = next(block.parameters()).device, len(sites)
    attention = faster_attention_of(block)  # only around forwards: it sees, and slows down, every call of torch's
    with stage.hooked(block, full, batches):
        for position, site in enumerate(sites):
            stage.open(position, MomentsSum(site.width, device))
            for batch in batches:
                with phase("forward"), attention:
                    batch.run(position, end)
                stage.add(batch)
                if not keep and batch.at < end and sites[batch.at].expert is None:
                    with attention:  # a forward ends with the modes that it had
                        batch.drop()
            on_site(site, stage.close())
        stage.open(end, None)
        for batch in batches:
            with phase("forward", *batch.activations.hidden.shape[:2]), attention:  # counted here, where it is done
                batch.run(end, end)


class _Forward(greenlet):
    """One batch's call of the block as a greenlet, which can be left and re-entered.

    Attributes:
        activations: the batch.
        role: QUANTIZED, FULL or FORCED, as `_Batch` has them.
        at: index of the site that it passed last, or is paused at; -1 before the first.
        x: input of the site that it is paused at.
        mask: True at real tokens of `x`; None when all are.
        earlier: inputs of sites that are called again, by the site's index.
        modes: torch's function modes outside of the forward.
    """

    def __init__(self, run: Callable[[], Any], batch: BatchActivations, role: str) -> None:
        super().__init__(run)
        self.activations, self.role, self.at = batch, role, -1
        self.x: Tensor | None = None
        self.mask: Tensor | None = None
        self.earlier: dict[int, list[Tensor]] = {}
        self.modes = _get_current_function_mode_stack()

    def wait(self) -> None:
        """Pause the forward and return to the caller of `switch`.

        A function mode that is handling a call is off during it; the caller gets all of its modes back.
        """
        off = self.modes[len(_get_current_function_mode_stack()) :]
        caller = self.parent
        assert caller is not None
        for mode in off:
            _push_mode(mode)
        try:
            caller.switch()
        finally:
            for _ in off:
                _pop_mode()


class _Batch:
    """One batch's forwards through a block: of the block itself, and of its full-precision copy, if there is one.

    A full-precision token may go to other experts than its quantized self. So its forward does not wait at experts;
    there, the quantized forward has another companion: full precision's experts, called with full precision's inputs
    and the quantized router's choices.

    Attributes:
        activations: the batch.
        at: index of the site that the forward is paused at; at the block's end, the number of sites.
        own: the quantized block's forward; None where it was given up.
        forced: full precision's experts on the tokens of the quantized ones; None outside of experts.
    """

    def __init__(
        self,
        batch: BatchActivations,
        index: int,
        block: nn.Module,
        full: nn.Module | None,
        sites: Sequence[Site],
        routes: Routes,
    ) -> None:
        self.activations, self.at = batch, -1
        self.own: _Forward | None = None
        self.forced: _Forward | None = None
        self._paired: _Forward | None = None
        self._index, self._block, self._full, self._sites, self._routes = index, block, full, sites, routes

    def run(self, position: int, end: int) -> None:
        """Run on to the first site, from index `position` on, that this batch reaches, or to the block's `end`."""
        if self.at > position or (self.at == position and self.own is not None):
            return
        own, paired = self._begin() if self.own is None else (self.own, self._paired)
        if paired is not None and not paired.dead and paired.at == own.at:
            paired.switch()
        own.switch()
        self.at = end if own.dead else own.at
        if self.at < end and self._sites[self.at].expert is not None:
            if paired is not None:
                self._force(self._sites[self.at])
        elif paired is not None:
            self._drop_forced()
            if (end if paired.dead else paired.at) != self.at:
                self.at = -1  # they part: `_Stage.add` raises, as no site is at -1

    def full_input(self) -> Tensor | None:
        """Full precision's input at the site that the forwards are paused at; None where there is none."""
        if self._paired is None:
            return None
        if self._sites[self.at].expert is None:
            return self._paired.x
        assert self.own is not None
        return self.own.x if self.forced is None else self.forced.x

    def drop(self) -> None:
        """Give the paused forwards up, with the activations that they hold; they begin anew at the next `run`."""
        self._drop_forced()
        for forward in (self.own, self._paired):
            if forward is not None:
                forward.throw()  # raises GreenletExit where it is paused
        self.own = self._paired = None

    def _force(self, site: Site) -> None:
        """Bring full precision's experts to the site that the quantized ones wait at.

        Experts that can't be called with the quantized router's choices are paired with themselves, as without drift.
        """
        if self.forced is None or self.forced.dead:
            self.forced = None
            run = self._routes.forced(site, self.activations.number)
            if run is None:
                return
            self.forced = _Forward(run, self.activations, FORCED)
        assert self.own is not None
        if self.forced.at < self.own.at:
            self.forced.switch()
        if self.forced.dead or self.forced.at != self.at or self.forced.x is None:
            raise UserError(
                f"block {self._index}: {site.name} is not passed by full precision's experts as by the quantized ones; "
                "choose a method that doesn't compare the two, such as method=gptq"
            )

    def _drop_forced(self) -> None:
        if self.forced is not None and not self.forced.dead:
            self.forced.throw()
        self.forced = None

    def _begin(self) -> tuple[_Forward, _Forward | None]:
        batch, index = self.activations, self._index

        def quantized() -> None:
            batch.pass_through(self._block, index)

        def full_precision() -> None:
            assert self._full is not None
            batch.pass_full_through(self._full, index)

        self._paired = None if self._full is None else _Forward(full_precision, batch, FULL)
        self.own = _Forward(quantized, batch, QUANTIZED)
        return self.own, self._paired


class _Stage:
    """The site that batches are gathering at, and the sum of its moments."""

    def __init__(self, sites: list[Site], routes: Routes, where: str) -> None:
        self._sites, self._routes, self._where = sites, routes, where
        self._position = 0
        self._sum: MomentsSum | None = None
        self._picked: PickedRows | None = None

    def open(self, position: int, total: MomentsSum | None) -> None:
        """Let forwards pass all sites before index `position`; `total` sums that site's moments."""
        self._position, self._sum = position, total

    def close(self) -> Moments:
        """The moments of the open site's input."""
        assert self._sum is not None
        return self._routes.finish(self._sites[self._position], self._sum)

    def add(self, batch: _Batch) -> None:
        """Add a batch's input to the moments of the open site.

        Raises:
            UserError: the batch did not reach the site, which is not an expert's.
        """
        assert self._sum is not None
        site = self._sites[self._position]
        if batch.at == self._position:
            assert batch.own is not None
            assert batch.own.x is not None
            self._sum.add(batch.own.x, batch.own.mask, batch.full_input())
        elif site.expert is None:
            raise UserError(f"{self._where}: not every calibration batch passes {site.name}, which is no expert's")

    @contextmanager
    def hooked(self, block: nn.Module, full: nn.Module | None, batches: Sequence[_Batch]) -> Iterator[None]:
        """Context in which each forward pauses at the first linear of the open site, or of a later one."""
        padded = any(batch.activations.mask is not None for batch in batches)
        pauses = hooks(
            module.get_submodule(site.linears[0]).register_forward_pre_hook(self._arrive(position, site))
            for module in ([block] if full is None or full is block else [block, full])
            for position, site in enumerate(self._sites)
        )
        with pauses, self._routes.hooked(_number), ExitStack() as stack:
            if padded and any(site.expert is not None for site in self._sites):
                self._picked = stack.enter_context(PickedRows())
            yield

    def _arrive(self, position: int, site: Site):
        """Pre-hook of a site's first linear: pause the forward there, unless the site is before the open one."""

        def hook(_module: nn.Module, args: tuple) -> None:
            forward = getcurrent()
            if not isinstance(forward, _Forward):
                return  # an expert called by `Routes`, outside of any batch's forward
            if forward.role == FULL and site.expert is not None:
                return
            earlier = forward.earlier.setdefault(position, []) if site.calls > 1 else []
            if len(earlier) + 1 < site.calls:
                earlier.append(args[0])
                return
            if position <= forward.at:
                raise UserError(
                    f"{self._where}: passes {site.name} after {self._sites[forward.at].name}, which a few tokens "
                    "showed in another order; its inputs would be lost"
                )
            forward.at = position
            if site.expert is not None and forward.role == QUANTIZED:
                self._routes.check(site, args[0], forward.activations.number)
            if position < self._position:
                return
            mask = None if forward.role == FORCED else self._mask(site, args[0], forward.activations)
            forward.x, forward.mask = args[0], mask
            if earlier:
                forward.x, forward.mask = _joined([*earlier, args[0]], forward.mask)
                earlier.clear()
            forward.wait()
            forward.x = forward.mask = None

        return hook

    def _mask(self, site: Site, x: Tensor, batch: BatchActivations) -> Tensor | None:
        if batch.mask is None or site.expert is None:
            return batch.mask
        assert self._picked is not None
        return self._picked.mask(site, x, batch.mask, self._where)


def _joined(inputs: Sequence[Tensor], mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The rows of a site's inputs of several calls, and the mask of them all."""
    rows = torch.cat([x.reshape(-1, x.shape[-1]) for x in inputs])
    return rows, None if mask is None else torch.cat([mask.flatten()] * len(inputs))


def _number() -> int | None:
    """Number of the batch whose forward is running; None outside of forwards, and within what is forced."""
    forward = getcurrent()
    return forward.activations.number if isinstance(forward, _Forward) and forward.role != FORCED else None


@torch.no_grad()
def observe_forward(
    block: nn.Module,
    index: int,
    sites: list[Site],
    activations: Activations,
    advance: bool,
    policy: ExpertPolicy = ExpertPolicy(),  # noqa: B008 (frozen)
) -> list[Moments]:
    """The moments of every site's input, from one forward of every batch through an unchanged block.

    Args:
        block: the block that forwards run through.
        index: the block's number.
        sites: the block's sites in the order they run.
        activations: the block's inputs; with `advance`, they are replaced by its outputs.
        advance: replace the activations.
        policy: policy for experts that few tokens reach.

    Raises:
        UserError: an ordinary site that no token reaches; non-finite activations; experts that can't be called alone.
    """
    device = next(block.parameters()).device
    sums = [MomentsSum(site.width, device) for site in sites]
    routes = Routes(block, sites, activations.batches, policy, f"block {index}", activations.ranks)
    padded = any(batch.mask is not None for batch in activations.batches)
    picked = PickedRows() if padded and any(site.expert is not None for site in sites) else None
    now = activations.batches[0]

    def add(site: Site, total: MomentsSum):
        def hook(_module: nn.Module, args: tuple) -> None:
            mask = now.mask
            if site.expert is not None:
                routes.check(site, args[0], now.number)
                mask = picked.mask(site, args[0], mask, f"block {index}") if picked and mask is not None else None
            total.add(args[0], mask)

        return hook

    handles = (
        block.get_submodule(site.linears[0]).register_forward_pre_hook(add(site, total))
        for site, total in zip(sites, sums, strict=True)
    )
    with hooks(handles), routes.hooked(lambda: now.number), faster_attention_of(block), picked or nullcontext():
        for batch in activations.batches:
            now = batch
            with phase("forward", *batch.hidden.shape[:2]):
                if advance:
                    batch.pass_through(block, index)
                else:
                    batch.calls[index].run(block, batch.hidden)
    return [routes.finish(site, total) for site, total in zip(sites, sums, strict=True)]
