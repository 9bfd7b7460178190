"""Every yaml composes, and every object it names can be built."""

from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import OmegaConf

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
GROUPS = sorted(p.name for p in CONFIGS.iterdir() if p.is_dir())
CHOICES = [(g, p.stem) for g in GROUPS for p in sorted((CONFIGS / g).glob("*.yaml"))]


@pytest.mark.parametrize(("group", "choice"), CHOICES)
def test_every_yaml_composes_and_instantiates(group, choice):
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        cfg = compose("config", overrides=[f"{group}={choice}", "out=somewhere"])
    OmegaConf.resolve(cfg)
    for node in ("method", "grid", "act", "kv", "model", "data", "eval", "export", "tracking"):
        instantiate(cfg[node], _convert_="all")


def test_the_contract_groups_are_there():
    assert {"method", "model", "data", "eval", "export", "tracking", "grid", "act", "kv"} <= set(GROUPS)
    methods = {choice for group, choice in CHOICES if group == "method"}
    assert methods >= {"fp", "rtn", "gptq", "awq", "awq_gptq"}
