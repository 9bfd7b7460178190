"""What lies outside of the blocks and lands on a grid: the embedding, rounded to nearest, and the output head.

A head that is solved gets what every linear in a block gets: the method's own solver, on moments of its input. That
input is what the activations are after the last block, through all that the model puts between it and the head, so it
comes last. Without error propagation the activations are full precision's, and so are the head's moments. Transforms
and tuning leave it alone.
"""

import logging
import time
from collections.abc import Mapping
from contextlib import contextmanager
from dataclasses import dataclass
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
from gptq_awq.models.linear import Site, is_linear, matrix
from gptq_awq.models.offload import residence, resident
from gptq_awq.numerics.distributed import Ranks
from gptq_awq.quantization.ledger import LinearReport
from gptq_awq.quantization.method import Method, solved
from gptq_awq.quantization.resume import BlockResult
from gptq_awq.solvers.base import Solver
from gptq_awq.solvers.rtn import RTN
from gptq_awq.transforms.base import Scaling

log = logging.getLogger(__name__)


def free_head(model: Any, method: Method) -> None:
    """Give a tied head that is to be quantized a matrix of its own, if that is allowed; else change nothing.

    Raises:
        UserError: it is not allowed; there is no head.
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
def round_ends(model: nn.Module, grids: Mapping[str, Grid], blocks: str, method: Method) -> BlockResult:
    """Round to nearest, in place, what lies outside of the blocks, has a grid and is not solved."""
    ends, solved = BlockResult(-1, {}, []), _solved_head(model, method, grids)
    for name, grid in grids.items():
        if not name.startswith(f"{blocks}.") and name != solved:
            _land(model, name, grid, method, RTN(), None, {}, ends)
    return ends


@dataclass(frozen=True)
class HeadStep:
    """The output head's turn, after all blocks'.

    Attributes:
        model: it is changed in place.
        name: of the head in the model.
        grid: where it lands.
        method: whose solver does it.
        prepared: what transforms of the whole model have done, for the ledger.
        ranks: that share the work.
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
        """None where the head is not solved."""
        name = _solved_head(model, method, grids)
        return None if name is None else cls(model, name, grids[name], method, prepared, ranks)

    @torch.no_grad()
    def run(self, activations: Activations | None) -> BlockResult:
        """Solve the head, once the `activations` have passed all blocks; None: nothing is calibrated.

        Of several ranks the first one solves it, and the others take what came of it.
        """
        moments = (
            None if activations is None else head_moments(self.model, self.name, activations, self.method.needs_cross)
        )
        done = self.ranks.from_first(lambda: self._solved(moments))
        return done if self.ranks.first else self.restore(done)

    def _solved(self, moments: Moments | None) -> BlockResult:
        assert self.method.solver is not None
        done = BlockResult(-1, {}, [])
        _land(self.model, self.name, self.grid, self.method, self.method.solver, moments, self.prepared, done)
        return done

    @torch.no_grad()
    def restore(self, done: BlockResult) -> BlockResult:
        """Put a finished head back."""
        with resident(self.model.get_submodule(self.name)):
            _put(self.model.get_submodule(self.name), done.weights[self.name])
        return done


def _solved_head(model: Any, method: Method, grids: Mapping[str, Grid]) -> str | None:
    """The name of the output head where the method's solver is to land it."""
    if method.head != "solve":
        return None
    head = model.get_output_embeddings()
    return next((name for name in grids if model.get_submodule(name) is head), None)


@torch.no_grad()
def head_moments(model: Any, name: str, activations: Activations, cross: bool = False) -> Moments:
    """The moments of what enters the head, of activations that have passed all blocks; `cross`: with full precision's.

    Raises:
        UserError: non-finite activations; no token at all.
    """
    head, (_, blocks) = model.get_submodule(name), find_blocks(model)
    calls, parameter = BlockCalls(model, blocks), head.weight
    total = MomentsSum(parameter.shape[1], parameter.device)

    def entering(hidden: Float[Tensor, "batch tokens width"]) -> Float[Tensor, "batch tokens width"]:
        ids = torch.zeros(hidden.shape[:2], dtype=torch.long)
        with _seeing_inputs(head) as seen:
            calls.finish(ids, hidden.to(parameter.dtype))  # a norm's weights and its input must be of one type
        return seen[0].to(hidden.dtype)

    with resident(head, model.get_input_embeddings()):  # both are called, though nobody wants what they answer
        for batch in activations.batches:
            x, full = entering(batch.hidden), batch.full
            total.add(x, batch.mask, entering(full) if cross and full is not None else None)
    return total.finish(name, activations.ranks)


@contextmanager
def _seeing_inputs(head: nn.Module):
    """Within: the head keeps what enters it, and computes next to nothing."""
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


def _land(
    model: nn.Module,
    name: str,
    grid: Grid,
    method: Method,
    solver: Solver,
    moments: Moments | None,
    prepared: Mapping[str, Scaling],
    done: BlockResult,
) -> None:
    """Land one weight in place, and note it."""
    started, module = time.perf_counter(), model.get_submodule(name)
    with resident(module):
        weight = _matrix(module).float()
        solution = solved(solver, name, weight, moments, grid)
        dequantized = _put(module, solution.quantized)
    report = LinearReport(name, -1, Site((name,), weight.shape[1]), method, moments, prepared)
    errors = report.errors(weight, dequantized, solution)
    done.rows.append(report.row(solution, errors, time.perf_counter() - started))
    done.weights[name] = solution.quantized


def _put(module: nn.Module, quantized: QuantizedWeight) -> Float[Tensor, "out in"]:
    """Give the module the weight that an engine computes with, for good if it comes and goes."""
    dequantized = quantized.dequantize()
    _matrix(module).copy_(dequantized)
    if (home := residence(module)) is not None:
        (own,) = home.parameters  # the embedding's, or the head's: it has no bias
        home.moved(lambda: [(own, quantized.dequantize())])
    return dequantized


def _matrix(module: nn.Module) -> Float[Tensor, "out in"]:
    return matrix(module) if is_linear(module) else module.get_parameter("weight").data
