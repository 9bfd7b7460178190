"""Looking at what quantized models write: `gptq-awq generate` and `gptq-awq compare`."""

REPORTS_ONLY = True
