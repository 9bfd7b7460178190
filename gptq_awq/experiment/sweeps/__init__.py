"""A run as one of many: its place in a sweep, the plugins that launch sweeps, and trackers that follow runs."""

REPORTS_ONLY = True
