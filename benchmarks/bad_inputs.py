"""Bad inputs, each given to the command as a user would: one line that names the option, exit code 2, nothing kept.

    python benchmarks/bad_inputs.py [--options 300] [--files 100] [--seed 0]

Options of every choice of every group get values that can't be meant: words and lists for numbers, words for booleans,
infinities, misspelled names. Texts and model folders are damaged: bytes cut off, overwritten or of another kind, keys
of JSON files left out or of another type. An input that is accepted is shown, for a person to judge whether it is
wrong. Seconds are those of a process that has imported everything before. Exit code 1 after a traceback, a refusal that
is no single line, or one that took more than 2 s.
"""

import argparse
import itertools
import json
import os
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
CONFIGS = ROOT / "configs"
SECONDS = 2.0
WORDS = ("abc", "none of these", "[1,2]", "{a:1}", "1e400", "-inf", "nan", "-1e9")
NO_BOOLEANS = ("maybe", "2", "[]", "{a:1}")


@dataclass(frozen=True)
class Case:
    """One bad input: what it is, and the options that give it to the command."""

    what: str
    options: tuple[str, ...]


def bad_options(draw: random.Random) -> Iterator[Case]:
    """Yield values that can't be meant, for options of every choice of every group, without end."""
    from hydra import compose, initialize_config_dir
    from omegaconf import OmegaConf

    choices = [(path.parent.name, path.stem) for path in sorted(CONFIGS.glob("*/*.yaml"))]
    while True:
        group, choice = draw.choice(choices)
        with initialize_config_dir(str(CONFIGS), version_base="1.3"):
            composed = compose("config", overrides=[f"{group}={choice}", "out=x"])
        container = OmegaConf.to_container(composed, resolve=True)
        leaves = [(name, value) for name, value in _leaves(container) if "_target_" not in name]
        name, value = draw.choice(leaves)
        if draw.random() < 0.25 and "." in name:
            value = "1"
            name = f"+{name}{draw.choice('xyz')}"
        elif isinstance(value, bool):
            value = draw.choice(NO_BOOLEANS)
        elif isinstance(value, int | float):
            value = draw.choice(WORDS)
        else:
            continue
        yield Case(f"{group}={choice} {name}={value}", (f"{group}={choice}", f"{name}={value}"))


def _leaves(node: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(node, dict):
        for key, value in node.items():
            yield from _leaves(value, f"{name}.{key}" if name else str(key))
    else:
        yield name, node


def bad_files(draw: random.Random, scratch: Path) -> Iterator[Case]:
    """Yield damaged texts and model folders, without end."""
    for number in range(10**9):
        folder = scratch / f"{number}"
        shutil.copytree(scratch / "model", folder)
        text = folder / "text.jsonl"
        text.write_text("".join(json.dumps({"text": "the cat sees a dog. " * 20}) + "\n" for _ in range(40)))
        path = draw.choice(sorted(folder.iterdir()))
        how = _damage(path, draw)
        yield Case(f"{path.name}: {how}", (f"model.path={folder}", f"data.path={text}"))
        shutil.rmtree(folder)


def _damage(path: Path, draw: random.Random) -> str:
    """Damage a file, and say how."""
    if path.suffix == ".json" and draw.random() < 0.6:
        content = json.loads(path.read_text())
        key = draw.choice(sorted(content))
        value = draw.choice(["left out", None, -1, "word", [], {}, 1e30, True])
        content[key] = value
        if value == "left out":
            del content[key]
        path.write_text(json.dumps(content))
        return f"{key}: {value}"
    held = path.read_bytes()
    kind = draw.choice(["cut", "empty", "zeros", "noise", "text"])
    start = draw.randrange(len(held))
    changed = {
        "cut": held[:start],
        "empty": b"",
        "zeros": held[:start] + bytes(len(held) - start),
        "noise": held[:start] + draw.randbytes(min(64, len(held) - start)) + held[start + 64 :],
        "text": b"not what you think",
    }
    path.write_bytes(changed[kind])
    return f"{kind} from byte {start} of {len(held)}"


def with_options(options: Sequence[str], more: Sequence[str]) -> list[str]:
    """Add options, in place of those of the same name."""
    names = {option.partition("=")[0] for option in more}
    return [option for option in options if option.partition("=")[0] not in names] + list(more)


def main() -> None:
    """Give every input to the command, and print what happened."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--options", type=int, default=300)
    parser.add_argument("--files", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    from helpers.forked import call_run, import_everything  # pyright: ignore[reportMissingImports]
    from helpers.tiny_models import save_tiny_folder  # pyright: ignore[reportMissingImports]

    import_everything()
    draw, faults, accepted, slowest = random.Random(arguments.seed), 0, 0, 0.0
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        save_tiny_folder(scratch / "model")
        (scratch / "text.txt").write_text("the cat sees a dog. " * 2000)
        small = ("model=local", "data=local", "data.samples=4", "data.seqlen=32", "method=gptq", "group_size=32")
        small += ("eval=none", "export.formats=[hf]", f"model.path={scratch / 'model'}")
        small += (f"data.path={scratch / 'text.txt'}",)
        environment = os.environ | {"GPTQ_AWQ_CACHE": str(scratch / "cache"), "HF_HUB_OFFLINE": "1"}
        call_run(small, environment, scratch)  # warms up
        both = ((bad_options(draw), arguments.options), (bad_files(draw, scratch), arguments.files))
        for cases, count in both:
            reads_model = cases is both[1][0]
            for case in itertools.islice(cases, count):
                work = Path(tempfile.mkdtemp(dir=scratch))
                began = time.perf_counter()
                done = call_run(with_options(small, case.options), environment, work)
                seconds = time.perf_counter() - began
                said = {line for line in done.stderr.splitlines() if line.startswith("error:")}  # a sweep repeats it
                if done.returncode == 0:
                    accepted += 1
                    print(f"accepted: {case.what}", flush=True)
                elif done.returncode != 2 or len(said) != 1 or "Traceback" in done.stderr:
                    faults += 1
                    print(f"FAULT: {case.what}: exit code {done.returncode}: {done.stderr[-600:]}", flush=True)
                elif not reads_model and "experiment=" not in case.what:
                    slowest = max(slowest, seconds)
    print(
        f"{arguments.options + arguments.files} inputs: {faults} faults, {accepted} accepted (above), the rest refused"
    )
    print(f"slowest refusal of an option: {slowest:.1f} s")
    sys.exit(int(faults > 0 or slowest > SECONDS))


if __name__ == "__main__":
    main()
