"""Paged attention, decode and prefill, against the references, the references against torch, and the work
lists they walk."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import attention_plan
from kernels import paged_decode_attention as decode
from kernels import paged_decode_attention_ref as decode_ref
from kernels import paged_prefill_attention as prefill
from kernels import paged_prefill_attention_ref as prefill_ref
from kernels.attention_plan import (
    MIN_CHUNK_TOKENS,
    plan_decode_attention,
    plan_prefill_attention,
    prefill_block_q,
)
from kernels.rotary_write_kv import rotary_write_kv_
from tests.kernels.tolerances import assert_close

LAYERS, LAYER = 2, 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Cache:
    """A paged KV cache of sequences of given lengths, on shuffled pages; what no token owns is NaN."""

    pool: torch.Tensor
    page_table: torch.Tensor
    keys: list[torch.Tensor]  # by slot, [length, Hkv, D]
    values: list[torch.Tensor]
    shape: dict[str, int]

    @classmethod
    def random(cls, lengths, kv_heads, head_dim, page_tokens, target, seed=0):
        device, dtype = target
        generator = torch.Generator().manual_seed(seed)
        width = -(-max(lengths) // page_tokens) + 1
        order = torch.randperm(width * len(lengths), generator=generator)
        table = order.view(len(lengths), width).int()
        pool = torch.full((len(order), LAYERS, 2, kv_heads, page_tokens, head_dim), float("nan"), dtype=dtype)
        keys, values = [], []
        for slot, length in enumerate(lengths):
            kv = torch.randn(2, length, kv_heads, head_dim, generator=generator).to(dtype)
            token = torch.arange(length)
            pool[table[slot, token // page_tokens].long(), LAYER, :, :, token % page_tokens] = kv.transpose(
                0, 1
            )
            keys.append(kv[0].to(device))
            values.append(kv[1].to(device))
        shape = dict(layer=LAYER, num_layers=LAYERS, num_kv_heads=kv_heads)
        shape |= dict(head_dim=head_dim, page_tokens=page_tokens)
        return cls(
            pool=pool.flatten(1).to(device),
            page_table=table.to(device),
            keys=keys,
            values=values,
            shape=shape,
        )

    def attention(self, slot, q, first_position):
        """Torch's attention of queries [n, Hq, D] at positions first_position … over this slot's tokens, [n,
        Hq·D]."""
        end = first_position + len(q)
        mask = (
            torch.arange(end, device=q.device) <= torch.arange(first_position, end, device=q.device)[:, None]
        )
        q, k, v = (
            x.float().transpose(0, 1)[None] for x in (q, self.keys[slot][:end], self.values[slot][:end])
        )
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
        return out[0].transpose(0, 1).flatten(1)


def strided_queries(tokens, heads, kv_heads, head_dim, target, seed=1):
    """q as the model has it: the first columns of qkv."""
    device, dtype = target
    generator = torch.Generator().manual_seed(seed)
    qkv = torch.randn(tokens, heads + 2 * kv_heads, head_dim, generator=generator).to(device, dtype)
    return qkv[:, :heads]


def poisoned(*shape, dtype, device):
    return torch.full(shape, float("nan"), dtype=dtype, device=device)


def length_of(items, device):
    return torch.tensor([len(items)], dtype=torch.int32, device=device)


NONSENSE = 2 * (np.full((3, 4), 10**9, dtype=np.int32),)  # past the counts of two lists


def capped(items, device, tail=NONSENSE[0]):
    """A work list in a larger buffer, its unused end nonsense."""
    buffer = np.concatenate([np.reshape(items, (-1, 4)), tail]).astype(np.int32)
    return torch.from_numpy(buffer).to(device)


def run_decode(module, q, cache, slots, items, combine, *, max_partials=16, num_programs=5, tails=NONSENSE):
    tokens, heads, head_dim = q.shape
    out = poisoned(tokens, heads * head_dim, dtype=q.dtype, device=q.device)
    partial = poisoned(max_partials, heads, head_dim, dtype=torch.float32, device=q.device)
    lse = poisoned(max_partials, heads, dtype=torch.float32, device=q.device)
    module.paged_decode_attention(
        q, cache.pool, cache.page_table, torch.tensor(slots, dtype=torch.int32, device=q.device),
        capped(items, q.device, tails[0]), length_of(items, q.device),
        capped(combine, q.device, tails[1]), length_of(combine, q.device),
        partial, lse, out, **cache.shape, num_programs=num_programs,
    )  # fmt: skip
    return out, partial, lse


def guard_accesses(monkeypatch, module):
    """Hold every access of a launch in the interpreter to its tensors' memory; on a GPU the driver does, page by page."""
    if torch.cuda.is_available():
        return
    from triton.runtime.interpreter import InterpreterBuilder as Builder

    spans = []
    launch = module.paged_decode_attention

    def recorded(*tensors, **options):
        for tensor in tensors:
            if tensor.numel():
                reach = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True)) + 1
                spans.append((tensor.data_ptr(), tensor.data_ptr() + reach * tensor.element_size()))
        return launch(*tensors, **options)

    def check(ptrs, mask):
        live = ptrs.data[np.broadcast_to(mask.data, ptrs.data.shape).astype(bool)].astype(np.int64)
        width = ptrs.get_element_ty().primitive_bitwidth // 8
        inside = np.zeros(live.shape, bool)
        for start, end in spans:
            inside |= (live >= start) & (live + width <= end)
        assert inside.all(), f"{np.count_nonzero(~inside)} accesses outside the arguments"

    load, store = Builder.create_masked_load, Builder.create_masked_store

    def guarded_load(self, ptrs, mask, *rest):
        check(ptrs, mask)
        return load(self, ptrs, mask, *rest)

    def guarded_store(self, ptrs, value, mask, *rest):
        check(ptrs, mask)
        return store(self, ptrs, value, mask, *rest)

    monkeypatch.setattr(module, "paged_decode_attention", recorded)
    monkeypatch.setattr(Builder, "create_masked_load", guarded_load)
    monkeypatch.setattr(Builder, "create_masked_store", guarded_store)


# Slot −1 is a padding row; lengths at, before and after page and block edges, one token, and one row to
# split.
SLOTS = [3, -1, 0, 2, 1, 4, -1]
DECODE_LENS = [64, 16, 1, 830, 129]  # by slot
DECODE_GEOMETRIES = [
    (4, 4, 64, 16),
    (8, 2, 128, 16),
    (8, 1, 64, 8),
    (6, 2, 16, 32),
]  # Hq, Hkv, D, page_tokens


def decode_lists(lens, slots, page_tokens, target_items=8):
    kv_lens = np.array([lens[slot] if slot >= 0 else 0 for slot in slots])
    return plan_decode_attention(kv_lens, page_tokens=page_tokens, max_partials=16, target_items=target_items)


@pytest.mark.parametrize(("heads", "kv_heads", "head_dim", "page_tokens"), DECODE_GEOMETRIES)
def test_decode(target, heads, kv_heads, head_dim, page_tokens):
    cache = Cache.random(DECODE_LENS, kv_heads, head_dim, page_tokens, target)
    q = strided_queries(len(SLOTS), heads, kv_heads, head_dim, target)
    items, combine = decode_lists(DECODE_LENS, SLOTS, page_tokens)
    assert len(combine) == 1 and combine[0, 2] >= 3
    out, partial, lse = run_decode(decode, q, cache, SLOTS, items, combine)
    want, partial_want, lse_want = run_decode(decode_ref, q, cache, SLOTS, items, combine)
    live = torch.tensor(SLOTS) >= 0
    assert out[~live].isnan().all()
    assert_close(out[live], want[live])
    used = int(combine[0, 2])
    assert_close(partial[:used], partial_want[:used], q.dtype)
    assert_close(lse[:used], lse_want[:used], q.dtype)
    assert partial[used:].isnan().all() and lse[used:].isnan().all()
    for row, slot in enumerate(SLOTS):
        if slot >= 0:
            expected = cache.attention(slot, q[row : row + 1], DECODE_LENS[slot] - 1)
            assert_close(want[row], expected[0], q.dtype)


def test_decode_of_every_length_around_a_page(target):
    lengths = [1, 2, 15, 16, 17, 63, 64, 65]
    cache = Cache.random(lengths, 1, 32, 16, target)
    q = strided_queries(len(lengths), 2, 1, 32, target)
    slots = list(range(len(lengths)))
    out, _, _ = run_decode(decode, q, cache, slots, *decode_lists(lengths, slots, 16))
    expected = [cache.attention(slot, q[slot : slot + 1], length - 1) for slot, length in enumerate(lengths)]
    assert_close(out, torch.cat(expected), q.dtype)


def test_decode_merges_more_partials_than_one_block(target, monkeypatch):
    monkeypatch.setattr(decode, "COMBINE_BLOCK", 2)
    cache = Cache.random([77], 2, 16, 8, target)
    q = strided_queries(2, 2, 2, 16, target)
    items = [(1, start, min(start + 16, 77), 3 + start // 16) for start in range(0, 77, 16)]
    out, _, _ = run_decode(decode, q, cache, [-1, 0], items, [(1, 3, 5, 0)])
    assert_close(out[1], cache.attention(0, q[1:], 76)[0], q.dtype)
    assert out[0].isnan().all()


def test_decode_of_large_scores(target):
    """One key a hundred times the others: softmax is a step, and no partial sum overflows."""
    cache = Cache.random([40, 40], 1, 16, 8, target)
    q = strided_queries(1, 4, 1, 16, target) * 30
    items = [(0, 0, 16, 0), (0, 16, 40, 1)]
    out, _, _ = run_decode(decode, q, cache, [1], items, [(0, 0, 2, 0)])
    assert_close(out, cache.attention(1, q, 39), q.dtype)


# A program a pair of row and KV head, fewer, and more than there is work.
GRIDS = {"wide": (1, 10**6), "narrow": (3, 0), "idle": (20, 0)}  # num_programs, MAX_PROGRAMS


@pytest.mark.parametrize(("num_programs", "max_programs"), GRIDS.values(), ids=GRIDS)
def test_decode_merges_several_rows_on_any_grid(target, num_programs, max_programs, monkeypatch):
    monkeypatch.setattr(decode, "COMBINE_BLOCK", 2)
    monkeypatch.setattr(decode, "MAX_PROGRAMS", max_programs)
    lengths = [40, 30, 9]
    cache = Cache.random(lengths, 2, 16, 8, target)
    q = strided_queries(3, 4, 2, 16, target)
    items, combine, first = [(2, 0, 9, -1)], [], 1
    for row in (1, 0):
        starts = range(0, lengths[row], 16)
        items += [(row, start, min(start + 16, lengths[row]), first + i) for i, start in enumerate(starts)]
        combine.append((row, first, len(starts), 0))
        first += len(starts)
    out, _, _ = run_decode(decode, q, cache, [0, 1, 2], items[::-1], combine, num_programs=num_programs)
    expected = [cache.attention(slot, q[slot : slot + 1], length - 1) for slot, length in enumerate(lengths)]
    assert_close(out, torch.cat(expected), q.dtype)


# What may stand past the count of `items` and of `combine`: nonsense, or records of an earlier, larger step: rows that idle
# now or that are past the batch, and partial results past the scratch.
TAILS = {
    "nonsense": (np.full((70, 4), 2**31 - 1), np.full((9, 4), 2**31 - 1)),
    "stale": (
        np.array([(1, 0, 64, -1), (6, 0, 400, 9), (0, 0, 640, 3), (200, 512, 900, 300)] * 18),
        np.array([(1, 3, 2, 0), (6, 9, 5, 0), (200, 300, 40, 0)] * 3),
    ),
}


@pytest.mark.parametrize(("grid", "tails"), [("wide", "stale"), ("narrow", "nonsense"), ("idle", "stale")])
def test_decode_never_follows_what_stands_past_a_count(target, grid, tails, monkeypatch):
    num_programs, max_programs = GRIDS[grid]
    heads, kv_heads, head_dim, page_tokens = DECODE_GEOMETRIES[-1]
    lengths = [40, 5, 1, 130, 33]  # by slot
    monkeypatch.setattr(attention_plan, "MIN_CHUNK_TOKENS", 16)
    monkeypatch.setattr(decode, "MAX_PROGRAMS", max_programs)
    cache = Cache.random(lengths, kv_heads, head_dim, page_tokens, target)
    q = strided_queries(len(SLOTS), heads, kv_heads, head_dim, target)
    items, combine = decode_lists(lengths, SLOTS, page_tokens, target_items=12)
    assert len(combine) == 2
    guard_accesses(monkeypatch, decode)
    out, partial, lse = run_decode(
        decode, q, cache, SLOTS, items, combine, tails=TAILS[tails], num_programs=num_programs
    )
    for row, slot in enumerate(SLOTS):
        if slot >= 0:
            expected = cache.attention(slot, q[row : row + 1], lengths[slot] - 1)
            assert_close(out[row], expected[0], q.dtype)
        else:
            assert out[row].isnan().all()
    used = int(combine[:, 2].sum())
    assert partial[used:].isnan().all() and lse[used:].isnan().all()


def test_decode_with_lists_of_no_capacity(target):
    cache = Cache.random([20], 2, 16, 8, target)
    q = strided_queries(1, 4, 2, 16, target)
    empty = np.empty((0, 4), np.int32)
    out, _, _ = run_decode(decode, q, cache, [0], [], [], tails=(empty, empty))
    assert out.isnan().all()
    out, _, _ = run_decode(decode, q, cache, [0], [(0, 0, 20, -1)], [], tails=(empty, empty))
    assert_close(out, cache.attention(0, q, 19), q.dtype)


def test_decode_without_work_writes_nothing(target):
    cache = Cache.random([20], 1, 16, 8, target)
    q = strided_queries(2, 4, 1, 16, target)
    assert all(x.isnan().all() for x in run_decode(decode, q, cache, [-1, -1], [], []))


def run_prefill(module, q, cache, items, *, block_q, num_programs=3):
    tokens, heads, head_dim = q.shape
    out = poisoned(tokens, heads * head_dim, dtype=q.dtype, device=q.device)
    module.paged_prefill_attention(
        q, cache.pool, cache.page_table, capped(items, q.device), length_of(items, q.device), out,
        **cache.shape, block_q=block_q, num_programs=num_programs,
    )  # fmt: skip
    return out


# (row_start, length, first_position, slot): whole prompts, a later chunk, one row, one at a block edge. Rows
# 0–1 are decodes.
CHUNKS = [(2, 37, 0, 1), (39, 20, 61, 0), (59, 1, 0, 3), (60, 1, 127, 2), (61, 9, 119, 4)]
PREFILL_GEOMETRIES = [
    (4, 4, 64, 16, 16),
    (8, 2, 128, 16, 16),
    (8, 1, 64, 8, 8),
    (6, 2, 16, 32, 4),
]  # Hq, Hkv, D, page_tokens, block_q


@pytest.mark.parametrize(("heads", "kv_heads", "head_dim", "page_tokens", "block_q"), PREFILL_GEOMETRIES)
def test_prefill(target, heads, kv_heads, head_dim, page_tokens, block_q):
    lengths = [0] * 5
    for _, length, first, slot in CHUNKS:
        lengths[slot] = first + length
    cache = Cache.random(lengths, kv_heads, head_dim, page_tokens, target)
    q = strided_queries(72, heads, kv_heads, head_dim, target)
    items = plan_prefill_attention(CHUNKS, block_q)
    out = run_prefill(prefill, q, cache, items, block_q=block_q)
    want = run_prefill(prefill_ref, q, cache, items, block_q=block_q)
    live = torch.zeros(72, dtype=torch.bool)
    live[2:70] = True
    assert out[~live].isnan().all() and want[~live].isnan().all()
    assert_close(out[live], want[live])
    for row, length, first, slot in CHUNKS:
        expected = cache.attention(slot, q[row : row + length], first)
        assert_close(want[row : row + length], expected, q.dtype)


def test_prefill_without_work_writes_nothing(target):
    cache = Cache.random([20], 1, 16, 8, target)
    q = strided_queries(2, 4, 1, 16, target)
    assert run_prefill(prefill, q, cache, [], block_q=4).isnan().all()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_both_can_be_captured_and_follow_the_lists(target=("cuda", torch.bfloat16)):
    """One captured graph, replayed over another batch's lists."""
    lengths = [300, 1000]
    cache = Cache.random(lengths, 2, 128, 16, target)
    q = strided_queries(2, 8, 2, 128, target)
    out = torch.zeros(2, 8 * 128, dtype=q.dtype, device="cuda")
    partial, lse = torch.zeros(16, 8, 128, device="cuda"), torch.zeros(16, 8, device="cuda")
    slots = torch.zeros(2, dtype=torch.int32, device="cuda")
    items, combine = (torch.zeros(16, 4, dtype=torch.int32, device="cuda") for _ in range(2))
    counts = torch.zeros(2, 1, dtype=torch.int32, device="cuda")

    def launch():
        decode.paged_decode_attention(
            q, cache.pool, cache.page_table, slots, items, counts[0], combine, counts[1], partial, lse, out,
            **cache.shape, num_programs=264,
        )  # fmt: skip

    launch()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        launch()
    for order in ([0, 1], [1, 0]):
        lists = decode_lists(lengths, order, 16)
        slots.copy_(torch.tensor(order))
        for buffer, count, entries in zip((items, combine), counts, lists, strict=True):
            buffer[: len(entries)] = torch.from_numpy(entries).cuda()
            count.fill_(len(entries))
        out.fill_(float("nan"))
        graph.replay()
        expected = [
            cache.attention(slot, q[row : row + 1], lengths[slot] - 1) for row, slot in enumerate(order)
        ]
        assert_close(out, torch.cat(expected), q.dtype)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("num_programs", [5, 264])
def test_decode_starts_early_but_waits_for_what_is_written(num_programs, target=("cuda", torch.bfloat16)):
    """The kernel ahead of decode rotates q and writes the last token of each row over NaN; the merge finds NaN
    until decode has ended."""
    lengths = [1, 16, 17, 64, 65, 300, 1000, 66]
    rows = len(lengths)
    cache = Cache.random(lengths, 2, 128, 16, target)
    qkv = torch.randn(rows, 12 * 128, dtype=torch.bfloat16, device="cuda")
    cos_sin = torch.tensor([0.6, 0.8], device="cuda").repeat_interleave(64).repeat(1000, 1)
    slots = torch.arange(rows, dtype=torch.int32, device="cuda")
    last = torch.tensor(lengths, dtype=torch.int32, device="cuda") - 1
    pages = cache.pool.view(-1, LAYERS, 2, 2, 16, 128)
    last_pages = cache.page_table[slots.long(), last.long() // 16].long()
    pages[last_pages, LAYER, :, :, last.long() % 16] = float("nan")
    items, combine = decode_lists(lengths, range(rows), 16)
    assert len(combine) > 0
    # On the device before the chain starts, or their copies would stand between its kernels.
    item_list = (capped(items, "cuda"), length_of(items, "cuda"))
    combine_list = (capped(combine, "cuda"), length_of(combine, "cuda"))
    partial = poisoned(16, 8, 128, dtype=torch.float32, device="cuda")
    lse = poisoned(16, 8, dtype=torch.float32, device="cuda")
    out = poisoned(rows, 8 * 128, dtype=qkv.dtype, device="cuda")
    q = qkv[:, : 8 * 128].view(rows, 8, 128)
    rotary_write_kv_(qkv, cos_sin, last, slots, cache.page_table, cache.pool, num_heads=8, **cache.shape)
    decode.paged_decode_attention(
        q, cache.pool, cache.page_table, slots, *item_list, *combine_list, partial, lse, out,
        **cache.shape, num_programs=num_programs,
    )  # fmt: skip
    new = qkv.view(rows, 12, 128)
    for row, length in enumerate(lengths):
        cache.keys[row][length - 1] = new[row, 8:10]
        cache.values[row][length - 1] = new[row, 10:]
        assert_close(out[row], cache.attention(row, q[row : row + 1], length - 1)[0], q.dtype)


def test_a_wrong_argument_is_named(target):
    cache = Cache.random([20], 2, 16, 8, target)
    q = strided_queries(1, 4, 2, 16, target)
    items = [(0, 0, 20, -1)]
    with pytest.raises(ValueError, match=r"^q must"):
        run_decode(decode, q.double(), cache, [0], items, [])
    with pytest.raises(ValueError, match=r"^sequence_slots must"):
        run_decode(decode, q, cache, [0, 1], items, [])
    with pytest.raises(ValueError, match=r"^num_heads"):
        run_decode(decode, q[:, :3], cache, [0], items, [])
    with pytest.raises(ValueError, match=r"^num_programs"):
        run_decode(decode, q, cache, [0], items, [], num_programs=0)
    with pytest.raises(ValueError, match=r"^block_q"):
        run_prefill(prefill, q, cache, items, block_q=12)
    cache.shape["layer"] = LAYERS
    with pytest.raises(ValueError, match=r"^layer"):
        run_decode(decode, q, cache, [0], items, [])


@settings(deadline=None)
@given(
    lens=st.lists(st.one_of(st.integers(0, 600), st.integers(0, 200_000)), max_size=40),
    page_tokens=st.sampled_from([1, 8, 16, 64, 512]),
    max_partials=st.integers(0, 300),
    target_items=st.integers(1, 600),
)
def test_decode_plan_covers_every_token_once(lens, page_tokens, max_partials, target_items):
    items, combine = plan_decode_attention(
        np.array(lens, dtype=np.int64),
        page_tokens=page_tokens,
        max_partials=max_partials,
        target_items=target_items,
    )
    assert items.dtype == combine.dtype == np.int32
    by_row = {row: sorted(map(tuple, items[items[:, 0] == row, 1:].tolist())) for row in range(len(lens))}
    merged = {row: (first, count) for row, first, count, _ in combine.tolist()}
    assert len(merged) == len(combine)
    partials = []
    for row, length in enumerate(lens):
        edges = [start for start, _, _ in by_row[row]] + [length]
        assert edges[0] == 0 and all(
            end == edge for (_, end, _), edge in zip(by_row[row], edges[1:], strict=True)
        )
        assert all(start % page_tokens == 0 and start < end for start, end, _ in by_row[row])
        numbers = [partial for _, _, partial in by_row[row]]
        if len(numbers) > 1:
            first, count = merged.pop(row)
            assert numbers == list(range(first, first + count))
            assert all(end - start >= MIN_CHUNK_TOKENS for start, end, _ in by_row[row][:-1])
            partials += numbers
        else:
            assert numbers in ([], [-1])
    assert not merged
    assert sorted(partials) == list(range(len(partials))) and len(partials) <= max_partials
    assert (np.diff(items[:, 2] - items[:, 1]) <= 0).all()


def test_decode_plan_of_even_rows_is_not_split():
    items, combine = plan_decode_attention(
        np.full(64, 1000), page_tokens=16, max_partials=512, target_items=66
    )
    assert len(items) == 64 and len(combine) == 0


def test_decode_plan_of_one_long_row_fills_the_target():
    items, combine = plan_decode_attention(
        np.array([131_072]), page_tokens=16, max_partials=512, target_items=66
    )
    assert combine.tolist() == [[0, 0, len(items), 0]]
    assert 60 <= len(items) <= 66


def test_decode_plan_of_a_skewed_batch_has_no_long_item():
    lens = np.array([100_000] + [200] * 255)
    items, _ = plan_decode_attention(lens, page_tokens=16, max_partials=512, target_items=66)
    assert (items[:, 2] - items[:, 1]).max() <= 1.5 * lens.sum() / 66 + 16


def test_plans_fill_given_arrays():
    buffers = (np.zeros((8, 4), np.int32), np.zeros((4, 4), np.int32))
    arguments = dict(page_tokens=16, max_partials=8, target_items=4)
    items, combine = plan_decode_attention(np.array([600, 5, 0]), **arguments, out=buffers)
    assert np.shares_memory(items, buffers[0]) and np.shares_memory(combine, buffers[1])
    assert items.tolist() == [[0, 0, 304, 0], [0, 304, 600, 1], [1, 0, 5, -1]]
    assert combine.tolist() == [[0, 0, 2, 0]]
    with pytest.raises(ValueError, match="items needs 3 entries, has room for 2"):
        plan_decode_attention(np.array([600, 5, 0]), **arguments, out=(buffers[0][:2], buffers[1]))
    with pytest.raises(ValueError, match="items needs 3 entries"):
        plan_prefill_attention([(0, 40, 0, 0)], 16, out=buffers[0][:2])


def test_prefill_plan_is_exact():
    items = plan_prefill_attention([(5, 40, 0, 7), (45, 3, 100, 2), (48, 0, 9, 9)], 16)
    assert items.tolist() == [[45, 3, 100, 2], [37, 8, 32, 7], [21, 16, 16, 7], [5, 16, 0, 7]]
    assert plan_prefill_attention([], 16).shape == (0, 4)


def test_prefill_block_fills_a_tile():
    assert [prefill_block_q(heads, 8) for heads in (8, 32, 40, 64)] == [128, 32, 16, 16]


@pytest.mark.parametrize(("rows", "length"), [(4, 16_000), (32, 1_024), (5, 8_000), (1, 40_000)])
def test_equal_rows_are_split_into_no_more_items_than_programs(rows, length):
    items, _ = plan_decode_attention(np.full(rows, length), page_tokens=16, max_partials=512, target_items=66)
    assert rows < len(items) <= 66
