"""Progress: items pass through unchanged, bars come and go, logs get lines and no control characters."""

import io

import pytest
from rich.console import Console

from gptq_awq.runtime.progress import line_track, no_track, rich_track


def console(terminal: bool) -> Console:
    return Console(file=io.StringIO(), force_terminal=terminal, width=100, _environ={"TERM": "xterm"})


def text(console: Console) -> str:
    file = console.file
    assert isinstance(file, io.StringIO)
    return file.getvalue()


@pytest.mark.parametrize("terminal", [True, False])
def test_tracking_changes_no_item(terminal: bool) -> None:
    with rich_track(console(terminal)) as track:
        assert list(track(range(5), "phase", 5)) == list(no_track(range(5), "phase", 5)) == list(range(5))


def test_a_log_gets_one_line_per_phase_and_no_control_characters() -> None:
    log = console(terminal=False)
    with rich_track(log) as track:
        for _ in track(range(3), "quantize [bold]", 3):
            assert list(track(range(9), "inner", 9)) == list(range(9))
        list(track(range(2), "evaluate", 2))
    lines = text(log).splitlines()
    assert [line.split(" in ")[0] for line in lines] == ["quantize [bold]: 3/3", "evaluate: 2/2"]
    assert "\x1b" not in text(log)


def test_a_long_phase_reports_how_long_it_has_left() -> None:
    log, now = console(terminal=False), iter(range(0, 1000, 20))
    list(line_track(log, every=30, clock=lambda: next(now))(range(4), "quantize", 4))
    assert text(log).splitlines() == [
        "quantize: 2/4 after 40 s, about 40 s left",
        "quantize: 4/4 in 100.0 s",
    ]


def test_a_phase_left_early_says_how_far_it_came() -> None:
    log = console(terminal=False)

    def fail() -> None:
        for item in line_track(log)(range(5), "quantize", 5):
            if item == 2:
                raise ValueError

    with pytest.raises(ValueError):  # noqa: PT011
        fail()
    assert text(log).startswith("quantize: 2/5 in")


def test_bars_of_inner_loops_vanish_and_those_of_phases_stay() -> None:
    terminal = console(terminal=True)
    with rich_track(terminal) as track:
        for _ in track(range(2), "quantize", 2):
            list(track(range(3), "windows", 3))
        list(track(range(4), "evaluate", 4))
    last_frame = text(terminal).rsplit("\x1b[2K", 1)[-1]
    assert "quantize" in last_frame
    assert "evaluate" in last_frame
    assert "windows" not in last_frame


def test_a_notebook_without_widgets_gets_lines_and_no_warning(monkeypatch, recwarn) -> None:
    monkeypatch.setattr("gptq_awq.runtime.progress.find_spec", lambda _: None)
    notebook, said = Console(force_jupyter=True, file=io.StringIO()), []
    monkeypatch.setattr(notebook, "print", lambda line, **_: said.append(line))
    with rich_track(notebook) as track:
        list(track(range(3), "quantize", 3))
    assert [line.split(" in ")[0] for line in said] == ["quantize: 3/3"]
    assert not list(recwarn)
