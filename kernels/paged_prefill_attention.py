"""Causal attention of prefill chunks over the paged KV cache, which already holds the chunks' own K and V.

    out[r, h] = Σ_{n <= p(r)} softmax_n(scale · q[r, h] · k[n]) v[n],   scale = D^−½, p(r) the position of
    row r

One work item is up to `block_q` rows of one chunk. The rows of all query heads that share a KV head form one
tile (block_q × group rows), so K and V are read once a group and even a short chunk fills the tensor cores.
KV blocks that every row of the tile sees take no mask.

Source: Dao, FlashAttention-2, arXiv:2307.08691.
"""

import torch
import triton
import triton.language as tl

from kernels.checks import (
    FLOAT_DTYPES,
    check_heads,
    check_pool,
    check_positive,
    check_tensor,
    check_work_list,
)

LOG2_E = 1.4426950408889634
BLOCK_N = 64
NUM_STAGES = 3


@triton.jit
def _attend(
    sums,
    total,
    top,
    query,
    position,
    keys,
    pages,
    begin,
    end,
    last,
    page_elems,
    scale_log2,
    VALUE_OFFSET: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAGE_TOKENS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Take KV tokens begin … end − 1 (in whole blocks) into the running sums, sum of weights and maximum of
    each row."""
    column = tl.arange(0, HEAD_DIM)
    # Past the end the last token is read again, so loads need no mask and meet no unwritten memory. The page ids of a
    # block are loaded one iteration ahead, so that K and V wait for no other load.
    page = tl.load(pages + tl.minimum(begin + tl.arange(0, BLOCK_N), last) // PAGE_TOKENS)
    for start in range(begin, end, BLOCK_N):
        token = start + tl.arange(0, BLOCK_N)
        slot = (tl.minimum(token, last) if MASKED else token) % PAGE_TOKENS
        place = (page.to(tl.int64) * page_elems + slot * HEAD_DIM)[:, None] + column[None, :]
        page = tl.load(pages + tl.minimum(token + BLOCK_N, last) // PAGE_TOKENS)
        key = tl.load(keys + place)
        scores = tl.dot(query, tl.trans(key), input_precision="ieee") * scale_log2
        if MASKED:
            scores = tl.where(token[None, :] <= position[:, None], scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, axis=1))
        weight = tl.exp2(scores - new_top[:, None])
        fade = tl.exp2(top - new_top)
        total = total * fade + tl.sum(weight, axis=1)
        value = tl.load(keys + VALUE_OFFSET + place)
        sums = tl.dot(weight.to(value.dtype), value, sums * fade[:, None], input_precision="ieee")
        top = new_top
    return sums, total, top


@triton.jit
def _prefill_kernel(
    q,
    pool,
    page_table,
    items,
    num_items,
    out,
    q_stride,
    table_stride,
    page_elems,
    layer_offset,
    scale_log2,
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_PAD: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAGE_TOKENS: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    NUM_HEADS: tl.constexpr = NUM_KV_HEADS * GROUP
    BLOCK_M: tl.constexpr = BLOCK_Q * GROUP_PAD
    VALUE_OFFSET: tl.constexpr = NUM_KV_HEADS * PAGE_TOKENS * HEAD_DIM
    index = tl.arange(0, BLOCK_M) // GROUP_PAD
    member = tl.arange(0, BLOCK_M) % GROUP_PAD
    column = tl.arange(0, HEAD_DIM)
    for work in range(tl.program_id(0), tl.load(num_items) * NUM_KV_HEADS, tl.num_programs(0)):
        item = items + (work // NUM_KV_HEADS) * 4
        kv_head = work % NUM_KV_HEADS
        row_start = tl.load(item).to(tl.int64)
        row_count = tl.load(item + 1)
        first_position = tl.load(item + 2)
        pages = page_table + tl.load(item + 3).to(tl.int64) * table_stride
        last = first_position + row_count - 1
        inside = ((index < row_count) & (member < GROUP))[:, None]
        row = row_start + index
        place = (kv_head * GROUP + member)[:, None] * HEAD_DIM + column[None, :]
        query = tl.load(q + row[:, None] * q_stride + place, mask=inside, other=0.0)
        position = first_position + index
        keys = pool + layer_offset + kv_head * (PAGE_TOKENS * HEAD_DIM)
        top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
        total = tl.zeros((BLOCK_M,), tl.float32)
        sums = tl.zeros((BLOCK_M, HEAD_DIM), tl.float32)
        seen_by_all = (first_position + 1) // BLOCK_N * BLOCK_N
        sums, total, top = _attend(
            sums, total, top, query, position, keys, pages, 0, seen_by_all, last, page_elems, scale_log2,
            VALUE_OFFSET, HEAD_DIM, PAGE_TOKENS, BLOCK_N, False,
        )  # fmt: skip
        sums, total, top = _attend(
            sums, total, top, query, position, keys, pages, seen_by_all, last + 1, last,
            page_elems, scale_log2, VALUE_OFFSET, HEAD_DIM, PAGE_TOKENS, BLOCK_N, True,
        )  # fmt: skip
        result = (sums / total[:, None]).to(out.dtype.element_ty)
        tl.store(out + row[:, None] * (NUM_HEADS * HEAD_DIM) + place, result, mask=inside)


def paged_prefill_attention(
    q: torch.Tensor,
    pool: torch.Tensor,
    page_table: torch.Tensor,
    items: torch.Tensor,
    num_items: torch.Tensor,
    out: torch.Tensor,
    *,
    layer: int,
    num_layers: int,
    num_kv_heads: int,
    head_dim: int,
    page_tokens: int,
    block_q: int,
    num_programs: int,
) -> torch.Tensor:
    """Attend from the rows that the items name; other rows of `out` are left alone.

    q: [T, Hq, D] bf16, fp16 or fp32, rotated; each row contiguous, any row stride (a view of qkv).
    pool: [num_pages, num_layers·2·Hkv·page_tokens·D], dtype of q. page_table: [S, pages] int32.
    items: [cap, 4] int32, (row_start, row_count, first_position, sequence_slot), 1 <= row_count <= block_q:
    row row_start + i has position first_position + i. num_items: [1] int32, how many are valid. out: [T,
    Hq·D], dtype of q.
    block_q: a power of two; block_q × (group padded to a power of two) rows are one tile, at least 16, best
    128 (`attention_plan.prefill_block_q`). num_programs: the grid, any positive number.
    Returns out. Raises ValueError on shape, dtype, stride or device mismatch.
    """
    device = q.device
    check_tensor("q", q, shape=(None, None, head_dim), dtypes=FLOAT_DTYPES, device=device, strided_rows=True)
    tokens, num_heads, _ = q.shape
    check_heads(num_heads, num_kv_heads)
    check_pool(
        pool,
        layer=layer,
        num_layers=num_layers,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        page_tokens=page_tokens,
        like=q,
    )
    check_tensor(
        "page_table", page_table, shape=(None, None), dtypes=(torch.int32,), device=device, strided_rows=True
    )
    check_work_list("items", items, "num_items", num_items, device)
    check_tensor("out", out, shape=(tokens, num_heads * head_dim), dtypes=(q.dtype,), device=device)
    check_positive(num_programs=num_programs, block_q=block_q)
    group = num_heads // num_kv_heads
    group_pad = triton.next_power_of_2(group)
    block_m = block_q * group_pad
    if block_q & (block_q - 1) or not 16 <= block_m <= 256:
        raise ValueError(
            f"block_q(={block_q}) must be a power of two with 16 <= block_q × {group_pad} <= 256"
        )
    is_fp32 = q.dtype == torch.float32  # For tests: without tensor cores, larger blocks spill.
    _prefill_kernel[(num_programs,)](
        q,
        pool,
        page_table,
        items,
        num_items,
        out,
        q.stride(0),
        page_table.stride(0),
        pool.stride(0),
        layer * 2 * num_kv_heads * page_tokens * head_dim,
        head_dim**-0.5 * LOG2_E,
        NUM_KV_HEADS=num_kv_heads,
        GROUP=group,
        GROUP_PAD=group_pad,
        HEAD_DIM=head_dim,
        PAGE_TOKENS=page_tokens,
        BLOCK_Q=block_q,
        BLOCK_N=16 if is_fp32 else BLOCK_N,
        num_warps=8 if block_m >= 128 else 4,
        num_stages=1 if is_fp32 else NUM_STAGES,
    )
    return out
