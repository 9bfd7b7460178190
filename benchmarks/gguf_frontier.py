"""GGUF files by size and KL in one run: ours under budgets, llama-quantize's with and without importance matrix.

    npm pack @node-llama-cpp/linux-x64@3.22.1 && tar xzf node-llama-cpp-linux-x64-*.tgz
    python benchmarks/gguf_frontier.py --library package/bins/linux-x64/libllama.v0.5.0.so --out gguf.md
        [--types q4_k_m …] [--budgets 80MB …] [--methods gptq fast] [--model DIR] [--keep FOLDER]

The page goes to --out, the picture beside it. llama-quantize's files come from `llama_model_quantize`, which is all
that program calls; its importance matrix is of the text that ours are calibrated on (WikiText-2 valid), in full
precision. Ours: types chosen for each weight under a budget, embedding included (`grid=gguf`), and our codes on
llama.cpp's own choice of types. Sizes are of whole files. All files are decoded by the gguf library and scored in
float32: KL from full precision on the first windows of WikiText-2 test, ± twice the standard error over windows. A
budget is held against the smallest of llama-quantize's files that has at least our size. --keep remembers the scores of
finished files, so that a command that was interrupted goes on.
"""

import argparse
import copy
import ctypes
import datetime
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch

from gptq_awq.allocation.allocate import allocate
from gptq_awq.allocation.sensitivity import allocated_places
from gptq_awq.api import load_method
from gptq_awq.calibration.input_statistics import input_statistics
from gptq_awq.data.corpora import WikiText2
from gptq_awq.data.tokens import evaluation_windows
from gptq_awq.evaluation.divergence import divergence
from gptq_awq.evaluation.perplexity import token_losses
from gptq_awq.export.base import Source
from gptq_awq.export.gguf import GGUFFormat
from gptq_awq.export.gguf_file import read_gguf
from gptq_awq.export.gguf_layout import modules_by_tensor
from gptq_awq.export.gguf_size import gguf_bytes_beside
from gptq_awq.export.layout import Layout
from gptq_awq.grids.gguf import GGUFGrid
from gptq_awq.grids.mix import LlamaMix
from gptq_awq.models.load import AssetModel, LocalModel
from gptq_awq.quantization.quantize import quantize
from gptq_awq.storage.assets import cache_dir

TYPES: Any = (
    *("q2_k", "iq2_xxs", "iq2_s", "iq3_xxs", "iq3_s", "iq4_xs", "q4_k", "q5_k", "q6_k", "q8_0"),
    *("iq4_nl", "mxfp4", "q4_0", "q5_0", "q5_1"),
)
"""Types that ours choose among. Q4_1 is none: the default model's weights lie on its grid, and would cost nothing."""
TYPES_OF_FILES = ["iq3_xs", "iq3_m", "q2_k", "q3_k_m", "iq4_xs", "q4_0", "q4_k_s", "q4_k_m", "q5_k_m", "q6_k"]
"""File types of llama.cpp; the first two can't be written without an importance matrix."""
PLAIN, MATRIX = "llama-quantize", "llama-quantize, imatrix"


class _Entry(ctypes.Structure):
    """`llama_model_imatrix_data`: one tensor's mean squares."""

    _fields_ = (("name", ctypes.c_char_p), ("data", ctypes.c_void_p), ("size", ctypes.c_size_t))


class _Parameters(ctypes.Structure):
    """`llama_model_quantize_params`, of which more may follow."""

    _fields_ = (
        *((name, ctypes.c_int32) for name in ("threads", "file_type", "output_type", "embedding_type")),
        *((name, ctypes.c_bool) for name in ("requantize", "quantize_output", "copy", "pure", "keep_split", "dry")),
        ("imatrix", ctypes.POINTER(_Entry)),
        ("rest", ctypes.c_void_p * 16),
    )


class Llama:
    """llama-quantize, by the shared library of llama.cpp that its file is beside."""

    def __init__(self, library: Path) -> None:
        for part in ("libggml-base*.so*", "libggml.*so*"):
            ctypes.CDLL(str(next(library.parent.glob(part))), ctypes.RTLD_GLOBAL)
        self._library = ctypes.CDLL(str(library))
        self._library.llama_model_quantize_default_params.restype = _Parameters
        self._silent = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)(lambda *_: None)
        self._library.llama_log_set(self._silent, None)

    def quantize(self, source: Path, file: Path, kind: str, squares: Mapping[str, np.ndarray]) -> None:
        """Write a file of a type from one in full precision, by mean squares of tensors' inputs if there are any."""
        parameters = self._library.llama_model_quantize_default_params()
        if not parameters.quantize_output or parameters.pure:
            raise RuntimeError("llama_model_quantize_params is of another version")
        parameters.file_type = gguf.LlamaFileType[f"MOSTLY_{kind.upper()}"]
        entries = [_Entry(name.encode(), own.ctypes.data, own.size) for name, own in squares.items()]
        if entries:
            parameters.imatrix = (_Entry * (len(entries) + 1))(*entries, _Entry())
        if self._library.llama_model_quantize(str(source).encode(), str(file).encode(), ctypes.byref(parameters)):
            raise RuntimeError(f"llama.cpp could not write {kind}")


@dataclass(frozen=True)
class Point:
    """One file: who made it, under which name, its bytes, KL, twice its standard error, seconds of quantizing."""

    by: str
    name: str
    size: int
    kl: float
    margin: float
    seconds: float


class Contest:
    """A model, calibration and test windows, and the ways to make files."""

    def __init__(self, options: argparse.Namespace, work: Path) -> None:
        asset = AssetModel(name="smollm2-135m", asset="smollm2-135m")
        self._loaded = (LocalModel(path=options.model) if options.model else asset).load("float32", "cpu")
        self._full: Any = self._loaded.model
        tokenizer = self._loaded.tokenizer
        self._tokens = WikiText2(split="valid", samples=options.samples, seqlen=options.seqlen).tokens(tokenizer, 0)
        text = WikiText2(split=options.score).text("data")
        self._test = evaluation_windows(text, tokenizer, 2048, options.windows, "--windows")
        self._baseline = token_losses(self._full, self._test)
        self._output = {name: weight.clone() for name, weight in self._full.lm_head.named_parameters()}
        self._work, self._llama, self._format = work, Llama(options.library.resolve()), GGUFFormat(other_ids="allow")
        self._squares: dict[str, np.ndarray] = {}

    def llama(self, kind: str, matrix: bool) -> Point:
        """The file of llama-quantize of a type."""
        full = self._work / "full.gguf"
        if not full.exists():
            source = Source(self._full, self._loaded.tokenizer, self._loaded.name, {})
            GGUFFormat(plain_dtype="F32", other_ids="allow").write(source, self._work)
            (self._work / "model.gguf").rename(full)
        if matrix and not self._squares:
            seen = input_statistics(self._full, self._tokens)
            for tensor, (module, *_) in modules_by_tensor(self._full).items():
                if module in seen and module != "lm_head":
                    self._squares[f"{tensor}.weight"] = seen[module].squares.numpy()
        started = time.perf_counter()
        self._llama.quantize(full, self._work / "model.gguf", kind, self._squares if matrix else {})
        return self._scored(MATRIX if matrix else PLAIN, kind, time.perf_counter() - started)

    def mixed(self, method: str, kind: str) -> Point:
        """Our file on the mix of types that llama.cpp has for a file type."""
        mix: Any = LlamaMix(kind, "hessian")  # pyright: ignore[reportArgumentType]
        return self._ours(f"{method} on llama.cpp's types", method, kind, lambda: mix)

    def budget(self, method: str, budget: str) -> Point:
        """Our file of a size."""

        def chosen() -> Any:
            preset, _ = load_method(method)
            grid = GGUFGrid(budget, TYPES, search="hessian")
            places = [place.name for place in allocated_places(self._full, grid)]
            beside = gguf_bytes_beside(self._full, self._loaded.tokenizer, places)
            options: Any = {"model_sha256": self._loaded.sha256, "cache": cache_dir(), "beside": beside}
            return allocate(self._full, self._tokens, preset, grid, **options).grid

        return self._ours(f"{method}, types chosen", method, budget, chosen)

    def _ours(self, by: str, method: str, name: str, choose: Callable[[], Any]) -> Point:
        started = time.perf_counter()
        model, grid, (preset, _) = copy.deepcopy(self._full), choose(), load_method(method)
        weights = {}
        for block in quantize(model, self._tokens, preset, grid):
            weights.update(block.weights)
        seconds = time.perf_counter() - started
        self._format.write(Source(model, self._loaded.tokenizer, self._loaded.name, weights), self._work)
        return self._scored(by, name, seconds)

    @torch.no_grad()
    def _scored(self, by: str, name: str, seconds: float) -> Point:
        file, model = self._work / "model.gguf", copy.deepcopy(self._full)
        own = dict(model.named_parameters(remove_duplicate=False))
        for tensor in read_gguf(file, Layout.read(self._work)):
            own[tensor.name].copy_(torch.from_numpy(tensor.weight))
        kl = divergence(model, self._test, self._baseline, output=self._output).kl.double().mean(1)
        margin = 2 * float(kl.std()) / len(kl) ** 0.5
        return Point(by, name, file.stat().st_size, float(kl.mean()), margin, seconds)


def wanted(options: argparse.Namespace) -> Iterator[tuple[str, str, str]]:
    """Who makes which file: kind of contestant, method, and the file's type or budget."""
    yield from (("llama", MATRIX, kind) for kind in options.types)
    for method in options.methods:
        yield from (("mixed", method, kind) for kind in options.mixes)
        yield from (("budget", method, budget) for budget in options.budgets)
    yield from (("llama", PLAIN, kind) for kind in options.plain)


def made(contest: Callable[[], Contest], case: tuple[str, str, str]) -> Point:
    """The file of a case."""
    kind, by, name = case
    if kind == "llama":
        return contest().llama(name, by == MATRIX)
    return contest().mixed(by, name) if kind == "mixed" else contest().budget(by, name)


def lines(points: Sequence[Point]) -> Iterator[str]:
    """Lines of the page: every file by size, and ours beside llama-quantize's at or above their sizes."""
    yield f"# {datetime.date.today()}, GGUF files by size\n"
    yield f"`python benchmarks/gguf_frontier.py {' '.join(a for a in sys.argv[1:] if '/' not in a)}`\n"
    yield "| by | file | MB | KL ± 2 SE | quantizing |\n|:---|:---|---:|---:|---:|"
    for each in sorted(points, key=lambda point: point.size):
        kl = f"{each.kl:.4f} ± {each.margin:.4f}"
        yield f"| {each.by} | {each.name} | {each.size / 1e6:.1f} | {kl} | {each.seconds:.0f} s |"
    yield "\n| ours | MB | KL | llama-quantize at or above, imatrix | MB | KL | ratio |"
    yield "|:---|---:|---:|:---|---:|---:|---:|"
    anchors = [(each.size, each.kl, each.name) for each in points if each.by == MATRIX]
    for each in points:
        above = [anchor for anchor in anchors if anchor[0] >= 0.999 * each.size]  # files differ by their metadata
        if "llama-quantize" not in each.by and above:
            size, kl, name = min(above)
            row = f"| {each.by}: {each.name} | {each.size / 1e6:.1f} | {each.kl:.4f} | {name} | {size / 1e6:.1f}"
            yield f"{row} | {kl:.4f} | {each.kl / kl:.2f} |"


def plot(points: Sequence[Point], path: Path) -> None:
    """Draw KL over size, a line for each of those who make files."""
    import matplotlib.pyplot as plt

    _, axes = plt.subplots(figsize=(6.5, 4.2))
    for number, by in enumerate(dict.fromkeys(point.by for point in points)):
        line = sorted((each.size / 1e6, each.kl, each.margin, each.name) for each in points if each.by == by)
        x, y, margin, names = zip(*line, strict=True)
        style = {"linestyle": "none" if "llama" in by else "-", "marker": "sxo^Dv"[number % 6], "markersize": 5}
        axes.errorbar(x, y, margin, capsize=2, linewidth=1, label=by, **style)
        for each in zip(x, y, names, strict=True):
            axes.annotate(each[2], each[:2], textcoords="offset points", xytext=(4, 3), fontsize=6)
    axes.set(yscale="log", xlabel="MB of the file", ylabel="KL from full precision, nats per token")
    axes.legend(frameon=False, fontsize=8)
    plt.tight_layout()
    plt.savefig(path, dpi=150)


def parse() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--library", type=Path, required=True, help="libllama; ggml's libraries lie beside it")
    parser.add_argument("--out", type=Path, required=True, help="the page; the picture goes beside it")
    parser.add_argument("--model", help="a transformers folder; default: smollm2-135m")
    parser.add_argument("--types", nargs="*", default=TYPES_OF_FILES, help="llama.cpp's, with an importance matrix")
    parser.add_argument("--plain", nargs="*", default=TYPES_OF_FILES[2:], help="llama.cpp's, without")
    parser.add_argument("--mixes", nargs="*", default=["q4_k_m"], help="of llama.cpp's types that ours round onto")
    parser.add_argument("--budgets", nargs="*", default=["80MB", "90MB", "q4_k_m", "100MB", "120MB"])
    parser.add_argument("--methods", nargs="*", default=["gptq"])
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--windows", type=int, default=8, help="of 2048 tokens that are scored")
    parser.add_argument("--score", choices=["test", "train"], default="test", help="part of WikiText-2 that is scored")
    parser.add_argument("--keep", type=Path, help="folder that remembers finished files' scores")
    return parser.parse_args()


def main() -> None:
    """Make and score every file, and write page and picture after each."""
    options = parse()
    with tempfile.TemporaryDirectory(prefix="gguf-frontier-") as scratch:
        known: dict[str, Any] = {}
        record = (options.keep or Path(scratch)) / "points.json"
        if record.exists():
            known = json.loads(record.read_text())
        record.parent.mkdir(parents=True, exist_ok=True)
        opened: list[Contest] = []

        def contest() -> Contest:
            if not opened:
                opened.append(Contest(options, Path(scratch)))
            return opened[0]

        for case in wanted(options):
            key = " ".join(case)
            if key not in known:
                known[key] = asdict(made(contest, case))
                record.write_text(json.dumps(known, indent=1))
            print(f"{key}: {known[key]}", flush=True)
            points = [Point(**own) for own in known.values()]
            options.out.write_text("\n".join(lines(points)) + "\n", encoding="utf-8")
        plot([Point(**own) for own in known.values()], options.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
