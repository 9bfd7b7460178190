"""Every yaml composes, and every object it names can be built."""

from itertools import zip_longest

import pytest
from helpers.paths import CONFIGS
from helpers.tiny_models import tiny_model, tiny_tokens
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import OmegaConf

from gptq_awq import quantize_model
from gptq_awq.api import load_method
from gptq_awq.errors import UserError

GROUPS = sorted(p.name for p in CONFIGS.iterdir() if p.is_dir())
CHOICES = [(g, p.stem) for g in GROUPS for p in sorted((CONFIGS / g).glob("*.yaml"))]


METHODS = [choice for group, choice in CHOICES if group == "method"]


@pytest.mark.parametrize("method", METHODS)
def test_the_library_lands_every_preset_on_the_commands_grid(method):
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        cfg = compose("config", overrides=[f"method={method}", "bits=3", "group_size=16"])
    assert load_method(method, bits=3, group_size=16)[1] == instantiate(cfg.grid)


@pytest.mark.parametrize("method", ["hqq", "bf16"])
def test_the_library_runs_presets_by_name(method):
    """One with a grid of its own, one without a solver: the others are run elsewhere."""
    done = quantize_model(tiny_model("llama"), tiny_tokens(2), method, bits=3, group_size=16)
    assert len(done.weights) == (0 if method == "bf16" else 14)
    assert all(weight.grid == load_method(method, 3, 16)[1] for weight in done.weights.values())


def test_what_a_presets_own_grid_lacks_is_named():
    with pytest.raises(UserError, match=r"sym=True: method=hqq rounds onto grid=affine"):
        quantize_model(tiny_model("llama"), None, "hqq", sym=True)


TOGETHER = ("model", "data", "eval", "act", "kv", "export", "tracking")
"""Groups of which any choice goes with any other's: composed with one of each at a time."""
OVERRIDES = [[f"{group}={choice}"] for group, choice in CHOICES if group not in TOGETHER]
OVERRIDES += [
    [each for each in column if each]
    for column in zip_longest(*([f"{g}={choice}" for g, choice in CHOICES if g == group] for group in TOGETHER))
]


@pytest.mark.parametrize("overrides", OVERRIDES, ids=" ".join)
def test_every_yaml_composes_and_instantiates(overrides):
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        cfg = compose("config", overrides=[*overrides, "out=somewhere"])
    OmegaConf.resolve(cfg)
    for node in ("method", "grid", "act", "kv", "model", "data", "eval", "export", "tracking"):
        instantiate(cfg[node], _convert_="all")


def test_the_contract_groups_are_there():
    assert {"method", "model", "data", "eval", "export", "tracking", "grid", "act", "kv"} <= set(GROUPS)
    assert set(METHODS) >= {"fp", "rtn", "gptq", "awq", "awq_gptq"}
