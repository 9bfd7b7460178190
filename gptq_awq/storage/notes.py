"""Notes in the cache: a few JSON facts in a file, written whole, without which everything is only computed again."""

import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from gptq_awq.storage.atomic import replacing


def note(path: Path, facts: Mapping[str, Any]) -> None:
    """Write facts to `path`, whole or not at all. Raises OSError (disk full, read-only)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as scratch:
        scratch.write_text(json.dumps(facts))


def noted(path: Path) -> dict[str, Any]:
    """Return the facts that `path` holds; none where it is missing or damaged."""
    with suppress(OSError, ValueError, RecursionError):
        facts = json.loads(path.read_text())
        if isinstance(facts, dict):
            return facts
    return {}
