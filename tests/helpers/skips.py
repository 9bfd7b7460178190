"""Which skips CI expects: what it can't install, or what is a property of the machine."""

import re

EXPECTED = (
    r"mlx|bitsandbytes|compressed[-_.]tensors|xllamacpp",  # the packages of the `engines` extra
    r"scripts/install_engine\.py",  # engines and peers that want environments of their own
    r"\bSlurm\b",
    r"chromium",
    r"pdflatex|LaTeX",
    r"shared data is not at",
    r"CUDA|AVX512-BF16",
)


def is_expected(reason: str) -> bool:
    """Whether CI takes this reason to skip a test."""
    return re.search("|".join(EXPECTED), reason) is not None
