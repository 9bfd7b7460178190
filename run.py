"""The command line: `python run.py method=awq bits=4`. Everything else is configs/ and gptq_awq/experiment.py."""

import sys

import hydra
from omegaconf import DictConfig


@hydra.main(version_base="1.3", config_path="configs", config_name="config")
def main(cfg: DictConfig) -> None:
    """Run one experiment; a mistake in its options is one line and exit code 2."""
    from gptq_awq.errors import UserError
    from gptq_awq.experiment import run

    try:
        run(cfg)
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(2)


if __name__ == "__main__":
    main()
