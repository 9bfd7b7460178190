"""Small random models of many architectures, with norms and biases that are not trivially 1 and 0."""

import string

import torch
import transformers as T  # noqa: N812

COMMON = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED = COMMON | {"num_key_value_heads": 2}
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}

OPT = SPECIAL | {
    "vocab_size": 64,
    "hidden_size": 64,
    "ffn_dim": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
}

CONFIGS = {
    "llama": lambda: T.LlamaConfig(**GROUPED),
    "mistral": lambda: T.MistralConfig(**GROUPED),
    "qwen2": lambda: T.Qwen2Config(**GROUPED),
    "qwen3": lambda: T.Qwen3Config(**GROUPED, head_dim=16),
    "gemma3": lambda: T.Gemma3TextConfig(
        **GROUPED, head_dim=16, layer_types=["sliding_attention", "full_attention"], sliding_window=8
    ),
    "opt": lambda: T.OPTConfig(**OPT, word_embed_proj_dim=64),
    "opt-post-norm": lambda: T.OPTConfig(**OPT, word_embed_proj_dim=32, do_layer_norm_before=False),
    "gpt2": lambda: T.GPT2Config(vocab_size=64, n_embd=64, n_layer=2, n_head=4, n_positions=128, **SPECIAL),
    "gpt-neox": lambda: T.GPTNeoXConfig(**COMMON),
    "phi3": lambda: T.Phi3Config(**GROUPED),
}

ROUTED = GROUPED | {"intermediate_size": 96, "num_experts_per_tok": 2}
DEEPSEEK = ROUTED | {
    **{"num_hidden_layers": 3, "num_key_value_heads": 4, "first_k_dense_replace": 1, "n_shared_experts": 1},
    **{"n_routed_experts": 8, "n_group": 2, "topk_group": 1, "moe_intermediate_size": 48},
    **{"q_lora_rank": 32, "kv_lora_rank": 32, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 16},
}

MIXTURES = {
    "mixtral": lambda: T.MixtralConfig(**ROUTED, num_local_experts=4),
    "qwen3-moe": lambda: T.Qwen3MoeConfig(**ROUTED, head_dim=16, num_experts=8, moe_intermediate_size=48),
    "deepseek-v3": lambda: T.DeepseekV3Config(**DEEPSEEK, scoring_func="sigmoid"),
    "gpt-oss": lambda: T.GptOssConfig(**ROUTED, head_dim=16, num_local_experts=4),
}
"""With experts, fused as transformers has them; gpt-oss' matrices are transposed and have biases."""


def tiny_model(name: str, seed: int = 0) -> T.PreTrainedModel:
    """A random causal LM; the same one for the same name and seed."""
    torch.manual_seed(seed)
    model = T.AutoModelForCausalLM.from_config((CONFIGS | MIXTURES)[name]()).eval().requires_grad_(False)
    for parameter in model.parameters():
        if parameter.dim() == 1 or name in MIXTURES:  # a mixture's routers are nearly or wholly zero, too
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def tiny_tokens(rows: int = 4, length: int = 32, seed: int = 0) -> torch.Tensor:
    """Random token ids without special ones."""
    return torch.randint(3, 64, (rows, length), generator=torch.Generator().manual_seed(seed))


def save_tiny_folder(folder, name: str = "llama"):
    """Save a random model with a tokenizer of 64 characters, as a transformers folder."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    characters = ["<pad>", "<s>", "</s>", *string.ascii_letters, *" .,\n!?'-:"]
    tokenizer = Tokenizer(models.WordLevel({c: i for i, c in enumerate(characters)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    fast = T.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<pad>"
    )
    tiny_model(name).save_pretrained(folder)
    fast.save_pretrained(folder)
    return folder
