"""Which code a run's numbers come from: a change there makes finished runs old, a change of what reports does not."""

from pathlib import Path

import pytest
from helpers.paths import ROOT

from gptq_awq.runtime.source import code_sha256, reports_only

PACKAGE = ROOT / "gptq_awq"
REPORTS_ONLY = {
    *("cache", "frontier", "playground", "replay", "report", "runtime"),
    *("experiment.forecasting", "experiment.sweeps"),
}
"""Packages that declare themselves to change no number of a run."""
COMPUTES = (
    *("errors", "numerics", "storage", "grids", "data", "kernels", "models", "calibration", "evaluation", "tuning"),
    *("solvers", "transforms", "quantization", "export", "allocation", "experiment", "results"),
)
"""Rooms that `gptq_awq.experiment.run` reaches and that numbers come from."""


def module_of(path: Path) -> str:
    """The dotted name of a source file."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


@pytest.fixture
def edited(monkeypatch):
    """A function: the hash of the code if these files were edited."""
    read = Path.read_bytes

    def sha256(paths: set[Path]) -> str:
        with monkeypatch.context() as patch:
            patch.setattr(Path, "read_bytes", lambda path: read(path) + (b"\n#" if path in paths else b""))
            return code_sha256()

    return sha256


def test_the_packages_that_only_report_are_these():
    packages = {module_of(path) for path in PACKAGE.rglob("__init__.py")}
    declared = {name for name in packages if "\nREPORTS_ONLY = True\n" in _source(name)}
    assert {name.removeprefix("gptq_awq.") for name in declared} == REPORTS_ONLY
    assert {name for name in packages if reports_only(name)} == declared


def test_editing_what_only_reports_leaves_the_code_as_it_is(edited):
    paths = {p for p in PACKAGE.rglob("*.py") if reports_only(module_of(p))}
    assert len(paths) > len(REPORTS_ONLY)
    assert edited(paths) == edited(set())


@pytest.mark.parametrize("room", COMPUTES)
def test_editing_any_other_room_changes_the_code(edited, room):
    inside = PACKAGE / room
    paths = set(inside.rglob("*.py")) if inside.is_dir() else {inside.with_suffix(".py")}
    assert edited({p for p in paths if not reports_only(module_of(p))}) != edited(set())


def test_every_room_either_computes_or_reports_or_is_reached_by_no_run():
    rooms = {p.relative_to(PACKAGE).parts[0].removesuffix(".py") for p in PACKAGE.rglob("*.py")}
    beside = {"__init__", "__main__", "api"}  # ways to call what computes
    assert rooms == {*COMPUTES, *(name.partition(".")[0] for name in REPORTS_ONLY), *beside}


def _source(package: str) -> str:
    return (ROOT.joinpath(*package.split(".")) / "__init__.py").read_text()
