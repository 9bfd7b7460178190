"""Laws of files that processes share: records notice what changed, locks keep others out, leftovers are the dead's."""

import os
import subprocess
import sys
import time

import pytest
from helpers.damage import flip

from gptq_awq.cache.leftovers import clear_leftovers, leftovers
from gptq_awq.storage.atomic import discard, leftover, locked_folder, owner, replacing
from gptq_awq.storage.records import INTERVAL, SEAL, SMALL, FileRecord, broken_seal, misfit, records_of, seal


@pytest.fixture
def dead():
    """The process id of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def of(process):
    """The name that scratch files of a process carry."""
    machine, _, unique = owner().split("-")
    return f"{machine}-{process}-{unique}"


def keep_time(path, change):
    """Change a file and set its time back."""
    before = path.stat()
    change(path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.mark.parametrize("size", [10, SMALL + 10])
def test_a_flipped_bit_another_size_or_no_file_is_noticed(tmp_path, size):
    path = tmp_path / "folder" / "weights"
    path.parent.mkdir()
    path.write_bytes(b"x" * size)
    records = records_of(tmp_path, ["folder"])
    assert list(records) == ["folder/weights"]
    assert misfit(tmp_path, records) is None
    os.utime(path)
    assert misfit(tmp_path, records) is None, "another time alone is no change"
    flip(path, size // 2)
    assert misfit(tmp_path, records) == "folder/weights"
    path.write_bytes(b"x" * (size - 1))
    assert misfit(tmp_path, records) == "folder/weights"
    path.unlink()
    assert misfit(tmp_path, records) == "folder/weights"


def test_a_record_is_read_as_it_was_written_and_nonsense_is_refused(tmp_path):
    (tmp_path / "a").write_text("a")
    record = FileRecord.of(tmp_path / "a")
    assert FileRecord.read(record.json()) == record
    for nonsense in (None, 3, {}, {"sha256": "x", "size_bytes": "y", "mtime_ns": 0}, []):
        with pytest.raises(ValueError, match="no record"):
            FileRecord.read(nonsense)


def test_a_sealed_folder_is_read_again_after_a_while_whatever_its_times_say(tmp_path):
    big = tmp_path / "model"
    big.write_bytes(b"x" * (SMALL + 10))
    assert broken_seal(tmp_path) == SEAL
    seal(tmp_path)
    assert broken_seal(tmp_path) is None
    keep_time(big, lambda path: flip(path, 5))
    assert broken_seal(tmp_path) is None, "size and time are what they were"
    long_ago = time.time() - INTERVAL - 1
    os.utime(tmp_path / SEAL, (long_ago, long_ago))
    assert broken_seal(tmp_path) == "model"
    keep_time(big, lambda path: flip(path, 5))
    assert broken_seal(tmp_path) is None
    assert time.time() - (tmp_path / SEAL).stat().st_mtime < INTERVAL, "it was read just now"


def test_a_scratch_file_is_a_leftover_once_its_writer_is_dead(tmp_path, dead):
    with replacing(tmp_path / "file") as mine:
        mine.write_text("written")
        assert not leftover(mine)
        mine.rename(tmp_path / "kept")
        (tmp_path / "kept").rename(mine)
    assert (tmp_path / "file").read_text() == "written"
    for name in (f".file.{of(dead)}.tmp", f".partial-{of(dead)}-abcd", f".storing-{of(dead)}-abcd"):
        assert leftover(tmp_path / name), name
    foreign = tmp_path / f".file.00000000-{dead}-{'0' * 12}.tmp"
    foreign.write_text("")
    assert not leftover(foreign), "a process of another machine can't be asked"
    os.utime(foreign, (0, 0))
    assert leftover(foreign)
    assert not any(map(leftover, (tmp_path / ".locks", tmp_path / ".hidden", tmp_path / "file.tmp")))


def test_what_dead_processes_left_in_the_cache_is_found_and_deleted_and_nothing_else(tmp_path, dead):
    places = ("baselines", "progress/run", "progress/run/activations-0001", "moments/key")
    for place in places:
        (tmp_path / place).mkdir(parents=True)
        (tmp_path / place / f".x.{of(dead)}.tmp").write_text("left")
        (tmp_path / place / f".x.{of(os.getpid())}.tmp").write_text("being written")
        (tmp_path / place / "x").write_text("whole")
    (tmp_path / "models" / f".partial-{of(dead)}-abcd" / "model").mkdir(parents=True)
    assert len(list(leftovers(tmp_path))) == len(places) + 1
    assert len(clear_leftovers(tmp_path)) == len(places) + 1
    assert not list(leftovers(tmp_path))
    assert len([path for path in tmp_path.rglob("*") if path.is_file()]) == 2 * len(places)


def test_a_folder_is_locked_without_being_touched_and_for_one_at_a_time(tmp_path):
    def busy():
        raise BlockingIOError

    with locked_folder(tmp_path / "out"):
        assert not list((tmp_path / "out").iterdir())
        with pytest.raises(BlockingIOError), locked_folder(tmp_path / "out", busy):
            pass
    with locked_folder(tmp_path / "out", busy):
        pass


def test_a_folder_that_was_deleted_while_one_waited_is_locked_as_it_is_now(tmp_path):
    out = tmp_path / "out"
    holder = locked_folder(out)
    holder.__enter__()

    def make_way():
        out.rmdir()
        holder.__exit__(None, None, None)

    with locked_folder(out, make_way):
        assert out.is_dir()


def test_a_discarded_folder_is_gone_and_its_open_files_can_be_read(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "weights").write_text("content")
    with (folder / "weights").open() as file:
        discard(folder)
        assert not list(tmp_path.iterdir())
        assert file.read() == "content"
