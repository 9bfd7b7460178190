"""Laws of the memory and the processors that control groups and shells leave a process."""

import resource
import subprocess
import sys

import pytest
import torch

from gptq_awq.errors import UserError
from gptq_awq.runtime import limits, memory
from gptq_awq.runtime.limits import Limit, memory_limits, processor_quota

SECOND = "38 31 0:41 {top} /sys/fs/cgroup rw,relatime - cgroup2 cgroup2 rw"
FIRST = "35 31 0:32 {top} /sys/fs/cgroup/memory rw,relatime shared:9 - cgroup cgroup rw,memory"
OTHER = "32 31 0:29 / /sys/fs/cgroup/cpu rw,relatime - cgroup cgroup rw,cpu"


def group(folder, limit, used, cache, first=False):
    """Write the files of a control group, of the first version or the second."""
    folder.mkdir(parents=True, exist_ok=True)
    names = ("memory.limit_in_bytes", "memory.usage_in_bytes") if first else ("memory.max", "memory.current")
    for name, value in zip(names, (limit, used), strict=True):
        (folder / name).write_text(f"{value}\n")
    prefix = "total_" if first else ""
    (folder / "memory.stat").write_text(f"anon 5\n{prefix}inactive_file {cache}\n{prefix}active_file {cache}\n")


def system(root, cgroup, *mounts):
    """Write what /proc says of this process's control groups, and where they are mounted."""
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text(cgroup)
    (root / "proc/self/mountinfo").write_text("\n".join(["22 1 8:1 / / rw - ext4 /dev/root rw", *mounts]) + "\n")
    return root / "sys/fs/cgroup"


def found(root):
    return {
        limit.source.removeprefix(str(root)): limit.free
        for limit in memory_limits(root)
        if "ulimit" not in limit.source
    }


def test_a_group_is_limited_by_itself_and_by_those_above_and_files_in_memory_count_as_free(tmp_path):
    mounted = system(tmp_path, "0::/job/step\n", SECOND.format(top="/"))
    group(mounted / "job/step", "max", 300, 0)
    group(mounted / "job", 1000, 700, 100)
    (mounted / "job/memory.high").write_text("850\n")
    assert found(tmp_path) == {"/sys/fs/cgroup/job/memory.max": 500, "/sys/fs/cgroup/job/memory.high": 350}


def test_a_group_of_the_first_version_is_found_among_other_controllers(tmp_path):
    mounted = system(tmp_path, "9:name=systemd:/\n4:memory:/slurm/job\n1:cpu:/\n0::/\n", OTHER, FIRST.format(top="/"))
    group(mounted / "memory/slurm/job", 1000, 900, 50, first=True)
    group(mounted / "memory", 2**63 - 4096, 5000, 0, first=True)
    free = found(tmp_path)
    assert free.pop("/sys/fs/cgroup/memory/slurm/job/memory.limit_in_bytes") == 200
    assert all(left > 2**60 for left in free.values())


@pytest.mark.parametrize(("path", "top"), [("/docker/abc", "/docker/abc"), ("/", "/"), ("/docker/abc", "/kubepods/x")])
@pytest.mark.parametrize("first", [True, False])
def test_a_containers_own_group_is_where_its_files_are_mounted(tmp_path, path, top, first):
    cgroup, mount = (f"5:memory:{path}\n", FIRST) if first else (f"0::{path}\n", SECOND)
    mounted = system(tmp_path, cgroup, mount.format(top=top))
    group(mounted / "memory" if first else mounted, 1000, 400, 0, first)
    assert list(found(tmp_path).values()) == [600]


def test_what_is_taken_beyond_a_limit_leaves_nothing(tmp_path):
    group(system(tmp_path, "0::/\n", SECOND.format(top="/")), 1000, 1200, 0)
    assert list(found(tmp_path).values()) == [0]


def test_systems_without_control_groups_have_no_limit(tmp_path):
    assert found(tmp_path) == {}
    system(tmp_path, "0::/\n", "nonsense")
    assert found(tmp_path) == {}


@pytest.mark.parametrize("first", [True, False])
def test_a_quota_of_processors_is_the_least_of_the_group_and_those_above(tmp_path, first):
    cgroup, mount = ("3:cpu,cpuacct:/a/b\n", OTHER) if first else ("0::/a/b\n", SECOND.format(top="/"))
    mounted = system(tmp_path, cgroup, mount) / ("cpu" if first else "")
    assert processor_quota(tmp_path) is None
    for folder, quota in ((mounted / "a/b", "max"), (mounted / "a", 150000), (mounted, 400000)):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "cpu.max").write_text(f"{quota} 100000\n")
        (folder / "cpu.cfs_quota_us").write_text(f"{-1 if quota == 'max' else quota}\n")
        (folder / "cpu.cfs_period_us").write_text("100000\n")
    assert processor_quota(tmp_path) == 1.5


@pytest.mark.parametrize(("asked", "threads"), [(None, 2), ("4", 4)])
def test_no_more_threads_run_than_the_quota_allows_unless_the_user_says_how_many(monkeypatch, asked, threads):
    used = [4]
    monkeypatch.setattr(limits, "processor_quota", lambda: 1.5)
    monkeypatch.setattr(torch, "get_num_threads", lambda: used[-1])
    monkeypatch.setattr(torch, "set_num_threads", used.append)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if asked is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", asked)
    limits.keep_to_quota()
    assert used[-1] == threads


@pytest.mark.skipif(sys.platform != "linux", reason="the address space is limited on Linux alone")
def test_a_shells_limit_is_heeded():
    code = "from gptq_awq.runtime.memory import tightest; limit = tightest(); print(limit.free, limit.source)"
    run = subprocess.run(
        [sys.executable, "-c", code],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (2**33, 2**33)),
        check=True,
        capture_output=True,
        text=True,
    )
    free, source = run.stdout.split(maxsplit=1)
    assert source.strip() == "ulimit -v"
    assert 0 < int(free) < 2**33


def test_what_does_not_fit_into_a_limit_is_refused_by_its_name(monkeypatch):
    monkeypatch.setattr(memory, "memory_limits", lambda: [Limit(1000, "/sys/fs/cgroup/memory.max")])
    assert memory.available_bytes(torch.device("cpu")) == 1000
    with pytest.raises(UserError, match=r"0\.0 GB are free on cpu \(limited by /sys/fs/cgroup/memory\.max\)"):
        memory.require(10**9, torch.device("cpu"), "calibrating")
