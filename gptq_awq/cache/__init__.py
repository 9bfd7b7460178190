"""The cache folder that runs share, and its command: `python -m gptq_awq.cache`."""

REPORTS_ONLY = True
