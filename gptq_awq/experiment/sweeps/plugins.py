"""Hydra's plugins: launchers and sweepers that are packages of their own, and what to say where one is missing."""

import shutil
from collections.abc import Iterator, Sequence
from importlib.util import find_spec

import yaml

from gptq_awq.errors import UserError
from gptq_awq.runtime.configs import CONFIGS

# Choice of a group → the extra of this package, and the module, that provide it.
PLUGINS = {
    "hydra/launcher": {
        "joblib": ("joblib", "hydra_joblib_launcher"),
        "slurm": ("slurm", "hydra_submitit_launcher"),
        "submitit_slurm": ("slurm", "hydra_submitit_launcher"),
        "submitit_local": ("slurm", "hydra_submitit_launcher"),
        "ray": ("ray", "hydra_ray_launcher"),
        "ray_aws": ("ray", "hydra_ray_launcher"),
    },
    "hydra/sweeper": {"optuna": ("optuna", "hydra_optuna_sweeper")},
}
LOOKING = ("--cfg", "-c", "--info", "-i", "--help", "-h", "--hydra-help")


def check_plugins(arguments: Sequence[str]) -> None:
    """Look for the plugins that a command line needs, before Hydra does; nothing is imported.

    Raises:
        UserError: one that isn't installed, Slurm's own commands, or a launcher where there is nothing to launch.
    """
    needed = list(_choices(arguments))
    for group, choice in needed:
        extra, module = PLUGINS.get(group, {}).get(choice, (None, None))
        if module is not None and not _installed(module):
            raise UserError(f"{group}={choice}: its plugin isn't installed; pip install 'gptq_awq[{extra}]'")
        if choice in ("slurm", "submitit_slurm") and shutil.which("srun") is None:
            raise UserError(f"{group}={choice}: no srun here; submit where Slurm is, or try scripts/slurm_local.sh")
        if group == "hydra/launcher" and not _sweeps(arguments):
            raise UserError(f"{group}={choice}: launchers are for sweeps; add -m")


def _choices(arguments: Sequence[str]) -> Iterator[tuple[str, str]]:
    """The launchers and sweepers that are named, on the command line or by an experiment."""
    for argument in arguments:
        key, _, value = argument.lstrip("+").partition("=")
        if key in PLUGINS:
            yield key, value
        elif key == "experiment":
            yield from _choices_of_experiment(value)


def _choices_of_experiment(name: str) -> Iterator[tuple[str, str]]:
    path = CONFIGS / "experiment" / f"{name}.yaml"
    for entry in (yaml.safe_load(path.read_text()) if path.is_file() else {}).get("defaults", []):
        if isinstance(entry, str):
            yield from _choices_of_experiment(entry)
        else:
            yield from ((key.removeprefix("override /"), str(value)) for key, value in entry.items())


def _sweeps(arguments: Sequence[str]) -> bool:
    """Whether many runs are asked for; to look at the configuration only counts too."""
    if any(a.split("=")[0] in LOOKING for a in arguments):
        return True
    return any(
        a in ("-m", "--multirun", "hydra.mode=MULTIRUN") or a.lstrip("+").startswith("experiment=") for a in arguments
    )


def _installed(module: str) -> bool:
    try:
        return find_spec(f"hydra_plugins.{module}") is not None
    except ModuleNotFoundError:  # no plugin at all
        return False
