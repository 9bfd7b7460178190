"""Observations: a block's sites and the second moments of their inputs, from one forward of the block.

Without error propagation every method calibrates on the full-precision model, whatever its bits, grid and solver. So
these observations are computed once and kept in a journal, the `ObservationCache`, which every later run of a sweep
reads instead of calibrating.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from gptq_awq.calibration.activations import Activations, keep_block
from gptq_awq.calibration.expert_policy import ExpertPolicy
from gptq_awq.calibration.moments import Factor, FactorKey, Keep, Moments, pack_symmetric, unpack_symmetric
from gptq_awq.calibration.sequential import observe_forward
from gptq_awq.errors import UserError
from gptq_awq.models.blocks import Call, in_dtype
from gptq_awq.models.linear import Absorber, Site
from gptq_awq.models.offload import read_ahead, resident
from gptq_awq.models.topology import observe_sites
from gptq_awq.numerics.distributed import ONE, Ranks
from gptq_awq.runtime.fingerprint import factor_sha256
from gptq_awq.runtime.profiling import phase
from gptq_awq.runtime.progress import Track
from gptq_awq.storage.atomic import locked
from gptq_awq.storage.checksummed import ChecksummedFile, DamagedError, lock_path, once
from gptq_awq.storage.journal import Journal

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Observation:
    """A block's sites with the second moments of their inputs, and one batch of the block's input.

    Attributes:
        sites: the block's sites in the order they run.
        moments: second moments of each site's input.
        hidden: hidden states of the first batch that enter the block.
        call: the block's other arguments for that batch.
    """

    sites: list[Site]
    moments: list[Moments]
    hidden: Float[Tensor, "batch tokens width"]
    call: Call


@dataclass(frozen=True)
class ObservationCache:
    """A cache, on disk, of observations of the full-precision model.

    Attributes:
        journal: the folder of observations, one file per block.
        room: bytes that it may take.
    """

    journal: Journal
    room: int


@dataclass(frozen=True)
class Observer:
    """Observes one block after the other on the activations that enter it.

    Attributes:
        activations: inputs of the block that is observed.
        absorbers: look for each site's absorber too.
        heads: number of attention heads, which `observe_sites` looks for absorbers with.
        experts: policy for experts that few tokens reach.
    """

    activations: Activations
    absorbers: bool
    heads: int | None
    experts: ExpertPolicy = ExpertPolicy()  # noqa: RUF009 (frozen)

    @phase("sites")
    def sites(self, block: nn.Module, index: int, like: Sequence[Site] = ()) -> list[Site]:
        """The block's sites as rank 0 observes them; absorbers of `like`, another block's sites, are tried first."""
        hidden, call = self.activations.probe_input(), self.activations.probe.calls[index]
        return self.activations.ranks.from_first(
            lambda: observe_sites(block, hidden, call, self.absorbers, self.heads, like)
        )

    def observe(self, runner: nn.Module, index: int, sites: list[Site], advance: bool) -> Observation:
        """The moments of all sites in one forward of all batches; with `advance`, activations take its outputs."""
        first = self.activations.batches[0]
        hidden, call = first.hidden, first.calls[index]
        moments = observe_forward(runner, index, sites, self.activations, advance, self.experts)
        return Observation(sites, moments, hidden, call)


def passing(observer: Observer, blocks: nn.ModuleList, dtype: torch.dtype, start: int = 0) -> Iterator[Observation]:
    """Observe the blocks from `start` on, each before the caller changes it, and advance the activations through it."""
    sites: list[Site] = []
    for index in range(start, len(blocks)):
        if index + 1 < len(blocks):
            read_ahead(blocks[index + 1])
        if not observer.activations.enter(index):
            yield Observation([], [], observer.activations.probe.hidden, Call())
            continue
        with torch.no_grad(), resident(blocks[index]):
            sites = observer.sites(blocks[index], index, sites)
            seen = observer.observe(in_dtype(blocks[index], dtype), index, sites, advance=True)
        yield seen


def complete_cache(
    cache: ObservationCache,
    blocks: nn.ModuleList,
    open_observer: Callable[[], Observer],
    dtype: torch.dtype,
    track: Track,
    ranks: Ranks = ONE,
) -> bool:
    """Observe every block that the cache does not hold yet, and keep it there; false where there is no room for it.

    Of several processes one (with its ranks) observes, and the others wait.

    Args:
        cache: the observations of this model on these tokens.
        blocks: the model's blocks, all of them still in full precision.
        open_observer: opens activations at the first block; called only where a block is missing.
        dtype: dtype that forwards compute in.
        track: reports progress over blocks.
        ranks: the processes that share the work.
    """
    journal, count = cache.journal, len(blocks)
    with _lock(journal) if ranks.first else nullcontext():
        start = ranks.from_first(lambda: _usable_blocks(journal))
        if start == count:
            log.info("full-precision moments read from %s", journal.folder)
            return True
        observer = open_observer()
        if start:
            start = _restore_activations(journal, observer.activations, start)
        if not start and _moments_bytes(observer, blocks) > cache.room:
            log.warning("the moments of all blocks don't fit into cache_gb: they are not shared with other runs")
            return False
        rest = track(passing(observer, blocks, dtype, start), "calibrate (full precision)", count - start)
        try:
            for index, seen in enumerate(rest, start):
                outputs = observer.activations if index + 1 < count else None
                with phase("disk"):
                    keep_block(journal, index, partial(_packed, seen), outputs, ranks)
        except OSError as error:
            log.warning("the moments are not kept for later runs: %s", error)
            if ranks.first:
                journal.clear()
            return False
        if ranks.first:
            journal.drop_activations()
    return True


def _lock(journal: Journal) -> AbstractContextManager[None]:
    return locked(lock_path(journal.folder), lambda: log.warning("another process calibrates on these data: waiting"))


@phase("disk")
def read_observation(cache: ObservationCache, index: int, call: Call, device: torch.device) -> Observation:
    """Read block `index` from the cache; `call` holds the block's other arguments for the first batch.

    Raises:
        UserError: the file was lost or damaged since the run began.
    """
    try:
        content = cache.journal.block(index)
    except (DamagedError, FileNotFoundError) as error:
        raise UserError(f"the cache lost the moments of block {index}, run again: {error}") from error
    factors = [cache.journal.folder / f"factor-{index:04d}-{i}" for i in range(len(content.facts["sites"]))]
    return _unpacked(content, factors, call, device)


@phase("disk")
def _usable_blocks(journal: Journal) -> int:
    """Number of leading blocks that the journal holds; where one of them is damaged, the journal is cleared: 0."""
    count = journal.count()
    try:
        for index in range(count):
            journal.block(index)
    except (DamagedError, FileNotFoundError) as error:
        log.warning("the cached moments in %s are damaged (%s): calibrating anew", journal.folder, error)
        journal.clear()
        return 0
    return count


def _restore_activations(journal: Journal, activations: Activations, start: int) -> int:
    """Read the activations that enter block `start` from the journal, and return it; 0 where they are damaged."""
    try:
        activations.restore(journal, start - 1)
    except (DamagedError, FileNotFoundError) as error:
        log.warning("the cached activations in %s are damaged (%s): calibrating anew", journal.folder, error)
        if activations.ranks.first:
            journal.clear()
        return 0
    return start


def _moments_bytes(observer: Observer, blocks: nn.ModuleList) -> int:
    """Bytes of all blocks' moments, if each has as many as the first or the last, whichever has more (experts)."""

    def block_bytes(index: int) -> int:
        with resident(blocks[index]):
            sites = replace(observer, absorbers=False).sites(blocks[index], index)
        return sum(4 * site.width**2 for site in sites)

    return len(blocks) * max(block_bytes(0), block_bytes(len(blocks) - 1))


def _packed(seen: Observation) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """An observation as tensors and facts, for the journal."""
    tensors: dict[str, Tensor] = {"hidden": seen.hidden}
    facts = []
    for i, (site, moments) in enumerate(zip(seen.sites, seen.moments, strict=True)):
        if moments.tokens:
            tensors |= {f"{i}.hessian": pack_symmetric(moments.hessian), f"{i}.mean_abs": moments.mean_abs}
        if moments.max_abs is not None:
            tensors[f"{i}.max_abs"] = moments.max_abs
        fact: dict[str, Any] = {"linears": site.linears, "width": site.width, "tokens": moments.tokens}
        if site.expert is not None:
            fact |= {"expert": site.expert, "analogous": site.analogous}
            fact |= {"routed": moments.routed, "policy": moments.policy}
        if site.absorber is not None:
            tensors[f"{i}.rows"] = site.absorber.rows
            fact |= {"producer": site.absorber.producer, "unit_offset": site.absorber.unit_offset}
        facts.append(fact)
    return tensors, {"sites": facts}


def _unpacked(content: ChecksummedFile, factors: list[Path], call: Call, device: torch.device) -> Observation:
    """The observation that `_packed` put into `content`; `factors` are paths for the factors of the sites' Hessians."""
    tensors, sites, moments = content.tensors, [], []
    for i, (fact, path) in enumerate(zip(content.facts["sites"], factors, strict=True)):
        absorber = None
        if "producer" in fact:
            absorber = Absorber(fact["producer"], tensors[f"{i}.rows"], fact["unit_offset"])
        sites.append(
            Site(tuple(fact["linears"]), fact["width"], absorber, fact.get("expert"), fact.get("analogous", False))
        )
        expert = {"routed": fact.get("routed"), "policy": fact.get("policy")}
        if not fact["tokens"]:
            moments.append(Moments.none(**expert))
            continue
        hessian = unpack_symmetric(tensors[f"{i}.hessian"], fact["width"]).to(device)
        largest = tensors[f"{i}.max_abs"].to(device) if f"{i}.max_abs" in tensors else None
        mean = tensors[f"{i}.mean_abs"].to(device)
        moments.append(Moments(hessian, mean, fact["tokens"], largest, **expert, keep=_keep(path, device)))
    return Observation(sites, moments, tensors["hidden"].to(device), call)


def _keep(path: Path, device: torch.device) -> Keep:
    """A function that keeps factors in files that begin with `path`, named by the very H that each is of.

    A solver that changes H, and then factors it, has a file of its own for that.
    """

    def keep(hessian: Tensor, key: FactorKey, compute: Callable[[], Factor]) -> Factor:
        def packed() -> ChecksummedFile:
            U, order, used = compute()
            tensors = {"factor": pack_symmetric(U), "order": torch.empty(0) if order is None else order}
            return ChecksummedFile(tensors, {"used": used, "width": len(U)})

        damping, act_order, unit = key
        together = "" if unit == 1 else f"-{unit}"
        name = f"{path.name}-{factor_sha256(hessian, damping, act_order)[:32]}{together}.safetensors"
        kept = once(path.with_name(name), "factor of the Hessian", packed)
        U = unpack_symmetric(kept.tensors["factor"], kept.facts["width"]).triu().to(device)
        return U, kept.tensors["order"].to(device) if act_order else None, kept.facts["used"]

    return keep
