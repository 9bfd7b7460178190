"""Measure the table of common formats: bits, name, size reduction and accuracy loss, all on one model and text.

    python scripts/levels.py ROOT [--only NAME …] [run.py options …]

runs `python run.py` once per row (unless ROOT has its results already) and prints Markdown. Options are passed on to
every run: `model=local model.path=DIR eval=full`. `make readme-numbers FROM=ROOT` puts the rows into README.
"""

import argparse
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from gptq_awq.report import distinguishable
from gptq_awq.results import Result

LEFT = ("name", "method", "")
"""Columns of words."""
RUN = Path(__file__).resolve().parent.parent / "run.py"


@dataclass(frozen=True)
class Row:
    """One row of the table: its name, the options of the run that measures it, and a note."""

    name: str
    options: tuple[str, ...]
    note: str = ""

    def folder(self, root: Path) -> Path:
        """The folder below `root` that this row's run is in."""
        return root / self.name.replace(", ", "-")


ROWS = (
    Row("FP32", ("method=fp",)),
    Row("BF16", ("method=bf16",)),
    Row("FP16", ("method=fp16",)),
    Row("INT8", ("method=rtn", "bits=8", "group_size=-1", "sym=true"), "per channel, symmetric"),
    Row("FP8", ("method=rtn", "grid=fp8"), "E4M3, per channel"),
    Row("Q8_0", ("method=rtn", "grid=q8_0"), "llama.cpp"),
    Row("Q5_K_M", ("method=rtn", "grid=q5_k_m", "grid.search=mse"), "llama.cpp"),
    Row("Q4_K_M", ("method=rtn", "grid=q4_k_m", "grid.search=mse"), "llama.cpp"),
    Row("Q4_K_M, GPTQ", ("method=gptq", "grid=q4_k_m"), "same file size"),
    Row("NF4", ("method=rtn", "grid=nf4"), "groups of 64, float32 scales"),
    Row("NVFP4", ("method=rtn", "grid=nvfp4", "grid.search=minmax"), "groups of 16"),
    Row("NVFP4, GPTQ", ("method=gptq", "grid=nvfp4"), "groups of 16"),
    Row("MXFP4", ("method=rtn", "grid=mxfp4", "grid.search=minmax"), "groups of 32"),
    Row("MXFP4, GPTQ", ("method=gptq", "grid=mxfp4"), "groups of 32"),
    Row("IQ4_NL, GPTQ", ("method=gptq", "grid=iq4_nl"), "llama.cpp"),
    Row("AWQ-4", ("method=awq", "bits=4"), "groups of 64"),
    Row("GPTQ-4", ("method=gptq", "bits=4"), "groups of 64"),
    Row("Q3", ("method=gptq", "bits=3"), "GPTQ, groups of 64"),
    Row("Q2", ("method=gptq", "bits=2"), "GPTQ, groups of 64"),
    Row("Ternary", ("method=gptq", "grid=ternary"), "GPTQ, groups of 64"),
    Row("Ternary, tuned", ("method=yaqa_distill", "grid=ternary"), "`method=yaqa_distill`, groups of 64"),
)


def main() -> int:
    """Run the rows whose results are missing, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", type=Path)
    parser.add_argument("--only", nargs="+", metavar="NAME", help=f"rows: {', '.join(row.name for row in ROWS)}")
    options, passed_on = parser.parse_known_args()
    rows = [row for row in ROWS if options.only is None or row.name in options.only]
    for row in rows:
        out = row.folder(options.root)
        if not (out / "results.json").is_file():
            command = [sys.executable, str(RUN), *row.options, *passed_on, f"out={out}"]
            if code := subprocess.run(command, check=False).returncode:
                return code
    print(table([level(row, Result.read(row.folder(options.root) / "results.json")) for row in rows]))
    return 0


def level(row: Row, result: Result) -> dict[str, str]:
    """A row's cells; sizes are of all parameters, unquantized ones counted in 16 bits."""
    metric = next(name for name in result.metrics if "/ppl@" in name and name.count("/") == 1)
    text, m = metric.partition("/")[0], result.metrics
    full = 2 * (result.baseline_size_bytes or 0)  # the baseline's size is that of 16-bit weights
    size, bits = (full, 32.0) if row.name == "FP32" else (result.size_bytes or 0, result.bits or 0)
    low, high = m.get(f"{metric}/delta_ci95") or (0.0, 0.0)
    loss = f"{m[f'{metric}/delta']:+.3g} [{low:+.3g}, {high:+.3g}]" if low or high else "0"
    if (low or high) and not distinguishable(m, metric):
        loss += " not distinguishable"
    return {
        "bits": f"{bits:g}",
        "name": row.name,
        "size": f"{size / 1e6:.1f} MB",
        "reduction": f"{full / size:.2f}×",
        "bits/weight": f"{32.0 if row.name == 'FP32' else result.bits_per_weight:.2f}",
        metric: f"{m[metric]:.2f}",
        "loss [95%]": loss,
        "KL": f"{m[f'{text}/kl']:.4f}",
        "same top word": f"{100 * m[f'{text}/top1_agreement']:.1f}%",
        "": row.note,
    }


def table(rows: Sequence[Mapping[str, str]]) -> str:
    """Cells by their columns as a Markdown table, which has the columns of the first row."""
    names = list(rows[0])
    rules = [":---" if name in LEFT else "---:" for name in names]
    lines = [names, rules, *([row[name] for name in names] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    sys.exit(main())
