"""The table of levels: what it shows, and that every row's options compose."""

import importlib
from dataclasses import replace

import pytest
from helpers.example_results import GPTQ_RESULT, PPL
from helpers.paths import CONFIGS, ROOT
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate


@pytest.fixture
def levels(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    return importlib.import_module("levels")


def result(size, bits, delta, interval):
    metrics = {PPL: 20 + delta, f"{PPL}/delta": delta, f"{PPL}/delta_ci95": interval}
    metrics |= {"wikitext2/kl": 0.1, "wikitext2/top1_agreement": 0.9}
    return replace(GPTQ_RESULT, size_bytes=size, baseline_size_bytes=200, bits=bits, metrics=metrics)


def test_reductions_are_from_float32(levels):
    full, int8 = levels.ROWS[0], levels.ROWS[3]
    cells = [levels.level(full, result(200, 16, 0.0, [0, 0])), levels.level(int8, result(110, 8, 0.5, [0.4, 0.6]))]
    text = levels.table(cells)
    fp32, rounded = text.splitlines()[2:]
    assert "| 32 | FP32 |" in fp32
    assert "| 1.00× | 32.00 | 20.00 | 0 |" in fp32
    assert "| 8 | INT8 |" in rounded
    assert "| 3.64× |" in rounded
    assert "+0.5 [+0.4, +0.6]" in rounded


def test_a_difference_around_zero_says_so(levels):
    row = levels.ROWS[1]
    assert "not distinguishable" in levels.level(row, result(200, 16, 0.1, [-0.1, 0.3]))["loss [95%]"]


def test_every_row_composes(levels):
    for row in levels.ROWS:
        with initialize_config_dir(str(CONFIGS), version_base="1.3"):
            cfg = compose("config", overrides=[*row.options, "out=somewhere"])
        instantiate(cfg.method, _convert_="all")
        instantiate(cfg.grid, _convert_="all")
