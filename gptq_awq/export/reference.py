"""A checkpoint's decoded weights as a model in float32, and how far an engine is from what it computes.

Engines round activations, scales or sums, each in its own way. How much of a difference that explains is measured: the
same engine runs the same decoded weights from a file without the format's codes, its control, and what it differs
there is its noise.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from jaxtyping import Float, Int
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig, GenerationConfig, PreTrainedConfig, PreTrainedModel

from gptq_awq.errors import UserError
from gptq_awq.export.base import Format, Source
from gptq_awq.export.config import read_config
from gptq_awq.export.engines import ENGINES, Comparison, answer, compare
from gptq_awq.export.folder import FolderTensors
from gptq_awq.export.gguf import GGUFFormat
from gptq_awq.export.hf import HFFormat
from gptq_awq.export.mlx import MLXFormat
from gptq_awq.export.text_part import text_tensors
from gptq_awq.export.verify import VerificationRecord, decoding
from gptq_awq.grids.base import QuantizedWeight
from gptq_awq.grids.mix import llama_grid
from gptq_awq.models.auto_class import auto_class
from gptq_awq.models.expert_layouts import fused_parameters
from gptq_awq.models.linear import matrix
from gptq_awq.models.unfuse import unfuse
from gptq_awq.solvers.rtn import RTN

TIMES = 5.0
"""An engine may differ by so many times its noise."""
SEES_WITH = 4
"""Files may leave out so many times the parameters that they hold, of what a model sees with."""
FLOOR = 1e-4
"""Largest KL of a token, in nats, that passes whatever the noise is."""
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Judgement:
    """How far an engine is from a checkpoint's decoded weights, and how far it may be.

    Attributes:
        found: the engine on the checkpoint.
        noise: the engine on its control; None where it reads no other file of the model, or refuses it.
        limit: largest KL of a token, in nats.
    """

    found: Comparison
    noise: Comparison | None
    limit: float

    @property
    def within(self) -> bool:
        """Whether the engine's noise explains the difference."""
        return self.found.max_kl <= self.limit


@torch.no_grad()
def judge_engine(folder: Path, engine: str) -> Judgement:
    """Compare an engine's logits on the recorded tokens with those of the decoded weights, and with its own noise.

    Raises:
        UserError: the engine isn't installed, or refuses the checkpoint.
    """
    record = VerificationRecord.read(folder)
    tokens, model = torch.tensor(record.tokens), reference_model(folder)
    ours = torch.stack([model(input_ids=row[None], use_cache=False).logits[0] for row in tokens])
    path = folder / "model.gguf" if record.format == "gguf" else folder
    theirs = answer(engine, path, tokens, record.format, vocab=ours.shape[-1]).logits
    dtype = read_config(folder)["dtype"] if record.format == "mlx" else "float32"
    noise = _noise(engine, record, model, ours, tokens, dtype)
    limit = ENGINES[engine].formats[record.format].max_kl if noise is None else max(FLOOR, TIMES * noise.max_kl)
    return Judgement(compare(ours, theirs, tokens), noise, limit)


def _noise(
    engine: str,
    record: VerificationRecord,
    model: PreTrainedModel,
    ours: Float[Tensor, "windows seqlen vocab"],
    tokens: Int[Tensor, "windows seqlen"],
    dtype: Any,
) -> Comparison | None:
    """The engine's difference on its control: a file of the decoded weights without the format's codes.

    llama.cpp rounds activations only where weights are quantized, and then to 8 bits, as it does for Q8_0. mlx-lm's
    control is in the folder's dtype, which some of its tensors are computed into (norms + 1).
    """
    controls = {"mlx": MLXFormat(dtype), "hf": HFFormat("float32"), "gguf": GGUFFormat(plain_dtype="F32")}
    supported = ENGINES[engine].formats
    readable = [name for name in (record.format, "hf", "gguf") if name in controls.keys() & supported.keys()]
    if not readable:
        return None
    format_ = controls[readable[0]]
    with TemporaryDirectory(prefix="control-") as path:
        control, q8 = Path(path), format_.name == "gguf"
        rounded = {module: _in_q8_0(model, module) for module in record.weights} if q8 else {}
        try:
            format_.write(Source(model, None, "control", rounded), control)
            file, computed = control / "model.gguf" if q8 else control, supported[record.format].dtype
            theirs = answer(engine, file, tokens, format_.name, computed, vocab=ours.shape[-1]).logits
            return compare(ours, theirs, tokens)
        except UserError as error:
            log.warning("%s: no noise of its own is known (%s)", engine, error)
            return None


def _in_q8_0(model: PreTrainedModel, name: str) -> QuantizedWeight:
    return RTN().solve(matrix(model.get_submodule(name)), None, llama_grid("q8_0")).quantized


def reference_model(folder: Path) -> PreTrainedModel:
    """Build a float32 transformers model from a checkpoint's decoded weights. Raises UserError if some are missing."""
    format_ = VerificationRecord.read(folder).make_format()
    with decoding(folder):
        return _reference_model(folder, format_)


def _reference_model(folder: Path, format_: Format) -> PreTrainedModel:
    config = read_config(folder)
    for key in ("quantization_config", "quantization", "auto_map"):  # auto_map: code of the folder, which is not run
        config.pop(key, None)
    made = AutoConfig.for_model(**config)
    read = getattr(format_, "plain", FolderTensors)
    plain = {name: tensor.float() for name, tensor in read(folder).items()}
    decoded = {f"{decoded.name}.weight": decoded.weight for decoded in format_.decode(folder)}
    if (getattr(made.get_text_config(), "num_hidden_layers", None) or 0) > len(plain | decoded):
        raise UserError(f"{folder}: config.json describes more layers than there are tensors")
    with torch.device("meta"):
        model = auto_class(made).from_config(made, dtype=torch.float32)
    _check_size(model, sum(tensor.numel() for tensor in (plain | decoded).values()), folder)
    unheld = set(model.state_dict()) - text_tensors(model) - plain.keys()  # what a model sees with, where left out
    model = auto_class(made).from_config(made, dtype=torch.float32).eval()
    if any(name.rsplit(".", 2)[0] in fused_parameters(model) for name in decoded):  # one linear for each expert
        unfuse(model)
    own = dict(model.state_dict())
    state = {name: t for name, t in plain.items() if name in own and t.shape == own[name].shape} | decoded
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    if state.keys() - own.keys() or own.keys() - state.keys() - tied - unheld:  # names of the original checkpoint
        parts = tuple(name.removesuffix("weight") for name in decoded)
        rest = {n: tensor for n, tensor in plain.items() if not n.startswith(parts) or n.endswith(".bias")}
        return _loaded(made, rest | decoded, folder)
    model.load_state_dict(state, strict=False)
    model.tie_weights()
    return model


def _loaded(config: PreTrainedConfig, tensors: Mapping[str, Tensor], origin: Path) -> PreTrainedModel:
    """Build a model from a checkpoint's own names, as transformers loads one. Raises UserError if some are missing."""
    with TemporaryDirectory() as folder:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, Path(folder) / "model.safetensors")
        GenerationConfig().save_pretrained(folder)
        model, found = auto_class(config).from_pretrained(
            folder, config=config, dtype=torch.float32, output_loading_info=True
        )
    if lost := sorted(found["missing_keys"]):
        raise UserError(f"{origin}: holds no {lost[0]}")
    return model.eval()


def _check_size(model: PreTrainedModel, numbers: int, folder: Path) -> None:
    """Raise UserError where config.json describes a model of more parameters than the files hold.

    What a model sees with may be left out, up to a few times as much as they hold.
    """
    state, text = model.state_dict(), text_tensors(model)
    wanted = sum(parameter.numel() for parameter in model.parameters())
    unseen = sum(tensor.numel() for name, tensor in state.items() if name not in text)
    if wanted - min(unseen, SEES_WITH * numbers) > numbers:
        raise UserError(f"{folder}: config.json describes {wanted:,} parameters, and the files hold {numbers:,}")
