"""Rows of results, as runs write them."""

from gptq_awq.results import Result

PPL = "wikitext2/ppl@2048"
GPTQ_RESULT = Result(
    method="gptq",
    bits=4,
    bits_per_weight=4.5,
    group_size=64,
    sym=False,
    model="stories15M",
    status="done",
    metrics={},
    size_bytes=90,
    baseline_size_bytes=270,
    seconds={},
    peak_memory_bytes=None,
    ledger=None,
    manifest={"tokens": {"eval": {"wikitext2": "ab12"}}},
    config={},
)
RUN = "0123456789abcdef" * 4
AWQ_RESULT = Result(
    method="awq",
    bits=4,
    bits_per_weight=4.5,
    group_size=64,
    sym=False,
    model="stories15M",
    status="done",
    metrics={
        "wikitext2/ppl@2048": 22.15,
        "wikitext2/ppl@2048/delta_ci95": [2.7, 3.1],
        "wikitext2/kl": float("inf"),
    },
    size_bytes=90_000_000,
    baseline_size_bytes=269_000_000,
    seconds={"quantize": 52.5},
    peak_memory_bytes=None,
    ledger="ledger.jsonl",
    manifest={"tokens": {"eval": {"wikitext2": "ab12"}}},
    config={"seed": 7, "method": {"solver": {"damping": 0.01}}},
)
