"""Time paged attention: decode against its byte bound, prefill against its operations and against torch's attention on contiguous KV.

Every case is first held against the fp32 reference. A graph calls each layer of a pool once; all layers together exceed the 60 MB L2.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn.attention.bias import causal_lower_right

from kernels.attention_plan import plan_decode_attention, plan_prefill_attention, prefill_block_q
from kernels.graph_time import (
    FLOPS_PER_S,
    ROTATED_BYTES,
    bytes_us,
    check_error,
    graph_us,
    relative_error,
    timed,
)
from kernels.paged_decode_attention import paged_decode_attention
from kernels.paged_decode_attention_ref import paged_decode_attention as paged_decode_attention_ref
from kernels.paged_decode_attention_ref import read_kv
from kernels.paged_prefill_attention import paged_prefill_attention
from kernels.paged_prefill_attention_ref import paged_prefill_attention as paged_prefill_attention_ref

DEVICE, DTYPE = "cuda", torch.bfloat16
PAGE_TOKENS = 16
MIN_LAYERS, MAX_LAYERS = 8, 64
MAX_PARTIALS = 512
DECODE_PROGRAMS, PREFILL_PROGRAMS = 132 * 4, 132 * 3  # as in engine/model.py

Log = Callable[[str], object]


@dataclass(frozen=True, slots=True, kw_only=True)
class Heads:
    """Query heads, KV heads and their width; as in Llama-3.1-8B if not said otherwise."""

    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128

    @property
    def token_bytes(self) -> int:
        """Bytes of one token's K and V in one layer."""
        return 2 * self.kv_heads * self.head_dim * 2


LLAMA = Heads()
# (rows, KV tokens of each) …: one long context, split; batches; one long among many short.
DECODE_CASES: tuple[tuple[tuple[tuple[int, int], ...], Heads], ...] = (
    (((1, 1024),), LLAMA),
    (((1, 8192),), LLAMA),
    (((1, 65536),), LLAMA),
    (((32, 1024),), LLAMA),
    (((64, 1024),), LLAMA),
    (((256, 300),), LLAMA),
    (((256, 1024),), LLAMA),
    (((1, 100_000), (255, 200)), LLAMA),
    (((32, 1024),), Heads(kv_heads=32)),
    (((64, 1024),), Heads(head_dim=64)),
)
# (sequences, tokens of each one's chunk, tokens before it).
PREFILL_CASES = ((1, 128, 0), (16, 128, 0), (1, 2048, 0), (1, 8192, 0), (4, 512, 7680))


def bench_attention(
    *, quick: bool = False, log: Log = print, decode_cases=None, prefill_cases=None
) -> list[dict]:
    """Check and time every case; return a row for each. Raises WrongResultError if a result is wrong."""
    replays = 10 if quick else 30
    rows = []
    for groups, heads in DECODE_CASES if decode_cases is None else decode_cases:
        rows.append(bench_decode(groups, heads, replays))
        log(describe(rows[-1]))
    for case in PREFILL_CASES if prefill_cases is None else prefill_cases:
        rows.append(bench_prefill(*case, replays=replays))
        log(describe(rows[-1]))
    return rows


def bench_decode(groups: tuple[tuple[int, int], ...], heads: Heads, replays: int) -> dict:
    """Check and time decode attention of one layer."""
    lengths = [length for count, length in groups for _ in range(count)]
    rows, tokens = len(lengths), sum(lengths)
    cache = Cache(lengths, heads)
    q = queries(rows, heads)
    out = torch.empty(rows, heads.heads * heads.head_dim, dtype=DTYPE, device=DEVICE)
    slots = torch.arange(rows, dtype=torch.int32, device=DEVICE)
    items, combine = plan_decode_attention(
        np.array(lengths), page_tokens=PAGE_TOKENS, max_partials=MAX_PARTIALS,
        target_items=max(1, DECODE_PROGRAMS // heads.kv_heads),
    )  # fmt: skip
    partial = torch.empty(MAX_PARTIALS, heads.heads, heads.head_dim, device=DEVICE)
    lse = torch.empty(MAX_PARTIALS, heads.heads, device=DEVICE)
    lists = (*on_device(items), *on_device(combine))

    def call(layer: int, attend=paged_decode_attention, out=out) -> None:
        attend(
            q, cache.pool, cache.table, slots, *lists, partial, lse, out,
            layer=layer, num_programs=DECODE_PROGRAMS, **cache.shape,
        )  # fmt: skip

    kv = " + ".join(f"{count}x{length}" for count, length in groups)
    error = check_call(f"decode attention {kv} {heads}", call, out)
    us = time_layers(call, cache.num_layers, replays)
    bound = bytes_us(tokens * heads.token_bytes + 4 * out.numel())
    shape = {"op": "decode_attention", "kv": kv, **fields(heads), "kv_tokens": tokens, "items": len(items)}
    return {**shape, **timed(us, bound), "rel_err": error}


def bench_prefill(sequences: int, length: int, before: int, *, replays: int, heads: Heads = LLAMA) -> dict:
    """Check and time prefill attention of one layer, and torch's on the same K and V, contiguous."""
    cache = Cache([before + length] * sequences, heads)
    tokens = sequences * length
    q = queries(tokens, heads)
    out = torch.empty(tokens, heads.heads * heads.head_dim, dtype=DTYPE, device=DEVICE)
    block_q = prefill_block_q(heads.heads, heads.kv_heads)
    chunks = [(row * length, length, before, row) for row in range(sequences)]
    lists = on_device(plan_prefill_attention(chunks, block_q))

    def call(layer: int, attend=paged_prefill_attention, out=out) -> None:
        attend(
            q, cache.pool, cache.table, *lists, out,
            layer=layer, block_q=block_q, num_programs=PREFILL_PROGRAMS, **cache.shape,
        )  # fmt: skip

    name = f"prefill attention {sequences}x{length} after {before}"
    error = check_call(name, call, out)
    us = time_layers(call, cache.num_layers, replays)
    pairs = sequences * sum(before + i + 1 for i in range(length))
    operations_us = 4 * heads.heads * heads.head_dim * pairs / FLOPS_PER_S * 1e6
    moved = sequences * (before + length) * heads.token_bytes + 4 * out.numel()
    shape = {
        "op": "prefill_attention",
        "sequences": sequences,
        "tokens": length,
        "before": before,
        **fields(heads),
    }
    row = {**shape, **timed(us, max(operations_us, bytes_us(moved))), "rel_err": error}
    call(0)
    return {**row, **time_sdpa(cache, q.unflatten(0, (sequences, length)), out, us, replays)}


def time_sdpa(cache: Cache, q: torch.Tensor, expected: torch.Tensor, us: float, replays: int) -> dict:
    """Return torch's time on contiguous K and V of every layer, and ours as a multiple of it; null with the reason where it fails."""
    q = q.transpose(1, 2).contiguous()
    mask = causal_lower_right(q.shape[2], cache.lengths[0])
    layers = [cache.contiguous(layer) for layer in range(cache.num_layers)]

    def call(layer: int) -> torch.Tensor:
        key, value = layers[layer]
        return torch.nn.functional.scaled_dot_product_attention(
            q, key, value, attn_mask=mask, enable_gqa=True
        )

    try:
        check_error(
            "scaled_dot_product_attention",
            relative_error(call(0).transpose(1, 2).reshape(expected.shape), expected),
        )
        us_sdpa = time_layers(call, cache.num_layers, replays)
    except RuntimeError as error:
        return {"us_sdpa": None, "vs_sdpa": None, "sdpa_error": str(error).splitlines()[0]}
    return {"us_sdpa": round(us_sdpa, 2), "vs_sdpa": round(us / us_sdpa, 3)}


class Cache:
    """Random K and V of sequences of given lengths on shuffled pages, of so many layers that they exceed the cache."""

    def __init__(self, lengths: list[int], heads: Heads) -> None:
        self.lengths, self.heads = lengths, heads
        layers = -(-int(ROTATED_BYTES) // (sum(lengths) * heads.token_bytes))
        self.num_layers = min(MAX_LAYERS, max(MIN_LAYERS, layers))
        counts = [-(-length // PAGE_TOKENS) for length in lengths]
        order = torch.randperm(sum(counts), dtype=torch.int32, device=DEVICE)
        self.table = torch.zeros(len(lengths), max(counts), dtype=torch.int32, device=DEVICE)
        for row, pages in zip(self.table, order.split(counts), strict=True):
            row[: len(pages)] = pages
        page_elems = self.num_layers * PAGE_TOKENS * heads.token_bytes // 2
        self.pool = torch.empty(len(order), page_elems, dtype=DTYPE, device=DEVICE)
        for pages in self.pool.split(512):
            pages.normal_()
        self.shape = dict(
            num_layers=self.num_layers, num_kv_heads=heads.kv_heads, head_dim=heads.head_dim, page_tokens=PAGE_TOKENS
        )  # fmt: skip

    def contiguous(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return K and V of one layer, each [sequences, Hkv, length, D]; the sequences must be of one length."""
        heads = self.heads
        pages = self.pool.view(
            len(self.pool), self.num_layers, 2, heads.kv_heads, PAGE_TOKENS, heads.head_dim
        )
        read = [read_kv(pages[:, layer], row, 0, self.lengths[0]) for row in self.table]
        key, value = (torch.stack(side).to(DTYPE) for side in zip(*read, strict=True))
        return key, value


def queries(tokens: int, heads: Heads) -> torch.Tensor:
    """Random queries as a view of qkv, [tokens, heads, D]."""
    width = heads.heads + 2 * heads.kv_heads
    return torch.randn(tokens, width, heads.head_dim, dtype=DTYPE, device=DEVICE)[:, : heads.heads]


def on_device(items: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a work list, with at least one row, and its length."""
    padded = items if len(items) else np.zeros((1, 4), np.int32)
    return torch.from_numpy(padded).to(DEVICE), torch.tensor([len(items)], dtype=torch.int32, device=DEVICE)


def check_call(what: str, call: Callable, out: torch.Tensor) -> float:
    """Run layer 0 by kernel and by reference; return the relative error. Raises WrongResultError where it is too large."""
    out.fill_(float("nan"))
    call(0)
    expected = torch.full_like(out, float("nan"), dtype=torch.float32)
    references = {"decode": paged_decode_attention_ref, "prefill": paged_prefill_attention_ref}
    call(0, references[what.split()[0]], expected)
    return check_error(what, relative_error(out, expected))


def time_layers(call: Callable[[int], object], num_layers: int, replays: int) -> float:
    """Return the time of a call, called on each layer in turn."""

    def run() -> None:
        for layer in range(num_layers):
            call(layer)

    return graph_us(run, replays) / num_layers


def fields(heads: Heads) -> dict[str, int]:
    """Return the heads as fields of a row."""
    return {"heads": heads.heads, "kv_heads": heads.kv_heads, "head_dim": heads.head_dim}


def describe(row: dict) -> str:
    """Return a line of progress."""
    case = row.get("kv") or f"{row['sequences']}x{row['tokens']} after {row['before']}"
    return f"{row['op']} {case}: {row['us']:.1f} µs, bound {row['bound_us']:.1f}"
