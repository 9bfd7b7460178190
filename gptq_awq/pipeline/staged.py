"""Staged forward: statistics of every site on quantized inputs, for one forward per block.

A site's input depends only on the sites before it. So every batch's forward pass runs until it reaches the
next site, adds its input to that site's moments and pauses there. When all batches have arrived the site is
solved, and they all go on with its quantized weights. This is true-sequential calibration without the
repeated forwards (one per site) that it usually costs.

Each batch's forward runs in its own greenlet: an ordinary call of the block that can be left and re-entered. What
waiting batches hold is large: several hidden states for every calibration token. Where that doesn't fit, forwards
are given up once they have arrived and begin anew for the next site, for the same moments at several times the cost.

Where the method compares with full precision, each batch has two forwards, of the quantized block and of a copy from
before it was solved. They wait at the same sites, so their inputs are paired there, and only there.
"""

from collections.abc import Callable

import torch
from greenlet import getcurrent, greenlet
from torch import Tensor, nn

from gptq_awq.errors import UserError
from gptq_awq.models.attention import faster_attention_of
from gptq_awq.models.blocks import hooks
from gptq_awq.models.linear import Site
from gptq_awq.moments import Moments, MomentsSum
from gptq_awq.pipeline.streams import Stream, Streams
from gptq_awq.profiling import phase

OnSite = Callable[[Site, Moments], None]


@torch.no_grad()
def staged_forward(
    block: nn.Module,
    index: int,
    sites: list[Site],
    streams: Streams,
    on_site: OnSite,
    keep: bool = True,
    full: nn.Module | None = None,
) -> None:
    """Advance the streams through `block`, calling `on_site` when all batches wait at a site.

    Args:
        block: the block as it is computed with; `on_site` may change the weights of the site it is given.
        index: the block's number.
        sites: the block's sites in the order they run.
        streams: replaced by the block's outputs.
        on_site: called once per site, in order, with the moments of its input.
        keep: hold every batch's activations while a site is solved; else compute them anew.
        full: the block in full precision, for the streams' full-precision states; moments have a `cross` then.

    Raises:
        UserError: the block does not run through the same sites for every batch.
    """
    stage = _Stage(sites, next(block.parameters()).device, f"block {index}")
    waiting: dict[int, list[greenlet]] = {}
    with stage.hooked(block, full), faster_attention_of(block):
        for site in sites:
            stage.open(site)
            for i, stream in enumerate(streams.batches):
                forwards = waiting.pop(i, None) or _forwards(block, full, index, stream)
                stage.mask = stream.mask
                with phase("forward"):
                    arrived = [forward.switch() for forward in forwards]
                if any(where is not site for where in arrived):
                    raise UserError(
                        f"block {index}: not every calibration batch passes {site.name}; "
                        "layers with data-dependent routing (mixture of experts) are not supported yet"
                    )
                if keep:
                    waiting[i] = forwards
                else:
                    for forward in forwards:
                        forward.throw()  # ends it
            on_site(site, stage.close())
        for i, stream in enumerate(streams.batches):
            for forward in waiting.pop(i, None) or _forwards(block, full, index, stream):
                with phase("forward", *stream.hidden.shape[:2]):  # counted here, where it is done
                    forward.switch()


def _forwards(block: nn.Module, full: nn.Module | None, index: int, stream: Stream) -> list[greenlet]:
    """One batch's way through the block: in full precision, where that is asked for, and then quantized."""
    call = stream.calls[index]

    def quantized() -> None:
        stream.hidden = call.run(block, stream.hidden)

    def full_precision() -> None:
        assert full is not None
        assert stream.full is not None
        stream.full = call.run(full, stream.full)

    return [greenlet(quantized)] if full is None else [greenlet(full_precision), greenlet(quantized)]


class _Stage:
    """The site that batches are gathering at."""

    def __init__(self, sites: list[Site], device: torch.device, where: str) -> None:
        self._gates = {site.linears[0]: site for site in sites}
        self._device, self._where = device, where
        self._open: Site | None = None
        self._sum: MomentsSum | None = None
        self._full: Tensor | None = None  # what full precision has where the next quantized forward arrives
        self.mask: Tensor | None = None

    def open(self, site: Site) -> None:
        self._open, self._sum = site, MomentsSum(site.width, self._device)

    def close(self) -> Moments:
        assert self._sum is not None
        assert self._open is not None
        moments = self._sum.finish(f"{self._where}, {self._open.name}")
        self._open = self._sum = self._full = None
        return moments

    def hooked(self, block: nn.Module, full: nn.Module | None):
        """Stop each forward at the first linear of the open site."""
        arrivals = [(block, self._add)] + ([] if full is None else [(full, self._pair)])
        return hooks(
            module.get_submodule(name).register_forward_pre_hook(self._arrive(site, seen))
            for module, seen in arrivals
            for name, site in self._gates.items()
        )

    def _add(self, x: Tensor) -> None:
        assert self._sum is not None
        self._sum.add(x, self.mask, self._full)

    def _pair(self, x: Tensor) -> None:
        self._full = x

    def _arrive(self, site: Site, seen: Callable[[Tensor], None]):
        def hook(_module, args) -> None:
            if site is not self._open:
                return
            seen(args[0])
            waiting_room = getcurrent().parent
            assert waiting_room is not None  # hooks fire only inside the forwards' greenlets
            waiting_room.switch(site)

        return hook


@torch.no_grad()
def observe_forward(block: nn.Module, index: int, sites: list[Site], streams: Streams, advance: bool) -> list[Moments]:
    """The moments of every site's input in one plain forward; with `advance`, streams take the outputs."""
    device = next(block.parameters()).device
    sums = [MomentsSum(site.width, device) for site in sites]
    mask = None

    def add(total: MomentsSum):
        return lambda _module, args: total.add(args[0], mask)

    handles = (
        block.get_submodule(site.linears[0]).register_forward_pre_hook(add(total))
        for site, total in zip(sites, sums, strict=True)
    )
    with hooks(handles), faster_attention_of(block):
        for stream in streams.batches:
            mask = stream.mask
            with phase("forward", *stream.hidden.shape[:2]):
                out = stream.calls[index].run(block, stream.hidden)
            if advance:
                stream.hidden = out
    return [total.finish(f"block {index}, {site.name}") for site, total in zip(sites, sums, strict=True)]
