"""Pairing experts' tokens with full precision beats GPTQ, and Qronos without pairing there, given enough tokens.

    python benchmarks/paired_experts.py [--windows 16,128]

Random mixtures (helpers.architectures) are quantized to 4 bits in groups of 32 on windows of 32 random tokens; KL is on
1,024 other tokens. "without drift" gives experts their own inputs in place of full precision's.
"""

import argparse
import copy
import logging
import sys
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch  # noqa: E402
from helpers.architectures import tiny_architecture  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from gptq_awq.api import load_method, quantize_model  # noqa: E402
from gptq_awq.calibration.block_inputs import Settings  # noqa: E402
from gptq_awq.calibration.expert_policy import Routes  # noqa: E402

MODELS = ("mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3")


def windows(rows: int, seed: int) -> Tensor:
    """Random token ids without special ones."""
    return torch.randint(3, 299, (rows, 32), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def log_probabilities(model: nn.Module) -> Tensor:
    """Log-probabilities of the next token on 32 windows."""
    return model(input_ids=windows(32, 2), use_cache=False).logits.double().log_softmax(-1)


def kl(full: nn.Module, rows: int, method: str, drift: bool) -> float:
    """Mean KL, in nats per token, of a model quantized on `rows` windows; without drift, experts aren't paired."""
    model, (preset, grid) = copy.deepcopy(full), load_method(method, 4, 32)
    with mock.patch.object(Routes, "forced", Routes.forced if drift else lambda *_: None):
        quantize_model(model, windows(rows, 1), preset, grid=grid, settings=Settings(compute_dtype="float32"))
    p, q = log_probabilities(full), log_probabilities(model)
    return float((p.exp() * (p - q)).sum(-1).mean())


def main() -> None:
    """Print a row for each model and amount of calibration text."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--windows", default="16,128")
    amounts = [int(amount) for amount in parser.parse_args().windows.split(",")]
    logging.disable(logging.CRITICAL)
    print("| model | calibration tokens | GPTQ | Qronos | Qronos, experts without drift |\n|---|---|---|---|---|")
    for name in MODELS:
        full = tiny_architecture(name)
        for rows in amounts:
            found = [kl(full, rows, *how) for how in (("gptq", True), ("qronos", True), ("qronos", False))]
            print(f"| {name} | {rows * 32} | {' | '.join(f'{value:.3f}' for value in found)} |", flush=True)


if __name__ == "__main__":
    main()
