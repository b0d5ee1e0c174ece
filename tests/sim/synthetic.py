"""A made-up profile with known coefficients, in the form that `python -m engine profile` writes."""

from __future__ import annotations

import itertools
from typing import Any

from engine.adapter import AdapterSpec
from engine.graph_sizes import graph_sizes, padded_tokens
from engine.layout import adapter_layout, page_geometry
from engine.model_shape import MODEL_CATALOGUE
from engine.step import StepShape

MODEL = MODEL_CATALOGUE["llama-3.1-8b"]
GRAPH_MAX_TOKENS = 1024
MAX_NUM_SEQS = 256
WEIGHT_US = {"qkv": 12.0, "o": 8.5, "gate_up": 55.0, "down": 28.0, "head": 250.0}
TOKEN_US = {"qkv": 0.06, "o": 0.045, "gate_up": 0.32, "down": 0.16, "head": 1.4}
HIDDEN_TOKENS = 100  # so many tokens cost nothing while weights stream


def matmul_us(linear: str, tokens: int, tp: int = 1) -> float:
    return (WEIGHT_US[linear] + TOKEN_US[linear] * max(0, tokens - HIDDEN_TOKENS)) / tp + 1.0


def elementwise_us(tokens: int) -> float:
    return 6.0 + 0.012 * tokens


def attention_decode_us(rows: int, kv_tokens: int, kv_max: int) -> float:
    return 4.0 + 0.02 * rows + 0.0012 * kv_tokens + 0.001 * kv_max


def attention_prefill_us(tokens: int, pairs: int, kv_max: int) -> float:
    return 7.0 + 0.01 * tokens + 2.5e-5 * pairs + 0.0008 * kv_max


def lora_us(adapters: int, tokens: int, num_bytes: float, token_bytes: float) -> float:
    return 11.0 + 0.1 * adapters + 0.004 * tokens + num_bytes / 4.0e6 + token_bytes / 6e8


def sample_us(rows: int) -> float:
    return 9.0 + 0.05 * rows


def transfer_us(num_bytes: float) -> float:
    return 9.0 + num_bytes / 54e3


def host_us(rows: int, prefill_chunks: int) -> float:
    return 350.0 + 1.2 * rows + 25.0 * prefill_chunks


def step_us(shape: StepShape) -> float:
    """The very sum that the cost model composes: whole steps need no correction."""
    padded = padded_tokens(shape.tokens, GRAPH_MAX_TOKENS)
    layers = MODEL.num_layers
    layer = sum(matmul_us(linear, padded) for linear in ("qkv", "o", "gate_up", "down")) + elementwise_us(
        padded
    )
    if shape.decode_rows:
        layer += attention_decode_us(shape.decode_rows, shape.decode_kv_tokens, shape.decode_kv_max)
    if shape.prefill_chunks:
        layer += attention_prefill_us(shape.prefill_tokens, shape.prefill_pairs, shape.prefill_kv_max)
    if shape.lora_adapters:
        layer += lora_us(
            shape.lora_adapters, shape.lora_tokens, shape.lora_bytes / layers, shape.lora_token_bytes / layers
        )
    rows = min(padded, MAX_NUM_SEQS)
    return layers * layer + matmul_us("head", rows) + sample_us(rows)


def adapter_bytes(rank: int, tp: int = 1) -> int:
    spec = AdapterSpec(name="a", rank=rank)
    return adapter_layout(MODEL, spec.module_ranks, page_geometry(MODEL, tp, 16, 2), tp=tp).payload_bytes


def shape(rows=0, kv=256, prefill=0, chunks=0, adapters=0, rank=16) -> StepShape:
    """A step of `rows` decodes at `kv` tokens each, and `chunks` prompts of `prefill` tokens in all, over
    some adapters.
    """
    tokens = rows + prefill
    each = prefill // max(1, chunks)
    num_bytes = adapter_bytes(rank)
    return StepShape(
        decode_rows=rows,
        decode_kv_tokens=rows * kv,
        decode_kv_max=kv if rows else 0,
        prefill_tokens=prefill,
        prefill_chunks=chunks,
        prefill_pairs=chunks * each * (each + 1) // 2,
        prefill_kv_tokens=prefill,
        prefill_kv_max=each,
        sample_rows=rows + chunks,
        lora_tokens=tokens if adapters else 0,
        lora_adapters=adapters,
        lora_bytes=adapters * num_bytes,
        lora_token_bytes=tokens * num_bytes if adapters else 0,
    )


def step_shapes() -> list[StepShape]:
    shapes = [
        shape(rows=rows, kv=kv, adapters=min(rows, adapters))
        for rows, kv, adapters in itertools.product(
            (1, 8, 32, 64, 128, 256), (128, 512, 2048), (0, 1, 32, 200)
        )
    ]
    shapes += [
        shape(rows=rows, prefill=prefill, chunks=chunks, adapters=adapters)
        for rows, prefill, chunks, adapters in itertools.product(
            (0, 32, 128), (128, 512, 896), (1, 2), (0, 2)
        )
    ]
    return shapes


def _attention_decode_rows(tp: int) -> list[dict[str, Any]]:
    grid = [
        (rows, rows * kv, kv * (1 if kv < 4096 else 2))
        for rows, kv in itertools.product((1, 2, 8, 32, 128, 256), (16, 128, 512, 2048, 8192))
    ]
    return [
        {"tp": tp, "rows": r, "kv_tokens": k, "kv_max": m, "us": attention_decode_us(r, k, m)}
        for r, k, m in grid
    ]


def _attention_prefill_rows(tp: int) -> list[dict[str, Any]]:
    rows = []
    for chunks, each, before in itertools.product((1, 2, 8), (16, 128, 512, 1024), (0, 512, 4096)):
        pairs = chunks * (each * before + each * (each + 1) // 2)
        values = {"tokens": chunks * each, "pairs": pairs, "kv_max": each + before}
        us = attention_prefill_us(**values)
        rows.append({"tp": tp, **values, "kv_tokens": chunks * (each + before), "us": us})
    return rows


def _lora_rows(tp: int) -> list[dict[str, Any]]:
    rows = []
    for tokens, adapters, rank in itertools.product((1, 8, 32, 128, 256, 1024), (1, 8, 32, 128), (8, 16, 64)):
        if adapters > tokens:
            continue
        each = adapter_bytes(rank, tp) / MODEL.num_layers
        row: dict[str, Any] = {
            "tp": tp,
            "tokens": tokens,
            "tile_tokens": 16 if tokens <= 128 else 64,
            "adapters": adapters,
            "rank": rank,
            "targets": "all",
        }
        row |= {"bytes": adapters * each, "single_bytes": 0, "token_bytes": tokens * each}
        rows.append(row | {"us": lora_us(adapters, tokens, row["bytes"], row["token_bytes"])})
    return rows


def profile_json(tps=(1, 2), correction=1.0) -> dict[str, Any]:
    """The JSON form. correction: whole steps take so many times what the operators add up to."""
    tokens = [1, 2, 4, 8, 16, 32, 64, 100, 128, 192, 256, 384, 512, 768, 1024, 2048, 4096, 8192]
    matmul = [
        {"tp": tp, "linear": linear, "tokens": size, "us": matmul_us(linear, size, tp)}
        for tp, linear, size in itertools.product(tps, WEIGHT_US, tokens)
    ]
    return {
        "schema_version": 1,
        "gpu": "h200",
        "gpu_name": "synthetic",
        "model": "llama-3.1-8b",
        "dtype": "bfloat16",
        "page_tokens": 16,
        "graph_max_tokens": GRAPH_MAX_TOKENS,
        "versions": {},
        "driver": "none",
        "commit": "none",
        "date": "2026-11-22",
        "command": "tests/sim/synthetic.py",
        "operators": {
            "matmul": matmul,
            "attention_decode": [row for tp in tps for row in _attention_decode_rows(tp)],
            "attention_prefill": [row for tp in tps for row in _attention_prefill_rows(tp)],
            "elementwise": [
                {"tp": tp, "tokens": size, "us": elementwise_us(size)}
                for tp in tps
                for size in (*tokens, *graph_sizes(1024))
            ],
            "lora": [row for tp in tps for row in _lora_rows(tp)],
            "sample": [{"rows": rows, "us": sample_us(rows)} for rows in (1, 8, 64, 256, 512)],
            "transfer": [
                {"bytes": size, "us": transfer_us(size)}
                for size in (65536, 2**20, 2**21, 2**23, 2**26, 2**28)
            ],
            "collective": [],
        },
        "steps": [{"shape": item.to_json(), "gpu_us": step_us(item) * correction} for item in step_shapes()],
        "host": [
            {"rows": rows, "prefill_chunks": chunks, "us": host_us(rows, chunks)}
            for rows, chunks in itertools.product((1, 8, 64, 256), (0, 1, 4))
        ],
    }
