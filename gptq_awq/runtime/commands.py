"""Parts that the programs of the command line share: help from a module's docstring, and mistakes in one line."""

import argparse
import sys
from collections.abc import Callable

from gptq_awq.errors import UserError


def described_parser(prog: str, docstring: str | None) -> argparse.ArgumentParser:
    """Make a parser whose help begins with a docstring's first line and ends with the rest of it, as it is laid out."""
    description, _, rest = (docstring or "").partition("\n")
    return argparse.ArgumentParser(
        prog, description=description, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def exit_code(run: Callable[[], int | None]) -> int:
    """Run a program; returns its code, 0 for None, or 2 with one line on stderr for a mistake of the user's."""
    try:
        return run() or 0
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
