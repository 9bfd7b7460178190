"""`ls`, completion, the help of a preset, and commands that are mistyped."""

import shutil
import subprocess
import sys

import pytest
from helpers.paths import CONFIGS

from gptq_awq import __main__ as command
from gptq_awq.experiment.catalogue import COMMANDS, KINDS, SCRIPTS, choices, complete, main
from gptq_awq.experiment.help import help_text


@pytest.mark.parametrize("kind", KINDS)
def test_everything_that_can_be_chosen_is_listed_with_a_line(kind, capsys):
    assert main([kind]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert {path.stem for path in (CONFIGS / KINDS[kind]).glob("*.yaml")} <= {line.split()[0] for line in lines}
    assert all(len(line.split()) > 1 for line in lines), "each says what it is"


def test_words_are_completed_to_options_choices_and_commands():
    assert "method=awq" in complete("method=aw")
    assert "method=rtn,awq_gptq" in list(complete("method=rtn,aw"))
    assert "experiment=reproduce/local" in list(complete("experiment=rep"))
    assert list(complete("gen")) == ["generate"]
    assert "group_size=" in list(complete("gr"))
    assert "methods" in list(complete("me", "ls"))
    assert list(complete("nonsense=")) == []


def test_completion_knows_every_command():
    assert set(COMMANDS) == set(command.SUBCOMMANDS) - {"complete"}


@pytest.mark.parametrize("shell", SCRIPTS)
def test_a_shell_accepts_the_script(shell):
    program = shutil.which(shell)
    if program is None:
        return
    done = subprocess.run([program, "-n"], input=SCRIPTS[shell], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_mistyped_command_is_answered_with_the_nearest(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["gptq-awq", "reprot", "multirun"])
    with pytest.raises(SystemExit, match="2"):
        command.main()
    assert "did you mean report?" in capsys.readouterr().err


def test_the_help_of_a_preset_has_its_own_values():
    text = help_text(arguments=["method=gptq", "--help"])
    assert "arXiv 2210.17323" in text
    assert "method.solver.act_order=true" in text
    assert "Subcommands" in help_text(arguments=["--help"])
    assert choices("method")["rtn"] in help_text(arguments=["method=rtn"])
