"""Hydra's errors about a command line, each as one line: the option, the choices there are, the nearest name."""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from hydra import compose
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import MissingConfigException, OverrideParseException
from omegaconf import OmegaConf

from gptq_awq.runtime.configs import CONFIGS
from gptq_awq.runtime.options import nearest


def one_line(error: Exception, arguments: Sequence[str]) -> str:
    """Put an error of Hydra's or OmegaConf's into one line for the user.

    Args:
        error: raised while the config was composed, or while one of its values was read.
        arguments: of the command line.
    """
    text = str(error)
    if isinstance(error, OverrideParseException):
        return _of_grammar(error.override)
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        return _of_choice(error, arguments)
    if found := re.search(r"Could not override '([^']+)'", text):
        return _of_name(found[1], arguments)
    if found := re.search(r"Could not append to config. An item is already at '([^']+)'", text):
        return f"+{found[1]}: this option is there already; leave out the +"
    return " ".join(line.strip() for line in text.splitlines()[:2]) or type(error).__name__


def _of_grammar(override: str) -> str:
    key, equals, value = override.partition("=")
    if not equals:
        return f"{override}: give OPTION=VALUE; see --help"
    quoted = value.replace("\\", "\\\\").replace('"', '\\"')
    return f"{override}: this value needs quotes, for Hydra and for the shell: '{key}=\"{quoted}\"'"


def _of_choice(error: MissingConfigException, arguments: Sequence[str]) -> str:
    missing = str(error.missing_cfg_file or "")
    group, _, choice = missing.rpartition("/")
    given = next((a for a in arguments if a.lstrip("+").startswith(f"{group}=")), f"{group}={choice}")
    choices = sorted(error.options or (path.stem for path in (CONFIGS / group).glob("*.yaml")))
    return f"{given}: choose one of {', '.join(choices)}{nearest(choice, choices, f'{group}=')}"


def _of_name(option: str, arguments: Sequence[str]) -> str:
    known = [name for name in _names_without(option, arguments) if name.count(".") <= option.count(".") + 1]
    parent = option.rpartition(".")[0]
    siblings = [name for name in known if name.rpartition(".")[0] == parent]
    guess = nearest(option, siblings) or nearest(option, known)
    return f"{option}: there is no such option{guess}"


def _names_without(option: str, arguments: Sequence[str]) -> list[str]:
    """Dotted names of the config that the other arguments compose; none where these don't compose either."""
    rest = [a for a in arguments if "=" in a and not a.startswith("-") and not re.match(rf"\+*{re.escape(option)}=", a)]
    try:
        if not GlobalHydra.instance().is_initialized():
            return []
        rest = [a for a in rest if "," not in a.partition("=")[2] and not a.lstrip("+").startswith("hydra")]
        cfg = compose("config", overrides=rest)
        return list(_leaves(OmegaConf.to_container(cfg, resolve=False)))
    except Exception:  # of a second mistake: the first one is what is told
        return []


def _leaves(node: Any, prefix: str = "") -> Iterator[str]:
    for key, value in node.items():
        yield f"{prefix}{key}"
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}.")
