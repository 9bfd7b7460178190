"""Provenance of a run for people: when, where, by which command and commit it was made. No number depends on it."""

import platform
import shlex
import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import gptq_awq

GIT_SECONDS = 10.0


def provenance(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Date (UTC, ISO 8601), command line, git commit and whether it is dirty, host name and version of gptq_awq.

    Args:
        arguments: of the command line; None: this process's.
    """
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join(sys.argv if arguments is None else arguments),
        "git": git_state(Path(gptq_awq.__file__).parent),
        "host": platform.node(),
        "version": gptq_awq.__version__,
    }


def git_state(package: Path) -> dict[str, Any] | None:
    """The commit of the checkout that a package lies in, and whether anything in it differs from that commit.

    None where there is no git, no checkout, or one that doesn't track the package (an environment inside of one).
    """
    if _git(package, "ls-files", "--error-unmatch", "__init__.py") is None:
        return None
    commit = _git(package, "rev-parse", "HEAD")
    changes = _git(package, "status", "--porcelain", "--", ".", "../configs")
    return None if commit is None else {"commit": commit.strip(), "dirty": changes is None or bool(changes.strip())}


def _git(folder: Path, *arguments: str) -> str | None:
    command = ["git", "-C", str(folder), "--no-optional-locks", *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=GIT_SECONDS)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout if done.returncode == 0 else None
