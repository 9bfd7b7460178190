"""The process around a computation: memory, clock, profiler marks, progress bars, log, location of the configs."""

REPORTS_ONLY = True
