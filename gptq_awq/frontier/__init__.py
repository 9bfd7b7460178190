"""Size against quality of stored runs as a table and a plot: `python -m gptq_awq.frontier`."""

REPORTS_ONLY = True
