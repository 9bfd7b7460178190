"""The wheel, installed where nothing of the checkout is: the command, its subcommands and the library work there."""

import json
import os
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
from helpers.paths import ROOT

import gptq_awq

MINE = """# @package _global_
method:
  _target_: gptq_awq.quantization.method.Method
  name: mine
  solver:
    _target_: gptq_awq.solvers.rtn.RTN
"""
LIBRARY = """
import torch, transformers, gptq_awq
from gptq_awq import quantize_model
assert gptq_awq.__file__.startswith(prefix), gptq_awq.__file__
model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
done = quantize_model(model, torch.randint(3, 60, (2, 16)), method="rtn", bits=4, group_size=32)
assert len(done.ledger) == 14
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", folder, ROOT]
    subprocess.run(command, check=True, capture_output=True)
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """bin/ of an environment with this wheel and, by a path file, the packages that it depends on."""
    home = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", home], check=True)
    python = home / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "-q", "--no-deps", "--no-index"]
    subprocess.run([*pip, wheel], check=True, capture_output=True)
    site = subprocess.run(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
        check=True,
        capture_output=True,
        text=True,
    )
    Path(site.stdout.strip(), "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    return home / "bin"


def call(*command, folder, cache):
    environment = os.environ | {"GPTQ_AWQ_CACHE": str(cache), "HF_HUB_OFFLINE": "1"}
    environment.pop("PYTHONPATH", None)
    return subprocess.run(
        [str(part) for part in command], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )


def test_the_wheel_holds_configs_engine_programs_pages_tasks_and_its_types(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    sources = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "gptq_awq").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    configs = {"gptq_awq/" + path.relative_to(ROOT).as_posix() for path in (ROOT / "configs").rglob("*.yaml")}
    assert sources | configs <= names
    assert {"gptq_awq/py.typed", "gptq_awq/export/engines/programs/llamacpp.cpp"} <= names


@pytest.mark.slow
@pytest.mark.fresh
def test_the_installed_command_sweeps_a_method_of_ones_own_and_reports(installed, tiny, tiny_folder, tmp_path, cache):
    own = tmp_path / "own" / "method"
    own.mkdir(parents=True)
    (own / "mine.yaml").write_text(MINE)
    empty = tmp_path / "empty"
    empty.mkdir()
    command = (installed / "gptq-awq", "--config-dir", own.parent, "-m", "method=mine", "bits=3,4", *tiny)
    swept = call(*command, folder=empty, cache=cache)
    assert swept.returncode == 0, swept.stderr
    rows = [json.loads(path.read_text()) for path in empty.glob("multirun/**/results.json")]
    assert sorted((row["method"], row["bits"]) for row in rows) == [("mine", 3), ("mine", 4)]
    reported = call(installed / "gptq-awq", "report", "multirun", folder=empty, cache=cache)
    assert "| mine | 3 |" in reported.stdout, reported.stderr
    again = call(installed / "python", "-m", "gptq_awq.report", "multirun", folder=empty, cache=cache)
    assert again.stdout == reported.stdout


def test_the_installed_module_says_its_version_and_refuses_in_one_line(installed, tmp_path, cache):
    version = call(installed / "python", "-m", "gptq_awq", "--version", folder=tmp_path, cache=cache)
    assert version.stdout == f"gptq_awq {gptq_awq.__version__}\n"
    refused = call(installed / "python", "-m", "gptq_awq", "bits=99", folder=tmp_path, cache=cache)
    assert (refused.returncode, refused.stderr) == (2, "error: bits=99: give a whole number from 2 to 8\n")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.fresh
def test_the_installed_library_quantizes_by_a_presets_name(installed, tiny_folder, tmp_path, cache):
    code = f"prefix, folder = {str(installed.parent)!r}, {str(tiny_folder)!r}\n{LIBRARY}"
    done = call(installed / "python", "-c", code, folder=tmp_path, cache=cache)
    assert done.returncode == 0, done.stderr
