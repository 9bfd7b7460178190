"""Which readers compute what each architecture computes: every format that transformers, llama.cpp and mlx-lm read.

    python benchmarks/readers.py [--only NAME,NAME] [--formats mlx,gguf] [--write]

A tiny random model of each architecture of the census (tests/helpers/architectures.py) is rounded to nearest, checked
and written as a run does it, and run by the format's reader; its distributions are compared with those of the model in
memory. What was found is kept in benchmarks/results/readers.json, and a later call goes on from there; --write puts the
table of it into docs/export.md. A reader that isn't installed is left out.
"""

import argparse
import copy
import json
import os
import re
import signal
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory, gettempdir
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch  # noqa: E402
from helpers.architectures import architectures, tiny_architecture  # noqa: E402
from transformers import PreTrainedModel  # noqa: E402
from transformers.models.auto import modeling_auto  # noqa: E402

from gptq_awq import quantize_model  # noqa: E402
from gptq_awq.errors import UserError  # noqa: E402
from gptq_awq.export import engine_check  # noqa: E402
from gptq_awq.export.base import Source, linear_specs  # noqa: E402
from gptq_awq.export.compressed_tensors import CompressedTensorsFormat  # noqa: E402
from gptq_awq.export.engines import answer, compare, find  # noqa: E402
from gptq_awq.export.gguf import GGUFFormat  # noqa: E402
from gptq_awq.export.hf import HFFormat  # noqa: E402
from gptq_awq.export.mlx import MLXFormat  # noqa: E402
from gptq_awq.export.write import Exports  # noqa: E402
from gptq_awq.grids.affine import AffineGrid  # noqa: E402
from gptq_awq.grids.base import Grid  # noqa: E402
from gptq_awq.grids.integer import IntGrid  # noqa: E402
from gptq_awq.models.experts import experts_in  # noqa: E402
from gptq_awq.models.unfuse import unfuse  # noqa: E402

STORE = ROOT / "benchmarks" / "results" / "readers.json"
PAGE = ROOT / "docs" / "export.md"
BEGIN, END = "<!-- readers.json -->\n", "<!-- /readers.json -->\n"
SECONDS, TOKENS = 240, 40
UNKNOWN = ("does not recognize this arch", "does not know", "not supported")
"""What readers say of architectures that they don't know."""


class Reading(NamedTuple):
    """How a format is tried.

    Attributes:
        format: what is written.
        grid: grid of its weights; None: nothing is quantized.
        engine: the reader.
        reader: its name and distribution, for the table.
        equal: mean KL in nats up to which the reader computes the same.
    """

    format: Any
    grid: Grid | None
    engine: str
    reader: str
    equal: float


READINGS = {
    "hf": Reading(HFFormat("float32"), None, "transformers4", "transformers 4.57", 1e-6),
    "compressed_tensors": Reading(
        CompressedTensorsFormat("float32"),
        IntGrid(4, 32, sym=True, scale_dtype="float32"),
        "transformers",
        "transformers 5",
        1e-6,
    ),
    "gguf": Reading(GGUFFormat(plain_dtype="F32"), None, "xllamacpp", "llama.cpp", 1e-4),
    "mlx": Reading(MLXFormat("float32"), AffineGrid(4, 32), "mlx", "mlx-lm", 1e-6),
}
"""Format → how it is tried, in float32. llama.cpp rounds activations where weights are rounded, which may send tokens
to other experts, so that its files hold the weights as they came; so do those of transformers 4."""


@contextmanager
def limited() -> Iterator[None]:
    """Context manager that ends what takes too long."""

    def end(*_: Any) -> None:
        raise TimeoutError(f"not done in {SECONDS} s")

    signal.signal(signal.SIGALRM, end)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)


@torch.no_grad()
def read(name: str, reading: Reading) -> dict[str, Any]:
    """Write and read one architecture.

    Returns:
        Whether it is a mixture, and `kl`, or the reason why it was `refused`, has `failed`, or is `unbuilt`.
    """
    found: dict[str, Any] = {}
    try:
        model = tiny_architecture(name)
    except Exception as error:  # of a class that can't be built small
        return {"unbuilt": _told(error)}
    try:
        with limited(), TemporaryDirectory() as path:
            folder, grid = Path(path), reading.grid
            weights = {} if grid is None else quantize_model(model, method="rtn", grid=grid).weights
            found["mixture"] = is_mixture(model)
            specs = linear_specs(model, {n: weight.grid for n, weight in weights.items()}, natural_order=True)
            tokens = torch.randint(3, 200, (1, TOKENS), generator=torch.Generator().manual_seed(0))
            ours = model(input_ids=tokens, use_cache=False).logits.float()
            Exports((reading.format,)).check(specs, model, None)
            reading.format.write(Source(model, None, name, weights), folder)
            path = next(folder.glob("*.gguf"), folder)
            theirs = answer(reading.engine, path, tokens, reading.format.name, vocab=ours.shape[-1]).logits
            found["kl"] = float(f"{compare(ours, theirs, tokens).mean_kl:.1e}")
    except UserError as error:
        found["refused"] = re.sub(rf"{re.escape(gettempdir())}[^\s:]*", "this folder", " ".join(str(error).split()))[
            :200
        ]
    except Exception as error:  # what nobody foresaw
        found["failed"] = _told(error)
    return found


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def is_mixture(model: PreTrainedModel) -> bool:
    """Whether a model has fused experts."""
    apart = copy.deepcopy(model)
    unfuse(apart)
    return bool(experts_in(apart))


def state(found: Mapping[str, Any], reading: Reading) -> str:
    """Whether a reader computes the same, or other logits, or doesn't know the model, or it was refused beforehand."""
    if "kl" in found:
        return "equal" if found["kl"] <= reading.equal else "other"
    if any(word in found.get("refused", "") for word in UNKNOWN):
        return "unknown"
    return "refused" if "refused" in found else "failed"


def table(stored: Mapping[str, Any]) -> str:
    """The table of what was found, and beneath it the mixtures by name."""
    lines = [
        "Tiny random models of the architectures of transformers "
        f"{stored['versions']['transformers']}, each written and read again (`python benchmarks/readers.py`):",
        "",
        "| format | read by | looked at | same logits | of which language models | of which mixtures | unknown to it "
        "| refused | other logits | failed |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    mixtures = []
    for name, reading in READINGS.items():
        of = {
            each: row[name] for each, row in stored["found"].items() if "unbuilt" not in row.get(name, {"unbuilt": ""})
        }
        if not of:
            continue
        states = {each: state(row, reading) for each, row in of.items()}
        same = [each for each, word in states.items() if word == "equal"]
        mixed = [each for each in same if any(row.get("mixture") for row in stored["found"][each].values())]
        counts = [list(states.values()).count(word) for word in ("unknown", "refused", "other", "failed")]
        causal = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.keys() & set(same)
        cells = (f"`{name}`", reading.reader, len(of), len(same), len(causal), len(mixed), *counts)
        lines.append(f"| {' | '.join(map(str, cells))} |")
        mixtures.append(f"- `{name}`: {', '.join(mixed) or 'none'}")
    return "\n".join([*lines, "", "Mixtures of experts with the same logits:", "", *mixtures]) + "\n"


def written(page: str, stored: Mapping[str, Any]) -> str:
    """The page with its table made anew."""
    before, _, rest = page.partition(BEGIN)
    return before + BEGIN + table(stored) + END + rest.partition(END)[2]


def go(names: Sequence[str], formats: Sequence[str], store: Path) -> dict[str, Any]:
    """Look at what wasn't looked at yet, store each finding at once, and return them all."""
    packages = ("transformers", "mlx-lm", "xllamacpp", "compressed-tensors")
    stored = json.loads(store.read_text()) if store.is_file() else {"found": {}}
    stored["versions"] = {package: version(package) for package in packages}
    for format_name in formats:
        if find(READINGS[format_name].engine, format_name) is None:
            print(f"{format_name}: {READINGS[format_name].engine} is not installed")
            continue
        for name in names:
            row = stored["found"].setdefault(name, {})
            if format_name in row:
                continue
            row[format_name] = read(name, READINGS[format_name])
            print(f"{name} {format_name}: {row[format_name]}")
            store.write_text(json.dumps(stored, indent=0, sort_keys=True) + "\n")
    return stored


def main() -> None:
    """Run the command line."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--only", help="names of architectures, with commas between")
    options.add_argument("--formats", default=",".join(READINGS), help=f"of {', '.join(READINGS)}")
    options.add_argument("--store", type=Path, default=STORE, help="file of what was found")
    options.add_argument("--write", action="store_true", help="put the table into docs/export.md")
    given = options.parse_args()
    warnings.filterwarnings("ignore")
    engine_check.LARGEST = 0  # engines are run once, on what was written
    names = given.only.split(",") if given.only else architectures()
    stored = go(names, given.formats.split(","), given.store)
    if given.write:
        PAGE.write_text(written(PAGE.read_text(), stored))


if __name__ == "__main__":
    main()
