"""Which skips CI expects: what it can't install, or what is a property of the machine."""

import os
import re

import pytest

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


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """In CI, a skip that nobody expects is a failure: else a missing package would quietly switch tests off."""
    report = yield
    if os.environ.get("GPTQ_AWQ_CI") and report.skipped and not hasattr(report, "wasxfail"):
        reason = str(report.longrepr[2])
        if not is_expected(reason):
            report.outcome, report.longrepr = "failed", f"{item.nodeid}: CI does not expect a skip: {reason}"
    return report
