"""The smallest logit of each row's nucleus: the smallest set of the likeliest tokens whose probability is at least top_p.

    mass[s](t) = Σ { exp(logits[s, v] / temperature[s]) : logits[s, v] ≥ t }
    thresholds[s] = max { t : mass[s](t) ≥ top_p[s] · mass[s](−∞) },    −∞ where temperature[s] = 0 or top_p[s] = 1

The mass falls only at a logit, so the largest t is one. All tokens whose logit equals it are kept. NaN weighs nothing.
Nucleus sampling: Holtzman et al., arXiv:1904.09751.

Nothing is sorted. Floats of the logits' own type are in the order of their bits (but for the sign), so t is bisected among those bits, two a
pass over the row, which L2 holds: three pivots cut what is left into four. The search starts from what can matter. Tokens below
max − temperature · log(vocabulary / (1 − top_p)) together weigh less than 1 − top_p of all, so t is not among them; in bf16 that mostly leaves
a few hundred values, or four passes. The sum over a row is made in one fixed order, so that the answer is always the same.
"""

import math

import torch
import triton
import triton.language as tl

from kernels import sample_params
from kernels.checks import FLOAT_DTYPES, check_tensor
from kernels.launch import launch_options, let_successor_start, wait_for_predecessors

# One program a row: 8 elements a thread in 16-byte loads, and so many threads that one row alone keeps its SM busy.
BLOCK = 4096
NUM_WARPS = 16
MAX_REGISTERS = 64  # two programs an SM

TEMPERATURE = tl.constexpr(sample_params.TEMPERATURE)
TOP_P = tl.constexpr(sample_params.TOP_P)
PARAM_COLUMNS = tl.constexpr(sample_params.PARAM_COLUMNS)
LOG2E = tl.constexpr(math.log2(math.e))


@triton.jit
def _load(row_logits, column, VOCAB: tl.constexpr):
    """Load logits, −∞ past the row's end."""
    return tl.load(row_logits + column, mask=column < VOCAB, other=float("-inf"))


@triton.jit
def _key_of(value, DTYPE: tl.constexpr):
    """Return the int64 that is as large among integers as `value`, rounded to DTYPE, is among the floats of DTYPE."""
    if DTYPE.primitive_bitwidth == 32:
        bits = value.to(tl.int32, bitcast=True)
        key = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    else:
        bits = value.to(DTYPE).to(tl.int16, bitcast=True).to(tl.int32)
        key = tl.where(bits < 0, bits ^ 0x7FFF, bits)
    return key.to(tl.int64)


@triton.jit
def _value_of(key, DTYPE: tl.constexpr):
    """Return the float, in fp32, whose key it is."""
    key = key.to(tl.int32)
    if DTYPE.primitive_bitwidth == 32:
        value = tl.where(key < 0, key ^ 0x7FFFFFFF, key).to(tl.float32, bitcast=True)
    else:
        bits = tl.where(key < 0, key ^ 0x7FFF, key).to(tl.int16)
        value = bits.to(DTYPE, bitcast=True).to(tl.float32)
    return value


@triton.jit
def _top_p_kernel(
    logits, params_, thresholds, logits_stride,
    VOCAB: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    let_successor_start(PDL)
    row = tl.program_id(0).to(tl.int64)
    temperature = tl.load(params_ + row * PARAM_COLUMNS + TEMPERATURE).to(tl.float32, bitcast=True)
    top_p = tl.load(params_ + row * PARAM_COLUMNS + TOP_P).to(tl.float32, bitcast=True)
    wait_for_predecessors(PDL)
    threshold = float("-inf")
    if (temperature != 0.0) & (top_p < 1.0):
        DTYPE: tl.constexpr = logits.dtype.element_ty
        row_logits = logits + row * logits_stride
        lane = tl.arange(0, BLOCK)
        largest = tl.full([BLOCK], float("-inf"), tl.float32)
        for start in tl.range(0, VOCAB, BLOCK, loop_unroll_factor=4):
            largest = tl.maximum(largest, _load(row_logits, start + lane, VOCAB).to(tl.float32))
        threshold = tl.max(largest, axis=0)
        if tl.abs(threshold) != float("inf"):  # else there is only this one to keep, or all
            scale = LOG2E / temperature
            # Its mass is enough, and of keys past `high` it is not; a temperature more and a key less than needed, for rounding.
            least = threshold - temperature * (1.0 + tl.log(VOCAB / (1.0 - top_p)))
            low, high = _key_of(least, DTYPE) - 1, _key_of(threshold, DTYPE)
            while low < high:
                step = (high - low) // 4 + 1
                first = _value_of(tl.minimum(low + step, high), DTYPE)
                second = _value_of(tl.minimum(low + 2 * step, high), DTYPE)
                third = _value_of(tl.minimum(low + 3 * step, high), DTYPE)
                mass = tl.zeros([BLOCK], tl.float32)
                first_mass, second_mass, third_mass = mass, mass, mass
                ahead = _load(row_logits, lane, VOCAB)
                for start in range(0, VOCAB, BLOCK):
                    logit = ahead.to(tl.float32)
                    ahead = _load(row_logits, start + BLOCK + lane, VOCAB)
                    weight = tl.exp2((logit - threshold) * scale)
                    mass += weight
                    first_mass += tl.where(logit >= first, weight, 0.0)
                    second_mass += tl.where(logit >= second, weight, 0.0)
                    third_mass += tl.where(logit >= third, weight, 0.0)
                needed = top_p * tl.sum(mass, axis=0)
                enough = (tl.sum(first_mass, axis=0) >= needed).to(tl.int64)
                enough += (tl.sum(second_mass, axis=0) >= needed).to(tl.int64)
                enough += (tl.sum(third_mass, axis=0) >= needed).to(tl.int64)
                high = tl.minimum(low + (enough + 1) * step - 1, high)
                low = tl.minimum(low + enough * step, high)
            threshold = _value_of(low, DTYPE)
    tl.store(thresholds + row, threshold)


def top_p_threshold(
    logits: torch.Tensor, params: torch.Tensor, *, out: torch.Tensor | None = None
) -> torch.Tensor:
    """Write the smallest logit of each row's nucleus to `out`.

    logits: [S, V] bf16, fp16 or fp32; rows contiguous, any row stride. params: [S, 5] int32 (kernels/sample_params.py), temperatures 0 or at
    least 1e-5. out: [S] fp32.
    It starts early (kernels/launch.py): params is read before the kernels ahead have ended.
    Returns out. Raises ValueError on shape, dtype, stride or device mismatch.
    """
    device = logits.device
    check_tensor("logits", logits, shape=(None, None), dtypes=FLOAT_DTYPES, device=device, strided_rows=True)
    rows, vocab = logits.shape
    if not 0 < vocab < 2**30:
        raise ValueError(f"logits must have between 1 and 2**30 - 1 columns, not {vocab}")
    check_tensor("params", params, shape=(rows, PARAM_COLUMNS.value), dtypes=(torch.int32,), device=device)
    if out is None:
        out = torch.empty(rows, dtype=torch.float32, device=device)
    check_tensor("out", out, shape=(rows,), dtypes=(torch.float32,), device=device)
    if rows == 0:
        return out
    _top_p_kernel[(rows,)](
        logits,
        params,
        out,
        logits.stride(0),
        VOCAB=vocab,
        BLOCK=min(BLOCK, triton.next_power_of_2(vocab)),
        num_warps=NUM_WARPS,
        maxnreg=MAX_REGISTERS,
        **launch_options(device),
    )
    return out
