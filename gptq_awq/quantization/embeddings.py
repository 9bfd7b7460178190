"""Quantization outside of the blocks: the embedding, rounded to nearest, and the output head, rounded or solved.

A head that is solved is treated like a linear in a block: by the method's own solver, on moments of its input. That
input is the activations after the last block, through all that the model has between it and the head (a norm), so the
head comes last. Without error propagation activations are full precision's, and so are the head's moments. Transforms
of blocks and tuning leave the head alone.
"""

import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from gptq_awq.calibration.activations import Activations
from gptq_awq.calibration.moments import Moments, MomentsSum
from gptq_awq.errors import UserError
from gptq_awq.grids.base import Grid, QuantizedWeight
from gptq_awq.models.blocks import BlockCalls, find_blocks
from gptq_awq.models.embeddings import is_tied, untie
from gptq_awq.models.linear import Site, matrix
from gptq_awq.models.offload import residence, resident
from gptq_awq.numerics.distributed import Ranks
from gptq_awq.quantization.ledger import LinearReport
from gptq_awq.quantization.method import Method, solved
from gptq_awq.quantization.resume import BlockResult, Row
from gptq_awq.solvers.base import Solver
from gptq_awq.solvers.rtn import RTN
from gptq_awq.transforms.base import Scaling

log = logging.getLogger(__name__)
NO_SCALINGS: Mapping[str, Scaling] = MappingProxyType({})


def free_head(model: Any, method: Method) -> None:
    """Untie an output head that is to be quantized from the embedding, if `Method.untie_head` allows it.

    Raises:
        UserError: the head is tied and must stay so; the model has no head.
    """
    if method.head is None or method.solver is None:
        return
    head = model.get_output_embeddings()
    if head is None:
        raise UserError(f"head={method.head}: {type(model).__name__} has no output head; choose head=null")
    if is_tied(model):
        if residence(head) is not None:
            raise UserError(
                f"head={method.head}: the head is the embedding, too, and is offloaded from disk; choose head=null, or "
                "a memory_budget that the model fits into"
            )
        if not method.untie_head:
            raise UserError(
                f"head={method.head}: {type(model).__name__}'s output head is its embedding, too; untie_head=true "
                f"gives it a matrix of its own ({head.weight.numel()} more weights), head=null leaves it alone"
            )
        log.info("the output head has a matrix of its own now (untie_head=true)")
        untie(model)


@torch.no_grad()
def round_embeddings(model: nn.Module, grids: Mapping[str, Grid], blocks: str, method: Method) -> BlockResult:
    """Round to nearest, in place, every weight outside of the blocks that has a grid and is not solved.

    Args:
        model: a causal LM.
        grids: module name → grid.
        blocks: name of the list of blocks in the model.
        method: the method, which may solve the head.
    """
    weights, rows, solved_head = {}, [], _solved_head(model, method, grids)
    for name, grid in grids.items():
        if not name.startswith(f"{blocks}.") and name != solved_head:
            weights[name], row = _quantize_module(model, name, grid, method, RTN())
            rows.append(row)
    return BlockResult(-1, weights, rows)


@dataclass(frozen=True)
class HeadStep:
    """Solves the output head, after all blocks.

    Attributes:
        model: the model; its head is changed in place.
        name: name of the head in the model.
        grid: grid of the head.
        method: the method, whose solver is applied.
        prepared: details of the whole model's transforms, by name, for the ledger.
        ranks: the processes that share the work.
    """

    model: nn.Module
    name: str
    grid: Grid
    method: Method
    prepared: Mapping[str, Scaling]
    ranks: Ranks

    @classmethod
    def of(
        cls, model: nn.Module, method: Method, grids: Mapping[str, Grid], prepared: Mapping[str, Scaling], ranks: Ranks
    ) -> "HeadStep | None":
        """The step for a method that solves the output head; None where it does not, or the head has no grid."""
        name = _solved_head(model, method, grids)
        return None if name is None else cls(model, name, grids[name], method, prepared, ranks)

    @torch.no_grad()
    def run(self, activations: Activations | None) -> BlockResult:
        """Solve the head on `activations` that have passed all blocks; None: without calibration.

        Of several ranks the first one solves it, and the others take its result.
        """
        moments = None
        if activations is not None:
            moments = head_moments(self.model, self.name, activations, self.method.needs_cross)
        done = self.ranks.from_first(lambda: self._solve(moments))
        return done if self.ranks.first else self.restore(done)

    def _solve(self, moments: Moments | None) -> BlockResult:
        assert self.method.solver is not None
        weight, row = _quantize_module(
            self.model, self.name, self.grid, self.method, self.method.solver, moments, self.prepared
        )
        return BlockResult(-1, {self.name: weight}, [row])

    @torch.no_grad()
    def restore(self, done: BlockResult) -> BlockResult:
        """Write a finished head's weight into the model; returns `done`."""
        head = self.model.get_submodule(self.name)
        with resident(head):
            _write_weight(head, done.weights[self.name].dequantize())
        return done


def _solved_head(model: Any, method: Method, grids: Mapping[str, Grid]) -> str | None:
    """The name of the output head if the method solves it and it has a grid; else None."""
    if method.head != "solve":
        return None
    head = model.get_output_embeddings()
    return next((name for name in grids if model.get_submodule(name) is head), None)


@torch.no_grad()
def head_moments(model: Any, name: str, activations: Activations, cross: bool = False) -> Moments:
    """The second moments of the output head's input.

    Args:
        model: a causal LM.
        name: name of the head in the model.
        activations: activations that have passed all blocks.
        cross: gather the cross-covariance with full precision's input too.

    Raises:
        UserError: non-finite activations; no real token.
    """
    head, (_, blocks) = model.get_submodule(name), find_blocks(model)
    calls, parameter = BlockCalls(model, blocks), head.weight
    total = MomentsSum(parameter.shape[1], parameter.device)

    def head_input(hidden: Float[Tensor, "batch tokens width"]) -> Float[Tensor, "batch tokens width"]:
        ids = torch.zeros(hidden.shape[:2], dtype=torch.long)
        with _recorded_inputs(head) as seen:
            calls.finish(ids, hidden.to(parameter.dtype))  # a norm's weight and its input must have one dtype
        return seen[0].to(hidden.dtype)

    with resident(head, model.get_input_embeddings()):  # the forward calls both, though their outputs are not used
        for batch in activations.own:
            if batch.walk is not None:
                with _recorded_inputs(head) as seen:
                    inputs = [x.to(batch.hidden.dtype) for _ in batch.finish() for x in seen[-1:]]
                total.add(inputs[0], batch.mask, inputs[1] if cross and len(inputs) > 1 else None)
                continue
            x, full = head_input(batch.hidden), batch.full
            total.add(x, batch.mask, head_input(full) if cross and full is not None else None)
    return total.finish(name, activations.ranks)


@contextmanager
def _recorded_inputs(head: nn.Module) -> Iterator[list[Tensor]]:
    """Context in which the head appends its inputs to the list that is yielded, and multiplies by no weight."""
    seen: list[Tensor] = []

    def keep(x: Tensor) -> Tensor:
        seen.append(x)
        return x[..., :1]

    own = head.__dict__.get("forward")
    head.forward = keep
    try:
        yield seen
    finally:
        del head.forward
        if own is not None:
            head.forward = own


def _quantize_module(
    model: nn.Module,
    name: str,
    grid: Grid,
    method: Method,
    solver: Solver,
    moments: Moments | None = None,
    prepared: Mapping[str, Scaling] = NO_SCALINGS,
) -> tuple[QuantizedWeight, Row]:
    """Quantize one module's weight in place; returns the quantized weight and its ledger row."""
    started, module = time.perf_counter(), model.get_submodule(name)
    with resident(module):
        weight = matrix(module).float()
        solution = solved(solver, name, weight, moments, grid)
        dequantized = solution.quantized.dequantize()
        report = LinearReport(name, -1, Site((name,), weight.shape[1]), method, moments, prepared)
        errors = report.errors(weight, dequantized, solution)  # `weight` may be the parameter itself
        _write_weight(module, dequantized)
    return solution.quantized, report.row(solution, errors, time.perf_counter() - started)


def _write_weight(module: nn.Module, dequantized: Float[Tensor, "out in"]) -> None:
    """Write a weight into the module, and into the place that an offloaded module is read from."""
    matrix(module).copy_(dequantized)
    if (home := residence(module)) is not None:
        (own,) = home.parameters  # the embedding's, or the head's: it has no bias
        home.moved(lambda: [(own, dequantized)])
