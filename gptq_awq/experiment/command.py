"""The main job's command: Hydra composes the config of one run, or of each run of a sweep, and `run` computes it."""

import errno
import gc
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import hydra
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from gptq_awq.errors import UserError
from gptq_awq.experiment.messages import one_line
from gptq_awq.experiment.options import check_options
from gptq_awq.experiment.output_folder import remove_empty_folder
from gptq_awq.experiment.sweeps.plugins import check_plugins
from gptq_awq.runtime.configs import CONFIGS
from gptq_awq.runtime.stopping import end

NOT_WRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Errors of the system where a folder that is to be made, or a file, can't be written."""


def main() -> None:
    """Run what the command line asks for; a mistake in its options is one line on stderr and exit code 2."""
    arguments = sys.argv[1:]
    if {"--help", "-h"} & set(arguments):
        from gptq_awq.experiment.help import help_text

        sys.stdout.write(help_text(_config_dir(arguments), arguments))
        return
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # errors come out of `task` instead of being printed by Hydra
    try:
        check_plugins(arguments)
        if "--dry-run" in arguments:
            _list_runs(arguments)
        else:
            sys.argv += _folder_of_hydra(arguments)
            task()
    except UserError as error:
        _refuse(str(error))
    except (HydraException, OmegaConfBaseException) as error:
        _refuse(one_line(error, arguments))
    except OSError as error:
        if error.errno not in NOT_WRITABLE:
            raise
        option = "hydra.sweep.dir" if {"-m", "--multirun"} & set(arguments) else "out"
        _refuse(f"{option}={error.filename or '?'}: cannot be written ({error.strerror}); name another folder")


def _list_runs(arguments: list[str]) -> None:
    from gptq_awq.numerics.distributed import rank_and_size

    if rank_and_size()[0] > 0:
        return  # of ranks that were started together one tells
    from gptq_awq.experiment.forecasting.listing import listing

    with listing(arguments) as composed:
        sys.argv[1:] = composed
        task()


@hydra.main(version_base="1.3", config_path=str(CONFIGS), config_name="config")
def task(cfg: DictConfig) -> float | tuple[float, ...]:
    """Run one experiment; returns what a search minimizes."""
    try:
        check_options(cfg)  # before the imports below, which take seconds
    except UserError as error:
        return _listed(cfg, error) if cfg.dry_run is True else _failed(cfg, error, stored=False)
    if cfg.dry_run:
        return _listed(cfg)
    run, objective = _imported()

    try:
        return objective(run(cfg), cfg.objective)
    except UserError as error:
        return _failed(cfg, error, stored=True)
    except KeyboardInterrupt as stop:
        end(stop, f"what is finished is kept for {cfg.out}; type the same command again to go on")


def _imported() -> tuple[Callable[[DictConfig], Any], Callable[..., Any]]:
    """Import what computes a run, on one process without the parts of torch that no run uses.

    What imports make stays, most of it, so it is never looked through for garbage.
    """
    from gptq_awq.numerics.distributed import rank_and_size
    from gptq_awq.runtime.collection import uncollected
    from gptq_awq.runtime.lean_import import import_transformers

    with uncollected():
        if rank_and_size()[1] == 1:
            import_transformers()
        from gptq_awq.experiment.run import run
        from gptq_awq.experiment.sweeps.sweep import objective

        gc.freeze()
    return run, objective


def _listed(cfg: DictConfig, mistake: UserError | None = None) -> float:
    """Note a run instead of computing it; one with a mistake is listed with it."""
    from hydra.core.hydra_config import HydraConfig

    from gptq_awq.experiment.forecasting.listing import ListedRun, check_listable, list_run, note

    try:
        check_listable(HydraConfig.get().runtime.choices["hydra/sweeper"])
    except UserError as error:
        _refuse(str(error))  # at once: a sweeper would go on without its result
    out = Path(HydraConfig.get().runtime.output_dir)
    folder = out if out.name == "one" else Path(HydraConfig.get().sweep.dir)
    try:
        if mistake is not None:
            raise mistake
        list_run(cfg, folder)
    except UserError as error:
        note(ListedRun(HydraConfig.get().job.override_dirname, f"error: {error}"), folder)
    return 0.0


def _failed(cfg: DictConfig, error: UserError, stored: bool) -> float | tuple[float, ...]:
    """End the command; in a sweep, whose other runs go on, the objective's worst value for this run."""
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    if HydraConfig.get().mode != RunMode.MULTIRUN:
        remove_empty_folder(Path(HydraConfig.get().runtime.output_dir))
        _refuse(str(error))
    from gptq_awq.experiment.sweeps.progress import tell_failed
    from gptq_awq.experiment.sweeps.sweep import no_objective, store_failure
    from gptq_awq.numerics.distributed import RankLostError

    if isinstance(error, RankLostError):
        _refuse(str(error))
    if not stored:
        store_failure(cfg, error)
    log = Path(cfg.out) / "run.log"
    folder, number = Path(HydraConfig.get().sweep.dir), HydraConfig.get().job.num
    tell_failed(cfg, folder, number, str(error).splitlines()[0], log if log.is_file() else None)
    return no_objective(cfg.objective)


def _refuse(message: str) -> NoReturn:
    sys.stderr.write(f"error: {message}\n")
    sys.exit(2)


def _folder_of_hydra(arguments: Sequence[str]) -> list[str]:
    """Let Hydra's own folder be `out` where it is given: the working directory may be one that can't be written to."""
    if {"-m", "--multirun"} & set(arguments) or any(a.startswith("hydra.run.dir=") for a in arguments):
        return []
    return [f"hydra.run.dir={a.partition('=')[2]}" for a in arguments if a.startswith("out=")][-1:]


def _config_dir(arguments: Sequence[str]) -> Path | None:
    for argument, after in zip(arguments, [*arguments[1:], ""], strict=True):
        if argument in ("--config-dir", "-cd"):
            return Path(after)
        if argument.startswith("--config-dir="):
            return Path(argument.partition("=")[2])
    return None
