"""Quantizing a tiny model: small settings, tokens, and the run that laws compare."""

from gptq_awq import quantize_model
from gptq_awq.data.tokens import make_token_set
from gptq_awq.grids.integer import IntGrid
from gptq_awq.quantization.quantize import Settings
from helpers.tiny_models import tiny_model, tiny_tokens

SMALL = Settings(compute_dtype="float32", tokens_per_batch=64)
GRID = IntGrid(3, 32)


def tokens(rows=6, length=32):
    """A calibration set of random tokens."""
    return make_token_set("tiny", tiny_tokens(rows, length), None, "test")


def run(name, method, grid=GRID, data=None, settings=SMALL):
    """Quantize the tiny model of that architecture."""
    return quantize_model(tiny_model(name), data or tokens(), method, grid=grid, settings=settings)
