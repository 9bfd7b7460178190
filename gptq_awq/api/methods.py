"""Methods by their names, with options by theirs: `load_method("gptq", bits=3, options={"damping": 0.1})`."""

from collections.abc import Iterator, Mapping
from typing import Any

from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from gptq_awq.errors import UserError
from gptq_awq.grids.allocated import AllocatedGrid
from gptq_awq.grids.base import Grid
from gptq_awq.quantization.method import Method
from gptq_awq.runtime.configs import CONFIGS, composed_method
from gptq_awq.runtime.declarations import Declared
from gptq_awq.runtime.options import check_config, nearest


def load_method(
    name: str,
    bits: int | None = None,
    group_size: int | None = None,
    sym: bool | None = None,
    grid: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> tuple[Method, Grid]:
    """Load a preset of configs/method, and the grid that it rounds weights onto.

    Args:
        name: of the preset: `gptq`, `awq`, `published/gptq`.
        bits: 2 to 8; None: 4, or the grid's own.
        group_size: columns that share a scale, -1: per channel; None: 64, or the grid's own.
        sym: symmetric grid; None: no, or the grid's own.
        grid: name of a number format of configs/grid; None: the preset's, integers for most.
        options: further options of method and grid by the last part of their names (`damping`), or more of it
            (`solver.damping`), as `gptq-awq method=NAME --cfg job` lists them.

    Raises:
        UserError: there is no such preset, grid or option, and the message names those there are; a value that it
            doesn't take; bits, group_size or sym that the grid doesn't have.
    """
    wanted = {"bits": bits, "group_size": group_size, "sym": sym}
    composed = composed_method(_known("method", name), *([f"grid={_known('grid', grid)}"] if grid else []))
    composed.merge_with({key: value for key, value in wanted.items() if value is not None})
    for key, value in (options or {}).items():
        OmegaConf.update(composed, _path(composed, key, name), value)
    built = []
    for part in ("method", "grid"):
        node = {part: OmegaConf.to_container(composed[part], resolve=True)}
        for option, value in check_config(node, Declared({}, "nodes")):
            OmegaConf.update(composed, option, value)
        built.append(instantiate(composed[part], _convert_="all"))
    method, made = built
    if isinstance(made, AllocatedGrid):
        raise UserError(f"grid={grid or made.label}: widths are allocated by a run: gptq-awq method={name} grid=mixed")
    for key, value in wanted.items():
        if value is not None and getattr(made, key, None) != value and (value or hasattr(made, key)):
            raise UserError(f"{key}={value}: method={name} rounds onto grid={made.label}, which has none; pass a grid")
    return method, made


def _known(group: str, name: str) -> str:
    folder = CONFIGS / group
    known = sorted(path.relative_to(folder).with_suffix("").as_posix() for path in folder.rglob("*.yaml"))
    if name not in known:
        raise UserError(f"{group}={name}: choose one of {', '.join(known)}{nearest(name, known, f'{group}=')}")
    return name


def _path(composed: DictConfig, option: str, method: str) -> str:
    """Full name of an option of method or grid. Raises UserError for one that there isn't, or that several are."""
    groups = {part: OmegaConf.to_container(composed[part], resolve=False) for part in ("method", "grid")}
    known = list(_leaves(groups))
    found = [path for path in known if path == option or path.endswith(f".{option}")]
    if not found:
        names = {path.rpartition(".")[2] for path in known}
        raise UserError(f"{option}: method={method} has no such option{nearest(option, names)}")
    if len(found) > 1:
        raise UserError(f"{option}: which one, {' or '.join(found)}? Pass **{{{found[0]!r}: …}}")
    return found[0]


def _leaves(node: Any, prefix: str = "") -> Iterator[str]:
    for key, value in node.items():
        if str(key).startswith("_") or key == "name":
            continue
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"
