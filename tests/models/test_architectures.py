"""Calibration sees what the model sees, in architectures whose blocks can't simply be run one after the other.

All architectures are looked at by benchmarks/architectures.py, whose findings are docs/architectures.md.
"""

import importlib.util

import pytest
from helpers.architectures import architectures, tiny_architecture
from helpers.paths import ROOT

from gptq_awq.models.blocks import find_blocks
from gptq_awq.models.left import mark_left

SOME = {
    "gemma3n_text": "several hidden states of each token",
    "gemma4_text+shared_kv": "keys and values of an earlier block",
    "glm_moe_dsa": "tokens that an earlier block chose",
    "mllama": "a block that is called for images only",
    "openai-gpt": "blocks that return lists",
    "reformer": "blocks that return named fields",
    "git": "a larger list that sees",
    "llama4_text": "experts in one product",
    "zamba": "a block's weights in another block",
    "modernbert-decoder": "a decoder that is the head",
}


def census():
    """The module benchmarks/architectures.py."""
    spec = importlib.util.spec_from_file_location("architectures_benchmark", ROOT / "benchmarks" / "architectures.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", SOME, ids=SOME.values())
def test_calibration_sees_the_inputs_that_linears_have_in_the_whole_model(name):
    benchmark = census()
    error, linear = benchmark.wrong_inputs(tiny_architecture(name), benchmark.ids(2, 3))
    assert error < benchmark.SAME_INPUTS, linear


def test_what_only_chooses_tokens_is_left():
    model = tiny_architecture("glm_moe_dsa")
    mark_left(model, calibrates=False)
    _, blocks = find_blocks(model)
    choosing = {name for name, m in blocks.named_modules() if getattr(m, "left", "").startswith("it only chooses")}
    assert all("indexer" in name for name in choosing)
    assert choosing


@pytest.mark.slow
@pytest.mark.parametrize("name", architectures())
def test_every_architecture_is_calibrated_on_its_own_inputs_or_refused(name):
    benchmark = census()
    found = {}
    try:
        model = tiny_architecture(name)
        benchmark.logits(model, benchmark.ids(3, 2))
    except Exception:
        return
    with benchmark.telling(found.__setitem__, "inputs"):
        error, linear = benchmark.wrong_inputs(model, benchmark.ids(2, 3))
        assert error < benchmark.SAME_INPUTS, linear
    assert found["inputs"] == "ok" or found["inputs"].startswith("refused"), found
