"""Time and memory of a run before it begins: counted, and measured on copies of one block."""

REPORTS_ONLY = True
