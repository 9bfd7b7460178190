"""Runs that are interrupted at any moment and typed again: none may be lost, changed, or leave anything behind.

    python benchmarks/interruptions.py [--trials 200] [--seed 0] [--keep FOLDER] [run.py options …]

Each trial begins in an empty folder and stops a run of a tiny model, with a checkpoint, in one of these ways:

    kill, term, int    SIGKILL, SIGTERM, SIGINT at a random file operation, or at a random time
    full               the disk is full (ENOSPC) from a random file operation on
    short              no file may grow beyond a random size (EFBIG in the middle of a write)
    twice              the same command in the same folder, while the first is at work
    mistyped           a command with an option out of range in that folder, meanwhile
    other              another width in that folder, meanwhile

Then the command is typed again. Its metrics, codes, scores and checkpoint must be those of a run that nobody stopped,
and neither the run's folder nor the cache may hold a file that such a run doesn't leave. A signal must end in its exit
code, a full disk in one line, nothing in a traceback. Prints a row for each way; exit code 1 if anything is wrong.
"""

import argparse
import errno
import hashlib
import json
import os
import random
import resource
import runpy
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

for variable in ("OMP_NUM_THREADS", "NUMBA_NUM_THREADS", "RAYON_NUM_THREADS"):
    os.environ[variable] = "1"  # a process with threads can't be forked
ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

SIGNALS = {"kill": signal.SIGKILL, "term": signal.SIGTERM, "int": signal.SIGINT}
WAYS = (*SIGNALS, "full", "short", "twice", "mistyped", "other")
WRITES = {"open", "os.rename", "os.link", "os.mkdir", "os.remove", "os.rmdir", "os.truncate", "shutil.rmtree"}
METHOD = ("method=gptq", "bits=4", "group_size=32", "export.formats=[hf]")
Hook = Callable[[str, tuple], None]


@dataclass(frozen=True)
class Ended:
    """End of a process: its exit code (-9 for SIGKILL) and what it printed."""

    code: int
    printed: str


@dataclass
class Trials:
    """Failures by way of interruption, and the number of trials of each."""

    made: Counter[str] = field(default_factory=Counter)
    wrong: dict[str, list[str]] = field(default_factory=dict)

    def add(self, way: str, faults: Sequence[str]) -> None:
        """Count a trial."""
        self.made[way] += 1
        self.wrong.setdefault(way, []).extend(faults)
        for fault in faults:
            print(f"{way}: {fault}", flush=True)


def at_file_operation(number: int, act: Callable[[], None], root: Path) -> Hook:
    """Return an audit hook that calls `act` from the given change of a file below `root` on."""
    seen = 0

    def hook(event: str, arguments: tuple) -> None:
        nonlocal seen
        if event in WRITES and _changes(event, arguments, root):
            seen += 1
            if seen >= number:
                act()

    return hook


def _changes(event: str, arguments: tuple, root: Path) -> bool:
    path = arguments[0]
    if not isinstance(path, str | os.PathLike) or not str(Path.cwd() / path).startswith(str(root)):
        return False
    return event != "open" or bool(arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))


@dataclass(frozen=True)
class Started:
    """A process that was started: its id, and the end of a pipe that gives what it prints."""

    process: int
    printed: int

    def signal(self, number: int) -> None:
        """Send it a signal."""
        os.kill(self.process, number)

    def end(self) -> Ended:
        """Wait for its end."""
        with os.fdopen(self.printed, errors="replace") as printed:
            text = printed.read()
        _, status = os.waitpid(self.process, 0)
        return Ended(os.waitstatus_to_exitcode(status), text)


def start(arguments: Sequence[str], folder: Path, prepare: Callable[[], None] = lambda: None) -> Started:
    """Fork a process that has imported everything into one that is `run.py ARGUMENTS`."""
    printed, output = os.pipe()
    process = os.fork()
    if process:
        os.close(output)
        return Started(process, printed)
    code = 1
    try:
        os.chdir(folder)
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.close(output)
        os.environ["GPTQ_AWQ_CACHE"] = str(folder.parent / "cache")
        sys.argv = ["run.py", *arguments]
        signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where this benchmark runs in the background
        prepare()
        runpy.run_path(str(ROOT / "run.py"), run_name="__main__")
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def content(folder: Path) -> dict[str, str]:
    """Return what a run's folder says that no interruption may change, by name."""
    found = {}
    row = json.loads((folder / "results.json").read_text())
    found["metrics"] = json.dumps([row["status"], row["metrics"]])
    ledger = [json.loads(line) for line in (folder / "ledger.jsonl").read_text().splitlines()]
    found["ledger"] = json.dumps([{k: v for k, v in line.items() if "seconds" not in k} for line in ledger])
    for path in sorted(folder.rglob("*")):
        if path.suffix in (".npz", ".safetensors") or path.name in ("config.json", "tokenizer.json"):
            found[str(path.relative_to(folder))] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def names(folder: Path) -> set[str]:
    """Return the names of all files and folders below a run's folder."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def scratch_files(cache: Path) -> set[str]:
    """Return the names of scratch files in a cache: hidden ones and those that end in .tmp."""
    paths = cache.rglob("*") if cache.is_dir() else ()
    return {str(p.relative_to(cache)) for p in paths if p.name.startswith(".") or p.suffix == ".tmp"}


@dataclass(frozen=True)
class Experiment:
    """A run of a tiny model that is to be interrupted.

    Attributes:
        options: of run.py.
        scratch: folder for trials.
        reference: folder of the same run, which nobody interrupted.
        operations: how many changes of files that run makes.
        seconds: how long it takes.
    """

    options: tuple[str, ...]
    scratch: Path
    reference: Path
    operations: int
    seconds: float

    def trial(self, way: str, draw: random.Random) -> list[str]:
        """Interrupt a run and type its command again; returns what is wrong, a line each."""
        home = Path(tempfile.mkdtemp(dir=self.scratch))
        folder = home / "work"
        folder.mkdir()
        try:
            where, faults = self._interrupted(way, draw, folder)
            again = start(self.options, folder).end()
            if again.code:
                faults.append(f"typed again: exit code {again.code}: {again.printed[-400:]}")
            else:
                faults += self._differences(folder)
            return [f"{where}: {fault}" for fault in faults]
        finally:
            shutil.rmtree(home)

    def _interrupted(self, way: str, draw: random.Random, folder: Path) -> tuple[str, list[str]]:
        if way in ("twice", "mistyped", "other"):
            return self._beside(way, draw, folder)
        number, prepare, stop_after = draw.randint(1, self.operations), lambda: None, None
        where = f"file operation {number}"
        if way == "short":
            size = int(2 ** draw.uniform(0, 18))
            where, prepare = f"files up to {size} bytes", partial(_limit, size)
        elif way == "full" or draw.random() < 0.5:
            prepare = partial(_hooked, number, folder.parent, way)
        else:
            stop_after = draw.uniform(0, self.seconds)
            where = f"after {stop_after:.2f} s"
        started = start(self.options, folder, prepare)
        if stop_after is not None:
            time.sleep(stop_after)
            started.signal(SIGNALS[way])
        return where, _told(way, started.end())

    def _beside(self, way: str, draw: random.Random, folder: Path) -> tuple[str, list[str]]:
        after = draw.uniform(0, self.seconds)
        second = self.options + {"twice": (), "mistyped": ("bits=99",), "other": ("bits=3",)}[way]
        first = start(self.options, folder)
        time.sleep(after)
        other = start(second, folder).end()
        faults = []
        if other.code != (2 if way == "mistyped" else 0) or "Traceback" in other.printed:
            faults.append(f"the second command: exit code {other.code}: {other.printed[-400:]}")
        if (end := first.end()).code:
            faults.append(f"the first command: exit code {end.code}: {end.printed[-400:]}")
        return f"a second command after {after:.2f} s", faults

    def _differences(self, folder: Path) -> list[str]:
        """Compare a run's folder and cache with those of the run that nobody interrupted."""
        wanted, got = content(self.reference / "work" / "x"), content(folder / "x")
        faults = [f"{name} differs" for name in sorted(wanted | got) if wanted.get(name) != got.get(name)]
        left = names(folder) - names(self.reference / "work")
        left |= scratch_files(folder.parent / "cache") - scratch_files(self.reference / "cache")
        missing = names(self.reference / "work") - names(folder)
        return (
            faults + [f"left behind: {name}" for name in sorted(left)] + [f"gone: {name}" for name in sorted(missing)]
        )


def _hooked(number: int, root: Path, way: str) -> None:
    """Let the disk be full from the given file operation on, or the process get a signal at it."""
    waiting = [partial(os.kill, os.getpid(), SIGNALS[way])] if way in SIGNALS else []

    def act() -> None:
        if way == "full":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        while waiting:
            waiting.pop()()

    sys.addaudithook(at_file_operation(number, act, root))


def _limit(size: int) -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def _told(way: str, end: Ended) -> list[str]:
    """Whether an interrupted process ended as it should; it may have been finished before."""
    faults = []
    allowed = {0, 2} if way not in SIGNALS else {0, -9 if way == "kill" else 128 + SIGNALS[way]}
    if end.code not in allowed:
        faults.append(f"exit code {end.code}: {end.printed[-400:]}")
    if "Traceback" in end.printed:
        faults.append(f"traceback: {end.printed[-1500:]}")
    return faults


def prepared(options: tuple[str, ...], scratch: Path) -> Experiment:
    """Make a tiny model and a text, and run the experiment once without interruption."""
    from helpers.tiny_models import save_tiny_folder  # pyright: ignore[reportMissingImports]

    draw = random.Random(0)
    save_tiny_folder(scratch / "model")
    lines = (" ".join(draw.choices(["the", "a", "cat", "dog", "sees", "likes"], k=12)) for _ in range(400))
    (scratch / "text.txt").write_text("\n".join(lines))
    tiny = ("model=local", f"model.path={scratch / 'model'}", "data=local", f"data.path={scratch / 'text.txt'}")
    sizes = ("data.samples=8", "data.seqlen=32", f"eval.perplexity.path={scratch / 'text.txt'}")
    few = ("eval.perplexity.seqlen=32", "eval.perplexity.windows=16", "out=x")
    options = (*METHOD, *tiny, *sizes, *few, *options)
    for name in ("warm", "reference"):  # the first run compiles
        (scratch / name / "work").mkdir(parents=True)
        log = scratch / f"{name}.operations"
        began = time.perf_counter()
        end = start(options, scratch / name / "work", partial(_counted, scratch / name, log)).end()
        seconds = time.perf_counter() - began
        if end.code:
            sys.exit(end.printed)
    return Experiment(options, scratch, scratch / "reference", log.stat().st_size, seconds)


def _counted(root: Path, log: Path) -> None:
    count = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def mark() -> None:
        os.write(count, b".")

    sys.addaudithook(at_file_operation(1, mark, root))


def main() -> None:
    """Make the trials, and print a table of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ways", nargs="+", default=WAYS, choices=WAYS)
    arguments, options = parser.parse_known_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    import gptq_awq.experiment.run  # noqa: F401  (so that forked processes needn't)

    draw, trials = random.Random(arguments.seed), Trials()
    with tempfile.TemporaryDirectory() as scratch:
        experiment = prepared(tuple(options), Path(scratch))
        print(f"a run changes files {experiment.operations} times and takes {experiment.seconds:.1f} s", flush=True)
        for number in range(arguments.trials):
            way = arguments.ways[number % len(arguments.ways)]
            trials.add(way, experiment.trial(way, draw))
    print("| interrupted by | trials | wrong |\n|---|---|---|")
    for way, made in trials.made.items():
        print(f"| {way} | {made} | {len(trials.wrong[way])} |")
    sys.exit(int(any(trials.wrong.values())))


if __name__ == "__main__":
    main()
