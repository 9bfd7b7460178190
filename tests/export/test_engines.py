"""Laws of comparing with engines; and, where an engine is installed, that it computes what transformers computes."""

import runpy
import sys
from dataclasses import replace
from functools import cache
from math import exp, log
from pathlib import Path

import pytest
import torch
from helpers.gguf_models import bpe
from helpers.paths import ROOT
from helpers.quantized_weights import tiny_source
from helpers.tiny_models import tiny_tokens
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3MoeConfig

from gptq_awq import quantize_model
from gptq_awq.errors import UserError
from gptq_awq.export import __main__ as command
from gptq_awq.export import reference
from gptq_awq.export.awq import AWQFormat
from gptq_awq.export.base import Source
from gptq_awq.export.bnb import BnbFormat
from gptq_awq.export.compressed_tensors import CompressedTensorsFormat
from gptq_awq.export.engines import ENGINES, Comparison, answer, compare, find
from gptq_awq.export.engines import run as run_module
from gptq_awq.export.formats import make_format
from gptq_awq.export.gguf import GGUFFormat
from gptq_awq.export.gptq import GPTQFormat
from gptq_awq.export.hf import HFFormat
from gptq_awq.export.mlx import MLXFormat
from gptq_awq.export.reference import TIMES, Judgement, judge_engine
from gptq_awq.export.verify import Probe, VerificationRecord
from gptq_awq.export.write import Exports
from gptq_awq.grids.affine import AffineGrid
from gptq_awq.grids.integer import IntGrid
from gptq_awq.grids.mix import LlamaMix
from gptq_awq.grids.table import TableGrid
from gptq_awq.runtime.progress import no_track

WORDS = 50
SIZES = {
    **{"vocab_size": 700, "hidden_size": 128, "head_dim": 32, "num_attention_heads": 4, "num_key_value_heads": 2},
    **{"num_hidden_layers": 2, "intermediate_size": 128, "max_position_embeddings": 128},
}
"""Sizes of a mixture that vLLM runs; all of its experts are asked, so that no rounding sends a token to another."""


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def tokens():
    return torch.randint(0, WORDS, (2, 70), generator=torch.Generator().manual_seed(1))


# compare


def test_equal_logits_differ_in_nothing(tokens):
    logits = draw(2, 70, WORDS)
    found = compare(logits, logits.clone(), tokens)
    assert (found.max_abs, found.mean_kl, found.max_kl) == (0, 0, 0)
    assert found.ppl_ours == found.ppl_engine


def test_a_constant_per_position_changes_nothing(tokens):
    logits = draw(2, 70, WORDS).double()
    found = compare(logits, logits + 100 * draw(2, 70, 1).double(), tokens)
    assert found.max_abs < 1e-12
    assert found.max_kl < 1e-12
    assert found.ppl_engine == pytest.approx(found.ppl_ours)


def test_kl_and_perplexity_of_two_words_are_those_computed_by_hand():
    p, q = [0.75, 0.25], [0.5, 0.5]
    found = compare(torch.tensor([[p, p]]).log(), torch.tensor([[q, q]]).log(), torch.tensor([[1, 0]]))
    kl = 0.75 * log(0.75 / 0.5) + 0.25 * log(0.25 / 0.5)
    assert found.mean_kl == pytest.approx(kl, rel=1e-6)
    assert found.max_kl == pytest.approx(kl, rel=1e-6)
    assert found.ppl_ours == pytest.approx(1 / 0.75)
    assert found.ppl_engine == pytest.approx(1 / 0.5)


def test_perplexity_is_that_of_cross_entropy(tokens):
    logits = draw(2, 70, WORDS)
    nll = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    assert compare(logits, logits, tokens).ppl_ours == pytest.approx(exp(nll.item()), rel=1e-5)


def test_one_wrong_position_shows_in_the_maxima(tokens):
    ours = draw(2, 70, WORDS)
    theirs = ours.clone()
    theirs[1, 66, 3] += 5
    found = compare(ours, theirs, tokens)
    assert found.max_abs == pytest.approx(5 * (1 - 1 / WORDS), rel=1e-5)
    assert found.mean_kl == pytest.approx(found.max_kl / 140)


def test_differing_vocabularies_are_not_compared(tokens):
    with pytest.raises(ValueError, match="50"):
        compare(draw(2, 70, WORDS), draw(2, 70, WORDS + 14), tokens)


# find and answer


@pytest.fixture
def empty(tmp_path, monkeypatch):
    """No engine's environment."""
    monkeypatch.setenv("GPTQ_AWQ_ENGINES", str(tmp_path / "engines"))
    return tmp_path / "engines"


def test_every_engine_has_a_program():
    for name in ENGINES:
        assert (run_module.PROGRAMS / f"{ENGINES[name].program or name}.py").is_file()


def test_an_environment_is_found_once_it_is_complete(empty):
    (empty / "llamacpp").mkdir(parents=True)
    assert find("llamacpp") is None
    (empty / "llamacpp" / "engine.json").write_text("{}")
    assert find("llamacpp") == empty / "llamacpp" / "bin" / "python"


def test_this_interpreter_serves_an_engine_whose_modules_it_has(empty, monkeypatch):
    assert find("transformers", "hf") == Path(sys.executable)
    monkeypatch.setattr(run_module.importlib.util, "find_spec", lambda name: None if name == "mlx_lm" else object())
    assert find("mlx") is None
    assert find("xllamacpp") == Path(sys.executable)


def test_what_is_not_installed_names_the_script(empty):
    with pytest.raises(UserError, match=r"llamacpp is not installed: python scripts/install_engine.py llamacpp"):
        answer("llamacpp", Path("x.gguf"), torch.zeros(1, 4), "gguf")


def test_unknown_engines_and_formats_are_told_what_there_is():
    with pytest.raises(UserError, match="choose from transformers"):
        find("ollama")
    with pytest.raises(UserError, match="mlx does not take gguf: it takes hf, mlx"):
        find("mlx", "gguf")


@pytest.fixture
def engine(tmp_path, monkeypatch):
    """An engine whose program is given as text; it runs in this interpreter."""

    def run(program, timeout=60.0):
        (tmp_path / "transformers.py").write_text("import sys, numpy as np, pathlib\n" + program)
        monkeypatch.setattr(run_module, "PROGRAMS", tmp_path)
        monkeypatch.setenv("GPTQ_AWQ_ENGINES", str(tmp_path / "engines"))
        return answer("transformers", tmp_path, torch.tensor([[1, 2, 3]]), "hf", vocab=4, timeout=timeout)

    return run


ANSWER = """
folder = pathlib.Path(sys.argv[2])
np.save(folder / "logits.npy", np.repeat(np.load(folder / "tokens.npy")[..., None], 6, 2).astype(np.float32) * {factor})
(folder / "version.txt").write_text("7." + sys.argv[3])
"""


def test_an_answer_has_the_programs_logits_without_padding(engine):
    got = engine(ANSWER.format(factor=1))
    assert got.logits.tolist() == [[[1] * 4, [2] * 4, [3] * 4]]
    assert (got.engine, got.version) == ("transformers", "7.float32")


def test_nan_is_refused(engine):
    with pytest.raises(UserError, match="NaN"):
        engine(ANSWER.format(factor="np.nan"))


def test_a_refusal_carries_the_engines_own_words(engine):
    message = (
        "1 validation error for Config\\n  Value error, bits=3 [type=value_error, x=1]\\n    For further information"
    )
    with pytest.raises(UserError, match=r"refuses .*: ValueError: 1 validation error for Config Value error, bits=3$"):
        engine(f"raise ValueError('{message}')")
    with pytest.raises(UserError, match="killed by signal 9"):
        engine("import os; os.kill(os.getpid(), 9)")
    with pytest.raises(UserError, match=r"no such kernel$"):
        engine("sys.exit('loading\\nno such kernel')")


def test_an_engine_that_hangs_is_stopped(engine):
    with pytest.raises(UserError, match="within 1 s"):
        engine("import time; time.sleep(60)", timeout=1)


def test_an_engine_that_refuses_keeps_no_other_from_being_asked(tmp_path, monkeypatch, capsys):
    source = tiny_source(sym=True)
    GPTQFormat().write(source, tmp_path)
    probe = Probe.of(source.model, tiny_tokens(1, 8), "x")
    VerificationRecord.of(GPTQFormat(), source, tmp_path, probe, {}).write(tmp_path)
    alike = Comparison(0.0, 0.0, 0.0, 1.0, 1.0)

    def judge(_, name):
        if name == "gptqmodel":
            raise UserError("gptqmodel refuses this folder")
        return Judgement(alike, alike, 1e-4)

    monkeypatch.setattr(command, "find", lambda *_: tmp_path)
    monkeypatch.setattr(command, "judge_engine", judge)
    assert command.main(["verify", str(tmp_path), "--engine", "all"]) == 2
    printed = capsys.readouterr().out
    assert "gptqmodel: gptqmodel refuses this folder" in printed
    assert "vllm: max" in printed


# The installer


@pytest.fixture
def install(tmp_path, monkeypatch, capsys):
    """scripts/install_engine.py, called as from the command line: exit code, what it printed."""
    path = ROOT / "scripts" / "install_engine.py"
    monkeypatch.setenv("GPTQ_AWQ_ENGINES", str(tmp_path))

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", [str(path), *arguments])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(path), run_name="__main__")
        return ended.value.code, "".join(capsys.readouterr())

    return call


def test_the_installer_knows_every_engine_and_quantizer_and_no_other(install):
    known = [*ENGINES, "llmcompressor", "autoround"]
    code, printed = install("--list")
    assert code == 0
    assert [line.split() for line in printed.splitlines()] == [[name, "-"] for name in known]
    assert install("ollama") == (2, f"error: NAME=ollama: choose from {', '.join(known)}, or all\n")


def test_a_failing_install_says_why_and_leaves_no_engine_behind(install, monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(sys, "executable", "/bin/false")
    code, printed = install("mlx")
    assert code == 2
    assert "this command failed: /bin/false -m venv" in printed
    assert find("llamacpp") is None


# Engines


@pytest.fixture(scope="module")
def checkpoint(stories15m, shared, tmp_path_factory):
    """A real model's folder in a format, rounded to nearest in 4 bits (hf: not at all)."""
    grids = {
        "hf": None,
        "gptq": IntGrid(4, 32, sym=True, scale_dtype="float16"),
        "awq": IntGrid(4, 32, scale_dtype="float16"),
        "compressed_tensors": IntGrid(4, 32, sym=True, scale_dtype="float16"),
        "bnb": TableGrid("nf4", 32),
        "mlx": AffineGrid(4, 32),
        "gguf": LlamaMix("q4_0"),
    }
    formats = [HFFormat("float32"), GPTQFormat(), AWQFormat(), CompressedTensorsFormat(), BnbFormat(), MLXFormat()]
    by_name = {format_.name: format_ for format_ in [*formats, GGUFFormat()]}

    @cache
    def write(name):
        model = AutoModelForCausalLM.from_pretrained(stories15m, dtype=torch.float32).eval()
        grid = grids[name]
        weights = quantize_model(model, method="rtn", grid=grid).weights if grid else {}
        source = Source(model, AutoTokenizer.from_pretrained(stories15m), "stories15M", weights)
        text = (shared / "data" / "tinystories" / "tinystories_val.txt").read_text()[:2000]
        ids = AutoTokenizer.from_pretrained(stories15m)(text).input_ids[:64]
        probe = Probe.of(model, torch.tensor([ids]), "text")
        out = tmp_path_factory.mktemp("engines")
        (done,) = Exports((by_name[name],), decode=False).write(source, out, probe, {}, no_track)
        return done.path

    return write


def cases():
    """Every engine with every format it takes; those that start slowly only with -m slow."""
    for name, engine in ENGINES.items():
        for format_name in engine.formats:
            missing = find(name, format_name) is None
            reason = f"engine {name} is not installed: python scripts/install_engine.py {name}"
            marks = [pytest.mark.skipif(missing, reason=reason)] + [pytest.mark.slow] * (
                name not in ("llamacpp", "xllamacpp")
            )
            yield pytest.param(name, format_name, marks=marks, id=f"{name}-{format_name}")


@pytest.mark.parametrize(("name", "format_name"), cases())
def test_an_engine_computes_what_the_decoded_weights_compute_but_for_its_noise(name, format_name, checkpoint):
    judged = judge_engine(checkpoint(format_name), name)
    assert judged.within, judged
    assert judged.found.ppl_engine == pytest.approx(judged.found.ppl_ours, rel=1e-2 if name == "xllamacpp" else 1e-3)


PACKED = [case for case in cases() if case.values[1] in ("gptq", "awq", "compressed_tensors")]


@pytest.mark.parametrize(("name", "format_name"), PACKED)
def test_an_engine_finds_every_expert_of_a_mixture_under_its_published_name(name, format_name, tmp_path):
    if (name, format_name) == ("transformers4", "compressed_tensors"):
        pytest.skip("scripts/install_engine.py: transformers 4 has no packed experts")
    torch.manual_seed(0)
    config = Qwen3MoeConfig(**SIZES, moe_intermediate_size=128, num_experts=4, num_experts_per_tok=4)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval().requires_grad_(False)
    grid = IntGrid(4, 32, sym=True, scale_dtype="float16")
    source = Source(model, bpe(["bytes of words"]), "tiny", quantize_model(model, method="rtn", grid=grid).weights)
    make_format(format_name, {}).write(source, tmp_path)
    tokens = tiny_tokens(1, 24)
    theirs = answer(name, tmp_path, tokens, format_name, vocab=SIZES["vocab_size"]).logits
    assert compare(model(tokens).logits, theirs, tokens).max_kl < 1e-4


@pytest.mark.slow
def test_an_engine_that_refuses_its_control_is_judged_by_a_constant(checkpoint, monkeypatch):
    folder, asked = checkpoint("compressed_tensors"), []

    def refusing_plain(*arguments, **options):
        asked.append(arguments[3])
        if arguments[3] == "hf":
            raise UserError("it reads no such names")
        return answer(*arguments, **options)

    monkeypatch.setattr(reference, "answer", refusing_plain)
    judged = judge_engine(folder, "transformers")
    assert asked == ["compressed_tensors", "hf"]
    assert judged.noise is None
    assert judged.limit == ENGINES["transformers"].formats["compressed_tensors"].max_kl
    assert judged.within


@pytest.mark.slow
def test_one_wrong_row_is_beyond_an_engines_noise(checkpoint, monkeypatch):
    folder = checkpoint("hf")
    assert judge_engine(folder, "transformers").within
    other = reference.reference_model(folder)
    other.get_parameter("model.layers.0.mlp.down_proj.weight").data[7] *= 1.5
    control = HFFormat.write
    monkeypatch.setattr(HFFormat, "write", lambda self, source, path: control(self, replace(source, model=other), path))
    found = judge_engine(folder, "transformers")
    assert found.noise.max_kl > TIMES * found.found.max_kl, "the control alone differs"
    monkeypatch.setattr(reference, "reference_model", lambda _: other)
    assert not judge_engine(folder, "transformers").within
