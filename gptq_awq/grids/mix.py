"""llama.cpp's file types, such as Q4_K_M: mixes that give each weight of a model one of llama.cpp's formats.

Most weights get one type, those that matter more (attention values, the MLP's last layer in some blocks, the output
head) one of more bits; where a width is no multiple of 256, a weight gets the type that llama.cpp falls back to.
The rules are those of its quantizer (src/llama-quant.cpp, release 11434) for dense models.
"""

import re
from collections.abc import Mapping
from typing import Literal

from gptq_awq.grids.affine import AffineGrid
from gptq_awq.grids.base import Grid, Place
from gptq_awq.grids.kquant import BLOCK, TYPES, KGrid
from gptq_awq.grids.scaled_float import ScaledFloatGrid
from gptq_awq.grids.signed import SignedGrid
from gptq_awq.grids.table import TableGrid
from gptq_awq.grids.ternary import TernaryGrid
from gptq_awq.grids.vectors import VECTOR_TYPES, VectorGrid
from gptq_awq.runtime.options import Search, checked_dataclass

ROLES = {
    "attn_v": r"v_proj|attention\.wv",
    "attn_qkv": r"qkv_proj|c_attn|query_key_value|Wqkv",
    "attn_output": r"o_proj|out_proj|attn\.c_proj|attention\.(dense|wo)",
    "ffn_down": r"down_proj|fc2|mlp\.c_proj|dense_4h_to_h|feed_forward\.w2",
    "embedding": r"embed_tokens|wte|embed_in|word_embeddings",
    "output": r"lm_head|embed_out",
}
FALLBACK = {
    "q2_k": "q4_0",
    "q3_k": "q4_0",
    "q4_k": "q5_0",
    "q5_k": "q5_1",
    "q6_k": "q8_0",
    "tq1_0": "q4_0",
    "tq2_0": "q4_0",
}
# Type of most weights, by file type.
BASE = {name: name for name in ("q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "iq4_nl", "q2_k", "q6_k", "tq1_0", "tq2_0")} | {
    f"{base}_{size}": base for base, sizes in {"q3_k": "sml", "q4_k": "sm", "q5_k": "sm"}.items() for size in sizes
}


# fmt: off
FileType = Literal[
    "iq4_nl", "q2_k", "q3_k_l", "q3_k_m", "q3_k_s", "q4_0", "q4_1", "q4_k_m", "q4_k_s",
    "q5_0", "q5_1", "q5_k_m", "q5_k_s", "q6_k", "q8_0", "tq1_0", "tq2_0",
]
# fmt: on
"""llama.cpp's file types that have a mix here."""


@checked_dataclass
class LlamaMix:
    """A llama.cpp file type as a choice of grids.

    Attributes:
        type: q4_0 q4_1 q5_0 q5_1 q8_0 iq4_nl q2_k q3_k_s q3_k_m q3_k_l q4_k_s q4_k_m q5_k_s q5_k_m q6_k tq1_0 tq2_0.
        search: how ranges are chosen: minmax, mse or hessian.
        embeddings: whether the embedding and the output head are rounded too (to nearest), as llama.cpp does.

    Raises:
        UserError: an unknown type.
    """

    type: FileType = "q4_k_m"
    search: Search = "minmax"
    embeddings: bool = True

    def __post_init__(self) -> None:
        llama_grid(BASE[self.type], self.search)

    @property
    def bits(self) -> float:
        """Stored bits of most weights' codes."""
        return llama_grid(BASE[self.type]).bits

    @property
    def group_size(self) -> int:
        """Group size of most weights."""
        return llama_grid(BASE[self.type]).group_size

    @property
    def label(self) -> str:
        """Name of the file type in llama.cpp, for tables."""
        return self.type

    @property
    def needs_hessian(self) -> bool:
        """True for `search=hessian`, the only range search that reads the Hessian."""
        return self.search == "hessian"

    def at(self, place: Place) -> Grid | None:
        """Grid of the weight at a place; None leaves it in 16 bits."""
        role = role_of(place.name)
        if role in ("embedding", "output"):
            if not self.embeddings and not place.head:
                return None
            # Embeddings and heads have no Hessian; from 6 bits on, searching millions of weights gains nothing.
            kind = self._type_outside_blocks(role, place)
            search = "minmax" if kind in ("q6_k", "q8_0") or self.search == "minmax" else "mse"
        else:
            kind, search = _type_in_block(self.type, role, place), self.search
        if place.columns % BLOCK and kind in FALLBACK:
            kind = FALLBACK[kind]
        return None if place.columns % 32 and role in ("embedding", "output") else llama_grid(kind, search)

    def _type_outside_blocks(self, role: str, place: Place) -> str:
        """Type of the output head or an embedding: Q6_K for the head and a tied embedding, unless all get Q8_0."""
        base = BASE[self.type]
        if base in ("tq1_0", "tq2_0"):
            return "q6_k" if role == "output" or place.tied else "q4_k"
        return "q6_k" if (role == "output" or place.tied) and base != "q8_0" else base


def role_of(name: str) -> str:
    """Role of a module in llama.cpp's rules, by its name in transformers ("" where no rule names it)."""
    for role, pattern in ROLES.items():
        if re.search(rf"(^|\.)({pattern})$", name):
            return role
    return ""


def llama_grid(kind: str, search: str = "minmax") -> Grid:
    """Grid of one of llama.cpp's formats, by its name there."""
    if kind in VECTOR_TYPES:
        return VectorGrid(kind, search)  # pyright: ignore[reportArgumentType]
    if kind == "mxfp4":
        return ScaledFloatGrid("e2m1", 32, scale="e8m0", search=search)  # pyright: ignore[reportArgumentType]
    if kind in TYPES:
        return KGrid(kind, search)  # pyright: ignore[reportArgumentType]
    if kind.startswith("tq"):
        how, bits = "absmean" if search == "minmax" else search, {"tq1_0": 1.625, "tq2_0": 2.0}[kind]
        return TernaryGrid(BLOCK, how, bits=bits)  # pyright: ignore[reportArgumentType]
    if kind == "iq4_nl":
        return TableGrid("iq4_nl", 32, search)  # pyright: ignore[reportArgumentType]
    bits, minimum = int(kind[1]), kind.endswith("_1")
    return (AffineGrid if minimum else SignedGrid)(bits, 32, search)  # pyright: ignore[reportArgumentType]


def _type_in_block(file_type: str, role: str, place: Place) -> str:
    """Type of a weight inside a block, before any fallback for its width."""
    base, i, n = BASE[file_type], place.block, place.blocks
    rules: Mapping[tuple[str, str], str] = {
        ("q2_k", "attn_v"): "q4_k" if place.shared_kv >= 4 else "q3_k",
        ("iq4_nl", "attn_v"): "q5_k" if place.shared_kv >= 4 else base,
        ("iq4_nl", "ffn_down"): "q5_k" if i < n // 8 else base,
        ("q2_k", "ffn_down"): "q3_k",
        ("q2_k", "attn_output"): "q3_k",
        ("q3_k_m", "attn_v"): "q5_k" if i < 2 else "q4_k",
        ("q3_k_m", "ffn_down"): "q5_k" if i < n // 16 else "q4_k",
        ("q3_k_m", "attn_output"): "q4_k",
        ("q3_k_m", "attn_qkv"): "q4_k",
        ("q3_k_l", "attn_v"): "q5_k",
        ("q3_k_l", "ffn_down"): "q5_k",
        ("q3_k_l", "attn_output"): "q5_k",
        ("q3_k_l", "attn_qkv"): "q4_k",
        ("q4_k_s", "attn_v"): "q5_k" if i < 4 else base,
        ("q4_k_s", "ffn_down"): "q5_k" if i < n // 8 else base,
        ("q4_k_m", "attn_v"): "q6_k" if _more_bits(i, n) else base,
        ("q4_k_m", "ffn_down"): "q6_k" if _more_bits(i, n) else base,
        ("q4_k_m", "attn_qkv"): "q5_k",
        ("q5_k_m", "attn_v"): "q6_k" if _more_bits(i, n) else base,
        ("q5_k_m", "ffn_down"): "q6_k" if _more_bits(i, n) else base,
        ("q5_k_m", "attn_qkv"): "q6_k",
    }
    return rules.get((file_type, role), base)


def _more_bits(block: int, blocks: int) -> bool:
    """Whether a block gets more bits: the first and last eighth of the blocks do, and every third between them."""
    return block < blocks // 8 or block >= 7 * blocks // 8 or (block - blocks // 8) % 3 == 2
