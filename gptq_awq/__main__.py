"""The command line: `gptq-awq method=awq bits=4`, or `python -m gptq_awq`, or `python run.py` in a checkout.

The main job's options are Hydra's; a first word that is one of `SUBCOMMANDS` is a command of its own.
"""

import sys
from importlib import import_module

from gptq_awq.runtime.stopping import end, stoppable

SUBCOMMANDS = {
    "report": "gptq_awq.report.command",
    "replay": "gptq_awq.replay.replay",
    "export": "gptq_awq.export.__main__",
    "cache": "gptq_awq.cache.cache",
    "frontier": "gptq_awq.frontier.frontier",
    "generate": "gptq_awq.playground.generate",
    "compare": "gptq_awq.playground.compare",
}
"""Word → module whose `main(arguments)` returns an exit code."""


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
        sys.exit(import_module(SUBCOMMANDS[first]).main(rest))
    else:
        import_module("gptq_awq.experiment.command").main()


if __name__ == "__main__":
    main()
