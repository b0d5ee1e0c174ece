"""Time the attention and elementwise kernels on this GPU: `python -m kernels.bench_attention`.

Each case is one CUDA graph of calls over different layers or buffers, so caches hold none of the inputs;
times are the median of its replays. "floor" is the bytes that must move over 4.3 TB/s or, for prefill, the
operations over 790 TFLOP/s: what an H200 was measured to give.
"""

import statistics
from collections.abc import Callable

import numpy as np
import torch

from kernels.attention_plan import plan_decode_attention, plan_prefill_attention, prefill_block_q
from kernels.paged_decode_attention import paged_decode_attention
from kernels.paged_prefill_attention import paged_prefill_attention
from kernels.rms_norm import add_rms_norm_
from kernels.rotary_write_kv import rotary_write_kv_
from kernels.silu_mul import silu_mul

BYTES_PER_S, FLOPS_PER_S = 4.3e12, 790e12
PAGE_TOKENS = 16
MULTIPROCESSORS = 132
LAYERS = 8  # calls a graph; each has its own layer of the pool
DTYPE = torch.bfloat16


def time_us(calls: list[Callable[[], object]], replays: int = 30) -> float:
    """Median time of one call, in µs, when the calls run one after the other in a captured graph."""
    for call in calls[:2]:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    times = []
    for replay in range(replays + 3):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        if replay >= 3:
            times.append(start.elapsed_time(end) * 1e3 / len(calls))
    return statistics.median(times)


def random_cache(lengths, kv_heads, head_dim):
    """(pool, page table) of random KV on shuffled pages."""
    width = -(-max(lengths) // PAGE_TOKENS)
    counts = [-(-length // PAGE_TOKENS) for length in lengths]
    order = torch.randperm(sum(counts), dtype=torch.int32, device="cuda")
    table = torch.zeros(len(lengths), width, dtype=torch.int32, device="cuda")
    for row, pages in zip(table, order.split(counts), strict=True):
        row[: len(pages)] = pages
    pool = torch.empty(
        len(order), LAYERS * 2 * kv_heads * PAGE_TOKENS * head_dim, dtype=DTYPE, device="cuda"
    ).normal_()
    return pool, table


def on_device(items):
    padded = items if len(items) else np.zeros((1, 4), np.int32)
    return torch.from_numpy(padded).cuda(), torch.tensor([len(items)], dtype=torch.int32, device="cuda")


def bench_decode(lengths, *, heads=32, kv_heads=8, head_dim=128, programs_per_sm=3):
    """Print time, floor and their ratio of decode attention of one layer."""
    pool, table = random_cache(lengths, kv_heads, head_dim)
    rows = len(lengths)
    q = torch.randn(rows, heads + 2 * kv_heads, head_dim, dtype=DTYPE, device="cuda")[:, :heads]
    out = torch.empty(rows, heads * head_dim, dtype=DTYPE, device="cuda")
    slots = torch.arange(rows, dtype=torch.int32, device="cuda")
    programs = MULTIPROCESSORS * programs_per_sm
    items, combine = plan_decode_attention(
        np.array(lengths),
        page_tokens=PAGE_TOKENS,
        max_partials=512,
        target_items=max(1, programs // kv_heads),
    )
    partial = torch.empty(512, heads, head_dim, device="cuda")
    lse = torch.empty(512, heads, device="cuda")
    lists = (*on_device(items), *on_device(combine))
    shape = dict(num_layers=LAYERS, num_kv_heads=kv_heads, head_dim=head_dim, page_tokens=PAGE_TOKENS)

    def call(layer):
        paged_decode_attention(
            q, pool, table, slots, *lists, partial, lse, out, layer=layer, **shape, num_programs=programs
        )

    us = time_us([lambda layer=layer: call(layer) for layer in range(LAYERS)])
    floor = sum(lengths) * 2 * kv_heads * head_dim * 2 / BYTES_PER_S * 1e6
    name = f"decode {rows} × {sum(lengths) // rows} {heads}/{kv_heads}×{head_dim} ×{programs_per_sm}"
    print(f"{name:44s} {us:9.1f} µs  floor {floor:8.1f}  {floor / us:5.0%}  {len(items)} items", flush=True)


def bench_prefill(length, before=0, *, rows=1, heads=32, kv_heads=8, head_dim=128, programs_per_sm=1):
    """Print time, floor and their ratio of prefill attention of one layer: `rows` chunks of `length`."""
    pool, table = random_cache([before + length] * rows, kv_heads, head_dim)
    tokens = rows * length
    q = torch.randn(tokens, heads + 2 * kv_heads, head_dim, dtype=DTYPE, device="cuda")[:, :heads]
    out = torch.empty(tokens, heads * head_dim, dtype=DTYPE, device="cuda")
    block_q = prefill_block_q(heads, kv_heads)
    chunks = [(row * length, length, before, row) for row in range(rows)]
    lists = on_device(plan_prefill_attention(chunks, block_q))
    shape = dict(num_layers=LAYERS, num_kv_heads=kv_heads, head_dim=head_dim, page_tokens=PAGE_TOKENS)
    programs = MULTIPROCESSORS * programs_per_sm

    def call(layer):
        paged_prefill_attention(
            q, pool, table, *lists, out, layer=layer, **shape, block_q=block_q, num_programs=programs
        )

    us = time_us([lambda layer=layer: call(layer) for layer in range(LAYERS)])
    pairs = rows * sum(before + i + 1 for i in range(length))
    floor = 4 * heads * head_dim * pairs / FLOPS_PER_S * 1e6
    name = f"prefill {rows} × {length} after {before} ×{programs_per_sm}"
    print(f"{name:44s} {us:9.1f} µs  floor {floor:8.1f}  {floor / us:5.0%}", flush=True)


def bench_elementwise(tokens, *, hidden=4096, intermediate=14336, heads=32, kv_heads=8, head_dim=128):
    """Print times and floors of the norm, the activation and the rotary embedding of one layer."""
    buffers = max(2, min(64, 2**28 // (tokens * intermediate * 4)))
    weight = torch.randn(hidden, dtype=DTYPE, device="cuda")

    def random(*shape):
        return [torch.randn(*shape, dtype=DTYPE, device="cuda") for _ in range(buffers)]

    x, residual, normed = random(tokens, hidden), random(tokens, hidden), random(tokens, hidden)
    calls = [
        lambda i=i: add_rms_norm_(x[i], residual[i], weight, 1e-5, out=normed[i]) for i in range(buffers)
    ]
    report(f"add_rms_norm_ {tokens} × {hidden}", time_us(calls), tokens * hidden * 8)

    gate_up, activated = random(tokens, 2 * intermediate), random(tokens, intermediate)
    calls = [lambda i=i: silu_mul(gate_up[i], out=activated[i]) for i in range(buffers)]
    report(f"silu_mul {tokens} × {intermediate}", time_us(calls), tokens * intermediate * 6)

    qkv = random(tokens, (heads + 2 * kv_heads) * head_dim)
    pool, table = random_cache([tokens], kv_heads, head_dim)
    cos_sin = torch.randn(max(tokens, 16), head_dim, device="cuda")
    positions = torch.arange(tokens, dtype=torch.int32, device="cuda")
    slots = torch.zeros(tokens, dtype=torch.int32, device="cuda")
    shape = dict(num_heads=heads, num_kv_heads=kv_heads, head_dim=head_dim)
    shape |= dict(page_tokens=PAGE_TOKENS, num_layers=LAYERS)
    calls = [
        lambda i=i: rotary_write_kv_(
            qkv[i], cos_sin, positions, slots, table, pool, layer=i % LAYERS, **shape
        )
        for i in range(buffers)
    ]
    moved = tokens * head_dim * (2 * (2 * heads + 5 * kv_heads) + 4)
    report(f"rotary_write_kv_ {tokens}", time_us(calls), moved)


def report(name, us, moved_bytes):
    floor = moved_bytes / BYTES_PER_S * 1e6
    print(f"{name:44s} {us:9.1f} µs  floor {floor:8.1f}  {floor / us:5.0%}", flush=True)


def main() -> None:
    """Run every case and print a row for each."""
    torch.manual_seed(0)
    for programs_per_sm in (2, 3, 4):
        for lengths in ([8192], [65536], [1024] * 64, [300] * 256, [1024] * 256, [100_000] + [200] * 255):
            bench_decode(lengths, programs_per_sm=programs_per_sm)
    bench_decode([1024] * 32, heads=32, kv_heads=32)
    bench_decode([1024] * 64, heads=32, kv_heads=8, head_dim=64)
    for programs_per_sm in (1, 2):
        bench_prefill(128, programs_per_sm=programs_per_sm)
        bench_prefill(128, rows=16, programs_per_sm=programs_per_sm)
        bench_prefill(2048, programs_per_sm=programs_per_sm)
        bench_prefill(8192, programs_per_sm=programs_per_sm)
        bench_prefill(512, before=7680, rows=4, programs_per_sm=programs_per_sm)
    for tokens in (1, 32, 256, 2048, 8192):
        bench_elementwise(tokens)


if __name__ == "__main__":
    main()
