"""Computes a stored run again and names the first layer that differs: `python -m gptq_awq.replay`."""

REPORTS_ONLY = True
