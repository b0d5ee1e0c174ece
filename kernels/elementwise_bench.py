"""Time the small kernels of a Llama-3.1-8B layer and the sampler against the bytes that they must move, each checked first."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from kernels import rms_norm_ref, rotary_write_kv_ref, sample_ref, silu_mul_ref, top_p_threshold_ref
from kernels.graph_time import bytes_us, check_error, graph_us, relative_error, timed
from kernels.rms_norm import add_rms_norm_, rms_norm
from kernels.rotary_write_kv import rotary_write_kv_
from kernels.sample import sample
from kernels.sample_params import sample_params
from kernels.silu_mul import silu_mul
from kernels.top_p_threshold import top_p_threshold

DEVICE, DTYPE = "cuda", torch.bfloat16
HIDDEN, INTERMEDIATE, HEADS, KV_HEADS, HEAD_DIM, VOCAB = 4096, 14336, 32, 8, 128, 128256
PAGE_TOKENS, LAYERS = 16, 8
EPS = 1e-5
TOKENS = (1, 32, 256, 2048, 8192)
SAMPLED_ROWS = (1, 32, 256)
SAMPLINGS = (
    ("greedy", 0.0, 1.0),
    ("temperature", 1.0, 1.0),
    ("top_p_0.9", 1.0, 0.9),
)  # of all rows of a batch
BUFFER_BYTES = 2**28  # of all sets of buffers together, in turn; at most 64 sets, at least 2

Log = Callable[[str], object]


def bench_elementwise(*, quick: bool = False, log: Log = print, tokens=None, sampled_rows=None) -> list[dict]:
    """Check and time every kernel at every size; return a row for each. Raises WrongResultError if a result is wrong."""
    replays = 10 if quick else 30
    rows = []
    for count in TOKENS if tokens is None else tokens:
        for bench in (bench_rms_norm, bench_add_rms_norm, bench_silu_mul, bench_rotary):
            rows.append(bench(count, replays))
        log(
            f"small kernels, {count} tokens: "
            + ", ".join(f"{row['op']} {row['us']:.1f}" for row in rows[-4:])
            + " µs"
        )
    for count in SAMPLED_ROWS if sampled_rows is None else sampled_rows:
        for name, temperature, top_p in SAMPLINGS:
            rows.append(bench_sampling(count, replays, name, temperature, top_p))
        log(
            f"sampling kernels, {count} rows: "
            + ", ".join(f"{row['op']} {row['us']:.1f}" for row in rows[-len(SAMPLINGS) :])
            + " µs"
        )
    return rows


def bench_rms_norm(tokens: int, replays: int) -> dict:
    """Check and time rms_norm."""
    x = randoms(tokens, HIDDEN)
    weight, out = random(HIDDEN), random(tokens, HIDDEN)
    error = relative_error(
        rms_norm(x[0], weight, EPS, out=out), rms_norm_ref.rms_norm(x[0].float(), weight, EPS)
    )
    return row(
        "rms_norm", tokens, error, lambda i: rms_norm(x[i], weight, EPS, out=out), len(x), replays, 4 * HIDDEN
    )


def bench_add_rms_norm(tokens: int, replays: int) -> dict:
    """Check and time add_rms_norm_; the error is the larger one of the residual's and the norm's."""
    x, residual = randoms(tokens, HIDDEN), randoms(tokens, HIDDEN)
    weight, out = random(HIDDEN), random(tokens, HIDDEN)
    expected_residual = residual[0].clone()
    expected = rms_norm_ref.add_rms_norm_(x[0], expected_residual, weight, EPS)
    add_rms_norm_(x[0], residual[0], weight, EPS, out=out)
    error = max(relative_error(out, expected), relative_error(residual[0], expected_residual))

    def call(i: int) -> None:
        add_rms_norm_(x[i], residual[i], weight, EPS, out=out)

    return row("add_rms_norm", tokens, error, call, len(x), replays, 8 * HIDDEN)


def bench_silu_mul(tokens: int, replays: int) -> dict:
    """Check and time silu_mul."""
    gate_up, out = randoms(tokens, 2 * INTERMEDIATE), random(tokens, INTERMEDIATE)
    error = relative_error(silu_mul(gate_up[0], out=out), silu_mul_ref.silu_mul(gate_up[0].float()))
    moved = 6 * INTERMEDIATE
    return row(
        "silu_mul", tokens, error, lambda i: silu_mul(gate_up[i], out=out), len(gate_up), replays, moved
    )


def bench_rotary(tokens: int, replays: int) -> dict:
    """Check and time rotary_write_kv_; the error is the larger one of q, k, v's and the pool's."""
    qkv = randoms(tokens, (HEADS + 2 * KV_HEADS) * HEAD_DIM)
    num_pages = -(-tokens // PAGE_TOKENS)
    table = torch.randperm(num_pages, dtype=torch.int32, device=DEVICE)[None]
    pool = torch.zeros(num_pages, LAYERS * 2 * KV_HEADS * PAGE_TOKENS * HEAD_DIM, dtype=DTYPE, device=DEVICE)
    angle = torch.rand(
        tokens, HEAD_DIM // 2, device=DEVICE
    )  # true angles: the calls that follow leave q and k as large
    cos_sin = torch.cat([angle.cos(), angle.sin()], dim=1)
    positions = torch.arange(tokens, dtype=torch.int32, device=DEVICE)
    slots = torch.zeros(tokens, dtype=torch.int32, device=DEVICE)
    shape = dict(
        num_heads=HEADS, num_kv_heads=KV_HEADS, head_dim=HEAD_DIM, page_tokens=PAGE_TOKENS, num_layers=LAYERS
    )

    def call(i: int, run=rotary_write_kv_, qkv=qkv, pool=pool) -> None:
        run(qkv[i], cos_sin, positions, slots, table, pool, layer=i % LAYERS, **shape)

    expected_qkv, expected_pool = qkv[0].clone(), pool.clone()
    call(0, rotary_write_kv_ref.rotary_write_kv_, [expected_qkv], expected_pool)
    call(0)
    error = max(relative_error(qkv[0], expected_qkv), relative_error(pool, expected_pool))
    moved = HEAD_DIM * (
        2 * (2 * HEADS + 5 * KV_HEADS) + 4
    )  # q and k in and out, v in, k and v to the pool, angles
    return row("rotary_write_kv", tokens, error, call, len(qkv), replays, moved)


def bench_sampling(rows: int, replays: int, name: str, temperature: float, top_p: float) -> dict:
    """Check and time top_p_threshold and sample as a step runs them; the bound is one reading of the logits.

    The error is how far the reference's scores of the tokens are below its largest; greedy tokens must be the reference's.
    """
    logits, params = randoms(rows, VOCAB), row_params(rows, temperature, top_p)
    slots = torch.arange(rows, dtype=torch.int32, device=DEVICE)
    last = torch.zeros(rows, dtype=torch.int64, device=DEVICE)
    arrivals = torch.zeros(rows, dtype=torch.int32, device=DEVICE)
    out = torch.empty(rows, dtype=torch.int64, device=DEVICE)
    thresholds = torch.empty(rows, device=DEVICE)

    def call(i: int) -> None:
        top_p_threshold(logits[i], params, out=thresholds)
        sample(logits[i], slots, params, thresholds, last, arrivals, out=out)

    call(0)
    host = params.cpu()  # on the CPU, where argmax takes the first of equal ones
    expected = top_p_threshold_ref.top_p_threshold(logits[0], params).cpu()
    scores = sample_ref.scores(logits[0].cpu(), host, expected)
    tokens = out.cpu()
    short = scores.amax(dim=1) - scores.gather(1, tokens[:, None]).squeeze(1)
    right = torch.equal(last, out) and (temperature > 0 or torch.equal(tokens, scores.argmax(dim=1)))
    error = short.max().item() if right else float("inf")
    return row(f"sample {name}", rows, error, call, len(logits), replays, 2 * VOCAB)


def row_params(rows: int, temperature: float, top_p: float) -> torch.Tensor:
    """The same parameters for all rows, seeds apart."""
    return torch.from_numpy(np.stack([sample_params(temperature, top_p, seed) for seed in range(rows)])).to(
        DEVICE
    )


def row(
    op: str,
    tokens: int,
    error: float,
    call: Callable[[int], object],
    buffers: int,
    replays: int,
    token_bytes: int,
) -> dict:
    """Time `call` on each set of buffers in turn; return the row. Raises WrongResultError where the error is too large."""
    check_error(f"{op} of {tokens}", error)

    def run() -> None:
        for index in range(buffers):
            call(index)

    us = graph_us(run, replays) / buffers
    return {"op": op, "tokens": tokens, **timed(us, bytes_us(tokens * token_bytes)), "rel_err": error}


def random(*shape: int) -> torch.Tensor:
    """Random numbers on the device."""
    return torch.randn(*shape, device=DEVICE).to(DTYPE)


def randoms(tokens: int, width: int) -> list[torch.Tensor]:
    """Sets of [tokens, width], so many that they exceed the cache, as far as 64 do."""
    return [random(tokens, width) for _ in range(max(2, min(64, BUFFER_BYTES // (2 * tokens * width))))]
