"""Location of the Hydra configs: inside the installed package, or at the top of a checkout."""

from pathlib import Path
from typing import Any

_PACKAGE = Path(__file__).resolve().parent.parent
CONFIGS = next((path for path in (_PACKAGE / "configs", _PACKAGE.parent / "configs") if path.is_dir()), _PACKAGE)
"""The folder that holds config.yaml and its groups."""

_NOT_OF_A_METHOD = ("model", "data", "eval", "export", "tracking")
"""Groups that no method reads; composing them takes as long as all others."""


def composed_method(name: str, *more: str, of_command: bool = False) -> Any:
    """Compose a preset of configs/method as Hydra does: the config's nodes `method`, `grid` and what both refer to.

    Args:
        name: of the preset.
        more: further choices of the command line, such as grid=nf4.
        of_command: look in the folders, too, that the command that is running was given by --config-dir.

    Raises:
        hydra.errors.MissingConfigException: there is no such preset.
    """
    from hydra import compose, initialize_config_dir  # takes a third of a second
    from hydra.core.global_hydra import GlobalHydra

    overrides = [f"method={name}", *more, *(f"~{group}" for group in _NOT_OF_A_METHOD)]
    if of_command and GlobalHydra.instance().is_initialized():
        return compose("config", overrides=overrides)
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return compose("config", overrides=overrides)
