"""Times each operator of a step alone, for the shard shapes of several tensor-parallel degrees, on cold weights.

Every graph walks many weight sets (or all layers of the pool), so that what it reads comes from memory and not from the 60 MB L2, as in a real step.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from engine.batch import DeviceBatch
from engine.model import DECODE_PROGRAMS, PREFILL_PROGRAMS
from engine.model_shape import GROUPS, ModelShape
from engine.runner import Runner
from engine.timing import captured_us, event_us
from kernels.attention_plan import plan_decode_attention, plan_prefill_attention
from kernels.sample_params import PARAM_COLUMNS

TP_DEGREES = (1, 2, 4, 8)
MATMUL_TOKENS = (
    1,
    8,
    16,
    32,
    48,
    64,
    96,
    128,
    160,
    192,
    224,
    256,
    320,
    384,
    448,
    512,
    640,
    768,
    896,
    1024,
    1536,
    2048,
    4096,
    8192,
)
ELEMENTWISE_TOKENS = (1, 16, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
LINEARS = ("qkv", "o", "gate_up", "down")
ROTATED_BYTES = 400_000_000
ONE_LONG = -1.0  # in place of a skew: one sequence of 8,000 tokens among others
TRANSFER_BYTES = (65536, 2**20, 2**21, 8 * 2**20, 32 * 2**20, 84 * 2**20, 256 * 2**20)


def profile_operators(runner: Runner, *, quick: bool) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (operator, row) one by one; rows are those of the profile's `operators`."""
    thin = 4 if quick else 1
    model = runner.blueprint.model
    degrees = [
        tp
        for tp in ((1,) if quick else TP_DEGREES)
        if model.num_kv_heads % tp == 0 and model.intermediate_size % tp == 0
    ]
    scratch = _scratch(runner)
    for tp in degrees:
        for row in _matmul_rows(model, tp, scratch, MATMUL_TOKENS[::thin]):
            yield "matmul", row
    for tp in degrees:
        for row in _elementwise_rows(runner, tp, ELEMENTWISE_TOKENS[::thin]):
            yield "elementwise", row
        for row in _decode_rows(runner, tp, thin):
            yield "attention_decode", row
        for row in _prefill_rows(runner, tp, thin):
            yield "attention_prefill", row
    for rows in (1, 16, 64, 128, 256)[::thin]:
        yield "sample", {"rows": rows, "us": _sample_us(runner, rows)}
    for row in _transfer_rows(runner):
        yield "transfer", row


def _scratch(runner: Runner) -> torch.Tensor:
    """Return random numbers to cut weights from: room for two of the largest, 2 GB where that is more than a few."""
    model = runner.blueprint.model
    largest = max(model.vocab_size * model.hidden_size, 2 * model.intermediate_size * model.hidden_size)
    size = max(2 * largest, min(24 * largest, 2**30))
    return torch.empty(size, dtype=runner.dtype, device=runner.device).normal_(0, 0.02)


def _matmul_rows(
    model: ModelShape, tp: int, scratch: torch.Tensor, token_counts: tuple[int, ...]
) -> Iterator[dict[str, Any]]:
    linears = model.linear_shapes(tp)
    shapes = {
        name: (sum(linears[module][0] for module in group), linears[group[0]][1])
        for name, group in zip(LINEARS, GROUPS, strict=True)
    }
    shapes["head"] = (-(-model.vocab_size // tp), model.hidden_size)
    for name, (out, inp) in shapes.items():
        size = out * inp
        copies = max(2, min(24, ROTATED_BYTES // (size * scratch.element_size())))
        weights = [
            scratch[(i * size) % (len(scratch) - size + 1) :][:size].view(out, inp) for i in range(copies)
        ]
        for tokens in token_counts:
            if name == "head" and tokens > 512:
                continue
            used = weights if tokens <= 1024 else weights[:2]
            x = torch.randn(tokens, inp, dtype=scratch.dtype, device=scratch.device)

            def call(x: torch.Tensor = x, used: list[torch.Tensor] = used) -> None:
                for weight in used:
                    F.linear(x, weight)

            us = captured_us(call, scratch.device, replays=5) / len(used)
            yield {"tp": tp, "linear": name, "tokens": tokens, "us": us}


def _elementwise_rows(runner: Runner, tp: int, token_counts: tuple[int, ...]) -> Iterator[dict[str, Any]]:
    for tokens in token_counts:
        yield {"tp": tp, "tokens": tokens, "us": _elementwise_us(runner, tp, tokens)}


def _elementwise_us(runner: Runner, tp: int, tokens: int) -> float:
    """Time the norms, the rotary embedding with its KV write, and SiLU of a layer; KV heads and width cut by tp."""
    model, ops, config = runner.blueprint.model, runner.model.ops, runner.blueprint.config
    heads, kv_heads = model.heads_per_rank(tp), model.kv_heads_per_rank(tp)
    width = model.linear_shapes(tp)["up_proj"][0]
    pool = _pool_view(runner, tp)
    rows = min(tokens, 256)
    slots = (torch.arange(tokens, device=runner.device) % rows).int()
    positions = (torch.arange(tokens, device=runner.device) // rows).int()
    per_row = -(-tokens // rows)
    table = _page_table(runner, np.full(rows, per_row), pool.shape[0])
    hidden, residual = (
        torch.randn(tokens, model.hidden_size, dtype=runner.dtype, device=runner.device) for _ in range(2)
    )
    qkv = torch.randn(
        tokens, (heads + 2 * kv_heads) * model.head_dim, dtype=runner.dtype, device=runner.device
    )
    gate_up = torch.randn(tokens, 2 * width, dtype=runner.dtype, device=runner.device)
    norm = runner.model.weights.norm

    def call() -> None:
        for layer in range(model.num_layers):
            ops.add_rms_norm_(hidden, residual, norm, model.rms_norm_eps)
            ops.rotary_write_kv_(
                qkv,
                runner.model.cos_sin,
                positions,
                slots,
                table,
                pool,
                layer=layer,
                num_layers=model.num_layers,
                num_heads=heads,
                num_kv_heads=kv_heads,
                head_dim=model.head_dim,
                page_tokens=config.page_tokens,
            )
            ops.add_rms_norm_(hidden, residual, norm, model.rms_norm_eps)
            ops.silu_mul(gate_up)

    return captured_us(call, runner.device) / model.num_layers


def _decode_rows(runner: Runner, tp: int, thin: int) -> Iterator[dict[str, Any]]:
    rng = np.random.default_rng(tp)
    cases = [(rows, kv, 0.0) for rows in (1, 4, 16, 32, 64, 128, 256) for kv in (64, 256, 1024, 4096)]
    cases += [(rows, kv, 1.0) for rows in (4, 16, 64, 256) for kv in (256, 1024)]  # skewed lengths
    cases += [(rows, kv, 0.0) for rows in (1, 2, 8) for kv in (512, 2048, 8000)]
    cases += [(rows, 8000, 0.0) for rows in (4, 16)]
    cases += [(rows, 256, ONE_LONG) for rows in (2, 4, 8, 16, 32, 64, 128)]
    most = runner.buffers.pool.shape[0] * runner.blueprint.config.page_tokens
    for rows, kv, skew in cases[::thin]:
        lens = (
            np.append(np.full(rows - 1, kv), 8000)
            if skew == ONE_LONG
            else np.full(rows, kv)
            if not skew
            else np.clip(kv * rng.lognormal(-0.5, skew, rows), 16, 8000).astype(int)
        )
        if lens.sum() + 16 * rows > most or lens.max() > runner.blueprint.config.max_model_len:
            continue
        yield {
            "tp": tp,
            "rows": rows,
            "kv_tokens": int(lens.sum()),
            "kv_max": int(lens.max()),
            "us": _decode_us(runner, tp, lens.astype(np.int32)),
        }


def _decode_us(runner: Runner, tp: int, lens: np.ndarray) -> float:
    model, config = runner.blueprint.model, runner.blueprint.config
    heads, kv_heads = model.heads_per_rank(tp), model.kv_heads_per_rank(tp)
    pool = _pool_view(runner, tp)
    rows = len(lens)
    table = _page_table(runner, lens, pool.shape[0])
    q = torch.randn(rows, heads, model.head_dim, dtype=runner.dtype, device=runner.device)
    out = torch.empty(rows, heads * model.head_dim, dtype=runner.dtype, device=runner.device)
    items, combine = plan_decode_attention(
        lens,
        page_tokens=config.page_tokens,
        max_partials=len(runner.buffers.partial),
        target_items=max(1, DECODE_PROGRAMS // kv_heads),
    )
    items_gpu, num_items = _work_list(items, runner.device)
    combine_gpu, num_combine = _work_list(combine, runner.device)
    slots = torch.arange(rows, dtype=torch.int32, device=runner.device)
    partials, lse = (
        runner.buffers.partial[:, :heads].contiguous(),
        runner.buffers.partial_lse[:, :heads].contiguous(),
    )

    def call() -> None:
        for layer in range(model.num_layers):
            runner.model.ops.paged_decode_attention(
                q,
                pool,
                table,
                slots,
                items_gpu,
                num_items,
                combine_gpu,
                num_combine,
                partials,
                lse,
                out,
                layer=layer,
                num_layers=model.num_layers,
                num_kv_heads=kv_heads,
                head_dim=model.head_dim,
                page_tokens=config.page_tokens,
                num_programs=DECODE_PROGRAMS,
            )

    return captured_us(call, runner.device) / model.num_layers


def _prefill_rows(runner: Runner, tp: int, thin: int) -> Iterator[dict[str, Any]]:
    cases = [
        [(length, start)] * count
        for length, start, count in (
            (16, 0, 1),
            (64, 0, 1),
            (256, 0, 1),
            (256, 2048, 1),
            (512, 0, 1),
            (512, 4096, 1),
            (1024, 0, 1),
            (1024, 1024, 1),
            (1024, 4096, 1),
            (64, 0, 8),
            (128, 0, 8),
            (256, 0, 4),
            (256, 512, 4),
            (2048, 0, 1),
            (512, 0, 8),
            (4096, 0, 1),
            (128, 0, 1),
            (768, 0, 1),
            (100, 0, 3),
            (512, 512, 2),
            (64, 1024, 1),
            (256, 1024, 1),
            (128, 1024, 4),
            (64, 2048, 8),
            (64, 4096, 1),
            (128, 7000, 1),
            (512, 7000, 1),
            (1024, 7000, 1),
        )
    ]
    longest = runner.blueprint.config.max_model_len
    for chunks in cases[::thin]:
        if max(length + start for length, start in chunks) > longest:
            continue
        tokens = sum(length for length, _ in chunks)
        yield {
            "tp": tp,
            "tokens": tokens,
            "chunks": len(chunks),
            "pairs": sum(length * start + length * (length + 1) // 2 for length, start in chunks),
            "kv_tokens": sum(length + start for length, start in chunks),
            "kv_max": max(length + start for length, start in chunks),
            "us": _prefill_us(runner, tp, chunks, tokens),
        }


def _prefill_us(runner: Runner, tp: int, chunks: list[tuple[int, int]], tokens: int) -> float:
    model, config = runner.blueprint.model, runner.blueprint.config
    heads, kv_heads = model.heads_per_rank(tp), model.kv_heads_per_rank(tp)
    pool = _pool_view(runner, tp)
    table = _page_table(runner, np.array([length + start for length, start in chunks]), pool.shape[0])
    starts = np.cumsum([0] + [length for length, _ in chunks])
    block_q = runner.layout(1).block_q
    plan = plan_prefill_attention(
        [(int(starts[i]), length, start, i) for i, (length, start) in enumerate(chunks)], block_q
    )
    items, num_items = _work_list(plan, runner.device)
    q = torch.randn(tokens, heads, model.head_dim, dtype=runner.dtype, device=runner.device)
    out = torch.empty(tokens, heads * model.head_dim, dtype=runner.dtype, device=runner.device)

    def call() -> None:
        for layer in range(model.num_layers):
            runner.model.ops.paged_prefill_attention(
                q,
                pool,
                table,
                items,
                num_items,
                out,
                layer=layer,
                num_layers=model.num_layers,
                num_kv_heads=kv_heads,
                head_dim=model.head_dim,
                page_tokens=config.page_tokens,
                block_q=block_q,
                num_programs=PREFILL_PROGRAMS,
            )

    return captured_us(call, runner.device) / model.num_layers


def _sample_us(runner: Runner, rows: int) -> float:
    """Time the two sampling kernels of a step in which all rows are greedy."""
    device, ops = runner.device, runner.model.ops
    logits = torch.randn(rows, runner.blueprint.model.vocab_size, dtype=runner.dtype, device=device)
    slots = torch.arange(rows, dtype=torch.int32, device=device)
    params = torch.zeros(rows, PARAM_COLUMNS, dtype=torch.int32, device=device)
    last_token = torch.zeros(rows, dtype=torch.int64, device=device)
    arrivals = torch.zeros_like(slots)

    def call() -> None:
        ops.sample(logits, slots, params, ops.top_p_threshold(logits, params), last_token, arrivals)

    return captured_us(call, device)


def lora_us(runner: Runner, batch: DeviceBatch) -> float:
    """Return the microseconds of shrink + expand of one layer's seven linears, averaged over all layers."""
    model = runner.model
    layers = runner.blueprint.model.num_layers
    linears = runner.blueprint.model.linear_shapes(runner.blueprint.config.tp)
    tokens = batch.layout.tokens
    inputs = [
        torch.randn(tokens, linears[group[0]][1], dtype=runner.dtype, device=runner.device)
        for group in GROUPS
    ]
    outputs = [
        torch.zeros(tokens, sum(linears[m][0] for m in group), dtype=runner.dtype, device=runner.device)
        for group in GROUPS
    ]

    def call() -> None:
        for layer in range(layers):
            for group in range(len(GROUPS)):
                bridge = model.lora_shrink(batch, layer, group, inputs[group])
                model.lora_expand_(batch, layer, group, bridge, outputs[group])

    return captured_us(call, runner.device) / layers


def _transfer_rows(runner: Runner) -> Iterator[dict[str, Any]]:
    for size in TRANSFER_BYTES:
        host = torch.empty(size, dtype=torch.uint8, pin_memory=runner.device.type == "cuda")
        target = torch.empty(size, dtype=torch.uint8, device=runner.device)
        us = event_us(partial(target.copy_, host, non_blocking=True), runner.device)
        yield {"bytes": size, "us": us}


def _pool_view(runner: Runner, tp: int) -> torch.Tensor:
    """Return the pool cut into the smaller pages of one of tp GPUs."""
    pool = runner.buffers.pool
    return pool.view(pool.shape[0] * tp, pool.shape[1] // tp)


def _page_table(runner: Runner, lens: np.ndarray, num_pages: int) -> torch.Tensor:
    """Return random pages for rows of these lengths in tokens: distinct ones as far as the pool reaches."""
    pages = -(-lens.astype(np.int64) // runner.blueprint.config.page_tokens)
    order = np.random.default_rng(len(lens)).permutation(num_pages)
    first = np.cumsum(pages) - pages
    index = (first[:, None] + np.arange(max(1, int(pages.max())))) % num_pages
    return torch.from_numpy(order[index].astype(np.int32)).to(runner.device)


def _work_list(items: np.ndarray, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a work list on the device, one row at least, and its length."""
    padded = np.zeros((max(1, len(items)), 4), dtype=np.int32)
    padded[: len(items)] = items
    length = torch.tensor([len(items)], dtype=torch.int32, device=device)
    return torch.from_numpy(padded).to(device), length
