"""Skips that CI expects, and those that it takes for failures."""

import os
import subprocess
import sys

import pytest
from helpers.paths import ROOT
from helpers.skips import is_expected


@pytest.mark.parametrize(
    "reason",
    [
        "could not import 'mlx.core': No module named 'mlx'",
        "could not import 'bitsandbytes.functional': No module named 'bitsandbytes'",
        "compressed-tensors 0.18 or newer is not installed",
        "engine vllm is not installed: python scripts/install_engine.py vllm",
        "Slurm is not installed (apt-get install slurm-wlm munge)",
        "chromium or its driver (chromedriver) is not installed",
        "shared data is not at shared (set GPTQ_AWQ_SHARED)",
        "no CUDA device, or no Triton",
    ],
)
def test_what_ci_cannot_have_may_skip(reason):
    assert is_expected(reason)


def test_a_missing_package_of_the_projects_own_fails_in_ci(tmp_path):
    assert not is_expected("could not import 'matplotlib': No module named 'matplotlib'")
    (tmp_path / "test_skipping.py").write_text("import pytest\n\ndef test_it():\n    pytest.importorskip('no_such')\n")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--rootdir={ROOT}", "-n", "0"]
    command += ["-p", "helpers.skips", str(tmp_path)]
    for in_ci, code in (("1", 1), ("", 0)):
        environment = os.environ | {"GPTQ_AWQ_CI": in_ci, "PYTHONPATH": str(ROOT / "tests")}
        done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == code, done.stdout
        assert ("CI does not expect a skip" in done.stdout) == bool(in_ci)
