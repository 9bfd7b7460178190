"""A tiny random model of (nearly) every architecture that transformers knows: its own config, made small.

Fields are recognized by their names: widths, counts of heads, of layers and of experts. Lists with an entry for each
layer keep every kind of entry; configs within configs are made small alike. `BY_HAND` has what no name tells.
"""

import dataclasses
import inspect
import math
import re
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.pytorch_utils import Conv1D

from gptq_awq.models.auto_class import auto_class

VOCABULARY = 512
LARGEST = 20_000_000
"""Parameters of a model that was not made small enough to be looked at."""
SIZES = [
    (r"(n_|padded_|unpadded_)?vocab(_size)?|vocab_size_per_layer_input", VOCABULARY),
    (r"moe_num_experts|num_(local_)?experts|n_routed_experts", 4),
    (r"num_experts_per_tok(en)?|moe_topk|moe_k|top_k_experts|moe_top_k|linear_num_key_heads", 2),
    (r"n_group|topk_group|num_expert_groups?|(moe_num|n|num)_shared_experts|first_k_dense_replace", 1),
    (r"moe_layer_start_index|mamba_n_?groups|n_groups", 1),
    (r"num_kv_shared_layers|num_nextn_predict_layers|num_mtp_layers|chunk_size_feed_forward", 0),
    (r"(moe|shared_expert|moe_shared_expert)_intermediate_size|shared_intermediate_size", 64),
    (r"expert_ffn_hidden_size|moe_latent_size|expert_dim|attention_hidden_size|lru_width", 64),
    (r"((text|llm|out|language|decoder|mm|projector)_)?hidden_size|embedding_size|d_model|n_embe?d|emb_dim", 64),
    (r"word_embed_proj_dim|projection(_hidden)?_dim", 64),
    (r"(dense_)?intermediate_size(_mlp)?|((encoder|decoder)_)?ffn_dim|n_inner|d_ff|dim_ff|d_inner", 128),
    (r"dff|ffn_hidden_size|feed_forward_size|mamba_d_ssm|original_max_position_embeddings", 128),
    (r"(swa_)?num_attention_heads|n_heads?|num_heads|(encoder|decoder)_attention_heads|indexer_n_heads", 4),
    (r"linear_num_(value_)?heads|linear_attn_num_heads|index_n_heads", 4),
    (r"((swa|global|attention)_)?head_dim|kv_channels|d_kv|head_size|dim_head|(swa_)?v_head_dim", 16),
    (r"qk_(nope|rope)_head_dim|linear_((key|value)_)?head_dim|index(er)?_head_dim|index_topk", 16),
    (r"sliding_window(_size)?|attention_window_size|window_size|local_window_size", 16),
    (r"attention_chunk_size|local_attention|(mamba_)?chunk_size", 16),
    (r"(ssm_)?state_size|(mamba_)?d_state|mamba_(d_)?head(_)?dim|mamba_d_head", 16),
    (r"(q_|kv_|o_)?lora_rank|compression_dim|mamba_dt_rank|time_step_rank|adapter_rank|laurel_rank", 32),
    (r"hidden_size_per_layer_input|image_size|conv_channel|subsample_hidden_size", 32),
    (r"max_position_embeddings|n_positions|n_ctx|max_seq_len|model_max_length|seq_length", 256),
    (r"(mamba_n|mamba_num|n_mamba)_heads|rotary_dim|patch_size", 8),
    (r"num_mel_(bins|filters)", 80),
]
"""Names of fields of numbers, and their value in a tiny model."""
KEY_VALUE_HEADS = r"(swa_)?num_key_value_heads|num_kv_heads|n_kv_heads|multi_query_group_num|num_query_groups"
LAYERS = r"num_hidden_layers|n_layers?|num_layers?|((encoder|decoder)_|num_(encoder|decoder)_|decoder_num_)layers|depth"
TOKEN = re.compile(r"(token_id|token_index|_id|token)s?$|_idx$")
ENCODERS = re.compile("bert|electra|data2vec|xmod|ernie$|rembert|roc_bert|roformer|big_bird")
"""Encoders that are causal language models if they are told to be decoders."""

FOUR = {"num_hidden_layers": 4}
WINDOWS = {"layer_types": ["sliding_attention", "full_attention"] * 2, **FOUR}
PLAIN_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
SECTIONS = {"rope_parameters": {**PLAIN_ROPE, "mrope_section": [2, 3, 3]}}
HALF = {"rope_parameters": {**PLAIN_ROPE, "partial_rotary_factor": 0.5, "mrope_section": [1, 1, 2]}}
SPARSE = {"num_local_experts": 4, "num_experts_per_tok": 2}
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 16, **FOUR}
SHARED_INDEXERS = {"indexer_types": ["full", "shared"] * 2}
GEMMA4 = {"head_dim": 16, "final_logit_softcapping": 30.0, **WINDOWS}
OMITTED: Any = object()
IMROPE = {"rope_parameters": {**PLAIN_ROPE, "mrope_section": [3, 3, 2]}}
SIGMOID = {"scoring_func": "sigmoid"}
INDEXED = {**SIGMOID, "index_head_dim": 64, "mlp_layer_types": OMITTED}
YARN = {
    **{"rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0},
    "original_max_position_embeddings": 4096,
}
BY_HAND: dict[str, dict[str, Any]] = {
    **dict.fromkeys(["gemma4_text", "diffusion_gemma_text"], GEMMA4),
    **dict.fromkeys(["glm4v_text", "glm46v_text", "glm_ocr_text", "glmga_text", "glm4v_moe_text"], HALF),
    **dict.fromkeys(["paddleocr_vl_text", "qwen2_5_vl_text", "qwen2_vl_text", "qwen2_5_omni_text"], SECTIONS),
    **{name: {"head_dim": 16} for name in ("hunyuan_v1_dense", "hunyuan_vl_text", "ministral")},
    **{name: {"query_pre_attn_scalar": 16} for name in ("gemma3_text", "vaultgemma", "t5gemma")},
    "gemma2": {"query_pre_attn_scalar": 16, "sliding_window": 4096},
    "gpt_bigcode": {"n_inner": 256},
    "recurrent_gemma": {"num_hidden_layers": 3, "num_key_value_heads": 1},
    **dict.fromkeys(["granitemoe", "granitemoeshared"], SPARSE),
    "hy_v4": SHARED_INDEXERS,
    **{name: {"sliding_window": 16} for name in ("step3p5", "step3p7_text")},
    "qwen3_vl_text": IMROPE,
    "qwen3_vl_moe_text": {**IMROPE, "moe_intermediate_size": 96, "norm_topk_prob": True},
    # a quarter of a head is rotated, by three sections: heads of 16 have no room for them
    **{name: {"head_dim": 256} for name in ("qwen3_5_text", "qwen3_5_moe_text")},
    "qwen3_moe": {"norm_topk_prob": True},
    **dict.fromkeys(["deepseek_v3", "glm4_moe_lite"], SIGMOID),
    "exaone_moe": {**SIGMOID, "is_moe_layer": [False, True, True, True]},
    "deepseek_v32": INDEXED,
    "glm_moe_dsa": {**INDEXED, **SHARED_INDEXERS, "moe_layer_freq": 1, "topk_method": "noaux_tc"},
    "solar_open": {"partial_rotary_factor": 1.0},
    "gpt_oss": {"head_dim": 64, "rope_parameters": {**YARN, "truncate": False, "rope_theta": 150000.0}},
    "laguna": {"layer_types": ["full_attention"] + ["sliding_attention"] * 3, **FOUR},
    "mistral": {"sliding_window": None},
    "llama4_text": {"attention_chunk_size": 8192, "num_experts_per_tok": 1},
    "exaone4": {"sliding_window": None, "layer_types": ["full_attention"] * 4, **FOUR},
    "lfm2": {"layer_types": ["conv", "conv", "full_attention", "conv"], "block_dim": 64, "full_attn_idxs": [2], **FOUR},
    "mellum": WINDOWS,
    "bitnet": {"tie_word_embeddings": True},
    "falcon_h1": {"head_dim": 16},
    "afmoe": {"route_norm": True, "mup_enabled": True},
    "ernie4_5_vl_moe_text": {"rope_parameters": {**PLAIN_ROPE, "mrope_section": [3, 3, 2]}},
    "qwen2_vl_vision": {"embed_dim": 64},
    "qwen2_vl": {"vision_config": {"depth": 2, "embed_dim": 64, "hidden_size": 64, "num_heads": 4, "patch_size": 8}},
    "dots1": {
        **{"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "first_k_dense_replace": 1},
        **SIGMOID,
    },
    "deepseek_v2": {
        **{"num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1},
        "rope_parameters": {**YARN, "rope_theta": 10000.0, "mscale": 0.707, "mscale_all_dim": 0.707},
    },
    "hunyuan_v1_moe": {
        **{"head_dim": 16, "num_experts": 4, "moe_topk": [2] * 4, "num_key_value_heads": 2},
        **{"moe_intermediate_size": [128] * 4, "num_shared_expert": [1] * 4},
    },
    "mimo_v2_flash": {
        **{"head_dim": 48, "v_head_dim": 32, "swa_head_dim": 48, "swa_v_head_dim": 32},
        **{"swa_num_attention_heads": 4, "swa_num_key_value_heads": 4, "hybrid_layer_pattern": [0, 1, 1, 1]},
        **{"topk_method": "noaux_tc", **SIGMOID},
    },
    "phimoe": {"original_max_position_embeddings": 256, "lm_head_bias": True, "attention_bias": True},
    "minimax_m2": {"rotary_dim": 8, **SIGMOID},
    "lfm2_moe": {"layer_types": ["conv", "conv", "full_attention", "conv"], "num_dense_layers": 1, **FOUR},
    "mamba2": {"num_heads": 8, "head_dim": 16, "n_groups": 1},
    "nemotron": {"num_key_value_heads": 2},
    "qwen4_exp_text": {
        **{"indexer_n_heads": 4, "indexer_kv_heads": 1, "indexer_head_dim": 128, "indexer_budget": 16},
        **{"head_dim": 256, "rope_parameters": {**PLAIN_ROPE, "partial_rotary_factor": 0.25}},
        **{"indexer_compress_ratio": 4, "hc_lowrank": 32, "output_gate_type": "sigmoid"},
    },
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "num_layers": 2},
    "gemma4_unified_text": {**GEMMA4, "moe_intermediate_size": None, "hidden_size_per_layer_input": 0},
    "gemma3n_text": {
        **{"intermediate_size": [128] * 5, "activation_sparsity_pattern": [0.95, 0.0, 0.95, 0.0, 0.0]},
        **{"hidden_size_per_layer_input": 256, "laurel_rank": 64},
    },
    "zamba": {
        **{"attention_hidden_size": 128, "attention_head_dim": 32, "mamba_dt_rank": 32, "num_hidden_layers": 6},
        "layers_block_type": ["linear_attention", "linear_attention", "hybrid"] * 2,
    },
    "zamba2": {
        **{"num_hidden_layers": 6, "mamba_headdim": 16, "kv_channels": OMITTED},
        "layers_block_type": ["linear_attention", "hybrid"] * 3,
    },
    "zaya": {"num_experts_per_tok": 1, "router_hidden_size": 32},
    "kimi_linear": {"linear_head_dim": 32},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 10000.0},
        "ffn_config": {"ffn_hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "cohere_compass_text": {
        **WINDOWS,
        "rope_parameters": dict.fromkeys(("sliding_attention", "full_attention"), PLAIN_ROPE),
    },
    "granitemoehybrid": {
        **SPARSE,
        **MAMBA,
        **{"layer_types": ["mamba", "attention"] * 2, "position_embedding_type": "nope"},
    },
    "nemotron_h": {"layers_block_type": ["linear_attention", "moe", "full_attention", "moe"], "n_groups": 1},
    "blt": {"encoder_hash_byte_group_vocab": 500},
    "reformer": {"is_decoder": True, "axial_pos_embds_dim": (32, 32), "axial_pos_shape": (16, 16)},
    "xmod": {"default_language": "en_XX", "is_decoder": True},
    "phi4_multimodal_audio": {"num_blocks": 1, **dict.fromkeys(["ext_pw_out_channel", "nemo_conv_channels"], 64)},
    "phi4_multimodal": {"num_hidden_layers": 6},
    "jamba": {
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
        **FOUR,
    },
    "bamba": {"attn_layer_indices": [1, 3], "attn_rotary_emb": 8, **MAMBA},
    "longcat_flash": {"zero_expert_num": 2, "n_routed_experts": 4},
    "mllama_text_model": {"cross_attention_layers": [1], "num_hidden_layers": 3},
    "rembert": {"input_embedding_size": 32, "output_embedding_size": 64},
}
"""model_type → fields as they shall be."""
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma4_text+experts": (
        "gemma4_text",
        {"enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 64},
    ),
    "gemma4_text+shared_kv": ("gemma4_text", {"num_kv_shared_layers": 2}),
    "git+large_text": ("git", {"num_hidden_layers": 6}),
    "gemma2+capped": ("gemma2", {"attn_logit_softcapping": 5.0, "final_logit_softcapping": 5.0}),
    "gemma2+windows": ("gemma2", {"sliding_window": 16}),
    "llama+biased": ("llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    "falcon+parallel": ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2, "alibi": False}),
    "exaone4+windows": (
        "exaone4",
        {
            **{"sliding_window": 16, "layer_types": ["sliding_attention"] * 3 + ["full_attention"]},
            "sliding_window_pattern": "LLLG",
        },
    ),
    "llama4_text+chunks": ("llama4_text", {"attention_chunk_size": 16}),
    "mistral+windows": ("mistral", {"sliding_window": 16}),
    "nemotron_h+dense": ("nemotron_h", {"layers_block_type": ["linear_attention", "mlp", "full_attention", "mlp"]}),
    "qwen3_moe+unnormalized": ("qwen3_moe", {"norm_topk_prob": False}),
    "opt+post_norm": ("opt", {"do_layer_norm_before": False, "word_embed_proj_dim": 32}),
}
"""Fields that an architecture's default config leaves out: name → model_type, further fields."""


def architectures() -> list[str]:
    """Every causal language model, every model that also sees, and the variants."""
    causal, seeing = (
        modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    )
    return [*dict.fromkeys([*causal, *seeing]), *VARIANTS]


def tiny_architecture(name: str) -> PreTrainedModel:
    """A random model in eval mode, of an architecture by its model_type, or of a variant; the same one at each call.

    Raises:
        RuntimeError: it has too many parameters, as a field of its config wasn't recognized.
    """
    kind, further = VARIANTS.get(name, (name, {}))
    cls = CONFIG_MAPPING[kind]
    config = cls(**_small(cls) | further)
    torch.manual_seed(0)
    model = auto_class(config).from_config(config).eval().requires_grad_(False)
    if (size := sum(p.numel() for p in model.parameters())) > LARGEST:
        raise RuntimeError(f"{size / 1e6:.0f}M parameters: its config wasn't made small")
    _randomize(model)
    return model


def _fields(cls: type) -> set[str]:
    """Names of the fields that a config's class can be given."""
    names = {field.name for field in dataclasses.fields(cls)} if dataclasses.is_dataclass(cls) else set()
    for base in cls.__mro__:
        if base not in (PreTrainedConfig, object) and "__init__" in base.__dict__:
            names |= set(inspect.signature(base.__init__).parameters)
    return names - {"self", "args", "kwargs"}


def _values(cls: type) -> dict[str, Any]:
    """Fields of a config's class, with their defaults; None for one that is computed by layer."""
    default, values = cls(), {}
    for name in sorted(_fields(cls)):
        try:
            values[name] = getattr(default, name, None)
        except Exception:
            values[name] = None
    return values


def _small(cls: type) -> dict[str, Any]:
    """Fields for a tiny config of this class."""
    values = _values(cls)
    numbers = {name: value for name, value in values.items() if type(value) is int}
    layers = next((numbers[name] for name in numbers if re.fullmatch(LAYERS, name)), 0)
    by_layer = [v for v in values.values() if isinstance(v, (list, tuple)) and layers and len(v) == layers > 3]
    kinds = any(len({str(x) for x in value}) > 1 for value in by_layer)
    sparse = any(name.startswith("moe") or "expert" in name for name in values)
    count = min(layers or 4, max(4, *map(_period, by_layer)) if kinds else 4 if sparse else 2)
    heads = next((numbers[name] for name in ("num_attention_heads", "n_head", "n_heads") if name in numbers), None)
    width = next((numbers[name] for name in ("hidden_size", "n_embd", "d_model") if name in numbers), None)
    small = dict(_fields_made_small(cls.model_type, values, layers, count, heads))
    for name in (name for name, value in numbers.items() if width and value == 4 * width and small.get(name) == 128):
        small[name] = 256  # some readers take four times the width for granted
    small |= BY_HAND.get(cls.model_type, {})
    return {name: value for name, value in small.items() if value is not OMITTED}


def _fields_made_small(
    kind: str, values: dict[str, Any], layers: int, count: int, heads: int | None
) -> Iterator[tuple[str, Any]]:
    """The fields that a tiny config has other values for."""
    tokens = iter(range(300, 500))
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    for name, value in values.items():
        if isinstance(value, PreTrainedConfig):
            yield name, type(value)(**_small(type(value)))
        elif name in special and value is not None:
            yield name, special[name]
        elif name == "is_decoder" and ENCODERS.search(kind):
            yield name, True
        elif name in ("rope_parameters", "rope_scaling") and isinstance(value, dict):
            yield name, _rope(value)
        elif isinstance(value, (list, tuple)) and layers and len(value) == layers > 3:
            each = dict(_number(name.removesuffix("_per_layer"), value[0], count, heads, tokens))
            yield name, list(each.values()) * count or _shortened(list(value), count)
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            yield from _number(name, value, count, heads, tokens)


def _number(name: str, value: Any, count: int, heads: int | None, tokens: Iterator[int]) -> Iterator[tuple[str, Any]]:
    """A number's field in a tiny config; nothing where it keeps its value."""
    size = next((size for pattern, size in SIZES if re.fullmatch(pattern, name)), None)
    if re.fullmatch(LAYERS, name):
        yield name, count
    elif re.fullmatch(KEY_VALUE_HEADS, name):
        yield name, value if value == 1 else 4 if value == heads else 2
    elif size is not None:
        yield name, min(size, value) if name.endswith("shared_experts") else size
    elif TOKEN.search(name) and value >= 250:
        yield name, next(tokens)


def _period(values: Sequence) -> int:
    """Number of layers after which their kinds repeat, such as 6 for five windows and one full attention."""
    known = list(values)
    return next((n for n in range(1, 9) if all(a == b for a, b in zip(known, known[n:], strict=False))), 1)


def _shortened(values: list, count: int) -> list:
    """The entries of the first layers, with every kind of entry among them."""
    kinds = list({str(value): value for value in values}.values())[:count]
    if len({str(value) for value in values[:count]}) == len(kinds):
        return values[:count]
    return [kinds[0]] * (count - len(kinds)) + kinds


def _rope(value: dict) -> dict:
    """Rotary embedding's parameters for heads of 16."""
    small = {name: _rope(each) if isinstance(each, dict) else each for name, each in value.items()}
    if "mrope_section" in small:
        small["mrope_section"] = [2, 3, 3]
    if "original_max_position_embeddings" in small:
        small["original_max_position_embeddings"] = 128
    return small | {name: small[name][:8] for name in ("short_factor", "long_factor") if name in small}


@torch.no_grad()
def _randomize(model: PreTrainedModel) -> None:
    """Give a model weights at which every layer matters, and norms and biases that are not trivially 1 and 0."""
    draw, done = torch.Generator().manual_seed(0), set()

    def normal(weight: torch.Tensor, deviation: float) -> None:
        weight.copy_(deviation * torch.randn(weight.shape, generator=draw))
        done.add(id(weight))

    for module in model.modules():
        if isinstance(module, (nn.Linear, Conv1D)):
            normal(module.weight, module.weight.shape[0 if isinstance(module, Conv1D) else 1] ** -0.5)
        elif isinstance(module, nn.Embedding):
            normal(module.weight, 0.25)
    for name, parameter in model.named_parameters():
        if id(parameter) in done or not parameter.is_floating_point():
            continue
        if parameter.dim() == 1:
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=draw))
        elif _is_untrained_matrix(name, parameter):
            normal(parameter, 1 / math.sqrt(min(parameter.shape[-2:])))
    head = model.get_output_embeddings()
    if getattr(head, "weight", None) is not None:
        normal(head.weight, 2 * head.weight.shape[1] ** -0.5)
    model.tie_weights()


def _is_untrained_matrix(name: str, parameter: torch.Tensor) -> bool:
    """Whether a parameter is a matrix, or a stack of them, that its model leaves next to zero."""
    named = "expert" in name or (name.endswith((".gate_up_proj", ".down_proj", ".weight")) and "conv" not in name)
    return named and parameter.dim() in (2, 3) and parameter.numel() > 0 and float(parameter.abs().max()) < 0.2
