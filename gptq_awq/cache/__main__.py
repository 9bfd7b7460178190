"""Entry point of `python -m gptq_awq.cache`."""

import sys

from gptq_awq.cache.cache import main

sys.exit(main())
