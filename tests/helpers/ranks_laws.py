"""Work of two ranks for test_distributed.py, started with a folder as argument, where results are left."""

import sys
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import torch

from gptq_awq.api import load_method
from gptq_awq.calibration.moments import MomentsSum
from gptq_awq.calibration.observation import ObservationCache
from gptq_awq.errors import UserError
from gptq_awq.numerics.distributed import opened, rank_and_size
from gptq_awq.quantization.method import Method
from gptq_awq.quantization.quantize import quantize
from gptq_awq.solvers.gptq import GPTQ
from gptq_awq.storage.journal import Journal
from helpers.interrupted_runs import KilledError
from helpers.quantization_runs import GRID, SMALL, tokens
from helpers.tiny_models import tiny_model

PRESETS = ("rtn", "gptq", "awq", "awq_gptq", "smoothquant", "gptaq", "qronos")
METHODS = {name: load_method(name)[0] for name in PRESETS}
METHODS["qronos and the head"] = replace(METHODS["qronos"], head="solve")
METHODS["gptq on full precision"] = Method("gptq", GPTQ(), error_propagation=False)


def run(method, ranks, journal=None, record=None, kill_after=None, name="llama"):
    """Codes, ledger and weights of four batches, the last of them shorter."""
    model, codes, rows = tiny_model(name), {}, []
    settings = replace(SMALL, ranks=ranks)
    for block in quantize(model, tokens(7), method, GRID, settings, progress=journal, record=record):
        codes |= {name: weight.codes for name, weight in block.weights.items()}
        rows += block.rows
        if block.index == kill_after:
            raise KilledError
    return {"codes": codes, "rows": rows, "state": model.state_dict()}


def moments_of_whole_numbers(ranks):
    """Inputs whose sums are exact, this rank's part of them; wider than a block of the upper triangle."""
    x = torch.randint(-8, 9, (6, 50, 500), generator=torch.Generator().manual_seed(0)).float()
    total = MomentsSum(500, torch.device("cpu"))
    for batch in range(ranks.rank, 6, ranks.size):
        total.add(x[batch], None, x[batch].flip(0))
    return _values(total.finish("here", ranks))


def moments_seen_by_one(ranks):
    """Rank 0 alone has tokens, as it may be with an expert."""
    total = MomentsSum(24, torch.device("cpu"))
    if ranks.first:
        total.add(torch.ones(3, 24), None, torch.ones(3, 24))
    return _values(total.finish("here", ranks))


def _values(moments):
    return {name: getattr(moments, name) for name in ("hessian", "cross", "mean_abs", "max_abs", "tokens")}


class Failing(GPTQ):
    """A solver that one rank can't run."""

    def solve(self, weight, moments, grid):
        if rank_and_size()[0] == 1:
            raise UserError("rank 1 has its reasons")
        return super().solve(weight, moments, grid)


def together(ranks, folder: Path) -> dict:
    """Work of ranks while nothing goes wrong."""
    found = {"folder": folder} | {name: run(method, ranks) for name, method in METHODS.items()}
    journal, record = Journal(folder / "journal", "key"), ObservationCache(Journal(folder / "record", "key"), 10**9)
    for kept in (journal, Journal(folder / "left", "key")):
        with suppress(KilledError):
            run(METHODS["gptq"], ranks, kept, kill_after=0)
    for name in ("gptq", "gptq on full precision"):
        found[f"{name} of experts"] = run(METHODS[name], ranks, name="qwen3-moe")
    found["resumed"] = run(METHODS["gptq"], ranks, journal)
    found |= {name: run(METHODS["awq"], ranks, record=record) for name in ("recording", "recorded")}
    found["whole numbers"], found["one"] = moments_of_whole_numbers(ranks), moments_seen_by_one(ranks)
    first, other = ranks.gather([x for name in METHODS for x in found[name]["state"].values()])
    found["same"] = [torch.equal(x, y) for x, y in zip(first, other, strict=True)]
    return found


def main(folder: Path) -> None:
    """Twice the ranks meet; the second time, one of them fails."""
    with opened(5) as ranks:
        found = together(ranks, folder)
    try:
        with opened(5, run=1) as ranks:
            run(Method("gptq", Failing()), ranks)
    except UserError as error:
        found["told"] = str(error)
    if ranks.first:
        torch.save(found, folder / "found.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
