"""Options are checked by their declarations, in configs without importing what declares them, and in Python alike."""

import math
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml
from helpers.paths import CONFIGS
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from gptq_awq.errors import UserError
from gptq_awq.runtime.declarations import Built, declared_by, targets_in
from gptq_awq.runtime.options import (
    Bits,
    ByteSize,
    GroupSize,
    InputPath,
    NamesBeside,
    NonNegative,
    PositiveInt,
    check_config,
    checked,
    checked_dataclass,
    described,
)
from gptq_awq.solvers.qronos import Qronos

TARGETS = sorted({t for path in CONFIGS.rglob("*.yaml") for t in targets_in(yaml.safe_load(path.read_text()))})


@pytest.mark.parametrize("target", TARGETS)
def test_every_target_of_the_configs_declares_its_options(target):
    assert declared_by(target) is not None


def test_no_option_of_plain_data_is_left_unchecked():
    """Only what configs build may have an annotation that is none of data's."""
    built = {name for path in CONFIGS.rglob("*.yaml") for node in nodes(path) for name in node if is_built(node[name])}
    built |= {
        "solver",
        "transforms",
        "tuning",
        "text",
        "perplexity",
        "metric",
        "corpora",
        "self_calibration",
        "output_curvature",
    }
    unread = [(t, name) for t in TARGETS for name, kind in declared_by(t).types.items() if kind in (Any, Built)]
    assert [(t, name) for t, name in unread if name not in built] == []


def is_built(value):
    return isinstance(value, dict) and any(True for _ in targets_in(value))


def nodes(path: Path):
    def walk(node):
        if isinstance(node, dict):
            if "_target_" in node:
                yield node
            for value in node.values():
                yield from walk(value)

    yield from walk(yaml.safe_load(path.read_text()))


@pytest.mark.parametrize("path", sorted(CONFIGS.rglob("*.yaml")), ids=lambda p: p.relative_to(CONFIGS).as_posix())
def test_the_configs_own_values_are_what_their_options_take(path):
    for node in nodes(path):
        declared = declared_by(node["_target_"])
        plain = {k: v for k, v in without_maps(node).items() if k != "defaults"}
        list(check_config(plain, declared))


def without_maps(node):
    """A node of a file without references, and without maps that a group gives their `_target_`."""
    kept = {}
    for key, value in node.items():
        if isinstance(value, dict) and "_target_" in value:
            kept[key] = without_maps(value)
        elif not (isinstance(value, str) and "${" in value) and (not isinstance(value, dict) or is_built(value)):
            kept[key] = value
    return kept


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"perplexity": {"seqlen": 5}}, "perplexity.seqlen=5: perplexity is not set"),
        ({"corpora": {"pile": {"split": "x"}}}, "corpora.pile.split=x: corpora is not set"),
        (
            {"corpora": {"a": {"_target_": "math.sqrt"}, "b": {"split": "x"}}},
            "corpora.b.split=x: there is no corpora.b",
        ),
    ],
)
def test_an_option_of_what_is_not_set_is_refused(config, message):
    declared = declared_by("gptq_awq.evaluation.protocol.Evaluation")
    with pytest.raises(UserError, match=message):
        list(check_config(config, declared))


BESIDE = (NamesBeside, InputPath | None)  # what these take depends on what else there is
RUN_OPTIONS = declared_by("gptq_awq.experiment.options.RunOptions")
OPTIONS = [
    (target, name, annotation)
    for target in TARGETS
    for name, annotation in declared_by(target).types.items()
    if annotation not in (Any, Built) and "a map" not in described(annotation) and annotation not in BESIDE
]
STRANGE = st.one_of(
    st.booleans(),
    st.integers(-(10**20), 10**20),
    st.floats(),
    st.text(max_size=8),
    st.none(),
    st.lists(st.integers(-3, 3), max_size=2),
    st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
)


@settings(max_examples=1000, deadline=None)
@given(st.sampled_from(OPTIONS), STRANGE)
def test_any_value_is_taken_as_its_type_or_refused_by_name_in_one_line(option, value):
    target, name, annotation = option
    node = {"_target_": target, name: value}
    refusal, changed = None, {}
    try:
        changed = dict(check_config({"model": node}, RUN_OPTIONS))
    except UserError as error:
        refusal = str(error)
    if refusal is None:
        assert is_exactly(changed.get(f"model.{name}", value), annotation), (annotation, value)
    else:
        assert refusal.startswith(f"model.{name}=")


def is_exactly(value, annotation):
    """Whether pydantic takes the value in strict mode: without turning it into another type."""
    for spelled in (value, tuple(value) if isinstance(value, list) else value):
        with suppress(ValidationError):
            TypeAdapter(annotation).validate_python(spelled, strict=True)
            return not isinstance(value, float) or math.isfinite(value)
    return False


@pytest.mark.parametrize(
    ("value", "annotation", "meant"),
    [
        ("no", bool, False),
        ("off", bool, False),
        ("yes", bool, True),
        (True, Literal["on", "off", "both"], "on"),
        (1, NonNegative, 1.0),
        ("4", Bits, 4),
        (-1, GroupSize, -1),
        (135, str, "135"),
        ("4GiB", ByteSize, "4GiB"),
    ],
)
def test_spellings_of_yaml_mean_what_they_say(value, annotation, meant):
    known = checked(value, annotation, "option")
    assert known == meant
    assert type(known) is type(meant)


@pytest.mark.parametrize(
    ("value", "annotation", "takes"),
    [
        ("maybe", bool, "true or false"),
        (99, Bits, "a whole number from 2 to 8"),
        (True, Bits, "a whole number from 2 to 8"),
        (1.5, GroupSize, "a whole number, at least 1 or -1"),
        (float("nan"), NonNegative, "a number, at least 0"),
        ("rtm", Literal["none", "rtn"], "one of none, rtn; did you mean rtn?"),
        ([0], list[PositiveInt], "a list, each a whole number, at least 1"),
        ("many", ByteSize, "a number of bytes, such as 4GB"),
    ],
)
def test_a_refusal_says_what_the_option_takes(value, annotation, takes):
    with pytest.raises(UserError) as refused:
        checked(value, annotation, "some.option")
    assert str(refused.value).startswith("some.option=")
    assert str(refused.value).endswith(f": give {takes}")


def test_checking_imports_nothing_that_declares_options():
    code = (
        "import sys; from gptq_awq.experiment.options import check_options\n"
        "from gptq_awq.runtime.declarations import declared_by\n"
        "assert declared_by('gptq_awq.solvers.qronos.Qronos').types['strength']\n"
        "assert not {'torch', 'transformers', 'gptq_awq.solvers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_class_of_ones_own_is_read_from_its_file_inherited_options_included(tmp_path, monkeypatch):
    (tmp_path / "declared_solver.py").write_text(
        "from dataclasses import dataclass\nfrom typing import Literal\nimport never_installed\n"
        "from gptq_awq.runtime.options import Fraction\nfrom gptq_awq.solvers.gptq import GPTQ\n"
        "@dataclass(frozen=True)\nclass Own(GPTQ):\n    share: Fraction = 0.5\n    mode: Literal['a', 'b'] = 'a'\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    declared = declared_by("declared_solver.Own")
    assert {"share", "mode", "damping", "act_order"} <= set(declared.types)
    for name, value in (("share", 2), ("mode", "c"), ("damping", -1), ("damp", 1)):
        with pytest.raises(UserError, match=name):
            list(check_config({name: value}, declared, "method.solver."))


def test_a_class_of_ones_own_may_take_maps_by_a_type_that_is_not_known_here(tmp_path, monkeypatch):
    (tmp_path / "own_types.py").write_text("from elsewhere import Table\nclass Own:\n    table: Table\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert list(check_config({"table": {"a": 1}}, declared_by("own_types.Own"))) == []


def test_a_checked_dataclass_checks_inherited_fields_and_runs_its_own_check():
    @checked_dataclass
    class Base:
        count: PositiveInt = 1

    @checked_dataclass
    class Derived(Base):
        share: NonNegative = 0

        def __post_init__(self):
            if self.share > self.count:
                raise UserError("share")

    assert Derived(share="2", count=3).share == 2.0
    for arguments in ({"count": 0}, {"share": -1}, {"share": 2}):
        with pytest.raises(UserError):
            Derived(**arguments)
    with pytest.raises(UserError, match=r"Qronos\.damping=-1: give a number, at least 0"):
        Qronos(damping=-1)
