"""How one weight lands on its grid: one paper, one file."""
