"""The main job's command: Hydra composes the config of one run, or of each run of a sweep, and `run` computes it."""

import sys

import hydra
from omegaconf import DictConfig

from gptq_awq.errors import UserError
from gptq_awq.experiment.sweeps.plugins import check_plugins
from gptq_awq.runtime.configs import CONFIGS


def main() -> None:
    """Run what the command line asks for; a mistake in its options is one line and exit code 2."""
    try:
        check_plugins(sys.argv[1:])
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(2)
    task()


@hydra.main(version_base="1.3", config_path=str(CONFIGS), config_name="config")
def task(cfg: DictConfig) -> float | tuple[float, ...]:
    """Run one experiment; returns what a search minimizes."""
    from gptq_awq.experiment.run import run
    from gptq_awq.experiment.sweeps.sweep import no_objective, objective, sweep_folder
    from gptq_awq.numerics.distributed import RankLostError

    try:
        return objective(run(cfg), cfg.objective)
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
        if sweep_folder() is None or isinstance(error, RankLostError):
            sys.exit(2)
        return no_objective(cfg.objective)  # the sweep's other runs go on; SweepEnd has the last word
