"""A program: `run.py`'s main on the simulated accelerator; its counts go to standard error, as JSON."""

import json
import sys
from dataclasses import asdict

from gptq_awq.__main__ import main
from helpers.simulated_accelerator import accelerator

if __name__ == "__main__":
    with accelerator() as asked:
        main()
    sys.stderr.write(json.dumps(asdict(asked)) + "\n")
