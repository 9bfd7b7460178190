"""Runs that are killed after a block, and what they are compared by."""

import torch

from gptq_awq.quantization.quantize import quantize
from helpers.quantization_runs import GRID, SMALL, tokens
from helpers.tiny_models import tiny_model


class KilledError(Exception):
    """Stands for kill -9."""


def run(method, name="llama", journal=None, kill_after=None, record=None, grid=GRID):
    """The model's state and the codes' hashes, after quantizing; killed once `kill_after` blocks were finished."""
    model = tiny_model(name)
    done = {}
    for block in quantize(model, tokens(), method, grid, SMALL, progress=journal, record=record):
        done |= {row["name"]: (row["codes_sha256"], row.get("error_after", 0)) for row in block.rows}
        if block.index == kill_after:
            raise KilledError
    return done, model.state_dict()


def same(a, b):
    """Whether two runs gave the same codes and the same model, bit for bit."""
    return a[0] == b[0] and all(torch.equal(x, b[1][key]) for key, x in a[1].items())
