"""Headers of files: what a header claims and the file doesn't hold is refused before anything is allocated by it."""

import json
import struct
import tracemalloc

import gguf
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from gptq_awq.errors import UserError
from gptq_awq.export.gguf_file import read_gguf
from gptq_awq.export.layout import Layout
from gptq_awq.export.placement import Numbering, Runs
from gptq_awq.models.gguf_claims import checked_gguf
from gptq_awq.storage.bounded import read_bytes, read_json, read_yaml
from gptq_awq.storage.checksummed import ChecksummedFile, DamagedError
from gptq_awq.storage.headers import check_gguf, safetensors_places
from gptq_awq.storage.journal import Journal

FUZZ = settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
SHAPES = {"embed": (3, 32), "up": (64, 32)}
STARTS = Numbering.of(SHAPES).first
LAYOUT = Layout(
    Numbering.of(SHAPES),
    {
        "token_embd.weight": Runs(np.array([STARTS["embed"]]), np.array([96])),
        "blk.0.ffn_up.weight": Runs(np.array([STARTS["up"]]), np.array([2048])),
    },
)
MANY = settings(FUZZ, max_examples=5000)


def small_gguf(path, **claims):
    """A Llama of one layer, as far as headers are concerned."""
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in ({"block_count": 1, "embedding_length": 32, "feed_forward_length": 64} | claims).items():
        writer.add_uint32(f"llama.{key}", value)
    writer.add_token_list(["a", "b", "c"])
    writer.add_float32("llama.rope.freq_base", 1e4)
    writer.add_bool("tokenizer.ggml.add_bos_token", True)
    writer.add_tensor("token_embd.weight", np.zeros((3, 32), np.float32))
    writer.add_tensor("blk.0.ffn_up.weight", np.zeros((64, 32), np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def within(call, megabytes=50):
    """The exception that a call ends with, None for none; it takes no more memory than said."""
    tracemalloc.start()
    try:
        call()
    except Exception as error:
        return error
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < megabytes * 1e6
    return None


# ------------------------------------------------------------------------------------------------------------ GGUF


def test_a_header_is_what_the_library_reads(tmp_path):
    path = small_gguf(tmp_path / "m.gguf")
    header, reader = check_gguf(path), gguf.GGUFReader(path)
    assert header.shapes == {t.name: tuple(t.shape.tolist()) for t in reader.tensors}
    own = {name: field for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    assert header.fields.keys() == own.keys()
    assert header.fields["tokenizer.ggml.tokens"] == 3
    scalars = {n: f.contents() for n, f in own.items() if gguf.GGUFValueType.ARRAY not in f.types}
    assert {name: header.fields[name] for name in scalars} == scalars
    assert len(checked_gguf(path, "x").shapes) == 2


def claim(path, after, code, value):
    """Overwrite the number that comes right after some bytes of a file."""
    content = bytearray(path.read_bytes())
    at = content.index(after) + len(after)
    content[at : at + struct.calcsize(code)] = struct.pack(code, value)
    path.write_bytes(content)


CLAIMS = {
    "keys": (b"GGUF\3\0\0\0" + struct.pack("<Q", 2), "<Q", 2**60),
    "tensors": (b"GGUF\3\0\0\0", "<Q", 2**63),
    "values of an array": (b"tokenizer.ggml.tokens" + struct.pack("<II", 9, 8), "<Q", 2**40),
    # The library reads no bytes per value behind the end, and goes on for ever.
    "numbers of an array": (b"tokenizer.ggml.tokens", "<IIQ", (9, 0, 2**40)),
    "letters of a text": (b"general.architecture" + struct.pack("<I", 8), "<Q", 2**62),
    "dimensions": (b"token_embd.weight", "<I", 2**31),
    "an array of arrays": (b"tokenizer.ggml.tokens", "<IIQ", (9, 9, 10**5)),
    "a tensor's length": (b"token_embd.weight" + struct.pack("<I", 2), "<Q", 2**40),
    "a tensor's place": (b"token_embd.weight" + struct.pack("<IQQI", 2, 32, 3, 0), "<Q", 2**50),
    "a tensor's type": (b"token_embd.weight" + struct.pack("<IQQ", 2, 32, 3), "<I", 999),
}


@pytest.mark.parametrize("what", CLAIMS)
def test_a_gguf_file_that_claims_what_it_does_not_hold_is_refused(what, tmp_path):
    path = small_gguf(tmp_path / "m.gguf")
    after, code, value = CLAIMS[what]
    if isinstance(value, tuple):
        code, value = f"{4 * 2 + 8}s", struct.pack(code, *value)
    claim(path, after, code, value)
    assert isinstance(within(lambda: check_gguf(path)), ValueError)
    error = within(lambda: list(read_gguf(path, LAYOUT)))
    assert isinstance(error, UserError)
    assert "\n" not in str(error)


@pytest.mark.parametrize("key", ["block_count", "embedding_length", "feed_forward_length", "vocab_size"])
def test_a_gguf_file_that_claims_a_model_its_tensors_are_not_of_is_refused(key, tmp_path):
    path = small_gguf(tmp_path / "m.gguf", **{key: 2**31})
    with pytest.raises(UserError, match=rf"model\.path=m: cannot be loaded: it claims llama\.{key}"):
        checked_gguf(path, "model.path=m")


def damaged(content, at, damage):
    at = at % (len(content) + 1)
    return content[:at] + damage + content[at + len(damage) :]


def gguf_ends_in_one_line(path):
    error = within(lambda: list(read_gguf(path, LAYOUT)))
    assert error is None or isinstance(error, UserError), repr(error)


@FUZZ
@given(st.integers(0, 600), st.binary(min_size=1, max_size=9) | st.just(b"\xff" * 8))
def test_any_damage_to_a_gguf_header_is_refused_or_read(tmp_path, at, damage):
    path = small_gguf(tmp_path / "m.gguf")
    path.write_bytes(damaged(path.read_bytes(), at, damage))
    gguf_ends_in_one_line(path)


@pytest.mark.slow
@MANY
@given(st.integers(0, 6000), st.binary(min_size=1, max_size=16), st.integers(0, 6000), st.integers(0, 9000))
def test_any_two_damages_to_a_gguf_file_are_refused_or_read(tmp_path, at, damage, also, end):
    path = small_gguf(tmp_path / "m.gguf")
    path.write_bytes(damaged(damaged(path.read_bytes(), at, damage), also, damage[::-1])[:end])
    gguf_ends_in_one_line(path)


# ----------------------------------------------------------------------------------------------------- safetensors


def test_places_are_where_the_tensors_are(tmp_path):
    path, tensors = tmp_path / "m.safetensors", {"a": torch.arange(4.0), "b": torch.ones(2, 3)}
    save_file(tensors, path)
    content = path.read_bytes()
    for name, (first, last) in safetensors_places(path).items():
        assert content[first:last] == tensors[name].numpy().tobytes()


HEADERS = ["[]", "1", "null", "{", "[" * 5000, '{"a": 1}', '{"a": {}}', '{"a": {"data_offsets": [0]}}', "\0" * 8]
HEADERS += ['{"a": {"data_offsets": [0, 1e18]}}', '{"a": {"data_offsets": [9, 3]}}', '{"a": {"data_offsets": [-1, 2]}}']
HEADERS += ['{"a": {"data_offsets": [0, 99999999999999]}}', '{"a": {"data_offsets": ["0", "1"]}}', '{"a": []}']


@pytest.mark.parametrize("at", range(len(HEADERS)))
def test_a_header_that_is_none_is_refused(at, tmp_path):
    path, header = tmp_path / "m.safetensors", HEADERS[at].encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(8))
    assert isinstance(within(lambda: safetensors_places(path)), ValueError)


@pytest.mark.parametrize("length", [2**63, 2**40, 10**9, 17])
def test_a_header_longer_than_its_file_is_not_read(length, tmp_path):
    path = tmp_path / "m.safetensors"
    path.write_bytes(struct.pack("<Q", length) + bytes(16))
    assert "not in the file" in str(within(lambda: safetensors_places(path)))


@FUZZ
@given(st.binary(max_size=60), st.integers(0, 200), st.binary(min_size=1, max_size=9))
def test_any_damage_to_a_safetensors_file_is_refused_or_read(tmp_path, raw, at, damage):
    path = tmp_path / "m.safetensors"
    path.write_bytes(raw)
    assert isinstance(within(lambda: safetensors_places(path)), ValueError | None)
    save_file({"a": torch.arange(4.0), "b": torch.ones(2, 3)}, path)
    path.write_bytes(damaged(path.read_bytes(), at, damage))
    error = within(lambda: safetensors_places(path))
    assert error is None or isinstance(error, ValueError)
    assert isinstance(within(lambda: ChecksummedFile.read(path)), DamagedError)  # it has no checksum, either


# -------------------------------------------------------------------------------------------------------- journals


@FUZZ
@given(st.integers(0, 2000), st.binary(min_size=1, max_size=9), st.integers(0, 2000))
def test_any_damage_to_a_journal_is_noticed(tmp_path, at, damage, end):
    journal = Journal(tmp_path, "key")
    journal.keep_batch(0, 0, [torch.arange(6.0)])
    journal.append(0, {"codes": torch.arange(4, dtype=torch.uint8)}, {"rows": [{"name": "q"}]})
    for path in (tmp_path / "block-0000.safetensors", tmp_path / "activations-0000" / "000000.safetensors"):
        path.write_bytes(damaged(path.read_bytes(), at, damage)[: end or None])
    found: dict = {}
    errors = [within(lambda: found.update(block=journal.block(0))), within(lambda: found.update(x=journal.batch(0, 0)))]
    assert all(error is None or isinstance(error, DamagedError) for error in errors), errors
    if "block" in found:  # a blank of the header may be another blank
        assert found["block"].tensors["codes"].tolist() == [0, 1, 2, 3]
        assert found["block"].facts == {"rows": [{"name": "q"}]}
    if "x" in found:
        assert torch.equal(found["x"][0], torch.arange(6.0))


FACTS = [{}, {"key": "key"}, {"key": ["key"]}, [], "key", None, 5, {"content": {}}]


@pytest.mark.parametrize("facts", FACTS, ids=str)
def test_a_file_of_a_journal_that_was_not_written_by_one_is_damaged(facts, tmp_path):
    journal = Journal(tmp_path, "key")
    ChecksummedFile({"x": torch.ones(2)}, facts).write(tmp_path / "block-0000.safetensors")
    ChecksummedFile({"x": torch.ones(2)}, facts).write(tmp_path / "activations-0000" / "000000.safetensors")
    with pytest.raises(DamagedError):
        journal.block(0)
    with pytest.raises(DamagedError):
        journal.batch(0, 0)


# ----------------------------------------------------------------------------------------------------- plain files


def test_a_file_larger_than_the_bound_is_not_read(tmp_path):
    path = tmp_path / "large"
    with path.open("wb") as file:
        file.truncate(10**12)  # without a byte on disk
    for read in (read_bytes, read_json, read_yaml):
        assert "more than 1 MB" in str(within(lambda read=read: read(path, 10**6)))


def test_what_is_read_is_what_the_libraries_read(tmp_path):
    path = tmp_path / "x"
    path.write_text(json.dumps({"a": [1, 2.5, None, "é"]}))
    assert read_json(path, 100) == read_yaml(path, 100) == {"a": [1, 2.5, None, "é"]}
