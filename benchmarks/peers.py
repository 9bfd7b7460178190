"""Time and quality of our GPTQ, AWQ and rounding to nearest against llm-compressor, GPTQModel and AutoRound.

    python scripts/install_engine.py llmcompressor gptqmodel autoround
    python benchmarks/peers.py [--rows rtn gptq_plain gptq awq autoround] [--dtype float32 bfloat16] [--repeat 3]

All get the same float32 transformers folder, the same calibration token ids, the same grid (--bits in groups of
--group-size, asymmetric) and the same number of threads, and run in a process of their own. Only the quantizing call
is timed, not loading and saving. A warm-up run on one block, which is not measured, triggers compilation. Then ours and
the others take turns (ours, peer, ours, peer, ours), --repeat times. The dequantized weights of each are checked to lie
on a grid of 2^bits levels per group, and scored by our float32 forward on the first --windows of WikiText-2 test, so
that quality is reported beside speed. --dtype is that of the calibration forwards, and of the peers' weights too, as
they use one dtype for both.

Rows of AWQ quantize the first --awq-layers blocks only, ours too, and score the model with its other blocks in full
precision (llm-compressor's AWQ takes about an hour for 30). AutoRound, which learns its rounding, is compared with our
method=fast, which does not. Drivers are in benchmarks/peers/, one per library.
"""

import argparse
import copy
import datetime
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.utils import logging as transformers_logging

from gptq_awq.data.corpora import WikiText2
from gptq_awq.data.tokens import TokenSet, evaluation_windows
from gptq_awq.evaluation.perplexity import perplexity, token_losses
from gptq_awq.export.engines.run import RECORD, engines_folder
from gptq_awq.models.blocks import find_blocks
from gptq_awq.models.linear import is_linear
from gptq_awq.models.load import AssetModel, LoadedModel, LocalModel

DRIVERS = Path(__file__).resolve().parent / "peers"
OURS = "ours"
PEERS = ("llmcompressor", "gptqmodel", "autoround")
"""Names of environments (scripts/install_engine.py) and of drivers."""
WARM_UP_TOKENS = 64


@dataclass(frozen=True)
class Row:
    """One comparison between ours and some peers.

    Attributes:
        title: name in the table.
        ours: our preset, and whether with its own settings (True) or the plain ones.
        theirs: method of the peers, and whether with their own best settings (True) or the plain ones.
        peers: names of the peers that take part.
        cut: whether only the first --awq-layers blocks are quantized.
    """

    title: str
    ours: tuple[str, bool]
    theirs: tuple[str, bool]
    peers: tuple[str, ...]
    cut: bool = False

    def asks(self, name: str) -> tuple[str, bool]:
        """The method that a contestant runs, and whether tuned."""
        return self.ours if name == OURS else self.theirs


ROWS: Mapping[str, Row] = {
    "rtn": Row("nearest", ("rtn", False), ("rtn", False), PEERS),
    "gptq_plain": Row("GPTQ, plain", ("gptq", False), ("gptq", False), ("llmcompressor", "gptqmodel")),
    "gptq": Row("GPTQ, defaults", ("gptq", True), ("gptq", True), ("llmcompressor", "gptqmodel")),
    "awq_plain": Row("AWQ, ranges not searched", ("awq", False), ("awq", False), ("llmcompressor",), cut=True),
    "awq": Row("AWQ, defaults", ("awq", True), ("awq", True), ("llmcompressor", "gptqmodel"), cut=True),
    "autoround": Row("learned beside our fast recipe", ("fast", True), ("autoround", True), ("autoround",)),
}


@dataclass
class Record:
    """Results of one contestant of a row so far: seconds of its runs, first answer, perplexity, error."""

    seconds: list[float] = field(default_factory=list)
    answer: dict[str, Any] = field(default_factory=dict)
    ppl: float | None = None
    error: str | None = None


@dataclass(frozen=True)
class Arena:
    """Model, data and options that all contestants share.

    Attributes:
        loaded: the full-precision model.
        windows: evaluation windows of the perplexity.
        tokens: calibration tokens, (samples, seqlen).
        folders: number of blocks → a transformers folder of the model cut to so many.
        options: options of the command line.
    """

    loaded: LoadedModel
    windows: TokenSet
    tokens: Tensor
    folders: Mapping[int, Path]
    options: argparse.Namespace

    def blocks(self, row: Row) -> int:
        """Number of blocks that a row quantizes."""
        there = len(find_blocks(self.loaded.model)[1])
        return min(there, self.options.awq_layers if row.cut else self.options.layers or there)


def python_of(name: str) -> Path | None:
    """Path of a contestant's interpreter, None where its environment is not installed."""
    if name == OURS:
        return Path(sys.executable)
    env = engines_folder() / name
    return env / "bin" / "python" if (env / RECORD).is_file() else None


def last_line(text: str, code: int) -> str:
    """Summarise a failed program: its signal, the last line of its output, or its exit code."""
    if code < 0:
        return f"killed by signal {-code}"
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return textwrap.shorten(lines[-1], 160) if lines else f"exit code {code}"


def call(name: str, folder: Path, threads: int, timeout: float) -> str | None:
    """Run a contestant's driver on a job folder; returns why it failed, or None."""
    python = python_of(name)
    if python is None:
        return f"not installed: python scripts/install_engine.py {name}"
    counts = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS"), str(threads))
    env = {**os.environ, **counts, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    command = [str(python), str(DRIVERS / f"run_{name}.py"), str(folder)]
    try:
        done = subprocess.run(  # in the job's folder, as some leave logs where they run
            command, capture_output=True, text=True, env=env, cwd=folder, timeout=timeout, check=False
        )
    except subprocess.TimeoutExpired:
        return f"stopped after {timeout:.0f} s"
    if done.returncode:
        return last_line(done.stderr, done.returncode)
    return None if (folder / "answer.json").is_file() else "left no answer"


def attempt(arena: Arena, row: Row, name: str, dtype: str, folder: Path, warm_up: bool = False) -> str | None:
    """Run a contestant in a fresh folder, or briefly on one block as a warm-up; returns why it failed, or None."""
    blocks = 1 if warm_up else arena.blocks(row)
    tokens = arena.tokens[:2, :WARM_UP_TOKENS] if warm_up else arena.tokens
    options = arena.options
    method, tuned = row.asks(name)
    job = {
        "model": str(arena.folders[blocks]),
        "method": method,
        "tuned": tuned,
        "bits": options.bits,
        "group_size": options.group_size,
        "sym": options.sym,
        "dtype": dtype,
        "batch_size": options.batch_size,
        "damping": 0.01,
        "iters": options.iters,
        "threads": options.threads,
    }
    folder.mkdir()
    (folder / "job.json").write_text(json.dumps(job))
    save_file({"ids": tokens.contiguous()}, folder / "tokens.safetensors")
    return call(name, folder, options.threads, options.timeout)


def turns(peers: Sequence[str], repeat: int) -> Iterator[str]:
    """Yield the contestants in running order: ours before each peer, and once more at the end."""
    for _ in range(repeat):
        for name in peers:
            yield OURS
            yield name
    yield OURS


def compete(arena: Arena, row: Row, peers: Sequence[str], dtype: str) -> dict[str, Record]:
    """Run all contestants of a row; one that fails is not run again, and the others go on."""
    records = {name: Record() for name in (OURS, *peers)}
    with tempfile.TemporaryDirectory(prefix="peers-") as scratch:
        for name, record in records.items():
            record.error = attempt(arena, row, name, dtype, Path(scratch) / f"warm-{name}", warm_up=True)
        for turn, name in enumerate(turns(peers, arena.options.repeat)):
            record, folder = records[name], Path(scratch) / str(turn)
            if record.error:
                continue
            record.error = attempt(arena, row, name, dtype, folder)
            if record.error is None:
                _take(arena, record, folder, arena.blocks(row))
            print(f"  {row.title}, {dtype}, {name}: {record.error or f'{record.seconds[-1]:.2f} s'}", file=sys.stderr)
    return records


def _take(arena: Arena, record: Record, folder: Path, blocks: int) -> None:
    """Record a run's seconds; check and score the weights of the first run."""
    answer = json.loads((folder / "answer.json").read_text())
    record.seconds.append(answer["seconds"])
    if record.ppl is None:
        record.answer = answer
        weights = load_file(folder / "weights.safetensors")
        names = linears_of(arena.loaded.model, blocks)
        record.error = off_grid(arena.loaded.model, weights, names, arena.options.bits, arena.options.group_size)
        record.ppl = scored(arena.loaded.model, weights, arena.windows)
    (folder / "weights.safetensors").unlink()


def linears_of(model: nn.Module, blocks: int) -> list[str]:
    """Names of the weights that quantizing the first blocks must have changed."""
    prefix, found = find_blocks(model)
    linears = ((i, name) for i in range(blocks) for name, module in found[i].named_modules() if is_linear(module))
    return [f"{prefix}.{i}.{name}.weight" for i, name in linears]


def levels(weight: Float[Tensor, "out in"], group_size: int) -> int:
    """Largest number of distinct values in any group of adjacent columns of a row."""
    most = 0
    for group in weight.split(group_size, dim=1):
        steps = group.sort(dim=1).values.diff(dim=1) > 0
        most = max(most, 1 + int(steps.sum(1).max()))
    return most


def off_grid(
    model: nn.Module, weights: Mapping[str, Tensor], names: Sequence[str], bits: int, group_size: int
) -> str | None:
    """Name the first weight that is missing, unchanged, or has more than 2^bits levels; None where all are valid."""
    full = dict(model.named_parameters())
    for name in names:
        if name not in weights:
            return f"{name} is not among the weights it left"
        if torch.equal(weights[name], full[name]):
            return f"{name} was not quantized"
        if (count := levels(weights[name], group_size)) > 2**bits:
            return f"{name} has {count} values in a group"
    return None


@torch.no_grad()
def scored(model: Any, weights: Mapping[str, Tensor], windows: TokenSet) -> float:
    """Perplexity of the model with the given weights, which are replaced by its own again afterwards.

    Raises ValueError for a weight that the model does not have.
    """
    own = dict(model.named_parameters(remove_duplicate=False))
    if unknown := sorted(set(weights) - set(own)):
        raise ValueError(f"the model has no weight {unknown[0]}")
    kept = {name: own[name].clone() for name in weights}
    try:
        for name, value in weights.items():
            own[name].copy_(value)
        return perplexity(token_losses(model, windows).nll)
    finally:
        for name, value in kept.items():
            own[name].copy_(value)


def save_cut(loaded: LoadedModel, blocks: int, folder: Path) -> Path:
    """Write a transformers folder of the model cut to its first blocks, in float32."""
    model: Any = copy.deepcopy(loaded.model)
    prefix, found = find_blocks(model)
    model.set_submodule(prefix, nn.ModuleList(list(found)[:blocks]))
    model.config.num_hidden_layers = blocks
    if kinds := getattr(model.config, "layer_types", None):
        model.config.layer_types = kinds[:blocks]
    model.save_pretrained(folder)
    loaded.tokenizer.save_pretrained(folder)
    return folder


def lines_of(row: Row, records: Mapping[str, Record], dtype: str) -> Iterator[str]:
    """Yield the table's lines for one row, one per contestant."""
    base = statistics.median(records[OURS].seconds) if records[OURS].seconds else None
    for name, record in records.items():
        if not record.seconds or record.error:
            yield f"| {row.title} | {name} | {dtype} | failed: {_cell(record.error or '')} | | | | | |"
            continue
        middle = statistics.median(record.seconds)
        ratio = f"{middle / base:.2f}" if base else ""
        memory = f"{record.answer['peak_bytes'] / 1e9:.2f} GB"
        times = f"{min(record.seconds):.2f} s | {middle:.2f} s | {ratio} | {memory} | {record.ppl:.2f}"
        yield f"| {row.title} | {name} | {dtype} | {_cell(record.answer['settings'])} | {times} |"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


HEADER = """
| row | by | dtype | settings | least | median | × ours | peak memory | perplexity |
|:---|:---|:---|:---|---:|---:|---:|---:|---:|"""


def preamble(arena: Arena) -> str:
    """Heading of the table: model, command line, machine, grid, tokens, full-precision perplexity."""
    options, (samples, seqlen) = arena.options, arena.tokens.shape
    full = scored(arena.loaded.model, {}, arena.windows)
    windows, length = arena.windows.ids.shape
    grid = f"{options.bits} bits, groups of {options.group_size}, {'symmetric' if options.sym else 'asymmetric'}"
    return textwrap.dedent(f"""\
        # {datetime.date.today()}, {arena.loaded.name}, libraries of others

        `python benchmarks/peers.py {shlex.join(sys.argv[1:])}`

        {options.threads} threads, {torch.cpu.get_capabilities().get("cpu_name")}; {grid}; {samples} x {seqlen}
        calibration tokens; {options.repeat} turns; {arena.blocks(ROWS["gptq"])} blocks, rows of AWQ the first
        {arena.blocks(ROWS["awq"])}; perplexity on {windows} x {length} tokens of WikiText-2 test, full precision
        {full:.2f}.
        """)


def versions(rows: Sequence[Mapping[str, Record]]) -> str:
    """List the versions of packages and the threads that each contestant ran with."""
    answers = {name: record.answer for records in rows for name, record in records.items() if record.answer}
    return "\n".join(
        f"- {name}: {told['package']}, torch {told['torch']}, transformers {told['transformers']}, "
        f"{told['threads']} threads"
        for name, told in answers.items()
    )


def parse() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a transformers folder; default: smollm2-135m")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=[name for name in ROWS if name != "awq_plain"])
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=PEERS)
    parser.add_argument("--dtype", nargs="+", choices=["float32", "bfloat16"], default=["float32"])
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--sym", action="store_true", help="a symmetric grid")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--batch-size", type=int, default=8, help="windows per forward of the peers (default: 8)")
    parser.add_argument("--windows", type=int, default=8, help="evaluation windows of the perplexity (default: 8)")
    parser.add_argument("--eval-seqlen", type=int, default=2048)
    parser.add_argument("--layers", type=int, help="blocks that the other rows quantize (default: all)")
    parser.add_argument("--awq-layers", type=int, default=4, help="blocks that rows of AWQ quantize (default: 4)")
    parser.add_argument("--iters", type=int, default=50, help="AutoRound's steps per block (default: 50)")
    parser.add_argument("--repeat", type=int, default=1)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--timeout", type=float, default=3 * 3600.0, help="seconds for one run (default: 3 hours)")
    parser.add_argument("--out", type=Path, help="also write the table to this file")
    return parser.parse_args()


def prepare(options: argparse.Namespace, scratch: Path) -> Arena:
    """Load the model, draw the tokens, and write the folders of cut models."""
    asset = AssetModel(name="smollm2-135m", asset="smollm2-135m")
    loaded = (LocalModel(path=options.model) if options.model else asset).load("float32", "cpu")
    calibration = WikiText2(split="valid", samples=options.samples, seqlen=options.seqlen)
    ids = calibration.tokens(loaded.tokenizer, seed=0).ids
    length = min(options.eval_seqlen, loaded.model.config.max_position_embeddings)
    windows = evaluation_windows(WikiText2(split="test").text(), loaded.tokenizer, length, options.windows)
    folders: dict[int, Path] = {}
    arena = Arena(loaded, windows, ids, folders, options)
    for blocks in {1, *(arena.blocks(ROWS[name]) for name in options.rows)}:
        folders[blocks] = save_cut(loaded, blocks, scratch / f"{blocks}-blocks")
    return arena


def main() -> None:
    """Run all rows, and print each when it is finished."""
    options = parse()
    torch.set_num_threads(options.threads)
    transformers_logging.disable_progress_bar()
    with tempfile.TemporaryDirectory(prefix="peers-models-") as scratch:
        arena = prepare(options, Path(scratch))
        text = [preamble(arena), HEADER]
        print("\n".join(text), flush=True)
        done = []
        for name in options.rows:
            row = ROWS[name]
            peers = [peer for peer in row.peers if peer in options.peers]
            for dtype in options.dtype:
                done.append(compete(arena, row, peers, dtype))
                text += lines_of(row, done[-1], dtype)
                print("\n".join(text[-1 - len(peers) :]), flush=True)
                if options.out:
                    options.out.write_text("\n".join([*text, "", versions(done), ""]))
        print(f"\n{versions(done)}")


if __name__ == "__main__":
    main()
