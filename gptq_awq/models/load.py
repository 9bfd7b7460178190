"""Causal language models, from an asset, a local folder or GGUF file, or the Hugging Face hub.

A GGUF file's weights are dequantized once, into a transformers folder in the user's cache (transformers reads
GGUF metadata in Python, half a minute for a small model; the folder loads in a second). Whatever the source,
the result is a plain transformers model in evaluation mode, with a hash of its content.
"""

import fnmatch
import logging
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass, field, replace
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.utils import logging as transformers_logging

from gptq_awq.errors import UserError
from gptq_awq.models.auto_class import also_sees, auto_class
from gptq_awq.models.checkpoint import folder_numbers
from gptq_awq.models.content import folder_sha256, known_sha256
from gptq_awq.models.embeddings import correct_tie
from gptq_awq.models.gguf_claims import checked_gguf
from gptq_awq.models.load_report import ADAPTER_CONFIG, LoadReport, examine, tokens_beyond
from gptq_awq.models.offload import offloaded
from gptq_awq.models.offloaded_model import offload, read_whole, skeleton
from gptq_awq.models.on_grid import grid_of
from gptq_awq.models.quantized_source import quantization_of
from gptq_awq.runtime.memory import make_private, return_large
from gptq_awq.runtime.options import InputPath, checked_keywords
from gptq_awq.storage.assets import ASSETS, cache_dir, fetch, hub_reachable, scratch_folder
from gptq_awq.storage.atomic import discard
from gptq_awq.storage.records import broken_seal, seal

log = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_OFFLINE = "Offline choices: model=smollm2-135m or model=local model.path=DIR"


@dataclass(frozen=True)
class LoadedModel:
    """A model in evaluation mode, without gradients, and its tokenizer.

    Attributes:
        model: the causal language model.
        tokenizer: the tokenizer that comes with it.
        name: short name of the model.
        source: origin of the weights: a path, an address, or a hub id and commit.
        sha256: hash of the GGUF file, or of a folder's weight files and config.json (see `models.content`).
        report: what the files hold beyond the model, and where it ends.
    """

    model: PreTrainedModel
    tokenizer: Any
    name: str
    source: str
    sha256: str
    report: LoadReport = field(default_factory=LoadReport)


@checked_keywords
class AssetModel:
    """A GGUF file among `gptq_awq.storage.assets.ASSETS`."""

    name: str
    asset: str

    def load(self, dtype: str, device: str, room: int | None = None) -> LoadedModel:
        """Fetch the asset if it is not in the cache, and load it. Raises UserError."""
        served = fetch(ASSETS[self.asset], hint="model=local model.path=DIR needs no network")
        folder = dequantized(served.path, served.sha256, f"model={self.name}")
        loaded = load_reported(folder, dtype, device, f"model={self.name}", room=room)
        return LoadedModel(loaded.model, loaded.tokenizer, self.name, served.source, served.sha256, loaded.report)


@checked_keywords
class LocalModel:
    """A transformers folder or a .gguf file; `name` defaults to the last part of the path."""

    path: InputPath | None = None
    name: str | None = None
    trust_remote_code: bool = False

    def load(self, dtype: str, device: str, room: int | None = None) -> LoadedModel:
        """Load the folder or file. Raises UserError naming model.path."""
        if self.path is None:
            raise UserError("model.path is not set: name a transformers folder or a .gguf file")
        path, option = Path(self.path).expanduser(), f"model.path={self.path}"
        if not path.exists():
            raise UserError(f"{option}: there is no such folder or file")
        if path.suffix == ".gguf" and path.is_file():
            sha256 = known_sha256(path)
            folder = dequantized(path, sha256, option)
        elif (path / "config.json").is_file():
            sha256, folder = folder_sha256(path, self.trust_remote_code), path
        else:
            raise UserError(f"{option}: is neither a .gguf file nor a folder with a config.json")
        loaded = load_reported(folder, dtype, device, option, self.trust_remote_code, room)
        name = self.name or (path.resolve().name if path.is_dir() else path.stem)
        return LoadedModel(loaded.model, loaded.tokenizer, name, str(path), sha256, loaded.report)


@checked_keywords
class HubModel:
    """A model on the Hugging Face hub, or in the hub's local cache when the hub does not answer."""

    id: str | None = None
    name: str | None = None
    revision: str = "main"
    trust_remote_code: bool = False

    def load(self, dtype: str, device: str, room: int | None = None) -> LoadedModel:
        """Download the files that the local cache lacks, and load them. Raises UserError naming model.id."""
        if self.id is None:
            raise UserError("model.id is not set: name a causal language model on the hub, as in ORG/NAME")
        _check(dtype, device)  # before a long download
        folder = hub_snapshot(self.id, self.revision)
        option = f"model.id={self.id}"
        loaded = load_reported(folder, dtype, device, option, self.trust_remote_code, room)
        name = self.name or self.id.split("/")[-1]
        sha256 = folder_sha256(folder, self.trust_remote_code)
        source = f"hub {self.id}@{folder.name}"
        return LoadedModel(loaded.model, loaded.tokenizer, name, source, sha256, loaded.report)


@dataclass(frozen=True)
class LoadedFolder:
    """Model and tokenizer of a transformers folder, and what its files hold beyond them."""

    model: PreTrainedModel
    tokenizer: Any
    report: LoadReport


def load_folder(
    folder: Path, dtype: str, device: str, option: str, trust_remote_code: bool = False, room: int | None = None
) -> tuple[PreTrainedModel, Any]:
    """Load model and tokenizer of a transformers folder (see `load_reported`)."""
    loaded = load_reported(folder, dtype, device, option, trust_remote_code, room)
    return loaded.model, loaded.tokenizer


def load_reported(
    folder: Path, dtype: str, device: str, option: str, trust_remote_code: bool = False, room: int | None = None
) -> LoadedFolder:
    """Load model and tokenizer of a transformers folder: a causal LM, or a multimodal model that contains one.

    A model of more than `room` bytes is offloaded (see `open_offloaded`); None: it is loaded whole, whatever its size.
    Raises UserError naming `option` where the folder does not hold all weights, finite and not yet quantized, and no
    others (see `load_report`), or naming dtype or device where those cannot be used.
    """
    _check(dtype, device)
    with _quietly(), _naming(option):
        code = {"trust_remote_code": trust_remote_code, "local_files_only": True}
        config = AutoConfig.from_pretrained(folder, **code)
        _forget_quantization(config)
        if also_sees(config):
            log.info("%s: a %s; its language model alone is quantized and scored", option, config.model_type)
        tokenizer = AutoTokenizer.from_pretrained(folder, **code)
        if room is not None and folder_numbers(folder, option) * DTYPES[dtype].itemsize > room:
            model, report = _offloaded(folder, config, dtype, device, option, trust_remote_code)
        else:
            model, report = _in_memory(folder, config, dtype, option, code)
            model.to(torch.device(device)).eval().requires_grad_(False)  # pyright: ignore[reportArgumentType]
        untied = correct_tie(model)
        on_grid = None if offloaded(model) else grid_of(model)
        report = replace(
            report, on_grid=on_grid, untied=untied, tokens_beyond=tokens_beyond(tokenizer, report.vocabulary)
        )
    for sentence in report.warnings():
        log.warning("%s: %s", option, sentence)
    return LoadedFolder(model, tokenizer, report)


def _forget_quantization(config: Any) -> None:
    """Take the quantization of the files out of a config: they are decoded when they are read."""
    for part in (config, config.get_text_config()):
        for name in ("quantization_config", "compression_config"):
            if getattr(part, name, None) is not None:
                delattr(part, name)


def _in_memory(
    folder: Path, config: Any, dtype: str, option: str, code: dict[str, Any]
) -> tuple[PreTrainedModel, LoadReport]:
    """A folder's whole model in memory."""
    if quantization_of(folder) is not None:
        return _decoded(folder, config, dtype, option, code)
    try:
        loaded: Any = auto_class(config).from_pretrained(
            folder, config=config, dtype=DTYPES[dtype], output_loading_info=True, **code
        )
    except Exception:
        remote = {"trust_remote_code": True} if code["trust_remote_code"] else {}
        examine(folder, skeleton(folder, config, DTYPES[dtype], **remote), option)  # which may know a better reason
        raise
    model, info = loaded
    make_private(model.parameters())
    _check_causal(model, option)
    if getattr(model, "peft_config", None):
        raise UserError(f"{option}: has an adapter beside its weights; merge it, or move its {ADAPTER_CONFIG} away")
    report = examine(folder, model, option)
    if missing := sorted(info["missing_keys"]):
        raise UserError(f"{option}: holds no weights for {missing[0]} ({len(missing)} missing)")
    _check_values(model, option)
    return model, report


def _decoded(
    folder: Path, config: Any, dtype: str, option: str, code: dict[str, Any]
) -> tuple[PreTrainedModel, LoadReport]:
    """The whole model, in memory, of a folder that comes quantized."""
    remote = {"trust_remote_code": True} if code["trust_remote_code"] else {}
    model = skeleton(folder, config, DTYPES[dtype], **remote)
    _check_causal(model, option)
    report = examine(folder, model, option)
    read_whole(model, folder, DTYPES[dtype], option)
    _check_values(model, option)
    return model, report


def _offloaded(
    folder: Path, config: Any, dtype: str, device: str, option: str, trust_remote_code: bool
) -> tuple[PreTrainedModel, LoadReport]:
    """A folder's model with its blocks left on disk."""
    code = {"trust_remote_code": trust_remote_code} if trust_remote_code else {}
    return_large()
    model = skeleton(folder, config, DTYPES[dtype], **code)
    _check_causal(model, option)
    report = examine(folder, model, option)
    model = offload(model, folder, DTYPES[dtype], torch.device(device), option)
    log.info("%s is offloaded: its blocks stay in %s and are read when they are computed", option, folder)
    return model, report


def dequantized(gguf: Path, sha256: str, option: str) -> Path:
    """Dequantize a GGUF file into a float32 transformers folder in the cache, with its tokenizer; return the folder.

    The folder is made once for each `sha256` of a file, and again where its files have changed since. Raises UserError
    naming `option` where the file can't be read, or the folder not be written.
    """
    folder = cache_dir() / "models" / f"{gguf.stem}-{sha256[:16]}"
    if folder.is_dir():  # it was made by a rename, so it is complete
        changed = broken_seal(folder)
        if changed is None:
            return folder
        log.warning("%s: %s is not what was written there: dequantizing %s again", folder, changed, gguf.name)
        discard(folder)
    log.info("dequantizing %s into %s, once", gguf.name, folder)
    with _quietly(), redirect_stderr(StringIO()), scratch_folder(folder.parent) as scratch:
        with _naming(option):
            checked_gguf(gguf, option)
            file = {"gguf_file": gguf.name, "local_files_only": True}
            AutoTokenizer.from_pretrained(gguf.parent, **file).save_pretrained(scratch / "model")
            model = AutoModelForCausalLM.from_pretrained(gguf.parent, dtype=torch.float32, **file)
        # Newer transformers call the model quantized, though its weights are float32, and won't save it.
        vars(model).pop("hf_quantizer", None)
        vars(model.config).pop("quantization_config", None)
        try:
            model.save_pretrained(scratch / "model")
            seal(scratch / "model")
        except (OSError, SafetensorError) as error:
            raise UserError(f"{option}: cannot be kept in the cache, {folder.parent}: {_one_line(error)}") from error
        try:
            (scratch / "model").rename(folder)
        except OSError:
            if not folder.is_dir():  # otherwise another process was faster
                raise
    return folder


def hub_snapshot(model_id: str, revision: str = "main") -> Path:
    """Download a model into the hub's local cache, as far as the hub answers; return its folder, named by the commit.

    Weights come from safetensors files, or from pytorch_model*.bin where there are none. Raises UserError.
    """
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    option, online, weights = f"model.id={model_id}", hub_reachable(), "model*.safetensors"
    with _naming(option):
        try:
            if online and not fnmatch.filter(HfApi().list_repo_files(model_id, revision=revision), weights):
                weights = "pytorch_model*.bin"
            return Path(
                snapshot_download(
                    model_id,
                    revision=revision,
                    allow_patterns=[weights, "*.json", "*.txt", "*.model", "*.jinja", "*.py"],
                    ignore_patterns="*/*",
                    local_files_only=not online,
                )
            )
        except LocalEntryNotFoundError as error:
            raise UserError(
                f"{option}: the Hugging Face hub does not answer, nor is it in its local cache. {_OFFLINE}"
            ) from error


def _check(dtype: str, device: str) -> None:
    if dtype not in DTYPES:
        raise UserError(f"dtype={dtype}: choose one of {', '.join(DTYPES)}")
    checked_device(device)


def checked_device(name: str) -> torch.device:
    """The torch device named `name`. Raises UserError where it can't be used."""
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:  # unknown, or not built in, or not there
        raise UserError(f"device={name} cannot be used here: {_one_line(error)}") from error


def _check_causal(model: PreTrainedModel, option: str) -> None:
    """Raise UserError unless the checkpoint is a causal LM's: transformers loads others as one too, such as BERT's."""
    trained_as = model.config.architectures or []
    causal = (type(model).__name__, "ForCausalLM", "LMHeadModel", "ForConditionalGeneration")
    if trained_as and not any(name.endswith(causal) for name in trained_as):
        raise UserError(f"{option}: is not a causal language model but {', '.join(trained_as)}")


def _check_values(model: PreTrainedModel, option: str) -> None:
    """Raise UserError naming the first weight that is not finite, or where every matrix is zero; name zero matrices."""
    matrices, zero = 0, []
    for name, parameter in model.named_parameters():
        if parameter.numel() == 0:
            continue
        low, high = torch.aminmax(parameter.detach())  # NaN wins both; takes no memory of the weight's size
        if not (torch.isfinite(low) and torch.isfinite(high)):
            dtype = str(parameter.dtype).removeprefix("torch.")
            raise UserError(f"{option}: the weight {name} is not finite with dtype={dtype}")
        if parameter.dim() > 1:
            matrices += 1
            zero += [name] if low == high == 0 else []
    if zero and len(zero) == matrices:
        raise UserError(f"{option}: every weight matrix is zero; were the weights written?")
    if zero:
        log.warning("%s: %d of %d weight matrices are zero, the first one %s", option, len(zero), matrices, zero[0])


@contextmanager
def _naming(option: str) -> Iterator[None]:
    """Context manager that turns any exception of transformers on a bad checkpoint into a UserError naming `option`."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        log.debug("loading failed", exc_info=True)
        raise UserError(f"{option}: cannot be loaded: {_one_line(error)}") from error


@contextmanager
def _quietly() -> Iterator[None]:
    """Context manager that silences transformers' bars and warnings: this module checks for what they warn of."""
    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()


def _one_line(error: Exception, length: int = 300) -> str:
    return textwrap.shorten(str(error), length, placeholder=" …") or repr(error)
