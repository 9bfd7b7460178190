"""Laws of names: whatever a number depends on changes the hash it is kept under, and nothing else does."""

import sys
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from helpers.paths import ROOT
from helpers.tiny_models import save_tiny_folder, tiny_model, tiny_tokens
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

from gptq_awq.calibration.expert_policy import ExpertPolicy
from gptq_awq.calibration.output_curvature import OutputCurvature
from gptq_awq.calibration.self_calibration import SelfCalibration
from gptq_awq.data.tokens import make_token_set
from gptq_awq.grids.allocated import AllocatedGrid
from gptq_awq.models.unfuse import unfuse
from gptq_awq.runtime import fingerprint, source
from gptq_awq.runtime.fingerprint import described
from gptq_awq.runtime.source import PACKAGES, Code
from gptq_awq.solvers.gptq import GPTQ
from gptq_awq.solvers.rtn import RTN
from gptq_awq.transforms.quarot import QuaRot

PACKAGE = ROOT / "gptq_awq"
REPORTED = (
    *("annotated_types", "filelock", "huggingface_hub", "hydra", "jaxtyping", "omegaconf", "orjson", "pandas"),
    *("platformdirs", "psutil", "pyarrow", "pydantic", "rich", "yaml", "gptqmodel", "vllm", "xllamacpp"),
)
"""Packages that a run imports and that change no number: they carry, check, store or show what others compute."""


@dataclass(frozen=True)
class Case:
    """All that names are made of."""

    model: torch.nn.Module
    tokenizer: object
    weights: str = "weights"
    tokens: str = "tokens"
    dtype: torch.dtype = torch.float32
    per_batch: int = 64
    transforms: tuple = ()
    experts: ExpertPolicy | None = None
    grid: AllocatedGrid = AllocatedGrid()  # noqa: RUF009 (frozen)
    solver: object = GPTQ()
    seed: int = 0
    threads: int = 1
    writer: SelfCalibration = SelfCalibration()  # noqa: RUF009 (frozen)
    curvature: OutputCurvature = OutputCurvature()  # noqa: RUF009 (frozen)
    text: str = "the cat sees"
    folder: Path = Path()

    def names(self) -> dict[str, str]:
        """The name of each kind of thing that is kept."""
        of = self.model, self.weights
        observations = fingerprint.observations_sha256(
            *of, self.tokens, self.dtype, self.per_batch, self.transforms, self.experts
        )
        return {
            "observations": observations,
            "baseline": fingerprint.baseline_sha256(*of, self.tokens, self.dtype),
            "floor": fingerprint.floor_sha256(*of, self.tokens, self.dtype),
            "answers": fingerprint.answers_sha256(*of, self.tokenizer, self.dtype),
            "sensitivities": fingerprint.sensitivities_sha256(
                observations, self.grid, self.solver, self.seed, self.threads
            ),
            "output curvature": fingerprint.curvature_sha256(
                *of, self.tokens, self.curvature, self.dtype, self.transforms
            ),
            "written text": fingerprint.written_sha256(*of, self.tokens, self.writer, self.dtype),
            "layout": fingerprint.layout_sha256(self.model.config.to_dict(), {}, "converter"),
            "vocabulary": fingerprint.vocabulary_sha256(self.folder, {self.text: [1]}, None, "converter", "engine"),
            "token ids": fingerprint.token_ids_sha256(self.text, self.tokenizer),
        }


OF_MODEL = {"observations", "baseline", "floor", "answers", "sensitivities", "output curvature", "written text"}
OF_TOKENS = OF_MODEL - {"answers"}
ALL = OF_MODEL | {"token ids"}
LAYOUT = {"layout", "vocabulary"}


@pytest.fixture
def case(tmp_path):
    folder = save_tiny_folder(tmp_path / "model")
    return Case(tiny_model("llama"), AutoTokenizer.from_pretrained(folder), folder=folder)


def changed(before: Case, after: Case) -> set[str]:
    """The kinds whose names differ."""
    old, new = before.names(), after.names()
    assert old == before.names()
    return {kind for kind in old if old[kind] != new[kind]}


# ----------------------------------------------------------------------------------------------- content and options


@pytest.mark.parametrize(
    ("change", "kinds"),
    [
        ({"weights": "other"}, OF_MODEL),
        ({"tokens": "other"}, OF_TOKENS),
        ({"dtype": torch.bfloat16}, OF_MODEL),
        ({"per_batch": 128}, {"observations", "sensitivities"}),
        ({"transforms": (QuaRot(),)}, {"observations", "sensitivities", "output curvature"}),
        ({"experts": ExpertPolicy(policy="rtn")}, {"observations", "sensitivities"}),
        ({"grid": AllocatedGrid(choices=(2, 4))}, {"sensitivities"}),
        ({"grid": AllocatedGrid(sensitivity="error")}, {"sensitivities"}),
        ({"grid": AllocatedGrid(budget_bits=3.0, tie="site")}, set()),
        ({"solver": GPTQ(damping=0.1)}, {"sensitivities"}),
        ({"solver": RTN()}, {"sensitivities"}),
        ({"seed": 1}, {"sensitivities"}),
        ({"threads": 2}, {"sensitivities"}),
        ({"writer": SelfCalibration(temperature=0.5)}, {"written text"}),
        ({"curvature": OutputCurvature(draws=2)}, {"output curvature"}),
        ({"curvature": OutputCurvature(tile=8, damping=0.1)}, set()),
        ({"text": "the dog sees"}, {"token ids", "vocabulary"}),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",  # a set's order differs between processes
)
def test_each_ingredient_changes_the_names_of_what_it_affects_and_no_other(case, change, kinds):
    assert changed(case, replace(case, **change)) == kinds


@pytest.mark.parametrize(
    "edit",
    [
        lambda model: model.double(),
        lambda model: setattr(model.config, "_attn_implementation", "eager"),
        lambda model: setattr(model.model.layers[0].mlp, "act_fn", torch.nn.ReLU()),
    ],
    ids=["dtype", "attention", "structure"],
)
def test_a_model_that_computes_otherwise_has_other_names(case, edit):
    other = tiny_model("llama")
    edit(other)
    assert changed(case, replace(case, model=other)) == OF_MODEL


def test_experts_as_linears_have_other_names_than_fused_ones(case):
    fused, linears = tiny_model("mixtral"), tiny_model("mixtral")
    unfuse(linears)
    assert changed(replace(case, model=fused), replace(case, model=linears)) == OF_MODEL


def test_generation_config_changes_what_the_model_writes(case):
    other = tiny_model("llama")
    other.generation_config.eos_token_id = 5
    assert changed(case, replace(case, model=other)) == {"answers", "written text"}


def with_bos(tokenizer):
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])


@pytest.mark.parametrize(
    ("edit", "kinds"),
    [
        (with_bos, {"answers", "token ids"}),
        (lambda tokenizer: tokenizer.add_tokens(["cat"]), {"answers", "token ids"}),
        (lambda tokenizer: setattr(tokenizer, "eos_token", "<s>"), {"answers", "token ids"}),
        (lambda tokenizer: setattr(tokenizer, "chat_template", "NEW {{ messages }}"), set()),
        (lambda tokenizer: tokenizer(["a", "the cat"], padding=True, truncation=True, max_length=4), set()),
    ],
    ids=["BOS", "added token", "EOS", "chat template", "a call that pads"],
)
def test_a_tokenizer_changes_the_names_of_what_it_encodes(case, edit, kinds, tmp_path):
    other = AutoTokenizer.from_pretrained(tmp_path / "model")
    edit(other)
    assert changed(case, replace(case, tokenizer=other)) == kinds


def test_a_checkpoint_depends_on_template_generation_config_and_the_tokenizers_files(case, tmp_path):
    def name():
        return fingerprint.export_sha256(case.model, case.tokenizer)

    names = [name()]
    case.tokenizer.chat_template = "NEW {{ messages }}"
    names.append(name())
    case.model.generation_config.eos_token_id = 5
    names.append(name())
    (tmp_path / "model" / "tokenizer.model").write_bytes(b"pieces")
    names.append(name())
    assert len(set(names)) == 4
    (tmp_path / "model" / "README.md").write_text("about it")
    assert name() == names[-1]


def test_windows_of_another_shape_or_mask_have_another_hash():
    ids = tiny_tokens(4, 32)
    masks = (None, torch.ones(4, 32, dtype=torch.bool), torch.arange(32).expand(4, 32) < 16)
    sets = [make_token_set("n", ids, mask, "s") for mask in masks]
    sets += [make_token_set("n", ids.view(rows, -1), None, "s") for rows in (2, 8)]
    assert len({tokens.sha256 for tokens in sets}) == 5
    assert make_token_set("m", ids.clone(), None, "elsewhere").sha256 == sets[0].sha256


def test_objects_are_described_by_class_and_fields_and_never_by_their_address():
    class Plain:
        def __init__(self, strength):
            self.strength, self.tables = strength, {"a": torch.ones(2)}

    assert described(Plain(1)) == described(Plain(1))
    assert described(Plain(1)) != described(Plain(2))
    assert "0x" not in str(described(Plain(1)))
    assert described(GPTQ()) != described(GPTQ(damping=0.1)) != described(RTN())


# -------------------------------------------------------------------------------------------------- code and packages


@pytest.fixture
def edited(monkeypatch):
    """A function: calls another one as if these files of the package were edited."""
    read = Path.read_bytes

    def under(names, call):
        paths = {PACKAGE / name for name in names}
        assert all(path.is_file() for path in paths)
        with monkeypatch.context() as patch:
            patch.setattr(Path, "read_bytes", lambda path: read(path) + (b"\n#" if path in paths else b""))
            return call()

    return under


@pytest.mark.parametrize(
    ("file", "kinds"),
    [
        ("models/load.py", OF_MODEL),
        ("models/topology.py", {"observations", "sensitivities"}),
        ("calibration/moments.py", {"observations", "sensitivities", "output curvature"}),
        ("calibration/self_calibration.py", {"written text"}),
        ("calibration/output_curvature.py", {"output curvature"}),
        ("calibration/output_gradients.py", {"sensitivities", "output curvature"}),
        ("evaluation/floor.py", {"floor"}),
        ("evaluation/language_model.py", {"answers"}),
        ("solvers/gptq.py", {"sensitivities"}),
        ("allocation/sensitivity.py", {"sensitivities"}),
        ("allocation/knapsack.py", set()),
        ("transforms/awq.py", set()),
        ("export/gguf.py", set()),
        ("report/table.py", set()),
        ("experiment/run.py", set()),
    ],
)
def test_the_code_that_computes_it_is_part_of_a_name(case, edited, file, kinds):
    old, new = case.names(), edited([file], case.names)
    assert {kind for kind in old if old[kind] != new[kind]} == kinds


@pytest.mark.parametrize("package", PACKAGES)
def test_the_version_of_every_package_that_computes_is_part_of_a_run(monkeypatch, package):
    before, real = fingerprint.run_sha256({}, {}, "code"), source.version
    monkeypatch.setattr(source, "version", lambda name: "0" if name == package else real(name))
    assert fingerprint.run_sha256({}, {}, "code") != before


@pytest.mark.parametrize(
    ("package", "kinds"),
    [
        *(
            (name, ALL | LAYOUT)
            for name in ("torch", "triton", "numba", "llvmlite", "transformers", "tokenizers", "numpy")
        ),
        ("greenlet", {"observations", "sensitivities"}),
        ("lm_eval", {"answers"}),
        *(
            (name, OF_MODEL | {"layout"}) for name in ("gguf", "bitsandbytes")
        ),  # a model may be a GGUF file, or come in NF4
        *((name, set()) for name in ("scipy", "wandb", "rich")),
    ],
)
def test_the_version_of_a_package_is_part_of_what_it_computes(case, monkeypatch, package, kinds):
    old, real = case.names(), source.version
    monkeypatch.setattr(source, "version", lambda name: "0" if name == package else real(name))
    new = case.names()
    assert {kind for kind in old if old[kind] != new[kind]} == kinds


def test_every_package_that_a_run_imports_either_computes_or_is_named_here():
    known = {name.replace("-", "_") for name in (*PACKAGES, *REPORTED, "gptq_awq")} | {*sys.stdlib_module_names}
    assert Code.of(["gptq_awq.experiment.run"]).imports - known == set()


def test_a_solver_of_the_users_own_counts_with_the_files_that_it_imports(case, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "own_grip.py").write_text("STRENGTH = 1\n")
    (tmp_path / "own_unused.py").write_text("STRENGTH = 1\n")
    (tmp_path / "own_solver.py").write_text("import torch\nfrom own_grip import STRENGTH\nclass Mine: pass\n")
    import own_solver  # pyright: ignore[reportMissingImports]

    mine = replace(case, solver=own_solver.Mine())
    names = [mine.names()["sensitivities"]]
    for file in ("own_grip", "own_solver"):
        with (tmp_path / f"{file}.py").open("a") as text:
            text.write("# edited\n")
        names.append(mine.names()["sensitivities"])
    (tmp_path / "own_unused.py").write_text("STRENGTH = 2\n")
    names.append(mine.names()["sensitivities"])
    assert len(set(names)) == 3
    assert names[2] == names[3]
