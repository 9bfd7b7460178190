"""Entry point of `python -m gptq_awq.frontier`."""

import sys

from gptq_awq.frontier.frontier import main

sys.exit(main())
