"""Rotary position embedding of q and k, and the write of k and v into the paged KV cache, in one pass over
qkv.

    q, k:  (a, b) → (a·cos − b·sin, b·cos + a·sin),   a, b the halves of a head;
    page = page_table[sequence_slots[t], positions[t] // page_tokens] takes k and v of token t at
    positions[t] mod page_tokens.

Source: Su et al., arXiv:2104.09864, halves split as in Hugging Face's Llama.
"""

import torch
import triton
import triton.language as tl

from kernels.checks import FLOAT_DTYPES, check_heads, check_pool, check_tensor
from kernels.launch import KEEP, launch_options, let_successor_start, wait_for_predecessors

HEADS_BLOCK = 16


@triton.jit
def _rotary_write_kv_kernel(
    qkv,
    cos_sin,
    positions,
    sequence_slots,
    page_table,
    pool,
    qkv_stride,
    table_stride,
    page_elems,
    layer_offset,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAGE_TOKENS: tl.constexpr,
    HEADS_BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """HEADS_BLOCK heads of one token. Without branches, no load waits for more than its own address: slot and position, then angles and page."""
    HALF: tl.constexpr = HEAD_DIM // 2
    let_successor_start(PDL)
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(sequence_slots + token, eviction_policy=KEEP).to(tl.int64)
    position = tl.load(positions + token, eviction_policy=KEEP)
    live = slot >= 0
    column = tl.arange(0, HALF)
    angle = cos_sin + position.to(tl.int64) * HEAD_DIM + column
    cos = tl.load(angle, mask=live, other=0.0, eviction_policy=KEEP)[None, :]
    sin = tl.load(angle + HALF, mask=live, other=0.0, eviction_policy=KEEP)[None, :]
    first_head = tl.program_id(1) * HEADS_BLOCK
    entry = page_table + slot * table_stride + position // PAGE_TOKENS
    has_kv = first_head + HEADS_BLOCK > NUM_HEADS
    page = tl.load(entry, mask=live & has_kv, other=0, eviction_policy=KEEP).to(tl.int64)
    head = (first_head + tl.arange(0, HEADS_BLOCK))[:, None]
    # K heads and V heads follow each other in qkv as they do in a page, so one index, kv_head, runs over both.
    kv_head = head - NUM_HEADS
    inside = head < NUM_HEADS + 2 * NUM_KV_HEADS
    rotates = live & (head < NUM_HEADS + NUM_KV_HEADS)
    written = live & inside & (kv_head >= 0)
    source = qkv + token * qkv_stride + head * HEAD_DIM + column[None, :]
    wait_for_predecessors(PDL)
    first = tl.load(source, mask=inside, other=0.0)
    second = tl.load(source + HALF, mask=inside, other=0.0)
    a = first.to(tl.float32)
    b = second.to(tl.float32)
    first = tl.where(rotates, (a * cos - b * sin).to(first.dtype), first)
    second = tl.where(rotates, (b * cos + a * sin).to(second.dtype), second)
    tl.store(source, first, mask=rotates)
    tl.store(source + HALF, second, mask=rotates)
    place = page * page_elems + layer_offset + (position % PAGE_TOKENS) * HEAD_DIM
    sink = pool + place + kv_head * (PAGE_TOKENS * HEAD_DIM) + column[None, :]
    tl.store(sink, first, mask=written)
    tl.store(sink + HALF, second, mask=written)


def rotary_write_kv_(
    qkv: torch.Tensor,
    cos_sin: torch.Tensor,
    positions: torch.Tensor,
    sequence_slots: torch.Tensor,
    page_table: torch.Tensor,
    pool: torch.Tensor,
    *,
    layer: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    page_tokens: int,
    num_layers: int,
) -> None:
    """Rotate q and k in place and write k and v into the pages of `layer`.

    qkv: [T, (Hq + 2 Hkv)·D] bf16, fp16 or fp32; rows contiguous, any row stride. cos_sin: [max_pos, D] fp32,
    cos then sin.
    positions, sequence_slots: [T] int32; a token with slot −1 is padding and is left alone. page_table: [S,
    pages] int32.
    pool: [num_pages, num_layers·2·Hkv·page_tokens·D], dtype of qkv.
    It starts early (kernels/launch.py): cos_sin, positions, sequence_slots and page_table are read before the kernels ahead have ended.
    Changes qkv and pool. Raises ValueError on shape, dtype, stride or device mismatch.
    """
    check_heads(num_heads, num_kv_heads)
    width = (num_heads + 2 * num_kv_heads) * head_dim
    device = qkv.device
    check_tensor("qkv", qkv, shape=(None, width), dtypes=FLOAT_DTYPES, device=device, strided_rows=True)
    check_tensor("cos_sin", cos_sin, shape=(None, head_dim), dtypes=(torch.float32,), device=device)
    tokens = qkv.shape[0]
    check_tensor("positions", positions, shape=(tokens,), dtypes=(torch.int32,), device=device)
    check_tensor("sequence_slots", sequence_slots, shape=(tokens,), dtypes=(torch.int32,), device=device)
    check_tensor(
        "page_table", page_table, shape=(None, None), dtypes=(torch.int32,), device=device, strided_rows=True
    )
    check_pool(
        pool,
        layer=layer,
        num_layers=num_layers,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        page_tokens=page_tokens,
        like=qkv,
    )
    if tokens == 0:
        return
    _rotary_write_kv_kernel[(tokens, triton.cdiv(num_heads + 2 * num_kv_heads, HEADS_BLOCK))](
        qkv,
        cos_sin,
        positions,
        sequence_slots,
        page_table,
        pool,
        qkv.stride(0),
        page_table.stride(0),
        pool.stride(0),
        layer * 2 * num_kv_heads * page_tokens * head_dim,
        NUM_HEADS=num_heads,
        NUM_KV_HEADS=num_kv_heads,
        HEAD_DIM=head_dim,
        PAGE_TOKENS=page_tokens,
        HEADS_BLOCK=HEADS_BLOCK,
        num_warps=4,  # 16 heads × 64 halves: one 16-byte load of each half a thread in bf16.
        **launch_options(qkv.device),
    )
