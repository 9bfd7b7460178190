"""Function-preserving changes of basis: one paper, one file."""
