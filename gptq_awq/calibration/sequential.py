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
before it was solved. Both pause at the same sites, where their inputs are paired.
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
    """One batch's call of the block as a greenlet, which can be left and re-entered.

    Attributes:
        activations: the batch.
        at: index of the site that it passed last, or is paused at; -1 before the first.
        x: input of the site that it is paused at.
        mask: True at real tokens of `x`; None when all are.
        modes: torch's function modes outside of the forward.
    """

    def __init__(self, run: Callable[[], None], batch: BatchActivations) -> None:
        super().__init__(run)
        self.activations, self.at = batch, -1
        self.x: Tensor | None = None
        self.mask: Tensor | None = None
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
    """One batch's forwards through a block: of its full-precision copy, if there is one, and of the block itself.

    Attributes:
        activations: the batch.
        at: index of the site that the forwards are paused at; at the block's end, the number of sites.
        forwards: the paused forwards; none where they were given up.
    """

    def __init__(self, batch: BatchActivations, index: int, block: nn.Module, full: nn.Module | None) -> None:
        self.activations, self.at = batch, -1
        self.forwards: list[_Forward] = []
        self._call, self._block, self._full = batch.calls[index], block, full

    def run(self, position: int, end: int) -> None:
        """Run on to the first site, from index `position` on, that this batch reaches, or to the block's `end`."""
        if self.at > position or (self.at == position and self.forwards):
            return
        self.forwards = self.forwards or self._begin()
        for forward in self.forwards:
            forward.switch()
        reached = {end if forward.dead else forward.at for forward in self.forwards}
        self.at = reached.pop() if len(reached) == 1 else -1  # they part: `_Stage.add` raises, as no site is at -1

    def drop(self) -> None:
        """Give the paused forwards up, with the activations that they hold; they begin anew at the next `run`."""
        for forward in self.forwards:
            forward.throw()  # raises GreenletExit where it is paused
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
            *full, own = batch.forwards
            assert own.x is not None
            self._sum.add(own.x, own.mask, full[0].x if full else None)
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
    """Number of the batch whose forward is running; None outside of forwards."""
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
                out = batch.calls[index].run(block, batch.hidden)
            if advance:
                batch.hidden = out
    return [routes.finish(site, total) for site, total in zip(sites, sums, strict=True)]
