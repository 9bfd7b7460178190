"""Comparison of a folder's files with the model that they are loaded as, for models in memory and on disk alike.

A model that would be wrong is refused: codes that are read as weights, layers that the config does not count. The rest
is named: tensors without a place, adapters that are not merged, a head that is not tied after all, tokens without a row
in the embedding. Names are compared after transformers' own renamings.
"""

import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open
from transformers import PreTrainedModel
from transformers.utils.loading_report import LoadStateDictInfo

from gptq_awq.errors import UserError
from gptq_awq.models.checkpoint import placed
from gptq_awq.models.context_length import context_length
from gptq_awq.models.quantized_source import decoded, quantization_of, told
from gptq_awq.models.tensor_files import StoredTensor, stored_tensors

ADAPTER_CONFIG = "adapter_config.json"
_ADAPTER = re.compile(r"(^|[._])(lora|loha|lokr|ia3|vera|dora|adapters?)([._]|$)", re.IGNORECASE)
_SCALE = re.compile(r"scale|absmax|quant_state|quant_map", re.IGNORECASE)
_SHOWN = 3


@dataclass(frozen=True)
class LoadReport:
    """Differences between a folder's files and the model loaded from it, and the limits of that model.

    Attributes:
        unplaced: tensors that the model has no place for, with * for numbers and how many they are.
        left_out: tensors that transformers leaves out of this architecture by its own rules.
        adapters: tensors of an adapter that is not merged, and the config of one beside the model.
        small_floats: weights stored in 8 bits or less without scales, which are taken as they are.
        untied: output head that the config ties to the embedding, and the files do not.
        vocabulary: number of rows of the embedding; 0 where it wasn't looked at.
        tokens_beyond: tokens of the tokenizer that have no row there.
        context: number of tokens that the model was made for.
        notes: sentences on how the run's data fit the model.
        quantized_source: format that the weights came in, and were decoded from; None for plain weights.
        on_grid: grid that the weights lie on as they are; None: on none that is known.
    """

    unplaced: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()
    adapters: tuple[str, ...] = ()
    small_floats: tuple[str, ...] = ()
    untied: str | None = None
    vocabulary: int = 0
    tokens_beyond: tuple[str, ...] = ()
    context: int | None = None
    notes: tuple[str, ...] = ()
    quantized_source: str | None = None
    on_grid: str | None = None

    def row(self) -> dict[str, Any]:
        """Findings for the manifest; kinds of which nothing was found are left out."""
        return {
            name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items() if value
        }

    def warnings(self) -> Iterator[str]:
        """A sentence for each finding that may not be what the user means."""
        if self.quantized_source:
            yield f"its weights came quantized, and are only as good as that: {self.quantized_source}"
        if self.on_grid:
            yield f"its weights lie on a grid already: {self.on_grid}; rounding them onto that grid again is exact"
        if self.unplaced:
            yield f"the model has no place for tensors of its files, which are left out: {_listed(self.unplaced)}"
        if self.adapters:
            yield f"an adapter is not merged, so the base model alone is loaded: {_listed(self.adapters)}"
        if self.small_floats:
            yield f"weights are stored in 8 bits without scales, and taken as they are: {_listed(self.small_floats)}"
        if self.untied:
            yield f"config.json ties {self.untied} to the embedding, the files hold another: it is loaded untied"
        if self.tokens_beyond:
            yield (
                f"tokens of the tokenizer are none of the embedding's {self.vocabulary}, and a text with one is "
                f"refused: {_listed(self.tokens_beyond)}"
            )


def _listed(found: Collection[str]) -> str:
    shown = ", ".join(list(found)[:_SHOWN])
    return shown if len(found) <= _SHOWN else f"{shown} and {len(found) - _SHOWN} more"


def examine(folder: Path, model: PreTrainedModel, option: str) -> LoadReport:
    """Compare the headers of a folder's files with the places of `model`, which may be on the meta device.

    Raises:
        UserError: naming `option`, where the files hold codes instead of weights, or layers that no config counts.
    """
    quantization = quantization_of(folder)
    stored, places = decoded(stored_tensors(folder, option), quantization, option), model.state_dict()
    pairs = [(place.source, place.target) for place in placed(model, stored)]
    homeless = {source: target for source, target in pairs if target not in places}
    housed = {source: target for source, target in pairs if target in places}
    small = _check_codes(stored, housed, homeless, model, option)
    rest = _without_known(homeless, model)
    left_out = [source for source in homeless if source not in rest]
    counted = _uncounted(rest, model, option)
    rest = {source: target for source, target in rest.items() if source not in counted}
    adapters = [source for source in rest if _ADAPTER.search(source)]
    beside = [ADAPTER_CONFIG] if (folder / ADAPTER_CONFIG).is_file() else []
    return LoadReport(
        unplaced=_patterns(source for source in rest if source not in adapters),
        left_out=_patterns([*left_out, *counted]),
        adapters=(*beside, *_patterns(adapters)),
        small_floats=_patterns(small),
        vocabulary=len(model.get_input_embeddings().get_parameter("weight")),
        context=context_length(model),
        quantized_source=told(stored, quantization),
    )


def tokens_beyond(tokenizer: Any, rows: int) -> tuple[str, ...]:
    """Tokens of a tokenizer whose id is none of the `rows` of an embedding, in the order of their ids."""
    beyond = {token: index for token, index in tokenizer.get_vocab().items() if index >= rows}
    return tuple(str(token) for token in sorted(beyond, key=beyond.__getitem__))


def _patterns(names: Iterable[str]) -> tuple[str, ...]:
    """Names with * for numbers, each with how many there are."""
    counts = Counter(re.sub(r"(?<![^.])\d+(?![^.])", "*", name) for name in names)
    return tuple(name if count == 1 else f"{name} ({count})" for name, count in counts.items())


def _without_known(homeless: Mapping[str, str], model: PreTrainedModel) -> dict[str, str]:
    """The tensors without a place, but for those that transformers leaves out itself, and old copies of buffers."""
    info = LoadStateDictInfo(set(), set(homeless.values()), set(), [], {}, set())
    model._adjust_missing_and_unexpected_keys(info)
    buffers = {name for name, _ in model.named_buffers()}
    return {source: target for source, target in homeless.items() if target in info.unexpected_keys - buffers}


def _uncounted(homeless: Mapping[str, str], model: PreTrainedModel, option: str) -> list[str]:
    """Tensors of layers behind the last one that the config counts as some that predict further tokens.

    Raises:
        UserError: naming the first layer that the config counts in no way.
    """
    last: dict[str, int] = {}
    for name in model.state_dict():
        parts = name.split(".")
        for i, part in enumerate(parts):
            if part.isdigit():
                parent = ".".join(parts[:i])
                last[parent] = max(last.get(parent, 0), int(part))
    further, counted = _further_layers(model), []
    for source, target in homeless.items():
        for name in (target, f"{model.base_model_prefix}.{target}"):
            parts = name.split(".")
            for i, part in enumerate(parts):
                beyond = int(part) - last.get(".".join(parts[:i]), int(part)) if part.isdigit() else 0
                if 0 < beyond <= further:
                    counted.append(source)
                elif beyond > 0:
                    count = last[".".join(parts[:i])] + 1
                    raise UserError(
                        f"{option}: holds {source}, and config.json counts {count} such layers: the model would be "
                        "cut off there; correct the count, or name the folder that the config belongs to"
                    )
    return list(dict.fromkeys(counted))


def _further_layers(model: PreTrainedModel) -> int:
    """Number of layers that predict further tokens, which a config counts apart and transformers has no place for."""
    config = model.config.get_text_config().to_dict()
    numbers = (value for name, value in config.items() if re.search("nextn|mtp", name) and type(value) is int)
    return max(numbers, default=0)


def _check_codes(
    stored: Mapping[str, StoredTensor],
    housed: Mapping[str, str],
    homeless: Mapping[str, str],
    model: PreTrainedModel,
    option: str,
) -> list[str]:
    """Names of the tensors that hold floating-point numbers of 8 bits as they are.

    Raises:
        UserError: tensors hold codes, which mean nothing without the scales that nobody would multiply them by.
    """
    places, small = model.state_dict(), []
    scales = {_module(name): name for name in homeless if _SCALE.search(name.rpartition(".")[2])}
    for source, target in housed.items():
        tensor, scale = stored[source], scales.get(_module(source))
        if not places[target].is_floating_point():
            continue
        integers = not tensor.holds_numbers and not tensor.holds_small_floats
        if integers or (scale is not None and (tensor.holds_small_floats or _all_integers(source, tensor))):
            beside = "" if scale is None else f", scales in {scale},"
            raise UserError(
                f"{option}: is quantized already, though no quantization_config says how: codes in {source} "
                f"({tensor.dtype}){beside} would be read as weights; name the full-precision model"
            )
        if tensor.holds_small_floats:
            small.append(source)
    filled = set(housed.values())
    for source, target in homeless.items():
        place = f"{_module(target)}.weight"
        if place in places and place not in filled and not stored[source].holds_numbers:
            raise UserError(
                f"{option}: is quantized already, though no quantization_config says how: it holds {source} "
                f"({stored[source].dtype}) and no weights for {place}; name the full-precision model"
            )
    return small


def _module(name: str) -> str:
    """The module of a tensor's name; that of a weight's own scale too, as in "q_proj.weight.absmax"."""
    return name.rpartition(".")[0].removesuffix(".weight")


def _all_integers(name: str, tensor: StoredTensor) -> bool:
    """Whether a tensor of 16 bits or more beside which scales lie holds codes: whole numbers, not only -1, 0 and 1."""
    if tensor.file.suffix != ".safetensors":
        return False
    with safe_open(tensor.file, framework="pt", backend="pread") as file:
        values = file.get_tensor(name)
    return bool((values == values.round()).all() and values.abs().max() > 1)
