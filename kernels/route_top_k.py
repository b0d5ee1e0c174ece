"""The router of a dynamic adapter: each token's k experts with their gates, and what batches of tokens need to share the experts' bytes.

    p = softmax(logits[t]);   the k largest, ties by the lowest index;   gate_j = p_j, or with `renormalise` p_j / Σ of the k

Nothing comes to the host: what follows reads experts and gates from device memory, so it can all be in one CUDA graph.

Renormalise or not: LoRA-Switch (arXiv:2405.17741) takes softmax and then the top k, as they are: the default here. MoLA (arXiv:2402.08562)
divides by the sum of the k; MoRAL (arXiv:2402.11260) and PESC (arXiv:2401.02731) take the softmax over the k largest logits, which is the
same number.

It does not start early: what it writes is read by kernels that do, before they wait (kernels/expert_shrink.py).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.checks import FLOAT_DTYPES, check_tensor

MAX_EXPERTS = 32
MAX_TOP_K = 8
TILE_SIZES = (1, 16, 32)


@triton.jit
def _route_kernel(
    logits, active, indices, gates, dense, touched, tokens, logits_stride,
    N: tl.constexpr, N_PAD: tl.constexpr, K: tl.constexpr, SLOTS: tl.constexpr, TILE: tl.constexpr,
    RENORMALISE: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Route one tile of tokens."""
    tile = tl.program_id(0)
    token = tile * TILE + tl.arange(0, TILE)
    inside = token < tokens
    live = inside
    if MASKED:
        live = inside & (tl.load(active + token, mask=inside, other=0) != 0)
    column = tl.arange(0, N_PAD)
    real = (column < N)[None, :]
    at = token.to(tl.int64)[:, None] * logits_stride + column[None, :]
    logit = tl.load(logits + at, mask=inside[:, None] & real, other=float("-inf")).to(tl.float32)
    top = tl.max(tl.where(inside[:, None], logit, 0.0), axis=1)
    weight = tl.where(real, tl.exp(logit - top[:, None]), 0.0)
    p = weight / tl.where(inside, tl.sum(weight, axis=1), 1.0)[:, None]
    taken = tl.zeros([TILE, N_PAD], tl.int32)
    for _ in tl.static_range(K):
        open_ = (taken == 0) & real
        best = tl.max(tl.where(open_, logit, float("-inf")), axis=1)
        first = tl.min(tl.where(open_ & (logit == best[:, None]), column[None, :], N - 1), axis=1)
        taken += (column[None, :] == first[:, None]).to(tl.int32)
    chosen = (taken > 0) & live[:, None]
    scale = tl.full([TILE], 1.0, tl.float32)
    if RENORMALISE:
        scale = 1.0 / tl.where(inside, tl.sum(tl.where(taken > 0, p, 0.0), axis=1), 1.0)
    gate = tl.where(chosen, p * scale[:, None], 0.0)
    tl.store(dense + token.to(tl.int64)[:, None] * N + column[None, :], gate, mask=inside[:, None] & real)
    # Once more in order, now that the sum is known.
    taken = tl.zeros([TILE, N_PAD], tl.int32)
    for j in tl.static_range(K):
        open_ = (taken == 0) & real
        best = tl.max(tl.where(open_, logit, float("-inf")), axis=1)
        first = tl.min(tl.where(open_ & (logit == best[:, None]), column[None, :], N - 1), axis=1)
        here = column[None, :] == first[:, None]
        taken += here.to(tl.int32)
        tl.store(indices + token * K + j, tl.where(live, first, -1), mask=inside)
        tl.store(gates + token * K + j, tl.sum(tl.where(here, gate, 0.0), axis=1), mask=inside)
    used = tl.max(chosen.to(tl.int32), axis=0)
    before = tl.cumsum(used, axis=0) - used
    place = tl.where(used > 0, before, tl.sum(used, axis=0) + column - before)
    tl.store(touched + tile * SLOTS + place, tl.where(used > 0, column, -1), mask=place < SLOTS)


def touched_slots(num_experts: int, top_k: int, tile_tokens: int) -> int:
    """Return the most experts that one tile of tokens can choose."""
    return min(num_experts, top_k * tile_tokens)


def route_top_k(
    logits: torch.Tensor,
    indices: torch.Tensor,
    gates: torch.Tensor,
    dense: torch.Tensor,
    touched: torch.Tensor,
    *,
    renormalise: bool = False,
    tile_tokens: int = 1,
    active: torch.Tensor | None = None,
) -> None:
    """Choose each token's experts.

    logits: [T, N] bf16, fp16 or fp32, N in 2..32, rows contiguous. active: [T] int32; a token with 0 is routed nowhere (None: all are routed).
    Written: indices [T, k] int32, k <= N, largest gate first, −1 where not routed; gates [T, k] fp32; dense [T, N] fp32, the gates at their
    experts and 0 elsewhere; touched [⌈T / tile_tokens⌉, min(N, k·tile_tokens)] int32, for each tile of tokens the experts that any of them
    chose, ascending, then −1. tile_tokens: 1, 16 or 32.
    An index is in 0..N−1 whatever the logits are, NaN included. Raises ValueError on shape, dtype, stride or device mismatch.
    """
    device = logits.device
    check_tensor("logits", logits, shape=(None, None), dtypes=FLOAT_DTYPES, device=device, strided_rows=True)
    tokens, num_experts = logits.shape
    if not 2 <= num_experts <= MAX_EXPERTS:
        raise ValueError(f"logits must have 2 to {MAX_EXPERTS} columns, not {num_experts}")
    check_tensor("indices", indices, shape=(tokens, None), dtypes=(torch.int32,), device=device)
    top_k = indices.shape[1]
    if not 1 <= top_k <= min(num_experts, MAX_TOP_K):
        raise ValueError(f"indices must have 1 to {min(num_experts, MAX_TOP_K)} columns, not {top_k}")
    if tile_tokens not in TILE_SIZES:
        raise ValueError(f"tile_tokens(={tile_tokens}) must be one of {TILE_SIZES}")
    tiles, slots = -(-tokens // tile_tokens), touched_slots(num_experts, top_k, tile_tokens)
    check_tensor("gates", gates, shape=(tokens, top_k), dtypes=(torch.float32,), device=device)
    check_tensor("dense", dense, shape=(tokens, num_experts), dtypes=(torch.float32,), device=device)
    check_tensor("touched", touched, shape=(tiles, slots), dtypes=(torch.int32,), device=device)
    if active is not None:
        check_tensor("active", active, shape=(tokens,), dtypes=(torch.int32,), device=device)
    if tokens == 0:
        return
    _route_kernel[(tiles,)](
        logits, logits if active is None else active, indices, gates, dense, touched, tokens, logits.stride(0),
        N=num_experts, N_PAD=triton.next_power_of_2(num_experts), K=top_k, SLOTS=slots, TILE=tile_tokens,
        RENORMALISE=renormalise, MASKED=active is not None, num_warps=1 if tile_tokens == 1 else 4,
    )  # fmt: skip
