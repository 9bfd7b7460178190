"""ChecksummedFile files and journals: what is read is what was written, and no crash leaves anything between."""

import logging
import shutil
import threading

import pytest
import torch
from helpers.damage import flip

from gptq_awq.storage import checksummed as sealed
from gptq_awq.storage.atomic import locked, replacing
from gptq_awq.storage.checksummed import ChecksummedFile, DamagedError
from gptq_awq.storage.journal import Journal

TENSORS = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(3, dtype=torch.bfloat16), "codes": torch.arange(4).byte()}
FACTS = {"rows": [{"loss": float("inf"), "shape": [2, 3]}], "name": "ü"}


def test_what_is_read_is_what_was_written(tmp_path):
    ChecksummedFile(TENSORS, FACTS).write(tmp_path / "x")
    read = ChecksummedFile.read(tmp_path / "x")
    assert read.facts == FACTS
    assert all(
        torch.equal(read.tensors[name], x) and read.tensors[name].dtype == x.dtype for name, x in TENSORS.items()
    )


def test_tensors_that_share_memory_are_written_all_the_same(tmp_path):
    x = torch.ones(4, 4)
    ChecksummedFile({"x": x, "again": x, "part": x[:2]}).write(tmp_path / "x")
    assert torch.equal(ChecksummedFile.read(tmp_path / "x").tensors["part"], x[:2])


@pytest.mark.parametrize("at", [3, 40, -3])
def test_a_flipped_bit_anywhere_is_seen(tmp_path, at):
    ChecksummedFile(TENSORS, FACTS).write(tmp_path / "x")
    flip(tmp_path / "x", at)
    with pytest.raises(DamagedError):
        ChecksummedFile.read(tmp_path / "x")


def test_a_write_that_fails_leaves_what_was_there(tmp_path):
    path = tmp_path / "x"
    path.write_text("before")
    with pytest.raises(ZeroDivisionError), replacing(path) as scratch:
        scratch.write_text(f"half {1 / 0}")
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]


def test_once_computes_once_also_between_threads(tmp_path):
    computed = []

    def compute():
        computed.append(1)
        return ChecksummedFile(TENSORS)

    threads = [
        threading.Thread(target=lambda: sealed.once(tmp_path / "x", "thing", compute), daemon=True) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert computed == [1]


def test_a_full_disk_costs_the_cache_and_not_the_result(tmp_path, monkeypatch, caplog):
    def full(*_args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(sealed, "save_file", full)
    with caplog.at_level(logging.WARNING):
        content = sealed.once(tmp_path / "x", "thing", lambda: ChecksummedFile(TENSORS, FACTS))
    assert content.facts == FACTS
    assert "No space left" in caplog.text
    assert not (tmp_path / "x").exists()


def test_a_lock_is_waited_for_and_free_when_its_holder_is_gone(tmp_path):
    waited = []
    with locked(tmp_path / "lock"):
        other = threading.Thread(target=lambda: _take(tmp_path / "lock", waited), daemon=True)
        other.start()
        other.join(0.3)
        assert waited == ["waiting"]
    other.join(5)
    assert waited == ["waiting", "got it"]


def _take(path, said):
    with locked(path, lambda: said.append("waiting")):
        said.append("got it")


def journal(folder, blocks=3):
    written = Journal(folder, "key")
    for index in range(blocks):
        for batch in range(2):
            written.keep_batch(index, batch, [torch.full((2, 2), float(index)), torch.full((1,), float(batch))])
        written.append(index, TENSORS, {"index": index})
    return written


def test_a_journal_gives_back_its_blocks_and_the_last_stream_only(tmp_path):
    written = journal(tmp_path / "j")
    assert written.count() == 3
    assert [written.block(i).facts["index"] for i in range(3)] == [0, 1, 2]
    assert torch.equal(written.batch(2, 0)[0], torch.full((2, 2), 2.0))
    assert torch.equal(written.batch(2, 1)[1], torch.ones(1))
    assert len(list((tmp_path / "j").glob("activations-*"))) == 1
    written.drop_activations()
    assert not list((tmp_path / "j").glob("activations-*"))
    written.clear()
    assert not (tmp_path / "j").exists()


@pytest.mark.parametrize("killed", ["among batches", "before the block", "after the block"])
def test_a_kill_between_two_files_leaves_a_consistent_state(tmp_path, killed):
    written = journal(tmp_path / "j", 2)
    kept = tmp_path / "kept"
    shutil.copytree(tmp_path / "j" / "activations-0001", kept)
    written.keep_batch(2, 0, [torch.full((2, 2), 2.0)])
    if killed != "among batches":
        written.keep_batch(2, 1, [torch.full((2, 2), 2.0)])
    if killed == "after the block":
        written.append(2, TENSORS, {})
        shutil.copytree(kept, tmp_path / "j" / "activations-0001")  # not yet deleted
    last = written.count() - 1
    assert last == (2 if killed == "after the block" else 1)
    assert all(torch.equal(written.batch(last, batch)[0], torch.full((2, 2), float(last))) for batch in range(2))


def test_appending_a_block_leaves_batches_that_others_take_further_already(tmp_path):
    written = journal(tmp_path / "j", 2)
    written.keep_batch(2, 1, [torch.ones(1)])
    written.append(1, TENSORS, {})
    assert [folder.name for folder in sorted((tmp_path / "j").glob("activations-*"))] == [
        "activations-0001",
        "activations-0002",
    ]


def test_another_computations_files_are_foreign(tmp_path):
    journal(tmp_path / "j")
    with pytest.raises(DamagedError, match="another computation"):
        Journal(tmp_path / "j", "other").block(0)
    with pytest.raises(DamagedError, match="another computation"):
        Journal(tmp_path / "j", "other").batch(2, 0)
