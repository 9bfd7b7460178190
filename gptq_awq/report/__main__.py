"""Entry point of `python -m gptq_awq.report`."""

import sys

from gptq_awq.report.command import main

sys.exit(main())
