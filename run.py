"""The command line: `python run.py method=awq bits=4`. Everything else is configs/ and gptq_awq/experiment/run.py."""

import sys

import hydra
from omegaconf import DictConfig

from gptq_awq.errors import UserError
from gptq_awq.experiment.plugins import check_plugins


@hydra.main(version_base="1.3", config_path="configs", config_name="config")
def main(cfg: DictConfig) -> float | tuple[float, ...]:
    """Run one experiment; a mistake in its options is one line and exit code 2. Returns what a search minimizes."""
    from gptq_awq.experiment.run import run
    from gptq_awq.experiment.sweep import no_objective, objective, sweep_folder
    from gptq_awq.runtime.distributed import RankLostError

    try:
        return objective(run(cfg), cfg.objective)
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
        if sweep_folder() is None or isinstance(error, RankLostError):
            sys.exit(2)
        return no_objective(cfg.objective)  # the sweep's other runs go on; gptq_awq.experiment.sweep has the last word


if __name__ == "__main__":
    try:
        check_plugins(sys.argv[1:])
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(2)
    main()
