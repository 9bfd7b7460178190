"""Inputs of each block during calibration: activations passed on by the block before, or recorded full precision."""

import logging
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from gptq_awq.calibration.activations import Activations, open_activations
from gptq_awq.calibration.expert_policy import ExpertPolicy
from gptq_awq.calibration.observation import Observation, ObservationCache, Observer, in_dtype, read, recorded
from gptq_awq.data.tokens import TokenSet
from gptq_awq.errors import UserError
from gptq_awq.models.blocks import find_blocks, heads_of
from gptq_awq.models.linear import Site, is_linear, matrix, widest
from gptq_awq.models.offload import offloaded
from gptq_awq.numerics.distributed import ONE, Ranks
from gptq_awq.numerics.dtypes import resolve_compute_dtype
from gptq_awq.runtime import memory
from gptq_awq.runtime.progress import Track, no_track

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Settings:
    """How calibration computes; none of it changes what is minimised.

    Attributes:
        compute_dtype: precision of calibration forwards ("auto": bfloat16 where the hardware has it).
        tokens_per_batch: calibration tokens per forward.
        activations: of batches that wait while a site is solved: "keep", "recompute", or "auto": kept where a
            forecast says that they fit into half of the memory that is free beside all else.
        memory_budget: bytes that this process may take; None: all that is free.
        scratch: folder for hidden states that would take more than an eighth of it; None: they stay in memory.
        ranks: the processes that share the work; none of what they do depends on it but the order of sums.

    Raises:
        UserError: another word for `activations`.
    """

    compute_dtype: str = "auto"
    tokens_per_batch: int = 2048
    activations: str = "auto"
    memory_budget: int | None = None
    scratch: Path | None = None
    ranks: Ranks = ONE

    def __post_init__(self) -> None:
        if self.activations not in ("auto", "keep", "recompute"):
            raise UserError(f"activations={self.activations}: choose auto, keep or recompute")

    def free_bytes(self, device: torch.device) -> int:
        """Memory that this rank may still allocate on `device`: its budget, or its part of what is free."""
        free = memory.available_bytes(device, self.memory_budget)
        return free if self.memory_budget is not None else free // self.ranks.sharing(device)


class Inputs:
    """The inputs of a model's blocks, asked for from the first block to the last.

    Args:
        error_propagation: see `Method`. Without it, `observe` advances the activations, on the block as it is then.
        absorbers: whether sites shall know theirs.
        full: whether activations carry full precision's hidden states too (`Method.needs_full`).
        settings: see `Settings`; `keeps_activations` says what `activations` came to.
        record: where what full precision shows is read from; it is completed first, for all later runs.
        experts: what calibrates experts that few tokens reach.
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
        self.keeps_activations = keeps_activations(model, tokens, settings, error_propagation, full)
        if error_propagation and not self.keeps_activations:
            log.info("activations of waiting batches are recomputed at every site (activations=keep holds them)")
        self._sites: list[Site] = []
        heads: int | None = heads_of(model)

        def observer(absorbers: bool) -> Observer:
            spill = _spill(model, tokens, self.dtype, 1 + full, settings)
            activations = open_activations(
                *(model, blocks, tokens, settings.tokens_per_batch, self.dtype, track, full, spill, settings.ranks)
            )
            return Observer(activations, absorbers, heads, experts)

        # A record serves all methods, so it knows absorbers whether this one wants them or not.
        if (
            record
            and self._advance
            and recorded(record, blocks, lambda: observer(True), self.dtype, track, settings.ranks)
        ):
            self._record, self._observer = record, None
            first = first_batch(tokens, settings.tokens_per_batch)
            self._calls = open_activations(model, blocks, first, settings.tokens_per_batch, self.dtype).batches[0].calls
        else:
            self._record, self._observer = None, observer(absorbers)

    @property
    def activations(self) -> Activations | None:
        """What enters the next block; None where inputs are read from a record."""
        return self._observer.activations if self._observer else None

    def runner(self, block: nn.Module) -> nn.Module:
        """The block as forwards compute with it."""
        return in_dtype(block, self.dtype)

    def sites(self, block: nn.Module, index: int) -> list[Site]:
        """The block's sites, without their moments."""
        assert self._observer is not None
        self._sites = self._observer.sites(block, index, self._sites)
        return self._sites

    def observe(self, block: nn.Module, runner: nn.Module, index: int) -> Observation:
        """The block's sites and the moments of their inputs."""
        if self._record is not None:
            device = next(block.parameters()).device
            return read(self._record, index, self._calls[index], device)
        assert self._observer is not None
        return self._observer.observe(runner, index, self.sites(block, index), self._advance)


def keeps_activations(
    model: nn.Module, tokens: TokenSet, settings: Settings, error_propagation: bool, full: bool
) -> bool:
    """Whether batches hold their activations while they wait; see `Settings.activations`.

    "auto": where these fit into half of the memory that is free beside all else that is needed.
    """
    if settings.activations != "auto" or not error_propagation:
        return settings.activations == "keep"
    needed = replace(calibration_of(model, tokens, settings, full), tokens_per_batch=0)
    free = settings.free_bytes(next(model.parameters()).device) - needed.most
    return waiting_bytes(needed) <= max(0, free) / 2


def calibration_of(model: nn.Module, tokens: TokenSet, settings: Settings, full: bool) -> memory.Calibration:
    """What calibrating this rank's batches takes; `full`: with full precision beside."""
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
    """What all batches hold while they wait at a site: in one forward, or in two with full precision's."""
    return (1 + needed.full) * memory.held_bytes(needed.tokens, needed.hidden, needed.widest, needed.itemsize)


def _width(model: nn.Module) -> int:
    """Of hidden states."""
    return model.get_input_embeddings().weight.shape[1]  # pyright: ignore[reportCallIssue]


def _spill(model: nn.Module, tokens: TokenSet, dtype: torch.dtype, forwards: int, settings: Settings) -> Path | None:
    """The folder for hidden states between blocks; None where memory has room for them."""
    if not _spills(model, tokens, dtype, forwards, settings):
        return None
    log.info("hidden states between blocks lie in %s", settings.scratch)
    return settings.scratch


def _spills(model: nn.Module, tokens: TokenSet, dtype: torch.dtype, forwards: int, settings: Settings) -> bool:
    """Whether they would take more than an eighth of what is free, and files are allowed."""
    flowing = forwards * tokens.ids.numel() // settings.ranks.size * _width(model) * dtype.itemsize
    return settings.scratch is not None and flowing > settings.free_bytes(torch.device("cpu")) / 8


def first_batch(tokens: TokenSet, tokens_per_batch: int) -> TokenSet:
    """The rows that make the first batch."""
    rows = max(1, tokens_per_batch // tokens.ids.shape[1])
    return replace(tokens, ids=tokens.ids[:rows], mask=None if tokens.mask is None else tokens.mask[:rows])
