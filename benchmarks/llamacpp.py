"""GPTQ onto llama.cpp's formats against llama.cpp's own quantizer, at equal file size.

    python benchmarks/llamacpp.py [--types q4_0 q4_k_m] [--model DIR] [--samples 32] [--windows 8] [--work DIR]

For every file type: llama-quantize alone; llama-quantize with an importance matrix of the same calibration text; our
rounding to nearest, GPTQ, and AWQ with GPTQ on the same grid. All files are decoded by the gguf library and scored
alike: KL from full precision and perplexity on the first windows of WikiText-2 test. Needs `python
scripts/install_engine.py llamacpp`.
"""

import argparse
import copy
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import torch

from gptq_awq.api import load_method
from gptq_awq.data.corpora import WikiText2
from gptq_awq.data.tokens import TokenSet, evaluation_windows
from gptq_awq.evaluation.evaluate import Baseline, full_precision, score
from gptq_awq.export.base import Source
from gptq_awq.export.engines.run import find
from gptq_awq.export.gguf import GGUFFormat
from gptq_awq.export.gguf_file import read_gguf
from gptq_awq.export.layout import Layout
from gptq_awq.grids.mix import LlamaMix
from gptq_awq.models.load import AssetModel, LoadedModel, LocalModel
from gptq_awq.quantization.quantize import quantize
from gptq_awq.storage.assets import cache_dir


def llamacpp(tool: str) -> str:
    """Path of one of llama.cpp's programs."""
    python = find("llamacpp", "gguf")
    if python is None:
        raise SystemExit("llama.cpp is not installed: python scripts/install_engine.py llamacpp")
    return str(python.parent / tool)


def call(*command: str | Path) -> float:
    """Run a program silently; returns its wall time in seconds."""
    started = time.perf_counter()
    subprocess.run([str(part) for part in command], check=True, capture_output=True)
    return time.perf_counter() - started


def theirs(full: Path, file: Path, kind: str, matrix: Path | None) -> float:
    """Quantize with llama-quantize; returns its wall time in seconds."""
    options = ["--imatrix", matrix] if matrix else []
    return call(llamacpp("llama-quantize"), *options, full, file, kind.upper())


def ours(loaded: LoadedModel, tokens: TokenSet | None, file: Path, kind: str, method: str, search: str) -> float:
    """Quantize with one of our methods onto the same grid and write GGUF; returns seconds without the writing."""
    source = Source(copy.deepcopy(loaded.model), loaded.tokenizer, loaded.name, {})
    preset, _ = load_method(method)
    started = time.perf_counter()
    weights = {}
    for block in quantize(source.model, tokens, preset, cast(Any, LlamaMix)(kind, search)):
        weights.update(block.weights)
    seconds = time.perf_counter() - started
    GGUFFormat().write(Source(source.model, source.tokenizer, source.name, weights), file.parent)
    (file.parent / "model.gguf").rename(file)
    return seconds


def scored(loaded: LoadedModel, baseline: Baseline, file: Path) -> dict[str, float]:
    """Score the decoded weights of a GGUF file; returns metrics by name."""
    model = copy.deepcopy(loaded.model)
    own = dict(model.named_parameters(remove_duplicate=False))
    for tensor in read_gguf(file, Layout.read(file.parent)):
        own[tensor.name].data.copy_(torch.from_numpy(tensor.weight))
    return score(model, loaded.tokenizer, baseline, seed=0).metrics


Make = Callable[[Path], float]
"""Writes a quantized GGUF file and returns the seconds of quantizing."""


def contestants(
    loaded: LoadedModel, tokens: TokenSet, full: Path, matrix: Path, kind: str
) -> Iterator[tuple[str, Make]]:
    """Yield name and quantizer of every way to make a file of type `kind`."""
    yield "llama-quantize", lambda file: theirs(full, file, kind, None)
    yield "llama-quantize, imatrix", lambda file: theirs(full, file, kind, matrix)
    yield "rtn, mse", lambda file: ours(loaded, None, file, kind, "rtn", "mse")
    for method in ("gptq", "awq_gptq"):
        yield method, lambda file, method=method: ours(loaded, tokens, file, kind, method, "hessian")


def parse() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--types", nargs="+", default=["q4_0", "q4_k_m"])
    parser.add_argument("--model", help="a transformers folder; default: smollm2-135m")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--work", type=Path, help="keep files here")
    return parser.parse_args()


def main() -> None:
    """Quantize every file type in every way, score the files, and print the table."""
    options = parse()
    source = LocalModel(path=options.model) if options.model else AssetModel(name="smollm2-135m", asset="smollm2-135m")
    loaded = source.load("float32", "cpu")
    calibration = WikiText2(split="valid", samples=options.samples, seqlen=options.seqlen)
    tokens = calibration.tokens(loaded.tokenizer, seed=0)
    text = WikiText2(split="test").text("data")
    test = evaluation_windows(text, loaded.tokenizer, 2048, options.windows, "windows")
    baseline = full_precision(
        loaded.model, loaded.tokenizer, loaded.sha256, [test], cache_dir=cache_dir(), keep_output=True
    )
    with tempfile.TemporaryDirectory() as scratch:
        work = options.work or Path(scratch)
        work.mkdir(parents=True, exist_ok=True)
        full, matrix, corpus = work / "full.gguf", work / "imatrix.gguf", work / "calibration.txt"
        GGUFFormat(plain_dtype="F32").write(Source(loaded.model, loaded.tokenizer, loaded.name, {}), work)
        (work / "model.gguf").rename(full)
        corpus.write_text("\n\n".join(loaded.tokenizer.decode(row) for row in tokens.ids))
        seconds = call(
            llamacpp("llama-imatrix"), "-m", full, "-f", corpus, "-o", matrix, "-c", str(options.seqlen), "-t", "2"
        )
        print(f"importance matrix: {seconds:.0f} s\n")
        print("| type | by | MB | KL | KL / llama-quantize's | perplexity | seconds |")
        print("|:---|:---|---:|---:|---:|---:|---:|")
        for kind in options.types:
            plain = None
            for name, make in contestants(loaded, tokens, full, matrix, kind):
                file = work / f"{kind}-{name.replace(', ', '-')}.gguf"
                seconds = make(file)
                metrics = scored(loaded, baseline, file)
                kl = metrics[f"{test.name}/kl"]
                plain = plain or kl
                ppl = next(value for key, value in metrics.items() if "/ppl@" in key)
                size = file.stat().st_size / 1e6
                print(
                    f"| {kind} | {name} | {size:.2f} | {kl:.4f} | {kl / plain:.2f} | {ppl:.2f} | {seconds:.0f} |",
                    flush=True,
                )
                if options.work is None:
                    file.unlink()


if __name__ == "__main__":
    main()
