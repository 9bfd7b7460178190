"""Mapping of transformers' architectures to llama.cpp's: tensor names, row order, hyperparameters and their limits.

llama.cpp has one fixed graph per architecture (its src/models/), so a config with features that the graph lacks
(another activation, partial rotation, a bias) is refused, as llama.cpp would silently compute something else.
"""

import logging
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from gguf import GGUFWriter, RopeScalingType
from jaxtyping import Float, Int

from gptq_awq.errors import UserError
from gptq_awq.models.blocks import head_size, key_value_heads

log = logging.getLogger(__name__)

Array = np.ndarray[Any, np.dtype[Any]]

LLAMA_OUTER = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
LLAMA_INNER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
HEAD_NORMS = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
SANDWICH_NORMS = {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
PHI3_INNER = {
    "attn_norm": "input_layernorm",
    "attn_qkv": "self_attn.qkv_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_up": "mlp.gate_up_proj",
    "ffn_down": "mlp.down_proj",
}
GPT2_OUTER = {
    "token_embd": "transformer.wte",
    "position_embd": "transformer.wpe",
    "output_norm": "transformer.ln_f",
    "output": "lm_head",
}
GPT2_INNER = {
    "attn_norm": "ln_1",
    "attn_qkv": "attn.c_attn",
    "attn_output": "attn.c_proj",
    "ffn_norm": "ln_2",
    "ffn_up": "mlp.c_fc",
    "ffn_down": "mlp.c_proj",
}
NEOX_OUTER = {"token_embd": "gpt_neox.embed_in", "output_norm": "gpt_neox.final_layer_norm", "output": "lm_head"}
NEOX_INNER = {
    "attn_norm": "input_layernorm",
    "attn_qkv": "attention.query_key_value",
    "attn_output": "attention.dense",
    "ffn_norm": "post_attention_layernorm",
    "ffn_up": "mlp.dense_h_to_4h",
    "ffn_down": "mlp.dense_4h_to_h",
}
GELU_TANH = ("gelu_pytorch_tanh", "gelu_new")


@dataclass(frozen=True)
class Architecture:
    """One llama.cpp architecture: tensor names, row orders, and the features that its graph computes.

    Attributes:
        name: architecture name, the value of `general.architecture`.
        inner: GGUF tensor → module inside of block N, for `blk.N.TENSOR` → `blocks.N.MODULE`.
        outer: GGUF tensor → module outside of the blocks.
        blocks: path of the module list of blocks.
        activations: activation functions that the graph computes.
        rope: rope types (position scaling) that the graph computes; empty for learned positions.
        biased: whether attention's linears may (True), must ("always") or can't (False) have a bias.
        square: whether heads x head_dim must equal the hidden size.
        head: tensor that logits are computed with: "output", "embedding", or "either", which is the output
            tensor, or the embedding where that is missing.
        norm_shift: constant that is added to the weights of norms (Gemma multiplies by 1 + weight).
        windows: whether the graph has layers with sliding windows.
        orders: GGUF tensor → function of the config that gives the order of its rows.
    """

    name: str
    inner: Mapping[str, str]
    outer: Mapping[str, str]
    blocks: str = "model.layers"
    activations: tuple[str, ...] = ("silu",)
    rope: tuple[str, ...] = ("default", "linear")
    biased: bool | str = False
    square: bool = False
    head: str = "either"
    norm_shift: int = 0
    windows: bool = False
    orders: Mapping[str, Callable[[Any], Int[np.ndarray, "rows"]]] | None = None

    def modules(self, blocks: int) -> Iterator[tuple[str, str]]:
        """Pairs (GGUF tensor, module) of a model with `blocks` blocks, in the order of a GGUF file."""
        last = [name for name in self.outer if name.startswith("output")]
        yield from ((name, module) for name, module in self.outer.items() if name not in last)
        for i in range(blocks):
            yield from ((f"blk.{i}.{name}", f"{self.blocks}.{i}.{module}") for name, module in self.inner.items())
        yield from ((name, self.outer[name]) for name in last)

    def order(self, tensor: str, config: Any) -> Int[np.ndarray, "rows"] | None:
        """Row order of a GGUF tensor: its row i is row `order[i]` of the module's weight; None where orders agree."""
        order = (self.orders or {}).get(tensor.split(".")[-1])
        return order(config) if order else None


def _interleaved(heads: int, head_dim: int) -> Int[np.ndarray, "rows"]:
    """Row order of q and k in llama.cpp's llama.

    It rotates neighbours (2i, 2i + 1) of a head, where transformers rotates pairs (i, i + d/2).
    """
    return np.arange(heads * head_dim).reshape(heads, 2, head_dim // 2).swapaxes(1, 2).reshape(-1)


def _split_qkv(heads: int, head_dim: int) -> Int[np.ndarray, "rows"]:
    """Row order of GPT-NeoX's fused qkv in llama.cpp: all q, then all k, then all v, instead of q, k, v per head."""
    return np.arange(3 * heads * head_dim).reshape(heads, 3, head_dim).swapaxes(0, 1).reshape(-1)


LLAMA = Architecture(
    "llama",
    LLAMA_INNER,
    LLAMA_OUTER,
    rope=("default", "linear", "llama3"),
    biased=True,
    orders={
        "attn_q": lambda c: _interleaved(c.num_attention_heads, head_size(c)),
        "attn_k": lambda c: _interleaved(key_value_heads(c), head_size(c)),
    },
)
GEMMA = {"activations": ("gelu_pytorch_tanh",), "norm_shift": 1}

ARCHITECTURES: Mapping[str, Architecture] = {
    "llama": LLAMA,
    "mistral": LLAMA,
    "qwen2": Architecture("qwen2", LLAMA_INNER, LLAMA_OUTER, rope=("default", "linear", "yarn"), square=True),
    "qwen3": Architecture("qwen3", LLAMA_INNER | HEAD_NORMS, LLAMA_OUTER, rope=("default", "linear", "yarn")),
    "gemma": Architecture("gemma", LLAMA_INNER, LLAMA_OUTER, head="embedding", **GEMMA),
    "gemma2": Architecture(
        "gemma2", LLAMA_INNER | SANDWICH_NORMS, LLAMA_OUTER, head="embedding", windows=True, **GEMMA
    ),
    "gemma3_text": Architecture(
        "gemma3", LLAMA_INNER | SANDWICH_NORMS | HEAD_NORMS, LLAMA_OUTER, windows=True, **GEMMA
    ),
    "phi3": Architecture("phi3", PHI3_INNER, LLAMA_OUTER, square=True),
    "gpt2": Architecture(
        "gpt2",
        GPT2_INNER,
        GPT2_OUTER,
        blocks="transformer.h",
        activations=GELU_TANH,
        rope=(),
        biased="always",
        square=True,
    ),
    "gpt_neox": Architecture(
        "gptneox",
        NEOX_INNER,
        NEOX_OUTER,
        blocks="gpt_neox.layers",
        activations=("gelu", *GELU_TANH),  # llama.cpp computes the tanh approximation for all of them
        biased="always",
        square=True,
        head="output",
        orders={"attn_qkv": lambda c: _split_qkv(c.num_attention_heads, head_size(c))},
    ),
}
"""Transformers' model_type → llama.cpp's architecture."""


def architecture(config: Any) -> Architecture:
    """llama.cpp architecture of a model. Raises UserError that lists the supported ones where there is none."""
    if config.model_type not in ARCHITECTURES:
        raise UserError(
            f"export.formats: gguf is written for {', '.join(ARCHITECTURES)}, not for {config.model_type}; "
            "choose another format, such as hf"
        )
    return ARCHITECTURES[config.model_type]


def check_architecture(config: Any) -> None:
    """Raise UserError unless llama.cpp's graph computes the model that this config describes."""
    for wrong in _differences(architecture(config), config):
        raise UserError(
            f"export.formats: llama.cpp's {config.model_type} has no {wrong}; choose another format, such as hf"
        )


def _differences(arch: Architecture, config: Any) -> Iterator[str]:
    """Features that the config requires and the graph lacks, in words."""
    if (activation := _activation(config)) not in arch.activations:
        yield f"{activation} activation"
    for rope in _ropes(config).values() if arch.rope else ():
        if (kind := rope.get("rope_type", "default")) not in arch.rope:
            yield f"{kind} rope"
        if rope.get("partial_rotary_factor", 1.0) != 1 and arch.name not in ("gptneox", "phi3"):
            yield "partial rotation"
    if arch.square and head_size(config) * config.num_attention_heads != config.hidden_size:
        yield "attention wider or narrower than the hidden size"
    if not arch.biased and getattr(config, "attention_bias", False):
        yield "attention_bias"
    if arch.biased == "always" and not getattr(config, "attention_bias", True):
        yield "attention without bias"
    if arch.head == "embedding" and not config.tie_word_embeddings:
        yield "output layer of its own"
    yield from _attention_differences(config)


def _attention_differences(config: Any) -> Iterator[str]:
    """Attention features that the config requires and the graph lacks: scaling, capping, masks, cross attention."""
    scalar = getattr(config, "query_pre_attn_scalar", None)
    if scalar is not None:
        blocks, gemma2 = config.num_hidden_layers, config.model_type == "gemma2"
        largest = blocks == (46 if gemma2 else 62)  # llama.cpp tells the 27B models by their number of blocks
        fixed = config.hidden_size // config.num_attention_heads if largest else head_size(config)
        if scalar != fixed:
            yield f"query_pre_attn_scalar={scalar} (but {fixed})"
    if getattr(config, "use_bidirectional_attention", False):
        yield "bidirectional attention"
    if config.model_type == "gemma3_text" and getattr(config, "attn_logit_softcapping", None):
        yield "attn_logit_softcapping"
    if config.model_type == "gpt2" and (config.scale_attn_by_inverse_layer_idx or not config.scale_attn_weights):
        yield "other scale of attention than 1/sqrt(head_dim)"
    if getattr(config, "add_cross_attention", False):
        yield "cross attention"


def _activation(config: Any) -> str:
    for name in ("hidden_activation", "hidden_act", "activation_function"):
        if getattr(config, name, None):
            return getattr(config, name)
    return "unknown"


def _ropes(config: Any) -> dict[str, Mapping[str, Any]]:
    """Layer type → rope parameters; the only key is "" where all layers share them."""
    rope = getattr(config, "rope_parameters", None) or {}
    if "full_attention" in rope or "sliding_attention" in rope:
        return {kind: parameters for kind, parameters in rope.items() if parameters}
    return {"": rope}


def rows(name: str, config: Any) -> Int[np.ndarray, "rows"] | None:
    """Row order of module `name`: row i of its GGUF tensor is row `rows[i]` of the module; None where orders agree."""
    arch = architecture(config)
    tensors = {module: tensor for tensor, module in arch.modules(config.num_hidden_layers)}
    return arch.order(tensors[name], config)


def add_hyperparameters(writer: GGUFWriter, config: Any) -> None:
    """Add the model's hyperparameters, the `ARCH.*` fields of the file."""
    arch = architecture(config)
    head_dim = head_size(config)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(context_length(config))
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(_feed_forward_length(config))
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(key_value_heads(config))
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    if hasattr(config, "rms_norm_eps"):
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    elif hasattr(config, "layer_norm_eps"):
        writer.add_layer_norm_eps(config.layer_norm_eps)
    else:
        writer.add_layer_norm_eps(config.layer_norm_epsilon)
    if hasattr(config, "use_parallel_residual"):
        writer.add_parallel_residual(config.use_parallel_residual)
    if arch.rope:
        _add_rope(writer, config, head_dim)
    if arch.windows:
        _add_gemma(writer, config)


def _feed_forward_length(config: Any) -> int:
    if config.model_type == "gpt2":
        return config.n_inner or 4 * config.hidden_size
    return config.intermediate_size


def context_length(config: Any) -> int:
    """Maximum number of positions; one sliding window where the model has windows that llama.cpp ignores."""
    length = config.max_position_embeddings
    window = getattr(config, "sliding_window", None)
    if architecture(config).windows or not window or window >= length:
        return length
    log.warning(
        "gguf: llama.cpp's %s has no sliding windows: context_length is one window, %d",
        config.model_type,
        window,
    )
    return window


def _add_rope(writer: GGUFWriter, config: Any, head_dim: int) -> None:
    ropes = _ropes(config)
    rope = ropes.get("full_attention") or ropes.get("") or {}
    writer.add_rope_dimension_count(int(head_dim * rope.get("partial_rotary_factor", 1.0)))
    writer.add_rope_freq_base(rope["rope_theta"])
    if "sliding_attention" in ropes:
        writer.add_rope_freq_base_swa(ropes["sliding_attention"]["rope_theta"])
    kind = rope.get("rope_type", "default")
    if kind in ("linear", "yarn"):
        writer.add_rope_scaling_type(RopeScalingType(kind))
        writer.add_rope_scaling_factor(rope["factor"])
    if kind == "yarn":
        writer.add_rope_scaling_orig_ctx_len(
            rope.get("original_max_position_embeddings") or config.max_position_embeddings
        )


def _add_gemma(writer: GGUFWriter, config: Any) -> None:
    writer.add_sliding_window(config.sliding_window)
    sliding = [kind == "sliding_attention" for kind in config.layer_types]
    every = 2 if config.model_type == "gemma2" else 6  # llama.cpp's default: every nth block sees all
    if sliding != [(i + 1) % every != 0 for i in range(len(sliding))]:
        writer.add_sliding_window_pattern(sliding)
    if cap := getattr(config, "attn_logit_softcapping", None):
        writer.add_attn_logit_softcapping(cap)
    if cap := getattr(config, "final_logit_softcapping", None):
        writer.add_final_logit_softcapping(cap)


def rope_factors(config: Any) -> Float[np.ndarray, "half_head"] | None:
    """Factors that divide the rope frequencies in Llama 3.1 (transformers' rope type llama3); None for other types.

    With L = original_max_position_embeddings: wavelengths below L / high_freq_factor keep factor 1, those above
    L / low_freq_factor get `factor`; in between the reciprocals 1 and 1 / `factor` are interpolated linearly in
    L / wavelength.
    """
    rope = _ropes(config).get("", {})
    if rope.get("rope_type") != "llama3":
        return None
    dim, factor = head_size(config), rope["factor"]
    wavelength = 2 * math.pi * rope["rope_theta"] ** (np.arange(0, dim, 2) / dim)
    context, low, high = (rope[k] for k in ("original_max_position_embeddings", "low_freq_factor", "high_freq_factor"))
    smooth = np.clip((context / wavelength - low) / (high - low), 0, 1)
    return (1 / ((1 - smooth) / factor + smooth)).astype(np.float32)
