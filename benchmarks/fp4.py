"""GPTQ against range searches on NVFP4 and MXFP4: which lowers the KL more, and by how much?

    python scripts/install_engine.py llmcompressor
    python benchmarks/fp4.py [--model DIR --text FILE --test FILE] [--seqlen 512 --test-seqlen 2048] [--samples 32]
        [--windows 8] [--grids nvfp4] [--by rtn gptq qronos llmcompressor] [--keep FOLDER] [--bytes]

Every grid with every choice of scales, rounded to nearest and by GPTQ and Qronos, beside llm-compressor's observers and
its GPTQ on the same grid, all calibrated on the same windows. KL from full precision is measured on the same test
windows, with our float32 forward. Differences are tested in pairs over blocks of 128 tokens (studentized bootstrap, p
adjusted by Holm's method within a grid): from rounding to nearest with the same search, from the same method with
`minmax`, and from the best that llm-compressor left. Seconds are of quantizing in one process, beside GPTQ's on
integers in groups of 32. Without --model: SmolLM2-135M, calibrated on WikiText-2 valid and scored on test. --keep
remembers KLs, so that one table can come from several commands. --bytes: the model is small_model.py's, whose tokens
are bytes.
"""

import argparse
import copy
import json
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peers import call
from safetensors.torch import load_file, save_file
from small_model import windows
from transformers import LlamaForCausalLM

from gptq_awq.api import load_method
from gptq_awq.data.corpora import LocalText, WikiText2
from gptq_awq.data.tokens import TokenSet, evaluation_windows
from gptq_awq.evaluation.divergence import divergence
from gptq_awq.evaluation.perplexity import token_losses
from gptq_awq.evaluation.statistics import block_sums, bootstrap_tests, holm
from gptq_awq.grids.base import Grid
from gptq_awq.grids.integer import IntGrid
from gptq_awq.grids.scaled_float import ScaledFloatGrid
from gptq_awq.models.load import AssetModel, LocalModel
from gptq_awq.quantization.quantize import quantize

GRIDS = {"nvfp4": ScaledFloatGrid(), "mxfp4": ScaledFloatGrid(group_size=32, scale="e8m0")}
SEARCHES = {"nvfp4": ("minmax", "four_over_six", "mse", "hessian"), "mxfp4": ("minmax", "mse", "hessian")}
PEER = "llmcompressor"
OBSERVERS = {
    "nvfp4": ("memoryless_minmax", "memoryless_mse", "nvfp4_expanded_mse"),
    "mxfp4": ("memoryless_minmax", "memoryless_mse"),
}
"""Observers of llm-compressor; the third of NVFP4 is what it has in Four-over-Six's place."""

Case = tuple[str, str, str]
"""Grid, method and search; llm-compressor's methods begin with its name."""


def cases(args: argparse.Namespace) -> Iterator[Case]:
    """Everything that is asked for."""
    for grid in args.grids:
        for method in args.by:
            if method == PEER:
                yield from (
                    (grid, f"{PEER} {own}", observer) for own in ("rtn", "gptq") for observer in OBSERVERS[grid]
                )
            else:
                yield from ((grid, method, search) for search in SEARCHES[grid])


def rounded(full: Any, tokens: TokenSet, method: str, grid: Grid) -> tuple[Any, float]:
    """A copy of the model on a grid, and the seconds that took."""
    model, (preset, _) = copy.deepcopy(full), load_method(method)
    started = time.perf_counter()
    for _ in quantize(model, tokens, preset, grid):
        pass
    return model, time.perf_counter() - started


def theirs(full: Any, tokenizer: Any, tokens: TokenSet, case: Case) -> tuple[Any, float]:
    """A copy of the model with llm-compressor's weights, and the seconds that took."""
    grid, method, observer = case
    threads = torch.get_num_threads()
    job = {"method": method.split()[1], "tuned": True, "bits": 4, "group_size": GRIDS[grid].group_size, "sym": True}
    job |= {"dtype": "float32", "batch_size": 8, "damping": 0.01, "iters": 0, "threads": threads}
    with tempfile.TemporaryDirectory(prefix="fp4-") as scratch:
        folder = Path(scratch)
        full.save_pretrained(folder / "model")
        tokenizer.save_pretrained(folder / "model")
        job |= {"model": str(folder / "model"), "scheme": f"{grid}a16", "observer": observer}
        (folder / "job.json").write_text(json.dumps(job))
        save_file({"ids": tokens.ids.contiguous()}, folder / "tokens.safetensors")
        if error := call(PEER, folder, threads, 3600.0):
            raise SystemExit(f"{method}, {observer}: {error}")
        model, seconds = copy.deepcopy(full), json.loads((folder / "answer.json").read_text())["seconds"]
        model.load_state_dict(load_file(folder / "weights.safetensors"), strict=False)
    return model, seconds


def inputs(args: argparse.Namespace) -> tuple[Any, Any, TokenSet, TokenSet]:
    """The model, its tokenizer if it has one, calibration tokens and test windows."""
    length = getattr(args, "test_seqlen", None) or args.seqlen
    if args.bytes:
        model = LlamaForCausalLM.from_pretrained(args.model).eval().requires_grad_(False)
        test = windows(args.test, length, args.windows)
        return model, None, windows(args.text, args.seqlen, args.samples), test
    asset = AssetModel(name="smollm2-135m", asset="smollm2-135m")
    loaded = (LocalModel(path=args.model) if args.model else asset).load("float32", "cpu")
    how: Any = {"samples": args.samples, "seqlen": args.seqlen}
    corpus = LocalText(path=str(args.text), **how) if args.text else WikiText2(split="valid", **how)
    text = LocalText(path=str(args.test)).text("--test") if args.test else WikiText2(split="test").text("data")
    test = evaluation_windows(text, loaded.tokenizer, length, args.windows, "--windows")
    return loaded.model, loaded.tokenizer, corpus.tokens(loaded.tokenizer, seed=0), test


class Bench:
    """A model, its windows, and what full precision and GPTQ on integers do on them."""

    def __init__(self, args: argparse.Namespace) -> None:
        self._full, self._tokenizer, self._tokens, self._test = inputs(args)
        self._baseline = token_losses(self._full, self._test)
        integers = IntGrid(4, 32, scale_dtype="float16")
        rounded(self._full, self._tokens, "gptq", integers)  # compiles
        _, self._unit = rounded(self._full, self._tokens, "gptq", integers)

    def kl(self, case: Case) -> tuple[np.ndarray, float]:
        """KL per token of a case, and its seconds over those of GPTQ on integers."""
        torch.manual_seed(0)
        grid, method, search = case
        if method.startswith(PEER):
            model, seconds = theirs(self._full, self._tokenizer, self._tokens, case)
        else:
            model, seconds = rounded(self._full, self._tokens, method, replaced(GRIDS[grid], search))
        return divergence(model, self._test, self._baseline).kl.double().numpy(), seconds / self._unit


def replaced(grid: ScaledFloatGrid, search: Any) -> ScaledFloatGrid:
    """The grid with another search."""
    return replace(grid, search=search)


def measured(args: argparse.Namespace, folder: Path) -> Iterator[tuple[Case, np.ndarray, float]]:
    """KL per token of every case, and its relative seconds; what the folder holds is not computed again."""
    bench: Bench | None = None
    for case in cases(args):
        file = folder / f"{' '.join(case)}.npz"
        if not file.exists():
            bench = bench or Bench(args)
            kl, seconds = bench.kl(case)
            np.savez(file, kl=kl, time=seconds)
        kept = np.load(file)
        yield case, kept["kl"], float(kept["time"])


def tests(found: Mapping[Case, np.ndarray], grid: str) -> Iterator[str]:
    """Lines of a grid's paired tests: every method of ours against three anchors."""
    own = {key[1:]: kl for key, kl in found.items() if key[0] == grid}
    peers = [key for key in own if key[0].startswith(PEER)]
    best = min(peers, key=lambda key: own[key].mean(), default=None)
    pairs = [(key, anchor) for key in own if key not in peers for anchor in (("rtn", key[1]), (key[0], "minmax"), best)]
    pairs = [(key, anchor) for key, anchor in pairs if anchor in own and anchor != key]
    if not pairs:
        return
    sums = {key: block_sums(kl[None])[0][0] for key, kl in own.items()}
    lengths = block_sums(next(iter(own.values()))[None])[1]
    differences = np.stack([sums[key] - sums[anchor] for key, anchor in pairs])
    p_values = holm(list(bootstrap_tests(differences, lengths)))
    for (key, anchor), row, p in zip(pairs, differences, p_values, strict=True):
        ratio, delta = own[key].mean() / own[anchor].mean(), row.sum() / lengths.sum()
        yield f"| {grid} | {', '.join(key)} | {', '.join(anchor)} | {ratio:.2f} | {delta:+.5f} | {p:.2g} |"


def parse() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a transformers folder; default: smollm2-135m")
    parser.add_argument("--text", type=Path, help="calibration text; default: WikiText-2 valid")
    parser.add_argument("--test", type=Path, help="text that is scored; default: WikiText-2 test")
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--test-seqlen", type=int, help="default: --seqlen")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--grids", nargs="+", choices=GRIDS, default=list(GRIDS))
    parser.add_argument("--by", nargs="+", default=["rtn", "gptq", "qronos"], help=f"also {PEER}, or any method")
    parser.add_argument("--keep", type=Path, help="folder that remembers KLs")
    parser.add_argument("--bytes", action="store_true")
    return parser.parse_args()


def main() -> None:
    """Quantize in every way, score, and print the tables."""
    args = parse()
    with tempfile.TemporaryDirectory(prefix="fp4-kept-") as scratch:
        folder = args.keep or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        print("| grid | method | search | KL | / nearest, minmax | seconds / GPTQ's on integers |")
        print("|:---|:---|:---|---:|---:|---:|")
        found: dict[Case, np.ndarray] = {}
        for case, kl, seconds in measured(args, folder):
            found[case] = kl
            plain = found.get((case[0], "rtn", "minmax"))
            ratio = "" if plain is None else f"{kl.mean() / plain.mean():.2f}"
            print(f"| {' | '.join(case)} | {kl.mean():.5f} | {ratio} | {seconds:.2f} |", flush=True)
        print("\n| grid | by | against | ratio | Δ KL | p |\n|:---|:---|:---|---:|---:|---:|")
        for grid in args.grids:
            print("\n".join(tests(found, grid)))


if __name__ == "__main__":
    main()
