"""Laws of refusals that need no run: objectives that no run has, disks that can't be written."""

import errno

import pytest
import torch

from gptq_awq.data.corpora import LocalText
from gptq_awq.data.tokens import TokenSet
from gptq_awq.errors import UserError
from gptq_awq.evaluation.protocol import Evaluation, Perplexity
from gptq_awq.experiment.store import told
from gptq_awq.experiment.sweeps.sweep import check_objective

SCORED = Evaluation(perplexity=Perplexity(text=LocalText(path=None)), metrics=("ppl", "kl"))
WINDOWS = (TokenSet("tiny", torch.zeros(2, 32, dtype=torch.long), None, "here", "ab"),)


@pytest.mark.parametrize(
    "name", [None, "bits_per_weight", "size_bytes", "tiny/kl", "tiny/ppl@32", "tiny/ppl@32/delta", [None, "tiny/kl"]]
)
def test_an_objective_that_the_run_will_have_is_taken_before_and_after_loading(name):
    check_objective(name, SCORED)
    check_objective(name, SCORED, WINDOWS)


@pytest.mark.parametrize(
    "name", ["nonsense", "kl", "tiny/nonsense", "tiny/kl/ci95", "lm_eval/arc/acc", ["tiny/kl", "x"]]
)
def test_one_that_no_run_has_is_refused_before_anything_is_loaded(name):
    with pytest.raises(UserError, match=r"objective=.*: choose one of bits_per_weight, size_bytes, TEXT/ppl, TEXT/kl"):
        check_objective(name, SCORED)


@pytest.mark.parametrize("name", ["other/kl", "tiny/ppl@64", "tiny/klx"])
def test_one_of_another_text_or_window_is_refused_before_anything_is_computed(name):
    with pytest.raises(UserError, match=r"choose one of .*tiny/ppl@32"):
        check_objective(name, SCORED, WINDOWS)


def test_tasks_have_objectives_where_tasks_are_asked_for():
    check_objective("lm_eval/arc/acc", Evaluation(tasks=("arc",)))
    with pytest.raises(UserError, match="lm_eval/TASK/METRIC"):
        check_objective("arc/acc", Evaluation(tasks=("arc",)))


def test_a_full_disk_is_the_users_to_fix_wherever_it_is_met_and_another_error_is_not():
    full = told(OSError(errno.ENOSPC, "No space left on device", "cache/file"))
    assert isinstance(full, UserError)
    assert str(full).startswith("the disk can't be written (cache/file): No space left on device")
    for other in (OSError(errno.ENOENT, "No such file"), ValueError("x")):
        assert told(other) is other
