"""Topology of a block by observation: which linears share an input (a site), and which op can absorb a scaling of it.

Sites are observed: linears that receive the same tensor in one forward. Absorbers are found by experiment, on a float32
copy of the block:

1. propose  the norms and linears that ran before the site, nearest first; of a fused linear also parts of
            its rows (halves, thirds, per-head thirds, the values of grouped queries);
2. trace    put known positive noise at the proposal's output and multiply channel r by a factor that spells
            r in base `LEVELS`. Where each column of the site's input is multiplied by one of these factors,
            the factors spell which channel feeds the column;
3. verify   divide the channels by random s, multiply the site's columns by s: what the block adds to each
            token must not change. This also rejects channels with another reader (a residual, another site).

Of experts, only the first that the probe reaches is examined; the others get the same absorbers (expert_sites.py).

There is no table of architectures, and no wrong guess passes silently.
"""

import copy
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from gptq_awq.models.blocks import Call, hooks, update_error
from gptq_awq.models.expert_sites import Seen, alike, completed
from gptq_awq.models.expert_sites import like as like_that
from gptq_awq.models.linear import Absorber, Site, channels, is_linear, matrix

LEVELS = 64  # distinct factors in one trace: 2.2% apart, far above rounding errors
TRACE_TOLERANCE = 3e-3  # relative error of a traced column, and distance of its factor from the nearest level
VERIFY_TOLERANCE = 1e-4  # relative change of what the block adds to any token


@dataclass(frozen=True)
class _Probe:
    """A block in float32, a short input for it, and the other arguments of its call."""

    block: nn.Module
    hidden: Float[Tensor, "1 tokens width"]
    call: Call

    def run(self) -> Tensor:
        """The block's output hidden states."""
        return self.call.run(self.block, self.hidden)


def observe_sites(
    block: nn.Module,
    hidden: Float[Tensor, "1 tokens width"],
    call: Call,
    absorbers: bool,
    heads: int | None = None,
    like: Sequence[Site] = (),
) -> list[Site]:
    """Observe a block's sites, in the order they run, and on request search for their absorbers.

    Args:
        block: one transformer block, left unchanged.
        hidden: a short input, such as the first tokens of a calibration sample.
        call: the block's other arguments for that input.
        absorbers: whether to search for each site's absorber too (a dozen tiny forwards per site).
        heads: number of attention heads, to recognise the values in a fused, per-head interleaved projection.
        like: sites of another block, most likely of the same structure: its absorbers are verified first, and searched
            for only where they fail; a site without an absorber there gets none.
    """
    probe = _Probe(copy.deepcopy(block).float(), hidden.float(), call)
    known = {site.linears: site.absorber for site in like}
    names = {name for name, _ in block.named_modules()}

    def absorber(site: Site, before: list[str]) -> Absorber | None:
        guess = known.get(site.linears)
        if site.calls > 1:
            return None
        there = guess is None or guess.producer in names
        if site.linears in known and there and (guess is None or _verify(probe, site, guess)):
            return guess
        return _find_absorber(probe, site, before, heads)

    with torch.no_grad():
        order, sites = _watch(probe)
        return _with_absorbers(sites, order, absorber) if absorbers else sites


def _with_absorbers(
    sites: list[Site], order: list[str], absorber: Callable[[Site, list[str]], Absorber | None]
) -> list[Site]:
    """Add to every site its absorber among the modules that ran before it; an expert's lie within that expert."""
    of_expert = {name: site.expert for site in sites for name in site.linears}
    first: list[Site] = []  # examined sites of experts, one of each kind
    found: list[Site] = []
    for site in sites:
        example = next((each for each in first if alike(each, site) is not None), None)
        if example is not None or site.linears[0] not in order:
            found.append(site)
            continue
        before = order[: order.index(site.linears[0])]
        inside = [n for n in before if of_expert.get(n) == site.expert and (site.expert is None or n in of_expert)]
        found.append(replace(site, absorber=absorber(site, inside)))
        first += [found[-1]] if site.expert is not None else []
    return [_like_any(site, first) for site in found]


def _like_any(site: Site, first: list[Site]) -> Site:
    """Give a site of an expert the absorber of the examined site that it is like, if there is one."""
    example = next((each for each in first if each is not site and alike(each, site) is not None), None)
    return site if example is None else like_that(example, site)


def _watch(probe: _Probe) -> tuple[list[str], list[Site]]:
    """Run the block once; return its leaf modules in call order, and its linears grouped by input tensor as sites."""
    order: list[str] = []
    readers: dict[int, list[str]] = {}
    held: list[Tensor] = []  # keeps every input alive, so that ids stay unique
    arrived: dict[str, int] = {}
    calls: dict[str, int] = Counter()

    def hook(name: str):
        def watch(module, args, _output):
            order.append(name)
            if is_linear(module):
                held.append(args[0])
                readers.setdefault(id(args[0]), []).append(name)
                arrived[name] = args[0].shape[:-1].numel()
                calls[name] += 1

        return watch

    leaves = [(n, m) for n, m in probe.block.named_modules() if not any(m.children())]
    with hooks([m.register_forward_hook(hook(n)) for n, m in leaves]):
        probe.run()
    widths = {name: matrix(module).shape[1] for name, module in leaves if is_linear(module)}
    seen = [Seen(site, arrived[site.linears[0]]) for site in _by_input(list(readers.values()), widths, calls)]
    tokens = min(probe.hidden.shape[:-1].numel(), max(arrived.values(), default=0))  # of several states for each: once
    return order, completed(seen, widths, tokens)


def _by_input(readers: Sequence[list[str]], widths: Mapping[str, int], calls: Mapping[str, int]) -> Iterator[Site]:
    """Sites of the linears that read each input in turn; one that is called again is a site at its last call."""
    left = dict(calls)
    for names in readers:
        for name in names:
            left[name] -= 1
        if once := tuple(name for name in names if calls[name] == 1):
            yield Site(once, widths[once[0]])
        for name in names:
            if calls[name] > 1 and not left[name]:
                yield Site((name,), widths[name], calls=calls[name])


def _find_absorber(probe: _Probe, site: Site, before: list[str], heads: int | None) -> Absorber | None:
    """The last op that ran before `site` and passes trace and verification; None where there is none."""
    for producer in dict.fromkeys(reversed(before)):
        module = probe.block.get_submodule(producer)
        for rows in _proposals(module, site.width, heads):
            columns = _trace(probe, site, producer, rows)
            if columns is None:
                continue
            for unit_offset in (False,) if is_linear(module) else (False, True):
                absorber = Absorber(producer, columns, unit_offset)
                if _verify(probe, site, absorber):
                    return absorber
    return None


def _proposals(module: nn.Module, width: int, heads: int | None) -> list[Int[Tensor, "part"]]:
    """Sets of output channels of `module` that might feed a site of `width` columns."""
    weight = getattr(module, "weight", None)
    if not isinstance(weight, nn.Parameter) or not (is_linear(module) or weight.dim() == 1):
        return []
    n = channels(module)
    every = torch.arange(n)
    parts = [every]
    if is_linear(module) and n > width:
        if n == 2 * width:
            parts += list(every.chunk(2))
        if n == 3 * width:
            parts += list(every.chunk(3))
            if heads and width % heads == 0:  # per head: q, k, v
                parts += list(every.view(heads, 3, -1).unbind(1))
        if (n - width) % 2 == 0:  # q as wide as the site, then k and v, fewer heads each
            parts.append(every[n - (n - width) // 2 :])
    return [part.flatten() for part in parts if width % len(part) == 0]


def _trace(probe: _Probe, site: Site, producer: str, rows: Int[Tensor, "part"]) -> Int[Tensor, "in"] | None:
    """Channel among `rows` that each column of the site is proportional to; None if a column has no such channel."""
    module = probe.block.get_submodule(producer)
    generator = torch.Generator().manual_seed(0)
    noise: list[Tensor] = []

    def inputs(factor: Tensor) -> Tensor:
        def inject(_module, _args, output):
            if not noise:
                noise.append(0.5 + torch.rand(output.shape, generator=generator).to(output))
            return noise[0] * factor.to(output) if output.shape == noise[0].shape else output

        return _site_input(probe, site, module.register_forward_hook(inject))

    ones = torch.ones(channels(module))
    plain = inputs(ones)
    index = torch.zeros(site.width, dtype=torch.long)
    for digit in range(max(1, math.ceil(math.log(len(rows), LEVELS)))):
        level = torch.arange(len(rows)) // LEVELS**digit % LEVELS
        factor = ones.clone()
        factor[rows] = _factors()[level]
        found = _levels(inputs(factor), plain)
        if found is None:
            return None
        index += found * LEVELS**digit
    return rows[index] if int(index.max()) < len(rows) else None


def _factors() -> Float[Tensor, "levels"]:
    """Log-spaced factors from 1/2 to 2. No factor is 1, so an untouched column is told from a traced one."""
    return torch.logspace(-1, 1, 2 * LEVELS + 1, base=2.0)[1::2]


def _levels(scaled: Float[Tensor, "tokens in"], plain: Float[Tensor, "tokens in"]) -> Int[Tensor, "in"] | None:
    """Index of the factor that multiplied each column, equal for all tokens; None if some column has no such factor."""
    energy = plain.square().sum(0)
    ratio = (scaled * plain).sum(0) / energy
    residual = (scaled - ratio * plain).square().sum(0).sqrt() / energy.sqrt()
    distance, level = (ratio[:, None].cpu().log() - _factors().log()).abs().min(1)
    proportional = (residual < TRACE_TOLERANCE).all() and (distance < TRACE_TOLERANCE).all()
    return level if bool(proportional) else None


def _site_input(probe: _Probe, site: Site, handle) -> Float[Tensor, "tokens in"]:
    """Input of the site in one run of the probe under the hook `handle`, which is removed afterwards."""
    seen: list[Tensor] = []
    first = probe.block.get_submodule(site.linears[0])
    with hooks([handle, first.register_forward_pre_hook(lambda _m, args: seen.append(args[0]))]):
        probe.run()
    return seen[0].reshape(-1, site.width)


def _verify(probe: _Probe, site: Site, absorber: Absorber) -> bool:
    """Whether absorbing random scales leaves what the block adds to each token unchanged."""
    s = absorber.tie(torch.rand(site.width, generator=torch.Generator().manual_seed(1)) * 1.5 + 0.5)
    s = s.to(probe.hidden.device)
    touched = [absorber.producer, *site.linears]
    before = {name: copy.deepcopy(probe.block.get_submodule(name).state_dict()) for name in touched}
    expected = probe.run()
    try:
        absorb(probe.block, site, absorber, s)
        return update_error(probe.run(), expected, probe.hidden) < VERIFY_TOLERANCE
    finally:
        for name, state in before.items():
            probe.block.get_submodule(name).load_state_dict(state)


def absorb(block: nn.Module, site: Site, absorber: Absorber, s: Float[Tensor, "in"]) -> None:
    """Multiply the site's columns by s and divide the absorber's channels by s, in place."""
    absorber.divide(block, s)
    for name in site.linears:
        weight = matrix(block.get_submodule(name))
        weight.copy_(weight * s.to(weight))


def relative_error(a: Tensor, b: Tensor) -> float:
    """Relative error ‖a - b‖ / ‖b‖ in the Frobenius norm."""
    return float((a - b).norm() / b.norm().clamp(min=1e-30))
