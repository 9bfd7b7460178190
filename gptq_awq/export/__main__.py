"""Verify an exported checkpoint against the weights that were scored, and compare inference engines on it."""

import argparse
import math
import sys
from pathlib import Path

from gptq_awq.errors import UserError
from gptq_awq.export.engines import ENGINES, find
from gptq_awq.export.reference import judge_engine
from gptq_awq.export.verify import VerificationRecord, verify
from gptq_awq.runtime.commands import exit_code


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return 0 if all agrees, 1 if an engine differs, 2 if one refuses or files were altered."""
    parser = argparse.ArgumentParser(prog="python -m gptq_awq.export", description=__doc__)
    command = parser.add_subparsers(required=True, dest="command").add_parser(
        "verify", help="decode a checkpoint, compare it with the weights that were scored, and run it in engines"
    )
    command.add_argument("folder", type=Path, help="OUT/checkpoints/FORMAT")
    command.add_argument(
        "--engine",
        action="append",
        default=[],
        help=f"also run it in this engine: {', '.join(ENGINES)}, or all that are installed (may be repeated)",
    )
    options = parser.parse_args(arguments)
    return exit_code(lambda: _verify(options.folder, options.engine))


def _verify(folder: Path, engines: list[str]) -> int:
    """Print what the verifier and each engine find; return the worst exit code of them."""
    record = VerificationRecord.read(folder)
    print(f"{folder}: {verify(folder)}")  # noqa: T201
    compatible = {name: engine for name, engine in ENGINES.items() if record.format in engine.formats}
    if "all" in engines:
        engines = [name for name in compatible if find(name, record.format)]
        for name in compatible.keys() - set(engines):
            print(f"{name}: skipped, it is not installed (python scripts/install_engine.py {name})")  # noqa: T201
    if unknown := [name for name in engines if name not in compatible]:
        raise UserError(
            f"--engine {unknown[0]}: does not load {record.format}; engines that do: {', '.join(compatible)}"
        )
    return max((_judge(folder, name, record) for name in engines), default=0)


def _judge(folder: Path, name: str, record: VerificationRecord) -> int:
    """Print what an engine computes; return 1 if it differs by more than its noise, 2 if it refuses, else 0."""
    try:
        judged = judge_engine(folder, name)
    except UserError as error:  # the others are asked all the same
        print(f"{name}: {error}")  # noqa: T201
        return 2
    found, noise = judged.found, judged.noise
    ppl_in_memory = math.exp(sum(map(sum, record.nll)) / sum(map(len, record.nll)))
    why = "" if noise is None else f", as its own noise is {noise.max_kl:.2g}"
    print(  # noqa: T201
        f"{name}: max |Δ logit| {found.max_abs:.2g}, KL mean {found.mean_kl:.2g} max {found.max_kl:.2g} "
        f"({'within' if judged.within else 'ABOVE'} {judged.limit:.2g}{why}), perplexity {found.ppl_engine:.4f} "
        f"(decoded weights in float32 {found.ppl_ours:.4f}, model in memory {ppl_in_memory:.4f})"
    )
    return int(not judged.within)


if __name__ == "__main__":
    sys.exit(main())
