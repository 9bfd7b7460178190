"""Memory that containers, batch systems and shells leave this process: control groups and `ulimit -v` (Linux).

A process that outgrows its control group (Docker, Kubernetes, Slurm, systemd) is killed without a word, however much
memory the machine has. A group is limited by itself and by all groups that it is part of.
"""

import resource
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import psutil


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
    found = list(_address_space())
    with suppress(OSError, ValueError):  # there are no such files, or they say something else
        found += _control_groups(root)
    return found


def _control_groups(root: Path) -> Iterator[Limit]:
    """Limits of this process's control groups, in both versions, from its own group upwards."""
    groups = [line.split(":", 2) for line in (root / "proc/self/cgroup").read_text().splitlines()]
    for line in (root / "proc/self/mountinfo").read_text().splitlines():
        before, _, after = line.partition(" - ")
        (top, mount), (kind, _, options) = before.split()[3:5], after.split()[:3]
        if kind not in _FILES or (kind == "cgroup" and "memory" not in options.split(",")):
            continue
        for _, controllers, path in groups:
            if "memory" in controllers.split(",") if kind == "cgroup" else not controllers:
                for part in _upwards(PurePosixPath(path), PurePosixPath(top)):
                    yield from _of_group(root / mount.lstrip("/") / part, _FILES[kind])


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
