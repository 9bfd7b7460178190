"""Fixtures shared by all tests: where the shared real data lies, and small random models.

GPTQ_AWQ_TEST_DTYPE=float32|bfloat16   what compute_dtype=auto means in tests, whatever the processor
GPTQ_AWQ_CI=1                          a test that skips for a reason that CI doesn't expect fails
"""

import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

# Tests are many and their tensors tiny: threads would only wait for each other. Before torch and numba load.
for variable in ("OMP_NUM_THREADS", "NUMBA_NUM_THREADS", "RAYON_NUM_THREADS"):
    os.environ.setdefault(variable, "1")

import helpers.auto_dtype  # noqa: E402, F401  (forces what compute_dtype=auto means)
import hypothesis  # noqa: E402
import pytest  # noqa: E402
from helpers.forked import call_run, import_everything  # noqa: E402
from helpers.paths import ROOT  # noqa: E402
from helpers.skips import pytest_runtest_makereport  # noqa: E402, F401  (a hook)

from gptq_awq.errors import UserError  # noqa: E402
from gptq_awq.export.gguf_converter import converter_root  # noqa: E402

hypothesis.settings.register_profile("ci", derandomize=True)
if os.environ.get("GPTQ_AWQ_CI"):  # the same examples each time: what fails there can be repeated here
    hypothesis.settings.load_profile("ci")


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real text, models and golden outputs, which is not part of the project."""
    path = Path(os.environ.get("GPTQ_AWQ_SHARED", ROOT.parent / "shared"))
    if not path.is_dir():
        pytest.skip(f"shared data is not at {path} (set GPTQ_AWQ_SHARED)")
    return path


@pytest.fixture(scope="session")
def stories15m(shared: Path) -> Path:
    """A real, trained fp32 Llama of 15M parameters, context 256."""
    return shared / "models" / "stories15M"


@pytest.fixture(scope="session")
def converter() -> Path:
    """llama.cpp's own converter."""
    try:
        return converter_root(None)
    except UserError as error:
        pytest.skip(f"llama.cpp's converter cannot be had: {error}")


def lend_converter(folder: Path) -> None:
    """Put llama.cpp's converter into a test's own cache: pip takes half a minute to get it."""
    with suppress(UserError, OSError):  # without it, the test says what is missing; a cache that can't be is its own
        theirs = converter_root(None)
        folder.mkdir(parents=True, exist_ok=True)
        for file in (theirs, theirs.with_name(theirs.name + ".json")):
            if not (folder / file.name).exists():
                shutil.copyfile(file, folder / file.name)


@pytest.fixture(scope="session")
def tiny_text(tmp_path_factory) -> Path:
    """A file of English-like text, a few thousand words."""
    import random

    draw = random.Random(0)
    words = [
        "the",
        "a",
        "cat",
        "dog",
        "sees",
        "likes",
        "house",
        "tree",
        "red",
        "small",
        "and",
        "then",
        "runs",
    ]
    path = tmp_path_factory.mktemp("text") / "tiny.txt"
    path.write_text("\n".join(" ".join(draw.choices(words, k=12)) + "." for _ in range(400)))
    return path


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory) -> Path:
    """A transformers folder: a random two-block Llama and a byte-level tokenizer."""
    from helpers.tiny_models import save_tiny_folder

    return save_tiny_folder(tmp_path_factory.mktemp("model") / "tiny-llama")


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def forks():
    import_everything()


@pytest.fixture
def cli(tmp_path, cache, forks):
    """Call run.py in an empty folder; the hub counts as unreachable."""

    def call(*arguments, **environment):
        settings = {"GPTQ_AWQ_CACHE": str(cache), "HF_HUB_OFFLINE": "1"} | environment
        if any("gguf" in str(argument) for argument in arguments):
            lend_converter(Path(settings["GPTQ_AWQ_CACHE"]) / "assets")
        return call_run([str(argument) for argument in arguments], os.environ | settings, tmp_path)

    return call


@pytest.fixture
def tiny(tiny_folder, tiny_text):
    """The contract's spelling of a run, on a tiny model."""
    return (
        *("group_size=24", "sym=false", "seed=0"),
        *("model=local", f"model.path={tiny_folder}", "data=local", f"data.path={tiny_text}"),
        *("data.samples=8", "data.seqlen=32", f"eval.perplexity.path={tiny_text}"),
        *("eval.perplexity.seqlen=32", "eval.perplexity.windows=16"),
    )


@pytest.fixture
def wandb_home(tmp_path: Path, monkeypatch) -> Iterator[Path]:
    """wandb without a network, an account, a console, or files outside of `tmp_path`."""
    for name in ("WANDB_DATA_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR"):
        monkeypatch.setenv(name, str(tmp_path / name))
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    yield tmp_path
    if wandb := sys.modules.get("wandb"):
        wandb.teardown()  # it reads these variables once
