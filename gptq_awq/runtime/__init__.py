"""What a process is given: its ranks, memory, clock, progress bars and log."""
