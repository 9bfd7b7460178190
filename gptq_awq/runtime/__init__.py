"""What surrounds a computation in its process: memory, clock, profiler marks, progress bars, log, configs."""

REPORTS_ONLY = True
