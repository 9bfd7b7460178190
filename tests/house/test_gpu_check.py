"""scripts/gpu_check.sh, which runs seldom and far from here, still fits what it calls."""

import re
import subprocess
from pathlib import Path

import pytest
from helpers.paths import ROOT

SCRIPT = ROOT / "scripts" / "gpu_check.sh"
TEXT = SCRIPT.read_text()
STEPS = re.findall(r"^step (\w+) (\d+)$", TEXT, flags=re.MULTILINE)


def test_the_script_parses_and_its_steps_are_functions_of_it():
    subprocess.run(["bash", "-n", SCRIPT], check=True)
    assert [name for name, _ in STEPS] == ["install", "gpu_tests", "benchmark", "whole_runs", "peers"]
    for name, _ in STEPS:
        assert f"\n{name}() {{\n" in TEXT
    assert sum(int(seconds) for _, seconds in STEPS) <= 13 * 60  # a quarter of an hour with what surrounds them


def test_what_it_carries_is_pinned():
    pinned = {line.partition("==")[0].lower().replace("_", "-") for line in (ROOT / "constraints.txt").open()}
    for name in ("CARRIED", "SOURCES"):
        (block,) = re.findall(rf"^{name}=\((.*?)\)", TEXT, flags=re.MULTILINE | re.DOTALL)
        packages = re.sub("#.*", "", block).split()
        missing = {package.lower().replace("_", "-") for package in packages} - pinned
        assert not missing


@pytest.mark.parametrize("program", re.findall(r"benchmarks/\w+\.py", TEXT))
def test_its_programs_take_the_options_that_it_gives(program):
    used = set(re.findall(r"(?<= )--[a-z][a-z-]*", next(line for line in _lines() if program in line)))
    assert used <= set(re.findall(r'add_argument\(\s*"(--[a-z-]+)"', (ROOT / program).read_text()))


def _lines() -> list[str]:
    return TEXT.replace("\\\n", " ").splitlines()


def test_mistakes_are_one_line(tmp_path: Path):
    for arguments, said in (([], "name the folder"), (["--tyni"], "no option --tyni"), ([tmp_path], "holds no wheels")):
        done = subprocess.run(
            [SCRIPT, *arguments, *([tmp_path / "out"] if arguments else [])],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 2
        assert said in done.stderr
        assert len(done.stderr.splitlines()) == 1
