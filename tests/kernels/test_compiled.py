"""Laws of compiled loops that are kept on disk."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.paths import ROOT

from gptq_awq.kernels import compiled


@pytest.fixture
def package(tmp_path) -> Path:
    """A package of one compiled loop that calls a function of another file, with this program's way to compile."""
    folder = tmp_path / "own"
    folder.mkdir()
    shutil.copy(compiled.__file__, folder)
    (folder / "helper.py").write_text("import numba\n\n\n@numba.njit\ndef more(x):\n    return x + 1\n")
    imports = "from own.compiled import compiled\nfrom own.helper import more\n"
    (folder / "loop.py").write_text(f"{imports}\n\n@compiled\ndef loop(x):\n    return more(x)\n")
    return folder


def call(package: Path, **variables: str) -> tuple[float, int]:
    """Call the loop in a new process: its result for 1, and how often it was read from disk."""
    code = "from own.loop import loop; print(loop(1.0), sum(loop.stats.cache_hits.values()))"
    env = {key: value for key, value in os.environ.items() if key != "NUMBA_CACHE_DIR"}
    env |= {"PYTHONPATH": str(package.parent), "PYTHONDONTWRITEBYTECODE": "1", "PYTHONWARNINGS": "ignore"} | variables
    run = subprocess.run([sys.executable, "-c", code], check=True, env=env, capture_output=True, text=True)
    result, hits = run.stdout.split()
    return float(result), int(hits)


def kept(folder: Path) -> list[Path]:
    return sorted(folder.glob("gptq_awq-*"))


def test_what_is_compiled_is_read_again_until_any_file_changes(package):
    assert [call(package), call(package)] == [(2.0, 0), (2.0, 1)]
    before = kept(package / "__pycache__")
    helper = package / "helper.py"
    helper.write_text(helper.read_text().replace("x + 1", "x + 2"))
    assert [call(package), call(package)] == [(3.0, 0), (3.0, 1)]
    after = kept(package / "__pycache__")
    assert len(before) == len(after) == 1  # what older sources left is gone
    assert before != after


def test_what_is_compiled_is_kept_where_the_user_says_or_can_write_and_else_nowhere(package, tmp_path):
    (package / "__pycache__").touch()  # a folder that can't be had, to root neither
    given, home = tmp_path / "given", tmp_path / "home"
    assert call(package, NUMBA_CACHE_DIR=str(given), XDG_CACHE_HOME=str(home)) == (2.0, 0)
    assert kept(given)
    assert not home.exists()
    assert call(package, XDG_CACHE_HOME=str(home)) == (2.0, 0)
    assert kept(home / "numba")
    nowhere = {"NUMBA_CACHE_DIR": "/dev/null/given", "XDG_CACHE_HOME": "/dev/null/home"}
    assert [call(package, **nowhere), call(package, **nowhere)] == [(2.0, 0), (2.0, 0)]


def test_every_loop_that_is_kept_is_kept_this_way():
    others = [path for path in (ROOT / "gptq_awq").rglob("*.py") if path != Path(compiled.__file__)]
    assert not [path for path in others if "njit" in (text := path.read_text()) and "cache=" in text]
    assert sum("@compiled\n" in path.read_text() for path in others) >= 10
