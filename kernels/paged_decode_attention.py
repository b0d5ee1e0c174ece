"""Attention of one new token a sequence over its paged KV cache, with long sequences split over several
programs.

    out[row, h] = Σ_n softmax_n(scale · q[row, h] · k[n]) v[n],   scale = D^−½

Work items name a row and a range of its KV tokens. A split row's items leave normalised partial results and
their log-sum-exps; a second kernel merges them. Both walk work lists whose lengths they read from the
device, on a fixed grid, so one CUDA graph serves any batch. (Merging by the last program of a split row
instead, which saves the second launch, took 3 to 7 µs longer where contexts are split: 27.3 against 20.8 µs
for one of 8000 tokens, H200.)

Both start early (kernels/launch.py) and read work lists, sequence slots and page table meanwhile. Asking for
older K and V as well, into L2 or by the loads themselves, made it slower.

The query heads that share a KV head are processed together, so K and V are read once. The group is padded to
16 rows, what a tensor-core
product takes at least: wasted arithmetic (0.5 MFLOP for each 32 KB of K and V at D = 128, against the ≈ 6
MFLOP that an H200 could do while it loads them), no wasted bytes, so group 1 needs no path of its own.

Source: Dao et al., Flash-Decoding, 2023; Kwon et al., PagedAttention, arXiv:2309.06180.
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
from kernels.launch import KEEP, launch_options, let_successor_start, wait_for_predecessors

LOG2_E = 1.4426950408889634
# One iteration takes 4,096 elements of K and as many of V (32 tokens at D = 128: 16 KB in bf16). Four stages keep three such
# blocks on their way; four programs then fill the shared memory of a multiprocessor (53 KB each). Against blocks of 8,192, three
# stages and three programs, on an H200, 2026-11-22, µs a layer: 128 rows of 194 tokens 34 to 38, 64 rows 19 to 24, 32 of 1,024 47 to 51.
BLOCK_ELEMS = 4096
NUM_STAGES = 4
NUM_WARPS = 4
MAX_REGISTERS = 128  # of a thread, for four programs on a multiprocessor
COMBINE_BLOCK = 32
# Up to so many pairs of a row and a KV head, each has a program of its own and the hardware balances them; they fill an
# H200 several times over (256 rows of mixed lengths 136 µs against 151). Past it, as in prefill, most programs would start for nothing.
MAX_PROGRAMS = 132 * 16


@triton.jit
def _load_item(items, index, capacity):
    """Return an entry of the list, also of its unused end, where it may be anything: make no address of it unseen."""
    item = items + tl.minimum(index, capacity - 1) * 4
    row = tl.load(item, eviction_policy=KEEP).to(tl.int64)
    kv_start = tl.load(item + 1, eviction_policy=KEEP)
    kv_end = tl.load(item + 2, eviction_policy=KEEP)
    part = tl.load(item + 3, eviction_policy=KEEP).to(tl.int64)
    return row, kv_start, kv_end, part


@triton.jit(do_not_specialize=["item_capacity"])
def _decode_kernel(
    q,
    pool,
    page_table,
    sequence_slots,
    items,
    num_items,
    partial,
    partial_lse,
    out,
    q_stride,
    table_stride,
    page_elems,
    layer_offset,
    item_capacity,
    scale_log2,
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_PAD: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAGE_TOKENS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PDL: tl.constexpr,
):
    LN_2: tl.constexpr = 0.6931471805599453
    NUM_HEADS: tl.constexpr = NUM_KV_HEADS * GROUP
    let_successor_start(PDL)
    member = tl.arange(0, GROUP_PAD)
    column = tl.arange(0, HEAD_DIM)
    is_member = member < GROUP
    # KV heads of one item are neighbours in the walk: they share its page ids, and their K (and V) lie side
    # by side in a page. An item is requested along with the count, or ahead of its turn.
    row, kv_start, kv_end, part = _load_item(items, tl.program_id(0) // NUM_KV_HEADS, item_capacity)
    num_works = tl.load(num_items, eviction_policy=KEEP) * NUM_KV_HEADS
    for work in range(tl.program_id(0), num_works, tl.num_programs(0)):
        kv_head = work % NUM_KV_HEADS
        slot = tl.load(sequence_slots + row, eviction_policy=KEEP).to(tl.int64)
        pages = page_table + slot * table_stride
        head = kv_head * GROUP + member
        keys = pool + layer_offset + kv_head * (PAGE_TOKENS * HEAD_DIM)
        top = tl.full((GROUP_PAD,), float("-inf"), tl.float32)
        total = tl.zeros(
            (GROUP_PAD, BLOCK_N), tl.float32
        )  # Summed over its columns once an item, not once a block.
        sums = tl.zeros((GROUP_PAD, HEAD_DIM), tl.float32)
        # Past the end the last token is read again, so loads need no mask and meet no unwritten memory. The page ids
        # of a block are loaded one iteration ahead, so that K and V wait for no other load.
        token = kv_start + tl.arange(0, BLOCK_N)
        page = tl.load(pages + tl.minimum(token, kv_end - 1) // PAGE_TOKENS, eviction_policy=KEEP)
        wait_for_predecessors(PDL)
        query = tl.load(
            q + row * q_stride + head[:, None] * HEAD_DIM + column[None, :],
            mask=is_member[:, None],
            other=0.0,
        )
        for start in range(kv_start, kv_end, BLOCK_N):
            token = start + tl.arange(0, BLOCK_N)
            offset = tl.minimum(token, kv_end - 1) % PAGE_TOKENS
            place = (page.to(tl.int64) * page_elems + offset * HEAD_DIM)[:, None] + column[None, :]
            next_token = tl.minimum(token + BLOCK_N, kv_end - 1)
            page = tl.load(pages + next_token // PAGE_TOKENS, eviction_policy=KEEP)
            key = tl.load(keys + place)
            scores = tl.dot(query, tl.trans(key), input_precision="ieee") * scale_log2
            scores = tl.where((token < kv_end)[None, :], scores, float("-inf"))
            new_top = tl.maximum(top, tl.max(scores, axis=1))
            weight = tl.exp2(scores - new_top[:, None])
            fade = tl.exp2(top - new_top)[:, None]
            total = total * fade + weight
            value = tl.load(keys + NUM_KV_HEADS * PAGE_TOKENS * HEAD_DIM + place)
            sums = tl.dot(weight.to(value.dtype), value, sums * fade, input_precision="ieee")
            top = new_top
        weight_sum = tl.sum(total, axis=1)
        result = sums / weight_sum[:, None]
        if part < 0:
            ptrs = out + row * (NUM_HEADS * HEAD_DIM) + head[:, None] * HEAD_DIM + column[None, :]
            tl.store(ptrs, result.to(out.dtype.element_ty), mask=is_member[:, None])
        else:
            sink = part * NUM_HEADS + head
            tl.store(partial + sink[:, None] * HEAD_DIM + column[None, :], result, mask=is_member[:, None])
            tl.store(partial_lse + sink, (top + tl.log2(weight_sum)) * LN_2, mask=is_member)
        row, kv_start, kv_end, part = _load_item(
            items, (work + tl.num_programs(0)) // NUM_KV_HEADS, item_capacity
        )
    wait_for_predecessors(PDL)  # Those without work too.


@triton.jit
def _combine_kernel(
    combine,
    num_combine,
    partial,
    partial_lse,
    out,
    NUM_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    let_successor_start(PDL)
    column = tl.arange(0, HEAD_DIM)
    num_works = tl.load(num_combine, eviction_policy=KEEP) * NUM_HEADS
    for work in range(tl.program_id(0), num_works, tl.num_programs(0)):
        entry = combine + (work // NUM_HEADS) * 4
        head = work % NUM_HEADS
        row = tl.load(entry, eviction_policy=KEEP).to(tl.int64)
        first = tl.load(entry + 1, eviction_policy=KEEP).to(tl.int64)
        count = tl.load(entry + 2, eviction_policy=KEEP)
        wait_for_predecessors(PDL)
        top = float("-inf")
        total = 0.0
        sums = tl.zeros((HEAD_DIM,), tl.float32)
        for start in range(0, count, BLOCK):
            index = start + tl.arange(0, BLOCK)
            source = (first + index) * NUM_HEADS + head
            lse = tl.load(partial_lse + source, mask=index < count, other=float("-inf"))
            result = tl.load(
                partial + source[:, None] * HEAD_DIM + column[None, :],
                mask=(index < count)[:, None],
                other=0.0,
            )
            new_top = tl.maximum(top, tl.max(lse, axis=0))
            weight = tl.exp(lse - new_top)
            fade = tl.exp(top - new_top)
            total = total * fade + tl.sum(weight, axis=0)
            sums = sums * fade + tl.sum(weight[:, None] * result, axis=0)
            top = new_top
        tl.store(out + (row * NUM_HEADS + head) * HEAD_DIM + column, (sums / total).to(out.dtype.element_ty))
    wait_for_predecessors(PDL)  # Those without work too.


def paged_decode_attention(
    q: torch.Tensor,
    pool: torch.Tensor,
    page_table: torch.Tensor,
    sequence_slots: torch.Tensor,
    items: torch.Tensor,
    num_items: torch.Tensor,
    combine: torch.Tensor,
    num_combine: torch.Tensor,
    partial: torch.Tensor,
    partial_lse: torch.Tensor,
    out: torch.Tensor,
    *,
    layer: int,
    num_layers: int,
    num_kv_heads: int,
    head_dim: int,
    page_tokens: int,
    num_programs: int,
) -> torch.Tensor:
    """Attend from the rows that the work lists name; other rows of `out` are left alone.

    q: [T, Hq, D] bf16, fp16 or fp32, rotated; each row contiguous, any row stride (a view of qkv).
    pool: [num_pages, num_layers·2·Hkv·page_tokens·D], dtype of q. page_table: [S, pages] int32.
    sequence_slots: [T] int32.
    items: [cap, 4] int32, (row, kv_start, kv_end, partial), kv_start < kv_end in tokens; partial −1: the
    item is the whole row.
    combine: [cap, 4] int32, (row, first_partial, count, 0). num_items, num_combine: [1] int32, how many
    entries are valid; what stands behind them is never followed.
    partial: [max_partials, Hq, D] fp32 and partial_lse: [max_partials, Hq] fp32, scratch: normalised results
    and log-sum-exps (natural).
    out: [T, Hq·D], dtype of q. num_programs: the smallest grid, any positive number; 132 × 4 fills an H200 at D
    = 128.
    It starts early (kernels/launch.py): work lists, sequence_slots and page_table are read before the kernels
    ahead have ended.
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
    check_tensor("sequence_slots", sequence_slots, shape=(tokens,), dtypes=(torch.int32,), device=device)
    check_work_list("items", items, "num_items", num_items, device)
    check_work_list("combine", combine, "num_combine", num_combine, device)
    check_tensor(
        "partial", partial, shape=(None, num_heads, head_dim), dtypes=(torch.float32,), device=device
    )
    check_tensor(
        "partial_lse",
        partial_lse,
        shape=(partial.shape[0], num_heads),
        dtypes=(torch.float32,),
        device=device,
    )
    check_tensor("out", out, shape=(tokens, num_heads * head_dim), dtypes=(q.dtype,), device=device)
    check_positive(num_programs=num_programs)
    if len(items) == 0:  # The kernel loads an item ahead of the count.
        return out
    pairs = tokens * num_kv_heads
    options = launch_options(device)
    group = num_heads // num_kv_heads
    is_fp32 = q.dtype == torch.float32  # For tests: without tensor cores, larger blocks spill.
    _decode_kernel[(pairs if num_programs < pairs <= MAX_PROGRAMS else num_programs,)](
        q,
        pool,
        page_table,
        sequence_slots,
        items,
        num_items,
        partial,
        partial_lse,
        out,
        q.stride(0),
        page_table.stride(0),
        pool.stride(0),
        layer * 2 * num_kv_heads * page_tokens * head_dim,
        len(items),
        head_dim**-0.5 * LOG2_E,
        NUM_KV_HEADS=num_kv_heads,
        GROUP=group,
        GROUP_PAD=max(16, triton.next_power_of_2(group)),
        HEAD_DIM=head_dim,
        PAGE_TOKENS=page_tokens,
        BLOCK_N=16 if is_fp32 else min(128, BLOCK_ELEMS // head_dim),
        num_warps=NUM_WARPS,
        num_stages=1 if is_fp32 else NUM_STAGES,
        maxnreg=MAX_REGISTERS,
        **options,
    )
    _combine_kernel[(num_programs,)](
        combine,
        num_combine,
        partial,
        partial_lse,
        out,
        NUM_HEADS=num_heads,
        HEAD_DIM=head_dim,
        BLOCK=COMBINE_BLOCK,
        num_warps=4,
        **options,
    )
    return out
