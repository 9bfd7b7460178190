"""Entry point of `python -m gptq_awq.replay`."""

import sys

from gptq_awq.replay.replay import main

sys.exit(main())
