"""Recipes side by side: KL from full precision on windows that nothing was fitted to, over models, bits and seeds.

    python benchmarks/recipes.py --model DIR --text FILE --bits 2 3 4 --seeds 0 1 \
        --recipes method=fast method=yaqa "method=yaqa method.output_curvature.tile=64"

A recipe is a list of the command line's options. The text is cut in two: calibration windows are drawn from its first
half, by the seed, and KL is measured on windows of its second half, so a benchmark's test text stays unread. The
change from the first recipe is paired: the same windows, the mean over seeds and windows, and twice its standard error.
Times are in forwards of the calibration text. A folder without a tokenizer is one of small_model.py's, whose tokens are
bytes.
"""

import argparse
import copy
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from jaxtyping import Float, Int
from torch import Tensor
from transformers import AutoModelForCausalLM

from gptq_awq import quantize_model
from gptq_awq.evaluation.divergence import token_kl
from gptq_awq.grids.base import Grid
from gptq_awq.models.load import AssetModel, LocalModel
from gptq_awq.quantization.method import Method
from gptq_awq.runtime.configs import CONFIGS

PER_FORWARD = 4
"""Windows in one forward."""


@dataclass(frozen=True)
class Outcome:
    """One recipe's outcome: KL of every window that was measured, and the time in forwards of the calibration text."""

    kl: Float[Tensor, "windows"]
    perplexity: float
    forwards: float


def recipe(options: str, bits: int, group_size: int) -> tuple[Method, Grid]:
    """Compose a recipe's method and grid."""
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        composed = compose("config", overrides=[*options.split(), f"bits={bits}", f"group_size={group_size}"])
    return tuple(instantiate(node, _convert_="all") for node in (composed.method, composed.grid))  # pyright: ignore


def model_and_tokens(folder: str | None, text: str) -> tuple[Any, Int[Tensor, "tokens"]]:
    """The full-precision model and a text's tokens, which are its bytes where the folder has no tokenizer."""
    if folder and not list(Path(folder).glob("tokenizer*")):
        model = AutoModelForCausalLM.from_pretrained(folder).eval()
        return model, torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8).long()
    source = LocalModel(path=folder) if folder else AssetModel(name="smollm2", asset="smollm2-135m")
    loaded = source.load("float32", "cpu")
    return loaded.model, loaded.tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids[0]


def windows(ids: Int[Tensor, "tokens"], count: int, length: int, seed: int | None) -> Int[Tensor, "count length"]:
    """Windows of a text: from evenly spread places, or drawn by a seed."""
    last = len(ids) - length
    if seed is None:
        starts = torch.arange(count) * (last // max(1, count - 1))
    else:
        starts = torch.randint(last, (count,), generator=torch.Generator().manual_seed(seed))
    return torch.stack([ids[start : start + length] for start in starts.tolist()])


@torch.no_grad()
def compared(model: Any, full: Any, held_out: Int[Tensor, "n length"]) -> tuple[Float[Tensor, "n"], float]:
    """Mean KL of each window, and the perplexity."""
    kl, loss = [], 0.0
    for batch in held_out.split(PER_FORWARD):
        log_p, log_q = (m(batch, use_cache=False).logits.float().log_softmax(-1) for m in (full, model))
        loss -= float(log_q[:, :-1].gather(-1, batch[:, 1:, None]).sum())
        kl += [token_kl(*rows).mean() for rows in zip(log_p, log_q, strict=True)]
    return torch.stack(kl), float(torch.tensor(loss / held_out[:, 1:].numel()).exp())


@torch.no_grad()
def seconds_of_a_forward(model: Any, calibration: Int[Tensor, "n length"]) -> float:
    """Seconds that one plain forward of the calibration text takes through the decoder."""
    decoder = model.get_decoder()
    decoder(calibration[:PER_FORWARD])  # warms up
    started = time.perf_counter()
    for batch in calibration.split(PER_FORWARD):
        decoder(batch, use_cache=False)
    return time.perf_counter() - started


def main() -> None:
    """Run every recipe at every width with every seed, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a transformers folder; default: smollm2-135m")
    parser.add_argument("--text", required=True, help="a text file, none that is a test set")
    parser.add_argument("--recipes", nargs="+", required=True, help="options of the command line, in quotes")
    parser.add_argument("--bits", type=int, nargs="+", default=[3])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--seqlen", type=int, default=256)
    parser.add_argument("--held-out", type=int, default=64, help="windows that KL is measured on")
    parser.add_argument("--characters", type=int, default=1_400_000, help="of the text that are read")
    parser.add_argument("--json", help="file that rows are appended to")
    options = parser.parse_args()
    full, ids = model_and_tokens(options.model, Path(options.text).read_text(encoding="utf-8")[: options.characters])
    first, second = ids[: len(ids) // 2], ids[len(ids) // 2 :]
    held_out = windows(second, options.held_out, options.seqlen, None)
    print("| bits | recipe | KL | change, ± 2 SE | perplexity | forwards |\n|---:|:---|---:|---:|---:|---:|")
    for bits in options.bits:
        found: dict[str, list[Outcome]] = {each: [] for each in options.recipes}
        for seed in options.seeds:
            calibration = windows(first, options.samples, options.seqlen, seed)
            unit = seconds_of_a_forward(full, calibration)
            for each in options.recipes:
                method, grid = recipe(each, bits, options.group_size)
                model = copy.deepcopy(full)
                started = time.perf_counter()
                quantize_model(model, calibration, method, bits, options.group_size, grid=grid)
                taken = (time.perf_counter() - started) / unit
                found[each].append(Outcome(*compared(model, full, held_out), taken))
                print(f"{bits} bits, seed {seed}, {each}: {found[each][-1].kl.mean():.4f}", file=sys.stderr, flush=True)
        for each, outcomes in found.items():
            show(bits, each, outcomes, found[options.recipes[0]], options.json)


def show(bits: int, name: str, outcomes: list[Outcome], anchor: list[Outcome], path: str | None) -> None:
    """Print one row, and append it to a file of results."""
    kl = torch.stack([each.kl for each in outcomes]).mean(0)
    change = kl - torch.stack([each.kl for each in anchor]).mean(0)
    error = 2 * float(change.std()) / len(change) ** 0.5
    perplexity, forwards = (sum(getattr(o, k) for o in outcomes) / len(outcomes) for k in ("perplexity", "forwards"))
    before = float(kl.mean() - change.mean())
    print(
        f"| {bits} | {name} | {float(kl.mean()):.4f} | {100 * float(change.mean()) / before:+.1f}% ± "
        f"{100 * error / before:.1f} | {perplexity:.3f} | {forwards:.1f} |",
        flush=True,
    )
    if path:
        spread = [round(float(each.kl.mean()), 6) for each in outcomes]
        row = {"bits": bits, "recipe": name, "kl": spread, "perplexity": perplexity, "forwards": round(forwards, 2)}
        with Path(path).open("a") as file:
            file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
