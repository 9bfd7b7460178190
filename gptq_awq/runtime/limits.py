"""Memory and processors that containers, batch systems and shells leave this process (Linux).

A process that outgrows its control group (Docker, Kubernetes, Slurm, systemd) is killed without a word, however much
memory the machine has. A group is limited by itself and by all groups that it is part of.
"""

import logging
import os
import resource
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from math import ceil
from pathlib import Path, PurePosixPath

import psutil
import torch

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Limit:
    """A limit of memory.

    Attributes:
        free: bytes that it still leaves.
        source: the file that says so, or the command.
    """

    free: int
    source: str


@dataclass(frozen=True)
class _Files:
    """Names of a control group's files, by version.

    Attributes:
        limits: of bytes, or "max".
        used: bytes, with the page cache.
        cache: lines of memory.stat that count pages of files, which the system takes back when they are wanted.
    """

    limits: tuple[str, ...]
    used: str
    cache: tuple[str, ...]


_FILES = {
    "cgroup": _Files(("memory.limit_in_bytes",), "memory.usage_in_bytes", ("total_inactive_file", "total_active_file")),
    "cgroup2": _Files(("memory.max", "memory.high"), "memory.current", ("inactive_file", "active_file")),
}


def memory_limits(root: Path = Path("/")) -> list[Limit]:
    """List the limits on this process's memory; the files of the system are looked for in `root`."""
    groups = (_of_group(folder, _FILES[kind]) for folder, kind in _groups(root, "memory"))
    return [*_address_space(), *(limit for group in groups for limit in group)]


def processor_quota(root: Path = Path("/")) -> float | None:
    """The processors whose time this process's control groups allow it, as `docker --cpus` sets; None: all."""
    quotas = []
    for folder, kind in _groups(root, "cpu"):
        with suppress(OSError, ValueError):  # "max" is no number
            if kind == "cgroup2":
                quota, period = map(int, (folder / "cpu.max").read_text().split())
            else:
                quota, period = (int((folder / f"cpu.cfs_{name}_us").read_text()) for name in ("quota", "period"))
            quotas += [quota / period] if quota > 0 else []
    return min(quotas, default=None)


def keep_to_quota() -> None:
    """Use no more of torch's threads than there are processors' time for, unless OMP_NUM_THREADS says how many.

    Threads beyond a quota wait for each other while all of them are held up.
    """
    quota = processor_quota()
    if quota is not None and torch.get_num_threads() > ceil(quota) and "OMP_NUM_THREADS" not in os.environ:
        log.warning("%d threads instead of %d: this container's quota", ceil(quota), torch.get_num_threads())
        torch.set_num_threads(ceil(quota))


def _groups(root: Path, controller: str) -> list[tuple[Path, str]]:
    """Folders of this process's control groups and all above them, each with its file system: cgroup or cgroup2."""
    found = []
    with suppress(OSError, ValueError):  # there are no such files, or they say something else
        groups = [line.split(":", 2) for line in (root / "proc/self/cgroup").read_text().splitlines()]
        for line in (root / "proc/self/mountinfo").read_text().splitlines():
            before, _, after = line.partition(" - ")
            (top, mount), (kind, _, options) = before.split()[3:5], after.split()[:3]
            if kind not in _FILES or (kind == "cgroup" and controller not in options.split(",")):
                continue
            wanted = controller if kind == "cgroup" else ""  # the second version's one hierarchy has no name
            paths = [PurePosixPath(path) for _, names, path in groups if wanted in names.split(",")]
            parts = (part for path in paths for part in _upwards(path, PurePosixPath(top)))
            found += [(root / mount.lstrip("/") / part, kind) for part in parts]
    return found


def _upwards(path: PurePosixPath, top: PurePosixPath) -> list[PurePosixPath]:
    """A group's folder and all above it, as seen from where the folder `top` is mounted.

    In a container the mount may begin below the path that /proc names; then the container's own group is its top.
    """
    relative = path.relative_to(top) if path.is_relative_to(top) else PurePosixPath()
    return [relative, *relative.parents]


def _of_group(folder: Path, files: _Files) -> Iterator[Limit]:
    """The limits of one group; none where its files are missing, as in the topmost one."""
    with suppress(OSError, ValueError, KeyError):
        counts = dict(line.split(maxsplit=1) for line in (folder / "memory.stat").read_text().splitlines())
        used = int((folder / files.used).read_text()) - sum(int(counts[name]) for name in files.cache)
        for name in files.limits:
            with suppress(OSError, ValueError):  # "max" is no number
                yield Limit(max(0, int((folder / name).read_text()) - used), str(folder / name))


def _address_space() -> Iterator[Limit]:
    """The limit of `ulimit -v`, which some batch systems set."""
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if limit != resource.RLIM_INFINITY:
        yield Limit(max(0, limit - psutil.Process().memory_info().vms), "ulimit -v")
