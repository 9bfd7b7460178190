"""A model's hash is of its content, wherever that lies; files are read again when anything has touched them."""

import json
import os
import shutil
import time

import pytest
from helpers.tiny_models import save_tiny_folder

from gptq_awq.models import content
from gptq_awq.models.content import folder_sha256, known_sha256
from gptq_awq.storage.assets import file_sha256


@pytest.fixture(autouse=True)
def cache_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setenv("GPTQ_AWQ_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def folder(tmp_path):
    return save_tiny_folder(tmp_path / "model")


def aged(path, seconds=3600.0):
    """A file whose last change is long ago, as a clock sees it that is as much ahead."""
    then = time.time() - seconds
    os.utime(path, (then, then))
    return path


def flip(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def into_a_subfolder(folder):
    """Move the weights to where only the index says."""
    (folder / "parts").mkdir()
    moved = (folder / "model.safetensors").rename(folder / "parts" / "one.safetensors")
    index = {"metadata": {}, "weight_map": {"lm_head.weight": "parts/one.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return moved


def test_weights_in_a_subfolder_that_the_index_names_are_part_of_the_hash(folder):
    weights = into_a_subfolder(folder)
    before = folder_sha256(folder)
    assert folder_sha256(folder) == before
    flip(weights)
    assert folder_sha256(folder) != before


def test_where_the_index_says_that_weights_lie_is_part_of_the_hash(folder):
    into_a_subfolder(folder)
    before, index = folder_sha256(folder), folder / "model.safetensors.index.json"
    index.write_text(index.read_text().replace("lm_head", "model.lm_head"))
    assert folder_sha256(folder) != before


def test_a_hub_blob_is_what_it_holds_and_not_what_it_is_called(folder, tmp_path):
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    weights = folder / "model.safetensors"
    blob = weights.rename(blobs / file_sha256(weights))
    weights.symlink_to(blob)
    before = folder_sha256(folder)
    flip(blob)
    assert folder_sha256(folder) != before


def test_what_no_number_depends_on_is_not_part_of_the_hash(folder):
    before = folder_sha256(folder)
    for name in ("README.md", "tokenizer_config.json", "generation_config.json", "notes.txt", "modeling.py"):
        (folder / name).write_text("{}")
    assert folder_sha256(folder) == before
    assert folder_sha256(folder, code=True) != before  # trusted code runs


def test_the_same_files_elsewhere_have_the_same_hash(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "copy")
    assert folder_sha256(folder) == folder_sha256(tmp_path / "copy")


@pytest.fixture
def hashed(monkeypatch):
    """Files that were read for their hash, in order."""
    seen = []
    monkeypatch.setattr(content, "file_sha256", lambda path: (seen.append(path.name), file_sha256(path))[1])
    monkeypatch.setattr(content, "RECENT_SECONDS", -1e9)  # the state of a file changes now, whatever its times say
    return seen


def test_an_untouched_file_is_hashed_once(folder, hashed):
    path = folder / "model.safetensors"
    assert [known_sha256(path) for _ in range(3)] == [file_sha256(path)] * 3
    assert hashed == ["model.safetensors"]


def test_a_file_that_has_just_changed_is_not_taken_to_be_known(folder, hashed, monkeypatch):
    monkeypatch.setattr(content, "RECENT_SECONDS", 2.0)
    known_sha256(folder / "model.safetensors")
    known_sha256(folder / "model.safetensors")
    assert len(hashed) == 2


@pytest.mark.parametrize("keeps_time", [False, True])
def test_a_changed_file_is_hashed_again_even_where_its_size_and_time_are_put_back(folder, hashed, keeps_time):
    path = aged(folder / "model.safetensors")
    before, times = known_sha256(path), path.stat()
    flip(path)
    if keeps_time:
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert known_sha256(path) == file_sha256(path) != before


def test_a_file_is_hashed_again_in_any_case_after_a_while(folder, hashed, monkeypatch):
    path = folder / "model.safetensors"
    known_sha256(path)
    monkeypatch.setattr(content, "TRUSTED_SECONDS", 0.0)
    known_sha256(path)
    assert len(hashed) == 2


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"seen": 1}', "\0"])
def test_a_damaged_memory_of_hashes_is_never_used(folder, text, tmp_path):
    path = folder / "model.safetensors"
    known_sha256(path)
    for memory in (tmp_path / "cache" / "hashes").glob("*.json"):
        memory.write_text(text)
    assert known_sha256(path) == file_sha256(path)
