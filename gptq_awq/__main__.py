"""The command line: `gptq-awq method=awq bits=4`, or `python -m gptq_awq`, or `python run.py` in a checkout.

The main job's options are Hydra's; a first word that is one of `SUBCOMMANDS` is a command of its own.
"""

import re
import sys
from importlib import import_module

from gptq_awq.runtime.stopping import end, stoppable

SUBCOMMANDS = {
    "report": "gptq_awq.report.command",
    "replay": "gptq_awq.replay.replay",
    "export": "gptq_awq.export.__main__",
    "push": "gptq_awq.export.push",
    "cache": "gptq_awq.cache.cache",
    "frontier": "gptq_awq.frontier.frontier",
    "generate": "gptq_awq.playground.generate",
    "compare": "gptq_awq.playground.compare",
    "ls": "gptq_awq.experiment.catalogue",
    "completion": "gptq_awq.experiment.catalogue:print_script",
    "complete": "gptq_awq.experiment.catalogue:print_completions",
}
"""Word → module, whose `main(arguments)`, or else the function that is named, returns an exit code."""


def main() -> None:
    """Run the subcommand that the first argument names, or else the main job; a signal ends either in one line."""
    try:
        with stoppable():
            _main()
    except KeyboardInterrupt as stop:
        end(stop, "nothing was left half done; type the same command again")


def _main() -> None:
    first, *rest = sys.argv[1:] or [""]
    if first == "--version":
        from gptq_awq import __version__

        sys.stdout.write(f"gptq_awq {__version__}\n")
    elif first in SUBCOMMANDS:
        module, _, function = SUBCOMMANDS[first].partition(":")
        sys.exit(getattr(import_module(module), function or "main")(rest))
    elif re.fullmatch(r"[a-z_]+", first):
        sys.exit(_unknown(first))
    else:
        import_module("gptq_awq.experiment.command").main()


def _unknown(command: str) -> int:
    from gptq_awq.runtime.options import nearest

    near = nearest(command, [name for name in SUBCOMMANDS if name != "complete"])
    sys.stderr.write(f"error: {command}: there is no such command{near or '; options are OPTION=VALUE'}; see --help\n")
    return 2


if __name__ == "__main__":
    main()
