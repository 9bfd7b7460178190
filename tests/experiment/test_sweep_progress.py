"""Progress of a sweep: runs are counted as Hydra will make them, and `--dry-run` lists them and computes none."""

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from gptq_awq import results
from gptq_awq.experiment.sweeps.progress import Ended, Sweep, count_runs, duration, told_metric
from gptq_awq.report import make_report, records
from gptq_awq.report.terminal import terminal_table


def config(folder, *overrides, **sweeper):
    hydra = {"sweep": {"dir": str(folder)}, "sweeper": sweeper, "overrides": {"task": list(overrides)}}
    return OmegaConf.create({"hydra": hydra})


@pytest.mark.parametrize(
    ("overrides", "sweeper", "count", "varies"),
    [
        (["method=rtn,gptq", "bits=3"], {}, 2, ["method"]),
        (["bits=2,3,4"], {"params": {"group_size": "-1,128"}}, 6, ["group_size", "bits"]),
        (["seed=range(5)"], {}, 5, ["seed"]),
        (["method=gptq"], {"n_trials": 30}, 30, []),
    ],
)
def test_runs_are_counted_as_they_will_be_made(tmp_path, overrides, sweeper, count, varies):
    assert count_runs(config(tmp_path, *overrides, **sweeper)) == (count, varies)
    parsed = OverridesParser.create().parse_overrides(overrides)
    swept = [each for each in parsed if each.is_sweep_override()]
    assert len(swept) <= len(varies) or not swept


def test_what_is_left_is_guessed_from_the_runs_that_were_computed(tmp_path):
    sweep = Sweep.begin(config(tmp_path, "bits=2,3,4,8"))
    assert Sweep.read(tmp_path) == sweep
    done = [Ended(0, "rtn 2 bits", "taken over", 1.0), Ended(1, "rtn 3 bits", "done", 60.0, "t/kl 0.5")]
    for run in done:
        sweep.note(run)
    assert sweep.ended() == done
    assert sweep.seconds_left(done, sweep.started + 60) == pytest.approx(2 * 60)
    assert sweep.seconds_left(done[:1], sweep.started + 60) is None
    assert sweep.line(done[1]).startswith("2/4  rtn 3 bits  t/kl 0.5  60 s")
    assert [duration(s) for s in (0, 52, 840, 7500)] == ["", "52 s", "14 min", "2 h 5 min"]


def test_a_sweep_in_another_place_tells_what_it_can(tmp_path):
    assert Sweep.read(tmp_path).total is None
    assert Sweep.read(tmp_path).line(Ended(0, "rtn", "done", 1.0)).startswith("0/?  rtn")


def test_the_metric_that_is_told_is_the_kl():
    assert told_metric({"a/ppl@8": 3.0, "a/kl": 0.25, "a/kl/ci95": [0, 1]}) == "a/kl 0.2500"
    assert told_metric({"a/ppl@8": 3.0, "a/ppl@8/delta": 1.0}) == "a/ppl@8 3.000"
    assert told_metric({}) == ""


def test_a_dry_run_lists_finished_and_new_runs_and_computes_none(cli, tiny, tmp_path):
    assert cli("method=rtn", "bits=3", *tiny, "out=a").returncode == 0
    before = sorted(tmp_path.rglob("*"))
    done = cli("-m", "method=rtn", "bits=3,4,9", *tiny, "hydra.sweep.dir=b", "--dry-run")
    assert done.returncode == 0, done.stderr
    assert "3 runs: 1 finished, 1 to compute, about" in done.stdout
    assert "bits=9: give a whole number" in done.stdout.replace("\n", " ")
    assert sorted(tmp_path.rglob("*")) == before
    refused = cli("experiment=search_gptq", *tiny, "--dry-run")
    assert refused.returncode == 2
    assert "chooses its runs by the results" in refused.stderr


@pytest.mark.parametrize("launcher", [("RANK", "WORLD_SIZE"), ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS")])
def test_of_several_ranks_the_first_lists_a_dry_run(cli, tiny, launcher):
    for rank, told in ((0, "1 runs: 0 finished, 1 to compute"), (1, "")):
        launched = dict(zip(launcher, (str(rank), "2"), strict=True))
        done = cli("method=rtn", "bits=5", *tiny, "--dry-run", **launched)
        assert done.returncode == 0, done.stderr
        assert told in done.stdout
        assert bool(done.stdout) == bool(told)


def test_a_sweep_tells_a_line_a_run_and_its_last_table_fits(cli, tiny, tmp_path):
    sweep = ("-m", "method=rtn", "bits=3,8,9", *tiny, "hydra.sweep.dir=s")
    done = cli(*sweep, GPTQ_AWQ_CACHE=str(tmp_path / "cache"))  # no run is known yet
    lines = [line for line in done.stderr.splitlines() if line.split("/")[0] in "123"]
    assert [line.split("  ")[0] for line in lines] == ["1/3", "2/3", "3/3"]
    assert "rtn 3 bits" in lines[0]
    assert "failed: rtn 9 bits: bits=9" in done.stderr
    assert max(map(len, done.stdout.splitlines())) <= 120
    assert "| rtn |" in (tmp_path / "s" / "report.md").read_text()
    (table,) = make_report(records(results.load(tmp_path / "s"))).tables
    for width in (60, 80, 200):
        shown = terminal_table(table, width)
        assert {"bits", "bits/weight", "tiny/kl"} <= {column.header for column in shown.columns}, width
