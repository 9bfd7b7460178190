"""Inputs of each block during calibration: activations from the block before, or cached full-precision observations."""

import logging
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from gptq_awq.calibration.activations import Activations, embed_again, open_activations
from gptq_awq.calibration.chain import why_not_alone
from gptq_awq.calibration.expert_policy import ExpertPolicy
from gptq_awq.calibration.observation import (
    Observation,
    ObservationCache,
    Observer,
    complete_cache,
    read_observation,
)
from gptq_awq.data.tokens import TokenSet
from gptq_awq.models.blocks import find_blocks, heads_of, in_dtype
from gptq_awq.models.linear import Site, is_linear, matrix, widest
from gptq_awq.models.offload import offloaded
from gptq_awq.numerics.distributed import ONE, Ranks
from gptq_awq.numerics.dtypes import resolve_compute_dtype
from gptq_awq.runtime import memory
from gptq_awq.runtime.options import ComputeDtype, PositiveInt, checked_dataclass
from gptq_awq.runtime.progress import Track, no_track

log = logging.getLogger(__name__)


@checked_dataclass
class Settings:
    """How calibration computes: precision, batching and memory; the objective does not depend on it.

    Attributes:
        compute_dtype: precision of calibration forwards ("auto": bfloat16 where the hardware has it).
        tokens_per_batch: calibration tokens per forward.
        activations: whether batches that wait while a site is solved hold their activations: "keep", "recompute",
            or "auto", which keeps them where a forecast says that they fit into half of the memory left by all else.
        memory_budget: bytes that this process may take; None: all that is free.
        scratch: folder for files of hidden states, used where these would take more than an eighth of the free
            memory; None keeps them in memory.
        ranks: the processes that share the work; results depend on them only by the order of sums.

    Raises:
        UserError: `activations` is none of the three words.
    """

    compute_dtype: ComputeDtype = "auto"
    tokens_per_batch: PositiveInt = 2048
    activations: Literal["auto", "keep", "recompute"] = "auto"
    memory_budget: int | None = None
    scratch: Path | None = None
    ranks: Ranks = ONE

    def free_bytes(self, device: torch.device) -> int:
        """Bytes that this rank may still allocate on `device`: within its budget, or its share of the free memory."""
        free = memory.available_bytes(device, self.memory_budget)
        return free if self.memory_budget is not None else free // self.ranks.sharing(device)


class Inputs:
    """The inputs of a model's blocks during calibration, asked for from the first block to the last.

    Args:
        model: a causal LM, all of it in full precision: who rounds its embedding calls `embedding_rounded` then.
        blocks: its transformer blocks.
        tokens: calibration windows.
        settings: how calibration computes; `keeps_activations` is what its `activations` came to.
        error_propagation: blocks see the inputs of the model quantized so far. Without it, `observe` advances the
            activations itself, through the block as it is at that time.
        absorbers: sites are observed with their absorbers.
        record: cache of full-precision observations, used without error propagation; it is completed first.
        track: reports progress.
        full: activations carry the full-precision model's hidden states too (`Method.needs_full`).
        experts: policy for experts that few tokens reach.

    Raises:
        UserError: blocks that can't be run one by one; fewer batches than ranks.
    """

    def __init__(
        self,
        model: nn.Module,
        blocks: nn.ModuleList,
        tokens: TokenSet,
        settings: Settings,
        error_propagation: bool,
        absorbers: bool,
        record: ObservationCache | None = None,
        track: Track = no_track,
        full: bool = False,
        experts: ExpertPolicy = ExpertPolicy(),  # noqa: B008 (frozen)
    ) -> None:
        self.dtype = resolve_compute_dtype(settings.compute_dtype, next(model.parameters()).device)
        self.experts, self._advance = experts, not error_propagation
        walked = why_not_alone(model, tokens) is not None
        self._opened = model, blocks, tokens, settings.tokens_per_batch
        self.keeps_activations = keeps_activations(model, tokens, settings, error_propagation, full)
        if error_propagation and not self.keeps_activations:
            log.info("activations are recomputed at every site, to save memory; activations=keep holds them instead")
        self._sites: list[Site] = []
        heads: int | None = heads_of(model)

        def observer(absorbers: bool) -> Observer:
            activations = open_activations(
                model=model,
                blocks=blocks,
                tokens=tokens,
                tokens_per_batch=settings.tokens_per_batch,
                compute_dtype=self.dtype,
                track=track,
                full=full,
                spill=_spill(model, tokens, self.dtype, 1 + full, settings),
                ranks=settings.ranks,
                walked=walked,
            )
            return Observer(activations, absorbers, heads, experts)

        # The cache serves all methods, so it has absorbers whether this one needs them or not.
        cache = record if self._advance and not walked else None
        if cache and complete_cache(cache, blocks, lambda: observer(True), self.dtype, track, settings.ranks):
            self._cache, self._observer = cache, None
            first = first_batch(tokens, settings.tokens_per_batch)
            self._calls = open_activations(model, blocks, first, settings.tokens_per_batch, self.dtype).batches[0].calls
        else:
            self._cache, self._observer = None, observer(absorbers)

    def embedding_rounded(self) -> None:
        """Let the quantized model's activations start from its embedding as it is now; full precision's do not."""
        if self._advance or self._observer is None:
            return
        embed_again(self._observer.activations, *self._opened)

    @property
    def activations(self) -> Activations | None:
        """The activations that enter the next block; None where observations are read from the cache."""
        return self._observer.activations if self._observer else None

    def enter(self, index: int) -> bool:
        """Let the activations enter block `index`; false where the model calls no such block for text."""
        return self.activations is None or self.activations.enter(index)

    def runner(self, block: nn.Module) -> nn.Module:
        """The block in the compute dtype: itself, or a copy."""
        return in_dtype(block, self.dtype)

    def sites(self, block: nn.Module, index: int) -> list[Site]:
        """The block's sites in the order they run, observed on the probe; without their moments."""
        assert self._observer is not None
        self._sites = self._observer.sites(block, index, self._sites)
        return self._sites

    def observe(self, block: nn.Module, runner: nn.Module, index: int) -> Observation:
        """The block's sites and the second moments of their inputs, from one forward of `runner` or from the cache."""
        if self._cache is not None:
            device = next(block.parameters()).device
            return read_observation(self._cache, index, self._calls[index], device)
        assert self._observer is not None
        return self._observer.observe(runner, index, self.sites(block, index), self._advance)


def keeps_activations(
    model: nn.Module, tokens: TokenSet, settings: Settings, error_propagation: bool, full: bool
) -> bool:
    """Whether batches hold their activations while they wait at a site, as `Settings.activations` has it.

    With "auto" they do where that fits into half of the memory that calibration's other needs leave free. Without
    error propagation no batch waits, and the answer is true for "keep" only.
    """
    if settings.activations != "auto" or not error_propagation:
        return settings.activations == "keep"
    needed = replace(calibration_of(model, tokens, settings, full), tokens_per_batch=0)
    free = settings.free_bytes(next(model.parameters()).device) - needed.most
    return waiting_bytes(needed) <= max(0, free) / 2


def calibration_of(model: nn.Module, tokens: TokenSet, settings: Settings, full: bool) -> memory.Calibration:
    """Forecast of the memory that calibration on this rank's batches takes.

    Args:
        model: a causal LM.
        tokens: calibration windows of all ranks.
        settings: how calibration computes.
        full: a full-precision forward runs beside the quantized one.
    """
    device, own = next(model.parameters()).device, next(model.parameters()).dtype
    dtype, (_, blocks) = resolve_compute_dtype(settings.compute_dtype, device), find_blocks(model)
    columns = widest(blocks)
    linears = [w.numel() for w in map(matrix, filter(is_linear, blocks.modules())) if w.shape[1] == columns]
    held = (own.itemsize if offloaded(model) else 0) + (dtype.itemsize if dtype != own else 0)
    return memory.Calibration(
        block=max(sum(p.numel() for p in block.parameters()) for block in blocks),
        linear=max(linears),
        widest=columns,
        hidden=_width(model),
        tokens=tokens.ids.numel() // settings.ranks.size,
        tokens_per_batch=settings.tokens_per_batch,
        itemsize=dtype.itemsize,
        held=held,
        full=full,
        spilled=_spills(model, tokens, dtype, 1 + full, settings),
    )


def waiting_bytes(needed: memory.Calibration) -> int:
    """Bytes that all batches hold while they wait at a site: of one forward, or of two where full precision runs."""
    return (1 + needed.full) * memory.held_bytes(needed.tokens, needed.hidden, needed.widest, needed.itemsize)


def _width(model: nn.Module) -> int:
    """Width of the model's hidden states."""
    return model.get_input_embeddings().weight.shape[1]  # pyright: ignore[reportCallIssue]


def _spill(model: nn.Module, tokens: TokenSet, dtype: torch.dtype, forwards: int, settings: Settings) -> Path | None:
    """The folder for files of hidden states between blocks; None where memory has room for them."""
    if not _spills(model, tokens, dtype, forwards, settings):
        return None
    log.info("hidden states between blocks are kept in files, in %s", settings.scratch)
    return settings.scratch


def _spills(model: nn.Module, tokens: TokenSet, dtype: torch.dtype, forwards: int, settings: Settings) -> bool:
    """Whether hidden states go to files: a folder is given, and they take more than an eighth of the free memory."""
    states = forwards * tokens.ids.numel() // settings.ranks.size * _width(model) * dtype.itemsize
    return settings.scratch is not None and states > settings.free_bytes(torch.device("cpu")) / 8


def first_batch(tokens: TokenSet, tokens_per_batch: int) -> TokenSet:
    """The calibration windows of the first batch."""
    rows = max(1, tokens_per_batch // tokens.ids.shape[1])
    return replace(tokens, ids=tokens.ids[:rows], mask=None if tokens.mask is None else tokens.mask[:rows])
