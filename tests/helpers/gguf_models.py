"""Models, tokenizers and text for the tests of GGUF files, and files written from them."""

import json

import torch
import transformers as T  # noqa: N812
from gguf import GGUFReader
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from tokenizers.pre_tokenizers import ByteLevel, Digits, Split

from gptq_awq.export.base import Source
from gptq_awq.export.gguf import GGUFFormat
from helpers.tiny_models import CONFIGS, GROUPED, SPECIAL

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32}
GEMMA3_ROPE = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
}
GEMMA = GROUPED | {"head_dim": 16}
VARIANTS = {
    "llama": CONFIGS["llama"],
    "llama-biased": lambda: T.LlamaConfig(
        **GROUPED, attention_bias=True, mlp_bias=True, tie_word_embeddings=True, head_dim=32
    ),
    "llama-3.1": lambda: T.LlamaConfig(**GROUPED, rope_parameters=LLAMA3),
    "llama-linear": lambda: T.LlamaConfig(
        **GROUPED, rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}
    ),
    "llama-256": lambda: T.LlamaConfig(**GROUPED | {"hidden_size": 256, "intermediate_size": 512}),
    "mistral": CONFIGS["mistral"],
    "qwen2": CONFIGS["qwen2"],
    "qwen2-yarn": lambda: T.Qwen2Config(**GROUPED, rope_parameters=YARN),
    "qwen3": CONFIGS["qwen3"],
    "qwen3-wide": lambda: T.Qwen3Config(**GROUPED, head_dim=128, tie_word_embeddings=True),
    "gemma": lambda: T.GemmaConfig(**GEMMA),
    "gemma2": lambda: T.Gemma2Config(
        **GEMMA, query_pre_attn_scalar=16, sliding_window=8, attn_logit_softcapping=0.5, final_logit_softcapping=5.0
    ),
    "gemma3": lambda: T.Gemma3TextConfig(
        **GEMMA,
        query_pre_attn_scalar=16,
        sliding_window=8,
        layer_types=["full_attention", "sliding_attention"],
        rope_parameters=GEMMA3_ROPE,
    ),
    "phi3": CONFIGS["phi3"],
    "phi3-partial": lambda: T.Phi3Config(
        **GROUPED, rope_parameters={"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
    ),
    "gpt2": CONFIGS["gpt2"],
    "gpt2-untied": lambda: T.GPT2Config(
        vocab_size=64, n_embd=64, n_layer=2, n_head=4, n_positions=1024, tie_word_embeddings=False, **SPECIAL
    ),
    "gpt-neox": CONFIGS["gpt-neox"],
    "gpt-neox-serial": lambda: T.GPTNeoXConfig(
        **{k: v for k, v in GROUPED.items() if k != "num_key_value_heads"}, use_parallel_residual=False
    ),
}
CORPUS = [
    "It's IT'S it'Ll x'RE 'tis ''s we've I'm he'LL. The cat sees the dog and then the cat runs, red tree house!",
    "12345 1 22 333 4444 5.5e-7 x=3.14; a  5 and 1234   def f(x):\n\treturn x**2  # \t tab\r\n\r\n",
    "CamelCaseWORDSmixedUP ÀÉÎõü //comment\n/// x /* y */\n\n/ !@#$%^&*()_+-=[]{}|;':\",./<>? a_b-c",
    "Ünïcödé 日本語テキスト 한국어 🚀😶‍🌫️ нещо на Български ?我想在apple工作1314151天～ \u00a0nbsp\u3000x",
]


def built(variant: str, vocab_size: int = 64):
    """A random model whose weights are large enough that every part of it shows in the logits."""
    config = VARIANTS[variant]()
    config.vocab_size = vocab_size
    torch.manual_seed(0)
    model = T.AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.mul_(3) if parameter.dim() == 2 else parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def bpe(steps, ignore_merges=False, **special):
    """A byte-level tokenizer of some 500 tokens: "bytes of words", "digits", or "split REGEX" and "bytes"."""
    made = {
        "bytes of words": lambda: ByteLevel(add_prefix_space=False, use_regex=True),
        "bytes": lambda: ByteLevel(add_prefix_space=False, use_regex=False),
        "digits": lambda: Digits(individual_digits=True),
    }
    parts = [made[s]() if s in made else Split(Regex(s.removeprefix("split ")), "isolated") for s in steps]
    tokenizer = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    tokenizer.pre_tokenizer = parts[0] if len(parts) == 1 else pre_tokenizers.Sequence(parts)
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=["<|end|>"], initial_alphabet=ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return T.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **({"eos_token": "<|end|>"} | special))


DEFAULT = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}


def pieces(prepend_scheme, **special):
    """A tokenizer of some 500 pieces as SentencePiece's are converted; `prepend_scheme`: of the space before a text."""
    symbols = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prepend_scheme, split=False)
    tokenizer.train_from_iterator(
        [line.replace(" ", "  ") for text in CORPUS for line in (text, text.lower())],
        trainers.BpeTrainer(vocab_size=700, special_tokens=symbols, show_progress=False),
    )
    content = json.loads(tokenizer.to_str())
    content["added_tokens"] = content["added_tokens"][:3]  # bytes are no added tokens
    content["post_processor"] = None
    tokenizer = Tokenizer.from_str(json.dumps(content))
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return T.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **(DEFAULT | special))


def exported(folder, model, tokenizer=None, weights=None, **options):
    """Write a model as GGUF, plain unless `weights` are given; the file's path."""
    GGUFFormat(**options).write(Source(model, tokenizer, "tiny", weights or {}), folder)
    return folder / "model.gguf"


def fields(path):
    """The metadata of a GGUF file."""
    return {key: field.contents() for key, field in GGUFReader(path).fields.items()}


def block_types_in(path, layout):
    """The model's tensors in a GGUF file → type that llama.cpp stores them in."""
    read = GGUFReader(path).tensors
    return {part.name: tensor.tensor_type.name for tensor in read for part in layout.parts(tensor.name)}
