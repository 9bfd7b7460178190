"""Compute logits, or token ids, with llama.cpp as packaged in xllamacpp, which needs no compiler.

python -I xllamacpp.py MODEL FOLDER DTYPE; see ../run.py for the files in FOLDER. Where FOLDER has texts.json, they are
tokenized instead, with one pre-tokenizer of it after the other until ids are as wanted: ids.json becomes one list of
lists for each, null where llama.cpp refuses one. llama.cpp's CPU kernels round activations to 8 bits where weights are
quantized.

The wheel's library exports llama.cpp's C interface. Parameters are passed as opaque blocks of bytes; the few fields
that are set are first recognized by their defaults, as a later version may have moved them.
"""

import ctypes
import importlib.util
import json
import struct
import sys
from importlib.metadata import version
from pathlib import Path

import numpy as np


class Block(ctypes.Structure):
    """A C structure larger than any that is passed: what is beyond the real one is not looked at."""

    _fields_ = (("raw", ctypes.c_uint64 * 64),)

    def put(self, form: str, at: int, value: float, default: float) -> None:
        """Set a field, given as `struct` writes it. Ends the program where the field does not have its default."""
        size = struct.calcsize(form)
        (found,) = struct.unpack(form, bytes(self)[at : at + size])
        if found != default:
            sys.exit(f"RuntimeError: this version of xllamacpp lays out its parameters differently ({at}: {found})")
        ctypes.memmove(ctypes.addressof(self) + at, struct.pack(form, value), size)


class Batch(ctypes.Structure):
    """llama.cpp's batch of tokens."""

    _fields_ = (
        ("n_tokens", ctypes.c_int32),
        ("token", ctypes.POINTER(ctypes.c_int32)),
        ("embd", ctypes.c_void_p),
        ("pos", ctypes.POINTER(ctypes.c_int32)),
        ("n_seq_id", ctypes.POINTER(ctypes.c_int32)),
        ("seq_id", ctypes.POINTER(ctypes.POINTER(ctypes.c_int32))),
        ("logits", ctypes.POINTER(ctypes.c_int8)),
    )


class Override(ctypes.Structure):
    """A metadata field of text that replaces the file's."""

    _fields_ = (
        ("tag", ctypes.c_int32),
        ("key", ctypes.c_char * 128),
        ("gap", ctypes.c_int32),
        ("text", ctypes.c_char * 128),
    )


LOG = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
STRING = 3  # LLAMA_KV_OVERRIDE_TYPE_STR


ERRORS: list[str] = []
"""Errors that llama.cpp logged."""


@LOG
def log_errors(level: int, text: bytes, _data: object) -> None:
    """Keep errors, for the message that ends the program."""
    if level == 4:  # GGML_LOG_LEVEL_ERROR
        ERRORS.append(text.decode(errors="replace").strip())


def library() -> ctypes.CDLL:
    """llama.cpp's C interface."""
    found = importlib.util.find_spec("xllamacpp")
    assert found is not None
    assert found.submodule_search_locations is not None
    lib = ctypes.CDLL(next(str(p) for p in Path(found.submodule_search_locations[0]).glob("xllamacpp*.so")))
    for name in ("model_load_from_file", "init_from_model", "get_memory", "model_get_vocab", "get_logits"):
        getattr(lib, f"llama_{name}").restype = ctypes.c_void_p
    for name in ("model", "context"):
        getattr(lib, f"llama_{name}_default_params").restype = Block
    lib.llama_batch_init.restype = Batch
    lib.llama_log_set(log_errors, None)
    lib.llama_backend_init()
    return lib


def load(lib: ctypes.CDLL, path: str, vocab_only: bool = False, pre: str | None = None) -> int | None:
    """Load a model, or its vocabulary only, with another pre-tokenizer than the file's; None where that fails."""
    params = lib.llama_model_default_params()
    overrides = (Override * 2)()
    if pre is not None:
        overrides[0] = Override(STRING, b"tokenizer.ggml.pre", 0, pre.encode())
        params.put("Q", 64, ctypes.addressof(overrides), 0)
    params.put("?", 72, vocab_only, False)
    params.put("?", 74, False, True)  # repacked weights would be another copy of the model
    return lib.llama_model_load_from_file(path.encode(), params)


def logits_of(lib: ctypes.CDLL, model: int, windows: np.ndarray) -> np.ndarray:
    """Logits (windows, seqlen, vocabulary) at every position of every window."""
    length = windows.shape[1]
    params = lib.llama_context_default_params()
    for at, default in ((0, 512), (4, 2048), (8, 512)):  # n_ctx, n_batch, n_ubatch
        params.put("I", at, length, default)
    params.put("i", 52, 0, -1)  # flash attention computes in float16
    params.put("i", 104, 0, 1)  # keys and
    params.put("i", 108, 0, 1)  # values in float32
    context = ctypes.c_void_p(lib.llama_init_from_model(ctypes.c_void_p(model), params))
    if not context:
        sys.exit("RuntimeError: llama.cpp makes no context for this model")
    vocab = ctypes.c_void_p(lib.llama_model_get_vocab(ctypes.c_void_p(model)))
    size = lib.llama_vocab_n_tokens(vocab)
    batch = lib.llama_batch_init(length, 0, 1)
    out = np.empty((*windows.shape, size), np.float32)
    for row, tokens in enumerate(windows):
        lib.llama_memory_clear(ctypes.c_void_p(lib.llama_get_memory(context)), True)
        batch.n_tokens = length
        for i, token in enumerate(tokens):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = int(token), i, 1, 1
            batch.seq_id[i][0] = 0
        if lib.llama_decode(context, batch):
            sys.exit("RuntimeError: llama_decode failed")
        found = ctypes.cast(lib.llama_get_logits(context), ctypes.POINTER(ctypes.c_float))
        out[row] = np.ctypeslib.as_array(found, (length, size))
    return out


def tokenized(lib: ctypes.CDLL, path: str, pre: str | None, texts: list[str]) -> list[list[int]] | None:
    """Token ids of texts, special tokens recognized and those around a text added; None where the file is refused."""
    model = load(lib, path, vocab_only=True, pre=pre)
    if not model:
        return None
    vocab, ids = ctypes.c_void_p(lib.llama_model_get_vocab(ctypes.c_void_p(model))), []
    for text in texts:
        raw = text.encode()
        room = len(raw) + 8
        buffer = (ctypes.c_int32 * room)()
        ids.append(list(buffer[: lib.llama_tokenize(vocab, raw, len(raw), buffer, room, True, True)]))
    lib.llama_model_free(ctypes.c_void_p(model))
    return ids


def main(path: str, folder_path: str, _dtype: str) -> None:
    """Compute and save logits of every window, or ids of every text."""
    folder, lib = Path(folder_path), library()
    (folder / "version.txt").write_text(version("xllamacpp"))
    if (folder / "texts.json").is_file():
        asked = json.loads((folder / "texts.json").read_text())
        ids: list[list[list[int]] | None] = []
        while len(ids) < len(asked["pre"]) and (not ids or ids[-1] != asked["wanted"]):
            ids.append(tokenized(lib, path, asked["pre"][len(ids)], asked["texts"]))
        (folder / "ids.json").write_text(json.dumps(ids))
        return
    model = load(lib, path)
    if not model:
        sys.exit(f"RuntimeError: llama.cpp does not load this file: {' '.join(ERRORS[:1])}")
    np.save(folder / "logits.npy", logits_of(lib, model, np.load(folder / "tokens.npy")))


if __name__ == "__main__":
    main(*sys.argv[1:])
