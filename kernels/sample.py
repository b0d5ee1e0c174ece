"""Sampling: the next token of each row, which also becomes its sequence's last token; rows with and without temperature side by side.

    tokens[s] = min { v : score[s, v] is the largest },    last_token[sample_slots[s]] = tokens[s]
    score[s, v] = logits[s, v]                                  where temperature[s] = 0
                = −∞                                            where logits[s, v] < thresholds[s]
                = logits[s, v] − temperature[s] · log E[s, v]   else

NaN counts as larger than everything, as in torch.argmax: the first NaN of a row is its token.

E is exponentially distributed, so −log E is Gumbel's, and the largest score is a draw from softmax(logits / temperature) of the tokens at
or above the threshold (Gumbel-max; Maddison et al., arXiv:1411.0030). E comes from a hash of seed, position and v alone: 64 bits of key of a
row, and for each v a mix of three multiplications (triple32 of C. Wellons' hash prospector, the second half of the key added after the
first multiplication). So a seed's draws do not depend on what else is in the batch, and no state is kept.

A row is cut into parts of BLOCK columns, one a program, which leaves its maximum and where it is as one 64-bit number that compares as
wanted. The program that arrives last at its row's counter merges them, so one launch does it all.
"""

import math

import torch
import triton
import triton.language as tl

from kernels import sample_params
from kernels.checks import FLOAT_DTYPES, check_tensor
from kernels.launch import launch_options, let_successor_start, wait_for_predecessors

# 16 programs a row at 128,256 columns: enough to take a single row in one round of loads, and few enough that the last one merges
# them by one load. 32 elements a thread: four 16-byte loads in bf16.
BLOCK = 8192
NUM_WARPS = 8
# Drawing takes fewer columns at a time, and the compiler no more registers than taking the maximum alone does (64, without spilling): four
# programs an SM either way, so that rows without temperature do not pay for the others.
STEP = 2048
MAX_REGISTERS = 64

TEMPERATURE = tl.constexpr(sample_params.TEMPERATURE)
SEED_LOW = tl.constexpr(sample_params.SEED_LOW)
SEED_HIGH = tl.constexpr(sample_params.SEED_HIGH)
POSITION = tl.constexpr(sample_params.POSITION)
LN2 = tl.constexpr(math.log(2))
PARAM_COLUMNS = tl.constexpr(sample_params.PARAM_COLUMNS)


@triton.jit
def _mix(x, key):
    """Hash 32 bits with a key of 32: one to one in x, and every bit of the result depends on all of both."""
    x ^= x >> 17
    x = x * 0xED5AD4BB + key
    x ^= x >> 11
    x *= 0xAC4C1B51
    x ^= x >> 15
    x *= 0x31848BAB
    return x ^ (x >> 14)


@triton.jit
def _log2(x, APPROXIMATE: tl.constexpr):
    """Return log2(x), on a GPU by its own instruction: wrong by at most 2^-22 between 1/2 and 2, by 2^-22 of itself elsewhere (PTX ISA)."""
    if APPROXIMATE:
        return tl.inline_asm_elementwise("lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, True, 1)
    return tl.log2(x)


@triton.jit
def _exponential(bits, APPROXIMATE: tl.constexpr):
    """Return −log(1 − u), u = (bits // 2 + 1/2) / 2**31: never 0 or infinite, and as exact at both ends.

    Small ones decide who wins, and 1 − u would have lost them: below 1/32 a series, wrong by less than 2 · 10⁻⁷ of itself.
    """
    half = (bits >> 1).to(tl.int32)
    is_small = half < 2**26
    part = (tl.where(is_small, half, 0x7FFFFFFF - half).to(tl.float32) + 0.5) * 2.0**-31  # u, or 1 − u
    series = part * (1.0 + part * (1 / 2 + part * (1 / 3 + part * (1 / 4))))
    return tl.where(is_small, series, -LN2 * _log2(part, APPROXIMATE))


@triton.jit
def _load(row_logits, column, VOCAB: tl.constexpr):
    """Load logits as fp32, −∞ past the row's end, which loses ties to what is in it."""
    return tl.load(row_logits + column, mask=column < VOCAB, other=float("-inf")).to(tl.float32)


@triton.jit
def _draw(
    row_logits, row_params, temperature, threshold, first_column,
    VOCAB: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr, APPROXIMATE: tl.constexpr,
):  # fmt: skip
    """Return the largest score of each of STEP lanes over a block's columns, the first of equal ones, and where it is."""
    low = tl.load(row_params + SEED_LOW).to(tl.uint32, bitcast=True)
    high = tl.load(row_params + SEED_HIGH).to(tl.uint32, bitcast=True)
    position = tl.load(row_params + POSITION).to(tl.uint32, bitcast=True)
    key = _mix(position, _mix(low, high))
    other_key = _mix(position, _mix(high ^ 0x9E3779B9, low))
    place = first_column + tl.arange(0, STEP)
    best = tl.full([STEP], float("-inf"), tl.float32)
    for start in range(0, BLOCK, STEP):
        column = first_column + start + tl.arange(0, STEP)
        logit = _load(row_logits, column, VOCAB)
        exponential = _exponential(_mix(column.to(tl.uint32) ^ key, other_key), APPROXIMATE)
        score = logit - temperature * LN2 * _log2(exponential, APPROXIMATE)
        score = tl.where(logit < threshold, float("-inf"), score)
        is_better = (score > best) | ((score != score) & (best == best))
        best = tl.where(is_better, score, best)
        place = tl.where(is_better, column, place)
    return best, place


@triton.jit
def _first_largest(score, column, VOCAB: tl.constexpr):
    """Return an int64 that is larger for a larger maximum and, at equal ones, for a smaller column of it; largest where there is a NaN."""
    top = tl.max(score, axis=0)
    # Where a NaN is: below VOCAB; else where the maximum is: from VOCAB on.
    place = tl.where(score == top, column + VOCAB, 2 * VOCAB)
    place = tl.min(tl.where(score != score, column, place), axis=0)
    is_nan = place < VOCAB
    bits = tl.where(top == 0.0, 0.0, top).to(tl.int32, bitcast=True)  # −0 equals 0
    ordered = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    ordered = tl.where(is_nan, 0x7FFFFFFF, ordered)
    return (ordered.to(tl.int64) << 32) | (0x7FFFFFFF - place + tl.where(is_nan, 0, VOCAB)).to(tl.int64)


@triton.jit
def _sample_kernel(
    logits, sample_slots, params_, thresholds, last_token, parts, arrivals, out, logits_stride,
    VOCAB: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr, PARTS: tl.constexpr, PARTS_PAD: tl.constexpr,
    APPROXIMATE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    let_successor_start(PDL)
    row = (tl.program_id(0) // PARTS).to(tl.int64)
    part = tl.program_id(0) % PARTS
    slot = tl.load(sample_slots + row).to(tl.int64)
    row_params = params_ + row * PARAM_COLUMNS
    temperature = tl.load(row_params + TEMPERATURE).to(tl.float32, bitcast=True)
    row_logits = logits + row * logits_stride
    wait_for_predecessors(PDL)
    if temperature == 0.0:
        column = part * BLOCK + tl.arange(0, BLOCK)
        rank = _first_largest(_load(row_logits, column, VOCAB), column, VOCAB)
    else:
        threshold = tl.load(thresholds + row)
        best, place = _draw(
            row_logits, row_params, temperature, threshold, part * BLOCK, VOCAB, BLOCK, STEP, APPROXIMATE
        )
        rank = _first_largest(best, place, VOCAB)
    tl.store(parts + row * PARTS + part, rank, cache_modifier=".cg")
    # One thread makes the store above and this: whoever sees the counter full also sees every part.
    if tl.atomic_add(arrivals + row, 1, sem="acq_rel") == PARTS - 1:
        other = tl.arange(0, PARTS_PAD)
        lowest = -0x8000000000000000
        ranks = tl.load(parts + row * PARTS + other, mask=other < PARTS, other=lowest, cache_modifier=".cg")
        token = 0x7FFFFFFF - (tl.max(ranks, axis=0) & 0x7FFFFFFF)
        tl.store(out + row, token)
        tl.store(last_token + slot, token)
        tl.store(arrivals + row, 0)


def sample(
    logits: torch.Tensor,
    sample_slots: torch.Tensor,
    params: torch.Tensor,
    thresholds: torch.Tensor,
    last_token: torch.Tensor,
    arrivals: torch.Tensor,
    *,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Write each row's token to `out`, and to `last_token` at the row's slot.

    logits: [S, V] bf16, fp16 or fp32, V < 2**30; rows contiguous, any row stride. sample_slots: [S] int32, in range; of rows with the same
    slot, any one's token stays. params: [S, 5] int32 (kernels/sample_params.py), temperatures 0 or at least 1e-5. thresholds: [S] fp32, read
    where the temperature is not 0 (kernels/top_p_threshold.py). last_token: [slots] int64. arrivals: [>= S] int32, zero, and left zero:
    counters that launches on one stream share. out: [S] int64.
    It starts early (kernels/launch.py): sample_slots and params are read before the kernels ahead have ended.
    Returns out. Raises ValueError on shape, dtype, stride or device mismatch.
    """
    device = logits.device
    check_tensor("logits", logits, shape=(None, None), dtypes=FLOAT_DTYPES, device=device, strided_rows=True)
    rows, vocab = logits.shape
    if not 0 < vocab < 2**30:
        raise ValueError(f"logits must have between 1 and 2**30 - 1 columns, not {vocab}")
    check_tensor("sample_slots", sample_slots, shape=(rows,), dtypes=(torch.int32,), device=device)
    check_tensor("params", params, shape=(rows, PARAM_COLUMNS.value), dtypes=(torch.int32,), device=device)
    check_tensor("thresholds", thresholds, shape=(rows,), dtypes=(torch.float32,), device=device)
    check_tensor("last_token", last_token, shape=(None,), dtypes=(torch.int64,), device=device)
    check_tensor("arrivals", arrivals, shape=(None,), dtypes=(torch.int32,), device=device)
    if len(arrivals) < rows:
        raise ValueError(f"arrivals must have at least {rows} entries, not {len(arrivals)}")
    if out is None:
        out = torch.empty(rows, dtype=torch.int64, device=device)
    check_tensor("out", out, shape=(rows,), dtypes=(torch.int64,), device=device)
    if rows == 0:
        return out
    block = min(BLOCK, triton.next_power_of_2(vocab))
    parts = triton.cdiv(vocab, block)
    _sample_kernel[(rows * parts,)](
        logits,
        sample_slots,
        params,
        thresholds,
        last_token,
        torch.empty((rows, parts), dtype=torch.int64, device=device),
        arrivals,
        out,
        logits.stride(0),
        VOCAB=vocab,
        BLOCK=block,
        STEP=min(STEP, block),
        PARTS=parts,
        PARTS_PAD=triton.next_power_of_2(parts),
        APPROXIMATE=device.type == "cuda",
        num_warps=NUM_WARPS,
        maxnreg=MAX_REGISTERS,
        **launch_options(device),
    )
    return out
