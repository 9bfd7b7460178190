"""Staged forward: statistics of every site on quantized inputs, for one forward per block.

A site's input depends only on the sites before it. So every batch's forward pass runs until it reaches the
next site, adds its input to that site's moments and pauses there. When all batches have arrived the site is
solved, and they all go on with its quantized weights. This is true-sequential calibration without the
repeated forwards (one per site) that it usually costs.

Each batch's forward runs in its own greenlet: an ordinary call of the block that can be left and re-entered. What
waiting batches hold is large: several hidden states for every calibration token. Where that doesn't fit, forwards
are given up once they have arrived and begin anew for the next site, for the same moments at several times the cost.

Experts are reached by some batches only, so a batch waits at the next gate that it does reach. What waits inside of the
experts is kept even where activations are recomputed: it is small, and experts are many.

Where the method compares with full precision, each batch has two forwards, of the quantized block and of a copy from
before it was solved. They wait at the same sites, so their inputs are paired there, and only there.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext

import torch
from greenlet import getcurrent, greenlet
from torch import Tensor, nn
from torch.overrides import _get_current_function_mode_stack, _pop_mode, _push_mode

from gptq_awq.calibration.activations import Activations, BatchActivations
from gptq_awq.calibration.expert_masks import PickedRows
from gptq_awq.calibration.expert_policy import ExpertPolicy, Routes, no_pairing
from gptq_awq.calibration.moments import Moments, MomentsSum
from gptq_awq.errors import UserError
from gptq_awq.models.attention import faster_attention_of
from gptq_awq.models.blocks import hooks
from gptq_awq.models.linear import Site
from gptq_awq.runtime.profiling import phase

OnSite = Callable[[Site, Moments], None]


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
    """Advance the activations through `block`, calling `on_site` when all batches wait at a site, or further on.

    Args:
        block: the block as it is computed with; `on_site` may change the weights of the site it is given.
        index: the block's number.
        sites: the block's sites in the order they run.
        activations: replaced by the block's outputs.
        on_site: called once per site, in order, with the moments of its input.
        keep: hold every batch's activations while a site is solved; else compute them anew.
        full: the block in full precision, for the activations' full-precision states; moments have a `cross` then.
        policy: for experts that few tokens reach.

    Raises:
        UserError: a batch that doesn't pass an ordinary site, or passes sites in another order; experts, with `full`.
    """
    if full is not None and any(site.expert is not None for site in sites):
        raise no_pairing(f"block {index}: the method")
    routes = Routes(block, sites, activations.batches, policy, f"block {index}", activations.ranks)
    stage = _Stage(sites, routes, f"block {index}")
    batches = [_Batch(batch, index, block, full) for batch in activations.batches]
    device, end = next(block.parameters()).device, len(sites)
    with stage.hooked(block, full, batches), faster_attention_of(block):
        for position, site in enumerate(sites):
            stage.open(position, MomentsSum(site.width, device))
            for batch in batches:
                with phase("forward"):
                    batch.run(position, end)
                stage.add(batch)
                if not keep and batch.at < end and sites[batch.at].expert is None:
                    batch.drop()
            on_site(site, stage.close())
        stage.open(end, None)
        for batch in batches:
            with phase("forward", *batch.activations.hidden.shape[:2]):  # counted here, where it is done
                batch.run(end, end)


class _Forward(greenlet):
    """A call of the block that can be left and re-entered.

    Attributes:
        batch: the batch's.
        at: number of the gate that it passed last, or waits at.
        x, mask: what it brings to the gate where it waits.
        modes: torch's function modes, as they are outside.
    """

    def __init__(self, run: Callable[[], None], batch: BatchActivations) -> None:
        super().__init__(run)
        self.activations, self.at = batch, -1
        self.x: Tensor | None = None
        self.mask: Tensor | None = None
        self.modes = _get_current_function_mode_stack()

    def wait(self) -> None:
        """Let the others go on. A mode that is handling a call is off meanwhile: it is on for them."""
        off = self.modes[len(_get_current_function_mode_stack()) :]
        waiting_room = self.parent
        assert waiting_room is not None
        for mode in off:
            _push_mode(mode)
        try:
            waiting_room.switch()
        finally:
            for _ in off:
                _pop_mode()


class _Batch:
    """One batch's way through the block: in full precision, where that is asked for, and then quantized.

    Attributes:
        at: number of the gate that it has come to; one more than the last at the end.
        forwards: that wait there; none where they are given up.
    """

    def __init__(self, batch: BatchActivations, index: int, block: nn.Module, full: nn.Module | None) -> None:
        self.activations, self.at = batch, -1
        self.forwards: list[_Forward] = []
        self._call, self._block, self._full = batch.calls[index], block, full

    def run(self, position: int, end: int) -> None:
        """Go on to the first gate from `position` on that this batch reaches, or to the end."""
        if self.at > position or (self.at == position and self.forwards):
            return
        self.forwards = self.forwards or self._begin()
        for forward in self.forwards:
            forward.switch()
        places = {end if forward.dead else forward.at for forward in self.forwards}
        self.at = places.pop() if len(places) == 1 else -1  # no gate: an error, as no site is passed then

    def drop(self) -> None:
        """Give the activations up, to be computed anew."""
        for forward in self.forwards:
            forward.throw()  # ends it
        self.forwards = []

    def _begin(self) -> list[_Forward]:
        batch, call = self.activations, self._call

        def quantized() -> None:
            batch.hidden = call.run(self._block, batch.hidden)

        def full_precision() -> None:
            assert self._full is not None
            assert batch.full is not None
            batch.full = call.run(self._full, batch.full)

        runs = [quantized] if self._full is None else [full_precision, quantized]
        return [_Forward(run, batch) for run in runs]


class _Stage:
    """The site that batches are gathering at."""

    def __init__(self, sites: list[Site], routes: Routes, where: str) -> None:
        self._sites, self._routes, self._where = sites, routes, where
        self._position = 0
        self._sum: MomentsSum | None = None
        self._picked: PickedRows | None = None

    def open(self, position: int, total: MomentsSum | None) -> None:
        self._position, self._sum = position, total

    def close(self) -> Moments:
        assert self._sum is not None
        return self._routes.finish(self._sites[self._position], self._sum)

    def add(self, batch: _Batch) -> None:
        """Count a batch in that has come to the open site."""
        assert self._sum is not None
        site = self._sites[self._position]
        if batch.at == self._position:
            *full, own = batch.forwards
            assert own.x is not None
            self._sum.add(own.x, own.mask, full[0].x if full else None)
        elif site.expert is None:
            raise UserError(f"{self._where}: not every calibration batch passes {site.name}, which is no expert's")

    @contextmanager
    def hooked(self, block: nn.Module, full: nn.Module | None, batches: Sequence[_Batch]) -> Iterator[None]:
        """Within: each forward stops at the first linear of the open site, or of one after it."""
        padded = any(batch.activations.mask is not None for batch in batches)
        gates = hooks(
            module.get_submodule(site.linears[0]).register_forward_pre_hook(self._arrive(position, site))
            for module in ([block] if full is None or full is block else [block, full])
            for position, site in enumerate(self._sites)
        )
        with gates, self._routes.hooked(_number), ExitStack() as stack:
            if padded and any(site.expert is not None for site in self._sites):
                self._picked = stack.enter_context(PickedRows())
            yield

    def _arrive(self, position: int, site: Site):
        def hook(_module: nn.Module, args: tuple) -> None:
            forward = getcurrent()
            if not isinstance(forward, _Forward):
                return  # an expert that is called by its number
            if position <= forward.at:
                raise UserError(
                    f"{self._where}: passes {site.name} after {self._sites[forward.at].name}, which a few tokens "
                    "showed in another order; its inputs would be lost"
                )
            forward.at = position
            if site.expert is not None:
                self._routes.check(site, args[0], forward.activations.number)
            if position < self._position:
                return
            forward.x, forward.mask = args[0], self._mask(site, args[0], forward.activations)
            forward.wait()
            forward.x = forward.mask = None

        return hook

    def _mask(self, site: Site, x: Tensor, batch: BatchActivations) -> Tensor | None:
        if batch.mask is None or site.expert is None:
            return batch.mask
        assert self._picked is not None
        return self._picked.mask(site, x, batch.mask, self._where)


def _number() -> int | None:
    """Whose forward is running; None outside of forwards."""
    forward = getcurrent()
    return forward.activations.number if isinstance(forward, _Forward) else None


@torch.no_grad()
def observe_forward(
    block: nn.Module,
    index: int,
    sites: list[Site],
    activations: Activations,
    advance: bool,
    policy: ExpertPolicy = ExpertPolicy(),  # noqa: B008 (frozen)
) -> list[Moments]:
    """The moments of every site's input in one plain forward; with `advance`, activations take the outputs."""
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
                out = batch.calls[index].run(block, batch.hidden)
            if advance:
                batch.hidden = out
    return [routes.finish(site, total) for site, total in zip(sites, sums, strict=True)]
