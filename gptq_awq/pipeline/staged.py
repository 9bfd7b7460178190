"""Staged forward: statistics of every site on quantized inputs, for one forward per block.

A site's input depends only on the sites before it. So every batch's forward pass runs until it reaches the
next site, adds its input to that site's moments and pauses there. When all batches have arrived the site is
solved, and they all go on with its quantized weights. This is true-sequential calibration without the
repeated forwards (one per site) that it usually costs.

Each batch's forward runs in its own greenlet: an ordinary call of the block that can be left and re-entered. What
waiting batches hold is large: several hidden states for every calibration token. Where that doesn't fit, forwards
are given up once they have arrived and begin anew for the next site, for the same moments at several times the cost.
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
    block: nn.Module, index: int, sites: list[Site], streams: Streams, on_site: OnSite, keep: bool = True
) -> None:
    """Advance the streams through `block`, calling `on_site` when all batches wait at a site.

    Args:
        block: the block as it is computed with; `on_site` may change the weights of the site it is given.
        index: the block's number.
        sites: the block's sites in the order they run.
        streams: replaced by the block's outputs.
        on_site: called once per site, in order, with the moments of its input.
        keep: hold every batch's activations while a site is solved; else compute them anew.

    Raises:
        UserError: the block does not run through the same sites for every batch.
    """
    stage = _Stage(sites, next(block.parameters()).device, f"block {index}")
    passes = {}
    with stage.hooked(block), faster_attention_of(block):
        for site in sites:
            stage.open(site)
            for i, stream in enumerate(streams.batches):
                forward = passes.pop(i, None) or greenlet(_pass(block, index, stream))
                stage.mask = stream.mask
                with phase("forward"):
                    arrived = forward.switch()
                if arrived is not site:
                    raise UserError(
                        f"block {index}: not every calibration batch passes {site.name}; "
                        "layers with data-dependent routing (mixture of experts) are not supported yet"
                    )
                if keep:
                    passes[i] = forward
                else:
                    forward.throw()  # ends it
            on_site(site, stage.close())
        for i, stream in enumerate(streams.batches):
            with phase("forward", *stream.hidden.shape[:2]):  # counted here, where it is done
                (passes.pop(i, None) or greenlet(_pass(block, index, stream))).switch()


def _pass(block: nn.Module, index: int, stream: Stream) -> Callable[[], None]:
    def run() -> None:
        stream.hidden = stream.calls[index].run(block, stream.hidden)

    return run


class _Stage:
    """The site that batches are gathering at."""

    def __init__(self, sites: list[Site], device: torch.device, where: str) -> None:
        self._gates = {site.linears[0]: site for site in sites}
        self._device, self._where = device, where
        self._open: Site | None = None
        self._sum: MomentsSum | None = None
        self.mask: Tensor | None = None

    def open(self, site: Site) -> None:
        self._open, self._sum = site, MomentsSum(site.width, self._device)

    def close(self) -> Moments:
        assert self._sum is not None
        assert self._open is not None
        moments = self._sum.finish(f"{self._where}, {self._open.name}")
        self._open = self._sum = None
        return moments

    def hooked(self, block: nn.Module):
        """Stop each forward at the first linear of the open site."""
        return hooks(
            block.get_submodule(name).register_forward_pre_hook(self._arrive(site))
            for name, site in self._gates.items()
        )

    def _arrive(self, site: Site):
        def hook(_module, args) -> None:
            if site is not self._open or self._sum is None:
                return
            self._sum.add(args[0], self.mask)
            waiting_room = getcurrent().parent
            assert waiting_room is not None  # hooks fire only inside the passes' greenlets
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
