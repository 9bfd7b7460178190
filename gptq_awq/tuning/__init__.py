"""What learns by gradients, after weights have landed on their grid: one paper, one file."""
