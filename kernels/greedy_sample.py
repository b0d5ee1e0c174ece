"""Greedy sampling: the first largest logit of each row, which also becomes its sequence's last token.

    tokens[s] = min { v : logits[s, v] = max logits[s] },    last_token[sample_slots[s]] = tokens[s]

NaN counts as larger than everything, as in torch.argmax: the first NaN of a row is its token.

A row is cut into parts of BLOCK columns, one a program, which leaves its maximum and where it is as one 64-bit number that compares as
wanted. The program that arrives last at its row's counter merges them, so one launch does it all.
"""

import torch
import triton
import triton.language as tl

from kernels.checks import FLOAT_DTYPES, check_tensor
from kernels.launch import launch_options, let_successor_start, wait_for_predecessors

# 16 programs a row at 128,256 columns: enough to take a single row in one round of loads, and few enough that the last one merges
# them by one load. 32 elements a thread: four 16-byte loads in bf16.
BLOCK = 8192
NUM_WARPS = 8


@triton.jit
def _rank_of(top, index, is_nan):
    """Return an int64 that is larger for a larger `top` and, at equal ones, for a smaller index; largest for NaN."""
    bits = tl.where(top == 0.0, 0.0, top).to(tl.int32, bitcast=True)  # −0 equals 0
    ordered = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    ordered = tl.where(is_nan, 0x7FFFFFFF, ordered)
    return (ordered.to(tl.int64) << 32) | (0x7FFFFFFF - index).to(tl.int64)


@triton.jit
def _greedy_sample_kernel(
    logits, sample_slots, last_token, parts, arrivals, out, logits_stride,
    VOCAB: tl.constexpr, BLOCK: tl.constexpr, PARTS: tl.constexpr, PARTS_PAD: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    let_successor_start(PDL)
    row = (tl.program_id(0) // PARTS).to(tl.int64)
    part = tl.program_id(0) % PARTS
    column = part * BLOCK + tl.arange(0, BLOCK)
    slot = tl.load(sample_slots + row).to(tl.int64)
    wait_for_predecessors(PDL)
    value = tl.load(logits + row * logits_stride + column, mask=column < VOCAB, other=float("-inf"))
    value = value.to(tl.float32)
    top = tl.max(value, axis=0)
    # Where a NaN is: below VOCAB; else where the maximum is: from VOCAB on. Past the row's end is −inf, which loses ties to what is in it.
    place = tl.where(value == top, column + VOCAB, 2 * VOCAB)
    place = tl.min(tl.where(value != value, column, place), axis=0)
    is_nan = place < VOCAB
    tl.store(
        parts + row * PARTS + part,
        _rank_of(top, place - tl.where(is_nan, 0, VOCAB), is_nan),
        cache_modifier=".cg",
    )
    # One thread makes the store above and this: whoever sees the counter full also sees every part.
    if tl.atomic_add(arrivals + row, 1, sem="acq_rel") == PARTS - 1:
        other = tl.arange(0, PARTS_PAD)
        lowest = -0x8000000000000000
        ranks = tl.load(parts + row * PARTS + other, mask=other < PARTS, other=lowest, cache_modifier=".cg")
        token = 0x7FFFFFFF - (tl.max(ranks, axis=0) & 0x7FFFFFFF)
        tl.store(out + row, token)
        tl.store(last_token + slot, token)
        tl.store(arrivals + row, 0)


def greedy_sample(
    logits: torch.Tensor,
    sample_slots: torch.Tensor,
    last_token: torch.Tensor,
    arrivals: torch.Tensor,
    *,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Write the first largest column of each row to `out`, and to `last_token` at the row's slot.

    logits: [S, V] bf16, fp16 or fp32, V < 2**30; rows contiguous, any row stride. sample_slots: [S] int32, in range; of rows with the same
    slot, any one's token stays. last_token: [slots] int64. arrivals: [>= S] int32, zero, and left zero: counters that launches on one stream
    share. out: [S] int64.
    It starts early (kernels/launch.py): sample_slots is read before the kernels ahead have ended.
    Returns out. Raises ValueError on shape, dtype, stride or device mismatch.
    """
    device = logits.device
    check_tensor("logits", logits, shape=(None, None), dtypes=FLOAT_DTYPES, device=device, strided_rows=True)
    rows, vocab = logits.shape
    if not 0 < vocab < 2**30:
        raise ValueError(f"logits must have between 1 and 2**30 - 1 columns, not {vocab}")
    check_tensor("sample_slots", sample_slots, shape=(rows,), dtypes=(torch.int32,), device=device)
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
    _greedy_sample_kernel[(rows * parts,)](
        logits,
        sample_slots,
        last_token,
        torch.empty((rows, parts), dtype=torch.int64, device=device),
        arrivals,
        out,
        logits.stride(0),
        VOCAB=vocab,
        BLOCK=block,
        PARTS=parts,
        PARTS_PAD=triton.next_power_of_2(parts),
        num_warps=NUM_WARPS,
        **launch_options(device),
    )
    return out
