"""python -m gptq_awq.export verify DIR: is a checkpoint still what was scored, and do engines agree?"""

import argparse
import math
import sys
from pathlib import Path

from gptq_awq.errors import UserError
from gptq_awq.export.engines import ENGINES, find
from gptq_awq.export.verify import VerificationRecord, compare_engine, verify


def main(arguments: list[str] | None = None) -> int:
    """The command line; 0 if all is well, 1 if an engine differs, 2 on a mistake or an altered checkpoint."""
    parser = argparse.ArgumentParser(prog="python -m gptq_awq.export", description=__doc__)
    command = parser.add_subparsers(required=True, dest="command").add_parser(
        "verify", help="decode a checkpoint and compare it with what was scored; run it in engines"
    )
    command.add_argument("folder", type=Path, help="OUT/checkpoints/FORMAT")
    command.add_argument(
        "--engine",
        action="append",
        default=[],
        help=f"also run it in this engine: {', '.join(ENGINES)}, or all that are installed (may be repeated)",
    )
    options = parser.parse_args(arguments)
    try:
        return _verify(options.folder, options.engine)
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2


def _verify(folder: Path, engines: list[str]) -> int:
    record = VerificationRecord.read(folder)
    print(f"{folder}: {verify(folder)}")  # noqa: T201
    taking = {name: engine for name, engine in ENGINES.items() if record.format in engine.formats}
    if "all" in engines:
        engines = [name for name in taking if find(name, record.format)]
        for name in taking.keys() - set(engines):
            print(f"{name}: skipped, it is not installed (python scripts/install_engine.py {name})")  # noqa: T201
    worst = 0
    for name in engines:
        if name not in taking:
            raise UserError(f"--engine {name}: takes no {record.format}; those that do: {', '.join(taking)}")
        found, limit = compare_engine(folder, name), taking[name].formats[record.format].max_kl
        memory = math.exp(sum(map(sum, record.nll)) / sum(map(len, record.nll)))
        fits = found.max_kl <= limit
        worst = max(worst, int(not fits))
        print(  # noqa: T201
            f"{name}: max |Δ logit| {found.max_abs:.2g}, KL mean {found.mean_kl:.2g} max {found.max_kl:.2g} "
            f"({'within' if fits else 'ABOVE'} {limit:g}), perplexity {found.ppl_engine:.4f} "
            f"(decoded weights in float32 {found.ppl_ours:.4f}, model in memory {memory:.4f})"
        )
    return worst


if __name__ == "__main__":
    sys.exit(main())
