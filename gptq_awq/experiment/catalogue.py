"""`gptq-awq ls`: what can be chosen, a line each; `gptq-awq completion`: the same for the shell's Tab key.

    gptq-awq ls methods                        methods grids models data formats metrics experiments
    eval "$(gptq-awq completion bash)"         also: zsh, fish

Both read the first comment of each yaml in configs, so a preset of one's own is in them as soon as its file is there.
"""

import re
import sys
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path

from gptq_awq.runtime.commands import described_parser
from gptq_awq.runtime.configs import CONFIGS

KINDS = {
    "methods": "method",
    "grids": "grid",
    "models": "model",
    "data": "data",
    "formats": "export/format",
    "metrics": "eval/metric",
    "experiments": "experiment",
}
"""Kind, as `ls` calls it → group of configs."""
GROUPS = ("method", "grid", "model", "data", "eval", "act", "kv", "export", "tracking", "experiment", "hydra/launcher")
WIDTH = 110
"""Characters of a line on a choice, at most."""
COMMANDS = ("report", "replay", "export", "push", "cache", "frontier", "generate", "compare", "ls", "completion")
SCRIPTS = {
    "bash": r"""_gptq_awq() {
    local line="${COMP_LINE:0:$COMP_POINT}" word
    word="${line##* }"
    local IFS=$'\n'
    COMPREPLY=($(gptq-awq complete "$word" "${COMP_WORDS[1]}" 2>/dev/null))
    if [[ "$word" == *=* ]]; then COMPREPLY=("${COMPREPLY[@]#*=}"); fi
    [[ "${COMPREPLY[*]}" == *= ]] && compopt -o nospace
}
complete -o default -F _gptq_awq gptq-awq
""",
    "zsh": r"""#compdef gptq-awq
_gptq_awq() {
    local -a found
    found=("${(@f)$(gptq-awq complete "$PREFIX" "${words[2]}" 2>/dev/null)}")
    compadd -S '' -- $found
}
compdef _gptq_awq gptq-awq
""",
    "fish": r"""complete -c gptq-awq -f -a '(gptq-awq complete (commandline -ct) (commandline -opc)[2] 2>/dev/null)'
""",
}


def choices(group: str) -> dict[str, str]:
    """Choices of a group of configs by name, each with the first sentence of its comment, or what it names."""
    folder = CONFIGS / group
    deep = group in ("experiment", "method")  # elsewhere folders inside are groups of their own
    paths = sorted(folder.glob("**/*.yaml" if deep else "*.yaml"))
    return {path.relative_to(folder).with_suffix("").as_posix(): told(path) for path in paths}


def told(path: Path) -> str:
    """One line on a yaml: the first sentence of its comment, else the model or data set that it names."""
    text = path.read_text(encoding="utf-8")
    lines = [line[1:].strip() for line in text.splitlines() if line.startswith("#") and "@package" not in line]
    if lines:
        return textwrap.shorten(re.split(r"(?<=\.) (?=[A-Z])", " ".join(lines))[0], WIDTH, placeholder=" …")
    named = re.search(r"^(?:id|repo|asset|_target_): *(\S+)", text, flags=re.MULTILINE)
    return named[1] if named else ""


def complete(word: str, first: str = "") -> Iterator[str]:
    """Completions of a word of the command line: options, their choices, commands and what `ls` lists.

    Args:
        word: as far as it was typed; in a list such as `method=rtn,aw` the last name is completed.
        first: first word of the command line.
    """
    if first == "ls" and word != "ls":
        yield from (kind for kind in KINDS if kind.startswith(word))
        return
    group, equals, value = word.partition("=")
    if equals:
        before, comma, last = value.rpartition(",")
        yield from (f"{group}={before}{comma}{name}" for name in _names(group) if name.startswith(last))
        return
    options = re.findall(r"^(\w+): ", (CONFIGS / "config.yaml").read_text(), flags=re.MULTILINE)
    known = [*COMMANDS, *(f"{name}=" for name in (*GROUPS, *options) if name not in ("defaults", "hydra"))]
    yield from (name for name in dict.fromkeys(known) if name.startswith(word))


def _names(group: str) -> list[str]:
    return list(choices(group)) if group in GROUPS or (CONFIGS / group).is_dir() else []


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `ls`; returns 0, or 2 for a kind that there isn't."""
    parser = described_parser("gptq-awq ls", __doc__)
    parser.add_argument("kind", nargs="?", choices=tuple(KINDS), help="what to list; nothing: the kinds")
    kind = parser.parse_args(arguments).kind
    if kind is None:
        sys.stdout.writelines(f"{each:12} {len(choices(group))} of {group}=…\n" for each, group in KINDS.items())
        return 0
    found = choices(KINDS[kind])
    width = max(map(len, found))
    sys.stdout.writelines(f"{name:{width}}  {line}\n" for name, line in found.items())
    return 0


def print_script(arguments: Sequence[str]) -> int:
    """Run `completion`; returns 0, or 2 for a shell that isn't known."""
    shell = arguments[0] if arguments else ""
    if shell not in SCRIPTS:
        sys.stderr.write(f"error: completion {shell}: choose one of {', '.join(SCRIPTS)}\n")
        return 2
    sys.stdout.write(SCRIPTS[shell])
    return 0


def print_completions(arguments: Sequence[str]) -> int:
    """Run `complete WORD FIRST`, which the shell's scripts call; returns 0."""
    sys.stdout.writelines(f"{found}\n" for found in complete(*arguments[:2]))
    return 0
