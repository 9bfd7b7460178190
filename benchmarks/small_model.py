"""Two small models trained on bytes of a text, for benchmarks that a published model doesn't fit or is not enough for.

    python benchmarks/small_model.py --text FILE --out DIR [--shape llama] [--minutes 15]

Widths 256 and 512 (1024), 3 layers, 8 heads, 256 tokens, one per byte; AdamW with a linear decay over the given time.
`llama` has rotary positions, grouped queries, RMSNorm and SwiGLU, and all its widths are multiples of 256, which
llama.cpp's blocks need; `gpt2` has learned positions, LayerNorm, biases and GELU. They have no tokenizer: benchmarks
feed them bytes.
"""

import argparse
import time
from pathlib import Path

import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from gptq_awq.data.tokens import TokenSet, make_token_set

SEQLEN, BATCH, RATE = 128, 6, 2e-3


def untrained(shape: str) -> PreTrainedModel:
    """A model of one of the two shapes, initialised at random."""
    if shape == "gpt2":
        return GPT2LMHeadModel(GPT2Config(vocab_size=256, n_embd=256, n_layer=3, n_head=8, n_positions=1024))
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=256,
            hidden_size=256,
            intermediate_size=512,
            num_hidden_layers=3,
            num_attention_heads=8,
            num_key_value_heads=4,
            max_position_embeddings=1024,
            tie_word_embeddings=False,
        )
    )


def bytes_of(text: Path) -> torch.Tensor:
    """A text as token ids."""
    return torch.frombuffer(bytearray(text.read_bytes()), dtype=torch.uint8)


def windows(text: Path, seqlen: int, count: int, first: int = 0) -> TokenSet:
    """`count` windows of a text's bytes, evenly spread over it, from byte `first` on."""
    data = bytes_of(text)
    step = (len(data) - first - seqlen) // count
    ids = torch.stack([data[first + i * step : first + i * step + seqlen] for i in range(count)]).long()
    return make_token_set(text.name, ids, None, str(text))


def train(text: Path, minutes: float, shape: str = "llama") -> PreTrainedModel:
    """Train a model on random windows of a text for the given time."""
    torch.manual_seed(0)
    model, data = untrained(shape).train(), bytes_of(text)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.95), weight_decay=0.1)
    started, step = time.monotonic(), 0
    while (spent := (time.monotonic() - started) / 60 / minutes) < 1:
        for group in optimizer.param_groups:
            group["lr"] = RATE * min((step + 1) / 50, 1 - spent)
        first = torch.randint(len(data) - SEQLEN, (BATCH,))
        ids = torch.stack([data[i : i + SEQLEN] for i in first.tolist()]).long()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 50 == 0:
            print(f"step {step}, {spent:.0%} of the time: {loss.item():.3f} nats a byte", flush=True)
        step += 1
    return model.eval()


def main() -> None:
    """Train and save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--shape", choices=["llama", "gpt2"], default="llama")
    parser.add_argument("--minutes", type=float, default=15.0)
    args = parser.parse_args()
    train(args.text, args.minutes, args.shape).save_pretrained(args.out)


if __name__ == "__main__":
    main()
