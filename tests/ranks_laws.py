"""What two ranks do, for test_ranks.py: started by torchrun with a folder as its argument, leaves there what came out."""

import os
import signal
import sys
from contextlib import suppress
from pathlib import Path

import torch
from test_pipeline import GRID, SMALL, tokens
from tiny_models import tiny_model

from gptq_awq.api import load_method
from gptq_awq.errors import UserError
from gptq_awq.journal import Journal
from gptq_awq.moments import MomentsSum
from gptq_awq.pipeline.inputs import Settings
from gptq_awq.pipeline.method import Method
from gptq_awq.pipeline.observe import Record
from gptq_awq.pipeline.quantize import quantize
from gptq_awq.ranks import ONE, Ranks, opened
from gptq_awq.solvers.gptq import GPTQ

METHODS = {
    "rtn": load_method("rtn")[0],
    "gptq": load_method("gptq")[0],
    "awq": load_method("awq")[0],
    "awq_gptq": load_method("awq_gptq")[0],
    "smoothquant": load_method("smoothquant")[0],
    "gptaq": load_method("gptaq")[0],
    "qronos": load_method("qronos")[0],
    "gptq on full precision": Method("gptq", GPTQ(), error_propagation=False),
}


def run(method, ranks, journal=None, record=None, kill_after=None):
    """Codes, ledger and weights."""
    model, codes, rows = tiny_model("llama"), {}, []
    settings = Settings(SMALL.compute_dtype, SMALL.tokens_per_batch, ranks=ranks)
    for block in quantize(model, tokens(7), method, GRID, settings, progress=journal, record=record):
        codes |= {name: weight.codes for name, weight in block.weights.items()}
        rows += block.rows
        if block.index == kill_after:
            raise KeyboardInterrupt
    return {"codes": codes, "rows": rows, "state": model.state_dict()}


def whole_numbers(ranks):
    """Moments of inputs whose sums are exact, this rank's part of them."""
    x = torch.randint(-8, 9, (6, 50, 800), generator=torch.Generator().manual_seed(0)).float()
    total = MomentsSum(800, torch.device("cpu"))
    for batch in range(ranks.rank, 6, ranks.size):
        total.add(x[batch], None, x[batch].flip(0))
    moments = total.finish("here", ranks)
    return [moments.hessian, moments.cross, moments.mean_abs, moments.max_abs, moments.tokens]


def one_sided(ranks):
    """Moments where rank 0 alone has seen tokens."""
    total = MomentsSum(24, torch.device("cpu"))
    if ranks.first:
        total.add(torch.ones(3, 24), None)
    return total.finish("here", ranks).hessian


class Failing(GPTQ):
    """A solver that fails where the name of its process says so."""

    def solve(self, weight, moments, grid):
        if int(os.environ["RANK"]) == 1:
            raise UserError("rank 1 has its reasons")
        return super().solve(weight, moments, grid)


def main(folder: Path) -> None:
    """Everything that takes no death; the last part's word comes from the other rank."""
    with opened(1) as ranks:
        found = {name: run(method, ranks) for name, method in METHODS.items()}
        journal = Journal(folder / "journal", "key")
        with suppress(KeyboardInterrupt):
            run(METHODS["gptq"], ranks, journal, kill_after=0)
        ranks.gather(None)
        if ranks.first:
            found["files"] = sorted(str(p.relative_to(folder)) for p in (folder / "journal").rglob("*.safetensors"))
        found["resumed"] = run(METHODS["gptq"], ranks, journal)
        for name in ("recording", "recorded"):
            found[name] = run(METHODS["awq"], ranks, record=Record(Journal(folder / "record", "key"), 10**9))
        found |= {"whole numbers": whole_numbers(ranks), "one-sided": one_sided(ranks)}
        states = ranks.gather({name: found[name]["state"] for name in METHODS})
        found["same"] = all(torch.equal(x, states[1][name][key]) for name in METHODS for key, x in states[0][name].items())
        found["slept"] = ranks.from_first(lambda: "by rank 0" if ranks.first else "by another")
    try:
        with opened(1, run=1) as ranks:
            run(Method("gptq", Failing()), ranks)
    except UserError as error:
        found["told"] = str(error)
    if found and ranks.first:
        torch.save(found, folder / "found.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
