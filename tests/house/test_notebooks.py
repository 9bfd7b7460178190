"""Notebooks: they run from the first cell to the last, and what is kept of them is small and of no one machine."""

import json
import os
import re
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from helpers.paths import ROOT
from helpers.tiny_models import tiny_model
from notebook_helpers import VARIABLE, Line, bars, example, image, lines

from gptq_awq import quantize_model
from gptq_awq.api import observe_moments, with_weights
from gptq_awq.errors import UserError

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
QUICK = ("01_gptq_column_by_column", "03_compare_methods")


def choice(shared: Path) -> str:
    """The options of a small trained model and its text."""
    text = shared / "data" / "tinystories"
    return " ".join(
        [
            f"model=local model.path={shared / 'models' / 'stories15M'}",
            f"data=local data.path={text / 'tinystories_val.txt'} data.samples=8",
            f"eval.perplexity.path={text / 'tinystories_val.txt'} eval.perplexity.seqlen=128",
        ]
    )


@pytest.mark.parametrize(
    "path",
    [
        pytest.param(path, id=path.stem, marks=[pytest.mark.slow, *([pytest.mark.fresh] if path.stem in QUICK else [])])
        for path in NOTEBOOKS
    ],
)
def test_a_notebook_runs_from_the_first_cell_to_the_last(path: Path, shared: Path, tmp_path: Path, monkeypatch) -> None:
    pytest.importorskip("matplotlib", reason="notebooks draw with matplotlib")
    nbformat = pytest.importorskip("nbformat", reason="runs notebooks with nbclient")
    nbclient = pytest.importorskip("nbclient", reason="runs notebooks with nbclient")
    pytest.importorskip("ipykernel", reason="runs notebooks with ipykernel")
    for name, value in {
        VARIABLE: choice(shared),
        "GPTQ_AWQ_SWEEP": "method=rtn,gptq bits=3,4",
        "GPTQ_AWQ_CACHE": str(tmp_path / "cache"),
        "IPYTHONDIR": str(tmp_path / "ipython"),
        "JUPYTER_RUNTIME_DIR": str(tmp_path / "jupyter"),
        "PYTHONPATH": os.pathsep.join(str(folder) for folder in (ROOT, path.parent)),  # as in the notebook's own folder
        "PYTHONWARNINGS": "ignore",
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("GPTQ_AWQ_RESULTS", raising=False)
    notebook = nbformat.read(path, as_version=4)
    # A kernel of this interpreter, wherever Jupyter has it installed.
    specification = tmp_path / "kernels" / "here"
    specification.mkdir(parents=True)
    command = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    (specification / "kernel.json").write_text(
        json.dumps({"argv": command, "display_name": "here", "language": "python"})
    )
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path))
    resources = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(notebook, timeout=300, kernel_name="here", resources=resources).execute()
    shown = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert not [output for output in shown if output.output_type == "error"]
    assert sum("image/png" in output.get("data", {}) for output in shown) >= 4


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_what_is_kept_of_a_notebook_is_small_whole_and_of_no_one_machine(path: Path) -> None:
    text = path.read_text()
    cells = json.loads(text)["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert len(text) < 900_000
    assert len(code) < 12
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell["outputs"]]
    assert {output["output_type"] for output in outputs} <= {"execute_result", "stream"}
    assert "stderr" not in {output.get("name") for output in outputs}
    for output in outputs:
        output.get("data", {}).pop("image/png", None)
    assert not re.search(r"(?<![\w.])/(home|root|tmp|work|Users|mnt|opt|usr|var)/", json.dumps(cells))


@pytest.mark.slow
def test_the_notebooks_have_no_type_errors() -> None:
    command = [sys.executable, "scripts/check_notebooks.py", "notebooks"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_a_folder_without_notebooks_is_said(tmp_path: Path) -> None:
    command = [sys.executable, "scripts/check_notebooks.py", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (2, "no notebook there\n")


# What notebooks are made of


def test_the_example_is_what_the_environment_chooses(tiny_folder: Path, tiny_text: Path, monkeypatch) -> None:
    monkeypatch.setenv(
        VARIABLE,
        f"model=local model.path='{tiny_folder}' data=local data.path='{tiny_text}' "
        f"eval.perplexity.path='{tiny_text}' data.seqlen=32",
    )
    it = example("data.samples=3", "eval.perplexity.seqlen=16")
    assert it.name == tiny_folder.name
    assert it.calibration.ids.shape == (3, 32)
    assert it.held_out.ids.shape == (8, 16)
    assert str(tiny_folder) not in repr(it)


def test_moments_of_every_site_are_those_of_its_input() -> None:
    """Against hooks on the plain model."""
    model = tiny_model("llama")
    ids = torch.randint(0, model.config.vocab_size, (4, 24), generator=torch.Generator().manual_seed(0))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    sites = list(observe_moments(model, ids, absorbers=True))
    inputs: dict[str, torch.Tensor] = {}
    for site in sites:
        for name in site.linears:
            model.get_submodule(name).register_forward_pre_hook(
                lambda _module, args, name=name: inputs.__setitem__(name, args[0].flatten(0, 1))
            )
    with torch.no_grad():
        model(ids)
    assert len({name for site in sites for name in site.linears}) == 7 * model.config.num_hidden_layers
    assert all(site.site.absorber is not None for site in sites if "q_proj" in site.site.name)
    for site in sites:
        for name in site.linears:
            x = inputs[name]
            torch.testing.assert_close(site.moments.hessian, x.T @ x / len(x), rtol=1e-4, atol=1e-6)
            torch.testing.assert_close(site.moments.mean_abs, x.abs().mean(0), rtol=1e-4, atol=1e-6)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_weights_are_lent_for_a_while(tiny_folder: Path) -> None:
    model, donor = tiny_model("llama"), tiny_model("llama")
    weights = quantize_model(donor, method="rtn", bits=3, group_size=16).weights
    name = next(iter(weights))
    own = {n: p.clone() for n, p in model.named_parameters()}
    with suppress(ZeroDivisionError), with_weights(model, {name: weights[name]}):
        changed = {n for n, p in model.named_parameters() if not torch.equal(p, own[n])}
        assert changed == {f"{name}.weight"}
        assert torch.equal(model.get_submodule(name).weight, donor.get_submodule(name).weight)
        raise ZeroDivisionError
    assert all(torch.equal(p, own[n]) for n, p in model.named_parameters())
    with pytest.raises(UserError, match="no linear"), with_weights(model, {"model.layers.9.x": own["lm_head.weight"]}):
        pass


def test_plots_are_pictures_and_the_same_numbers_give_the_same_bytes() -> None:
    pytest.importorskip("matplotlib")
    made = [
        [
            lines({"a": Line([1, 2], [3, 4], [2, 3], [4, 5]), "b": Line([1], [2])}, "t", "x", "y", log_y=True),
            lines({f"series {i}": Line([1, 2], [i, 1]) for i in range(5)}, "t", "x", "y", style="points"),
            bars({"a": {"p": 1, "q": 2}, "b": {"q": 3}}, "t", "x", "y", digits=".1f"),
            image(torch.eye(3), "t", "x", "y", "label", rows=["a", "b", "c"]),
        ]
        for _ in range(2)
    ]
    pictures = [[plot._repr_png_() for plot in plots] for plots in made]
    assert pictures[0] == pictures[1]
    assert all(picture.startswith(b"\x89PNG") and len(picture) < 100_000 for picture in pictures[0])
    assert repr(made[0][0]) == "Plot('t')"
