"""Census of all architectures of transformers: what works for a tiny random model of each, every method and format.

    python benchmarks/architectures.py [--out FOLDER] [--only NAME,NAME] [--command] [--write]

Each architecture is looked at in a process of its own: it is rounded to nearest, calibrated (GPTQ, AWQ, Qronos, fast),
written and read again by transformers. That calibration saw the right inputs is checked by a forward of the whole
model: the second moments of every linear's input must be those. --command also gives a saved folder to `run.py`. FOLDER
keeps what was found, so that an interrupted census goes on; --write makes docs/architectures.md of it.
"""

import argparse
import copy
import json
import logging
import os
import runpy
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch  # noqa: E402
from helpers.architectures import architectures, tiny_architecture  # noqa: E402
from helpers.tiny_models import save_tiny_folder  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from transformers import AutoConfig, AutoTokenizer  # noqa: E402

import gptq_awq.experiment.run  # noqa: E402, F401 (before forks)
from gptq_awq import api  # noqa: E402
from gptq_awq.api import observe_moments, quantize_model  # noqa: E402
from gptq_awq.calibration.block_inputs import Settings  # noqa: E402
from gptq_awq.errors import UserError  # noqa: E402
from gptq_awq.export.base import Source, linear_specs  # noqa: E402
from gptq_awq.export.compressed_tensors import CompressedTensorsFormat  # noqa: E402
from gptq_awq.export.hf import HFFormat  # noqa: E402
from gptq_awq.export.transformers_reader import unread  # noqa: E402
from gptq_awq.export.write import Exports  # noqa: E402
from gptq_awq.grids.integer import IntGrid  # noqa: E402
from gptq_awq.models.auto_class import auto_class  # noqa: E402
from gptq_awq.models.experts import fuse  # noqa: E402
from gptq_awq.quantization.quantize import prepare  # noqa: E402
from gptq_awq.quantization.targets import assign_grids  # noqa: E402

Found = dict[str, Any]
Tell = Callable[[str, Any], None]
METHODS = {name: (name, 4) for name in ("rtn", "gptq", "awq", "qronos", "fast")} | {"gptq 8": ("gptq", 8)}
COLUMNS = ("rtn", "gptq", "awq", "qronos", "fast", "hf", "compressed_tensors", "command")
PAGE = ROOT / "docs" / "architectures.md"
SECONDS = 300
SAME_INPUTS, SAME_LOGITS = 1e-3, 1e-4


load_method = cache(api.load_method)


def ids(rows: int, seed: int) -> Tensor:
    """Random token ids without special ones, in windows of 32."""
    return torch.randint(3, 299, (rows, 32), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits(model: nn.Module, tokens: Tensor) -> Tensor:
    """The model's logits, float64."""
    return model(input_ids=tokens, use_cache=False).logits.double()


def kl(full: Tensor, other: Tensor) -> float:
    """Median over tokens of KL, in nats: routers that change their mind move the mean."""
    p, q = full.log_softmax(-1), other.log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).median())


def said(error: BaseException) -> str:
    """One line: refused by the product, or where it broke."""
    line = " ".join(str(error).split())[:300]
    if isinstance(error, UserError):
        return f"refused: {line}"
    last = traceback.extract_tb(error.__traceback__)[-1]
    return f"crash: {type(error).__name__}: {line[:160]} ({Path(last.filename).name}:{last.lineno})"


@contextmanager
def telling(tell: Tell, key: str) -> Iterator[None]:
    """Context that tells `key` ok, or what went wrong within it."""
    try:
        yield
        tell(key, "ok")
    except Exception as error:
        tell(key, said(error))


def wrong_inputs(model: nn.Module, tokens: Tensor) -> tuple[float, str | None]:
    """Largest relative error of the moments that calibration gathers, against a forward of the whole model; of which.

    Experts whose moments a policy replaced, as few tokens reached them, are not compared.
    """
    sites = list(observe_moments(model, tokens, settings=Settings(compute_dtype="float32", tokens_per_batch=128)))
    sums: dict[str, list[Tensor]] = {}

    def add(name: str):
        def hook(_module: nn.Module, args: tuple) -> None:
            x = args[0].reshape(-1, args[0].shape[-1])
            sums.setdefault(name, []).append(x)

        return hook

    names = [site.linears[0] for site in sites if site.moments.policy is None]
    handles = [model.get_submodule(name).register_forward_pre_hook(add(name)) for name in names]
    logits(model, tokens)
    for handle in handles:
        handle.remove()
    worst: tuple[float, str | None] = (0.0, None)
    for site in sites:
        if site.linears[0] in sums:
            x = torch.cat(sums[site.linears[0]])
            expected = x.T @ x / len(x)
            error = float((site.moments.hessian - expected).norm() / expected.norm().clamp(min=1e-30))
            worst = (error, site.linears[0]) if not error <= worst[0] else worst
    return worst


def reload(folder: Path, model: nn.Module, limit: float) -> None:
    """Read a checkpoint with transformers; raise ValueError where its logits are others than the model's in memory."""
    config = AutoConfig.from_pretrained(folder)
    again = auto_class(config).from_pretrained(folder, dtype=torch.float32)
    expected, found = logits(model, ids(3, 2)), logits(again.eval(), ids(3, 2))
    error = float((found - expected).norm() / expected.norm())
    if not error <= limit:
        raise ValueError(f"corrupt: reloaded logits differ by {error:.1e}")


def export(format_: Any, model: Any, weights: Mapping[str, Any], tokenizer: Any, folder: Path) -> None:
    """Write a checkpoint, decode it, and compare with what is in memory."""
    folder.mkdir(parents=True)
    source = Source(model, tokenizer, "tiny", weights)
    format_.write(source, folder)
    stored = format_.stored(source) if hasattr(format_, "stored") else weights
    for each in format_.decode(folder):
        expected = stored[each.name].dequantize()
        if not torch.allclose(each.weight.float(), expected, rtol=1e-3, atol=1e-6):
            raise ValueError(f"corrupt: {each.name} decodes to something else")


def study(name: str, tell: Tell, scratch: Path) -> None:
    """Look at one architecture; `tell` is called with each finding as soon as it is known."""
    full = tiny_architecture(name)
    expected = logits(full, ids(3, 2))
    if not torch.isfinite(expected).all() or expected.shape[:2] != (3, 32):
        raise ValueError(f"logits of shape {tuple(expected.shape)} that aren't finite, or not one for each token")
    tell("built", "ok")
    tokenizer = AutoTokenizer.from_pretrained(scratch / "tokenizer")
    settings = Settings(compute_dtype="float32", tokens_per_batch=128)
    done: dict[str, Any] = {}
    for key, (method, bits) in METHODS.items():
        with telling(tell, key):
            model, (preset, grid) = copy.deepcopy(full), load_method(method, bits, 32)
            made = quantize_model(model, ids(8, 1), preset, grid=grid, settings=settings)
            found = logits(model, ids(3, 2))
            if not torch.isfinite(found).all():
                raise ValueError("logits that aren't finite")
            tell(f"KL {key}", kl(expected, found))
            done[key] = made
    with telling(tell, "inputs"):
        error, which = wrong_inputs(copy.deepcopy(full), ids(4, 3))
        tell("inputs error", error)
        if not error <= SAME_INPUTS:
            raise ValueError(f"{which} is calibrated on other inputs (by {error:.1e})")
    if (best := done.get("gptq", done.get("rtn"))) is not None:
        model = copy.deepcopy(full)
        with telling(tell, "hf"):
            export(HFFormat("float32"), best.model, best.weights, tokenizer, scratch / "hf")
            fuse(best.model)
            reload(scratch / "hf", best.model, SAME_LOGITS)
        tell("coverage", coverage(full, best.model))
    with telling(tell, "compressed_tensors"):
        model, grid, (method, _) = copy.deepcopy(full), IntGrid(4, 16, True), load_method("rtn", 4, 32)
        prepare(model, method, grid)
        format_ = CompressedTensorsFormat("float32")
        specs = linear_specs(model, assign_grids(model, grid), True)
        Exports((format_,)).check(specs, model, tokenizer)
        if why := unread(model, specs, format_, tokenizer):
            raise UserError(why)
        made = quantize_model(model, None, method, grid=grid, settings=settings)
        export(format_, model, made.weights, tokenizer, scratch / "ct")
        reload(scratch / "ct", model, SAME_LOGITS)


def coverage(full: nn.Module, quantized: nn.Module) -> float:
    """Share of the entries of the blocks' matrices that changed."""
    now, total, changed = dict(quantized.named_parameters()), 0, 0
    ends = {id(m.weight) for m in full.modules() if isinstance(m, nn.Embedding)}
    ends.add(id(getattr(full.get_output_embeddings(), "weight", None)))  # pyright: ignore[reportCallIssue]
    for name, parameter in full.named_parameters():
        if parameter.dim() > 1 and id(parameter) not in ends:
            total += parameter.numel()
            changed += parameter.numel() * (name in now and not torch.equal(now[name], parameter))
    return changed / max(1, total)


def by_command(name: str, tell: Tell, scratch: Path) -> None:
    """Give a folder that transformers saved to `run.py`, and export it."""
    tiny_architecture(name).save_pretrained(scratch / "model")
    AutoTokenizer.from_pretrained(scratch / "tokenizer").save_pretrained(scratch / "model")
    (scratch / "text.txt").write_text("the cat sees a dog. " * 400)
    options = ["model=local", f"model.path={scratch / 'model'}", "method=gptq", "bits=4", "group_size=32"]
    options += ["data=local", f"data.path={scratch / 'text.txt'}", "data.samples=8", "data.seqlen=32"]
    options += [f"eval.perplexity.path={scratch / 'text.txt'}", "eval.perplexity.seqlen=32", "out=run"]
    options += ["eval.perplexity.windows=4", "export.formats=[hf]", "export.hf.dtype=float32"]
    os.environ["GPTQ_AWQ_CACHE"] = str(scratch / "cache")
    os.chdir(scratch)
    with telling(tell, "command"), (scratch / "said").open("w+") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
        sys.argv = [str(ROOT / "run.py"), *options]
        try:
            runpy.run_path(sys.argv[0], run_name="__main__")
        except SystemExit as stop:
            lines = [line for line in (scratch / "said").read_text().splitlines() if line.strip()]
            refused = next((line for line in reversed(lines) if line.startswith("error:")), None)
            if refused:
                raise UserError(refused.removeprefix("error: ")) from stop
            if stop.code:
                raise RuntimeError((lines or ["?"])[-1]) from stop


def forked(work: Callable[[str, Tell, Path], None], name: str) -> Found:
    """Facts that `work` tells, even if it dies or takes too long; in a process of its own."""
    reader, writer = os.pipe()
    if (child := os.fork()) == 0:
        os.close(reader)
        with os.fdopen(writer, "w") as pipe, tempfile.TemporaryDirectory() as scratch:
            signal.alarm(SECONDS)

            def tell(key: str, value: Any) -> None:
                pipe.write(json.dumps([key, value], default=str) + "\n")
                pipe.flush()

            try:
                (Path(scratch) / "tokenizer").symlink_to(TOKENIZER)
                work(name, tell, Path(scratch))
            except BaseException as error:
                tell("died", said(error))
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        found = dict(json.loads(line) for line in pipe)
    _, status = os.waitpid(child, 0)
    return found | ({"died": f"crash: ended with status {status}"} if status else {})


def census(names: list[str], store: Path, command: bool) -> dict[str, Found]:
    """Look at each architecture that `store` has nothing of yet; everything found is kept there at once."""
    found: dict[str, Found] = json.loads(store.read_text()) if store.exists() else {}
    for name in names:
        seen = found.get(name, {})
        began = time.time()
        if "built" not in seen and "died" not in seen:
            seen = forked(study, name)
        if command and "built" in seen and "command" not in seen:
            seen |= forked(by_command, name)
        found[name] = seen
        store.write_text(json.dumps(found, indent=1) + "\n")
        told = " ".join(f"{key}={seen.get(key, '-')!s:.40}" for key in ("built", *COLUMNS, "inputs", "died"))
        print(f"{name:24s} {time.time() - began:5.1f} s  {told}", flush=True)
    return found


def counts(found: Mapping[str, Found]) -> dict[str, int]:
    """Numbers of architectures that each thing works for."""
    built = [seen for seen in found.values() if seen.get("built") == "ok"]
    numbers = {column: sum(seen.get(column) == "ok" for seen in built) for column in COLUMNS}
    wrong = sum("calibrated on other inputs" in str(seen.get("inputs")) for seen in built)
    return {"built": len(built), **numbers, "calibrated on wrong inputs": wrong}


def page(found: Mapping[str, Found]) -> str:
    """docs/architectures.md: counts, and one row for each architecture."""
    import transformers

    numbers, rows = counts(found), []
    for name, seen in sorted(found.items()):
        if seen.get("built") != "ok":
            continue
        cells = ["yes" if seen.get(column) == "ok" else "no" if column in seen else "·" for column in COLUMNS]
        notes = [f"{column}: {seen[column]}" for column in COLUMNS if seen.get(column, "ok") != "ok"]
        share = f"{seen['coverage']:.1%}" if "coverage" in seen else ""
        eight = f"{seen['KL gptq 8']:.1e}" if "KL gptq 8" in seen else ""
        rows.append(
            f"| {name} | {' | '.join(cells)} | {share} | {eight} | {'; '.join(notes)[:200].replace('|', '/')} |"
        )
    unbuilt = sorted(name for name, seen in found.items() if seen.get("built") != "ok")
    told = ", ".join(f"{key} {value}" for key, value in numbers.items() if key != "built")
    return "\n".join(
        [
            "# Architectures",
            "",
            f"{len(found)} architectures of transformers {transformers.__version__}, or variants, were looked at. Of",
            f"{numbers['built']} a tiny random model could be built and run on text (`benchmarks/architectures.py`).",
            "",
            f"**{told}.**",
            "",
            "Share: of the entries of matrices that GPTQ rounds, without embeddings and heads, with towers that see or",
            "hear. KL: median over tokens, GPTQ with 8 bits. Dots were not looked at.",
            "",
            f"| architecture | {' | '.join(COLUMNS)} | share | KL, 8 bits | what is refused, and why |",
            "|" + "---|" * (len(COLUMNS) + 4),
            *rows,
            "",
            f"Not built from a small config: {', '.join(unbuilt)}.",
            "",
        ]
    )


TOKENIZER = Path()


def main() -> None:
    """Look at all architectures, or some, and print how many work."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("census"))
    parser.add_argument("--only", default="", help="names, with commas between")
    parser.add_argument("--command", action="store_true", help="run.py on saved folders, too")
    parser.add_argument("--write", action="store_true", help="write docs/architectures.md of what was found")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.getLogger("gptq_awq").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    options.out.mkdir(parents=True, exist_ok=True)
    global TOKENIZER
    TOKENIZER = (options.out / "tokenizer").resolve()
    if not TOKENIZER.exists():
        save_tiny_folder(TOKENIZER)
        (TOKENIZER / "model.safetensors").unlink()
    for method, bits in METHODS.values():
        load_method(method, bits, 32)  # once, before processes are forked
    names = [name for name in options.only.split(",") if name] or architectures()
    found = census(names, options.out / "census.json", options.command)
    if options.write:
        PAGE.write_text(page(found))
    print(json.dumps(counts(found)))


if __name__ == "__main__":
    main()
