"""LoRA shrink and expand against their references, the references against dense fp32, and the work lists."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from kernels.lora_expand import lora_expand_
from kernels.lora_expand_ref import lora_expand_ref_
from kernels.lora_launch import ShrinkTuning, lora_launch_config
from kernels.lora_pack import pack_random
from kernels.lora_plan import (
    GROUPS,
    HEADER_COLUMNS,
    ITEM_COLUMNS,
    ITEM_SIZES,
    MODULES,
    NUM_GROUPS,
    NUM_ITEMS,
    NUM_SPLITS,
    TILE_COLUMNS,
    bridge_width,
    max_shrink_items,
    max_tiles,
    plan_lora,
)
from kernels.lora_shrink import lora_shrink
from kernels.lora_shrink_ref import lora_shrink_ref
from tests.kernels.tolerances import assert_close, relative_error

# q, k, v, o, gate, up, down: no dimension a multiple of a kernel block, some rows not of 128 bytes.
ODD = ((96, 160), (96, 40), (96, 40), (160, 96), (96, 200), (96, 200), (200, 96))
ROUND = ((128, 128), (128, 64), (128, 64), (128, 128), (128, 256), (128, 256), (256, 128))
RANKS = (
    (1, 1, 1, 1, 1, 1, 1),
    (3, 0, 17, 0, 8, 3, 16),
    (16, 16, 16, 16, 16, 16, 16),
    (0, 0, 0, 0, 0, 0, 8),
    (64, 8, 3, 17, 0, 64, 1),
    (0, 256, 0, 64, 256, 0, 17),
    (65, 128, 100, 72, 96, 127, 80),
)
BASE = -1  # slot of rows without adapter
NUM_LAYERS = 2


def launch_of(tile_tokens=16, max_splits=2, programs=100):
    return replace(
        lora_launch_config(1, 0),
        tile_tokens=tile_tokens,
        max_splits=max_splits,
        shrink_programs=programs,
        expand_programs=programs,
    )


class Batch:
    """Segments of adapters with everything that the kernels are given."""

    def __init__(self, target, segments, *, launch=None, shapes=ODD, ranks=RANKS, padding=2, poison=True):
        self.device, self.dtype = target
        self.shapes, self.segments = shapes, segments
        self.launch = launch or launch_of()
        self.packed = pack_random(
            ranks,
            shapes=shapes,
            num_layers=NUM_LAYERS,
            dtype=self.dtype,
            device=self.device,
            page_bytes=16384,
            poison=poison,
        )
        slots = np.array([slot for slot, _ in segments], np.int32)
        counts = np.array([count for _, count in segments], np.int32)
        starts = (np.cumsum(counts) - counts).astype(np.int32)
        self.tokens = int(counts.sum()) + padding
        max_rank = max(max(r) for r in ranks)
        capacity = max_tiles(self.tokens, max(1, len(segments)), self.launch.tile_tokens)
        tiles = np.full((capacity, TILE_COLUMNS), 2**31 - 1, np.int32)
        items = np.full((max_shrink_items(capacity, max_rank), ITEM_COLUMNS), 2**31 - 1, np.int32)
        headers = np.full((NUM_GROUPS, HEADER_COLUMNS), 2**31 - 1, np.int32)
        num_tiles, _ = plan_lora(
            slots, starts, counts, self.packed.adapter_meta, launches=[self.launch] * 4,
            in_features=[shapes[group[0]][0] for group in GROUPS],
            widths=[self.widths(group) for group in range(4)], tiles_out=tiles, headers_out=headers, items_out=items,
        )  # fmt: skip
        put = lambda array: torch.as_tensor(array, dtype=torch.int32).to(self.device)  # noqa: E731
        self.tiles, self.num_tiles = put(tiles), put([num_tiles])
        self.items, self.headers = put(items), put(headers)
        generator = torch.Generator().manual_seed(1)
        self.scales = (torch.rand(len(ranks), 7, generator=generator) + 0.5).to(self.device)
        self.width = bridge_width(max_rank)
        self.generator = generator

    def normal(self, *shape, scale=1.0):
        return (torch.randn(*shape, generator=self.generator) * scale).to(self.device, self.dtype)

    def poisoned_bridge(self):
        return torch.full((self.launch.max_splits, self.tokens, self.width), float("nan"), device=self.device)

    def widths(self, group):
        return [self.shapes[m][1] for m in range(*GROUPS[group])]

    def run(self, group, layer, num_programs=5, shrink=None, expand=None, reference=False):
        """Shrink and expand one group; return (x, y before, bridge, y after)."""
        x = self.normal(self.tokens, self.shapes[GROUPS[group][0]][0])
        before = self.normal(self.tokens, sum(self.widths(group)), scale=0.1)
        common = dict(
            group=group, layer=layer, tile_tokens=self.launch.tile_tokens, num_programs=num_programs
        )
        down, up = (lora_shrink_ref, lora_expand_ref_) if reference else (lora_shrink, lora_expand_)
        bridge = self.poisoned_bridge()
        down(x, self.packed.pool, self.headers, self.items, bridge, tuning=shrink, **common)
        y = before.clone()
        up(
            y, bridge, self.scales, self.packed.pool, self.tiles, self.num_tiles, self.headers,
            widths=self.widths(group), tuning=expand, **common,
        )  # fmt: skip
        return x, before, bridge, y

    def apply(self, group, x, y, layer=0, num_programs=5):
        """Return y with the update of x."""
        bridge, y = self.poisoned_bridge(), y.clone()
        common = dict(
            group=group, layer=layer, tile_tokens=self.launch.tile_tokens, num_programs=num_programs
        )
        lora_shrink(x, self.packed.pool, self.headers, self.items, bridge, **common)
        return lora_expand_(
            y, bridge, self.scales, self.packed.pool, self.tiles, self.num_tiles, self.headers,
            widths=self.widths(group), **common,
        )  # fmt: skip

    def dense(self, group, layer, x, before):
        """Expected y in fp32 by dense matrices, and which rows have an adapter."""
        y, adapted, row = before.float().cpu().clone(), torch.zeros(self.tokens, dtype=torch.bool), 0
        x = x.float().cpu()
        for slot, count in self.segments:
            rows, column = slice(row, row + count), 0
            row += count
            for module in range(*GROUPS[group]):
                width = self.shapes[module][1]
                if slot != BASE and self.packed.ranks[slot][module]:
                    a = self.packed.a(slot, layer, module).float().cpu()
                    b = self.packed.b(slot, layer, module).float().cpu()
                    y[rows, column : column + width] += self.scales[slot, module].cpu() * (x[rows] @ a.T @ b)
                    adapted[rows] = True
                column += width
        return y, adapted

    def check(self, group, layer, **options):
        x, before, bridge, y = self.run(group, layer, **options)
        expected, adapted = self.dense(group, layer, x, before)
        assert_close(y, expected, self.dtype)
        update, expected_update = (
            (y.float() - before.float())[adapted],
            (expected - before.float().cpu())[adapted],
        )
        assert (
            relative_error(update, expected_update)
            < {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}[self.dtype]
        )
        assert torch.equal(y[~adapted], before[~adapted])
        without_tile = [t for t in range(self.tokens) if not self._has_tile(t)]
        assert bridge[:, without_tile].isnan().all()
        return bridge

    def _has_tile(self, token):
        row = 0
        for slot, count in self.segments:
            if row <= token < row + count:
                return slot != BASE
            row += count
        return False


MIX = [(0, 1), (1, 5), (BASE, 3), (2, 1), (3, 0), (4, 17), (BASE, 1), (5, 2), (4, 1), (6, 3)]


@pytest.mark.parametrize(
    ("shapes", "group"),
    [(ODD, 0), (ODD, 1), (ODD, 2), (ODD, 3), (ROUND, 0), (ROUND, 3)],
    ids=["odd-qkv", "odd-o", "odd-gate_up", "odd-down", "round-qkv", "round-down"],
)
def test_a_mixed_batch(target, group, shapes):
    Batch(target, MIX, shapes=shapes).check(group, layer=1)


@pytest.mark.parametrize("group", range(4))
def test_the_reference_against_dense_matrices(target, group):
    batch = Batch(target, MIX)
    for layer in range(NUM_LAYERS):
        batch.check(group, layer, reference=True)


@pytest.mark.parametrize("shapes", [ODD, ROUND], ids=["odd", "round"])
def test_large_tiles_beside_small_ones(target, shapes):
    segments = [(2, 66), (BASE, 2), (4, 3), (1, 1), (0, 20), (5, 40), (6, 18)]
    batch = Batch(target, segments, launch=launch_of(tile_tokens=32), shapes=shapes)
    for group in range(4):
        batch.check(group, 0, shrink=ShrinkTuning(large_block_k=32))


@pytest.mark.parametrize("tile_tokens", [16, 32])
@pytest.mark.parametrize("where", ["input", "output"])
def test_a_row_that_is_not_finite_touches_no_other_row(target, tile_tokens, where):
    batch = Batch(target, [(2, 30), (4, 9), (5, 1)], launch=launch_of(tile_tokens=tile_tokens), shapes=ROUND)
    bad = (0, 7, 33, 39)
    for group in (0, 3):
        x = batch.normal(batch.tokens, batch.shapes[GROUPS[group][0]][0])
        y = batch.normal(batch.tokens, sum(batch.widths(group)))
        spoiled = [x.clone(), y.clone()]
        for row, value in zip(bad, (float("nan"), float("inf"), float("-inf"), float("nan")), strict=True):
            spoiled[where == "output"][row] = value
        clean, dirty = batch.apply(group, x, y), batch.apply(group, *spoiled)
        good = [row for row in range(batch.tokens) if row not in bad]
        assert torch.equal(clean[good], dirty[good])
        assert not dirty[list(bad)].isfinite().any(dim=1).all()


def test_a_whole_step_of_8192_tokens(target):
    """Sixty-four adapters of every rank in one step as large as a step can be."""
    if target[0] == "cpu":
        counts, tokens = [1, 33, 7], 120  # the interpreter takes minutes for more
    else:
        counts, tokens = [1, 2, 15, 16, 17, 33, 64, 500, 1, 31, 3, 900], 8192
    segments, left = [], tokens
    for number in range(64):
        count = min(left, counts[number % len(counts)])
        segments.append((BASE if number % 7 == 6 else number % len(RANKS), count))
        left -= count
    segments.append((5, left))
    for group in range(4):
        launch = lora_launch_config(tokens, group)
        batch = Batch(target, segments, launch=launch, shapes=ROUND, padding=0)
        assert batch.tokens == tokens
        programs = launch.shrink_programs if target[0] == "cuda" else 4
        batch.check(group, 1, num_programs=programs, shrink=launch.shrink, expand=launch.expand)


@pytest.mark.parametrize(("programs", "parts"), [(1, 1), (100, 3)])
def test_parts_of_the_input(target, programs, parts):
    shapes = ((96, 64), (96, 32), (96, 32), (96, 96), (96, 64), (96, 64), (600, 96))
    launch = launch_of(max_splits=8, programs=programs)
    batch = Batch(target, MIX, launch=launch, shapes=shapes)
    assert batch.headers[:, NUM_SPLITS].tolist() == [1, 1, 1, parts]
    bridge = batch.check(3, 0, num_programs=30, shrink=ShrinkTuning(block_k=16))
    assert bridge[parts:].isnan().all()


def test_one_token(target):
    for slot, groups in ((1, (0, 2)), (4, (1,))):
        batch = Batch(target, [(slot, 1)], padding=0)
        for group in groups:
            batch.check(group, 1)


@pytest.mark.parametrize(
    "segments", [[], [(BASE, 4)], [(1, 0)], [(BASE, 2), (0, 0)]], ids=["none", "base", "empty", "both"]
)
def test_no_work_leaves_everything(target, segments):
    batch = Batch(target, segments)
    for group in range(4):
        _, before, bridge, y = batch.run(group, 0)
        assert torch.equal(y, before)
        assert bridge.isnan().all()


def test_kernel_equals_reference_by_plane_sum(target):
    shapes = ((600, 64), (600, 32), (600, 32), (96, 96), (600, 64), (600, 64), (96, 96))
    batch = Batch(target, MIX, shapes=shapes)
    batch.generator.manual_seed(5)
    _, _, bridge, _ = batch.run(2, 0)
    batch.generator.manual_seed(5)
    _, _, expected, _ = batch.run(2, 0, reference=True)
    assert torch.equal(bridge.isnan(), expected.isnan())
    planes = int(batch.headers[2, NUM_SPLITS])
    written = ~bridge[0].isnan()
    assert_close(bridge[:planes].sum(0)[written], expected[:planes].sum(0)[written], batch.dtype)


def test_the_engine_launch_configuration(target):
    for tokens in (1, 200, 1100):
        for group in (0, 3):
            launch = lora_launch_config(tokens, group)
            batch = Batch(target, [(2, 1), (4, 20)], launch=launch, shapes=ROUND)
            batch.check(group, 0, num_programs=3, shrink=launch.shrink, expand=launch.expand)


def test_arguments_are_checked(target):
    batch = Batch(target, [(0, 1)])
    x, y = batch.normal(batch.tokens, 96), batch.normal(batch.tokens, 240)
    shrink = dict(
        x=x, pool=batch.packed.pool, headers=batch.headers, items=batch.items, bridge=batch.poisoned_bridge(), group=0, layer=0,
        tile_tokens=16, num_programs=4,
    )  # fmt: skip
    wrong = dict(
        x=x.t(), pool=batch.packed.pool.t(), headers=batch.headers[:3], items=batch.items.long(), bridge=batch.poisoned_bridge()[:, :1],
        group=4, layer=-1, tile_tokens=8, num_programs=0,
    )  # fmt: skip
    for name, value in wrong.items():
        with pytest.raises(ValueError, match=name):
            lora_shrink(**{**shrink, name: value})
    expand = {k: v for k, v in shrink.items() if k not in ("x", "items")}
    expand |= dict(
        y=y, scales=batch.scales, widths=[160, 40, 40], tiles=batch.tiles, num_tiles=batch.num_tiles
    )
    for name, value in dict(
        y=y[:, :200],
        scales=batch.scales.double(),
        widths=[160, 40],
        bridge=batch.poisoned_bridge()[:, :1],
        tiles=batch.tiles.long(),
        num_tiles=batch.num_tiles.repeat(2),
    ).items():
        with pytest.raises(ValueError, match=name):
            lora_expand_(**{**expand, name: value})


def plan(segments, meta, launch=None, tiles=64, items=512, in_features=(4096,) * 4):
    tiles_out, items_out = (
        np.full((tiles, TILE_COLUMNS), -7, np.int32),
        np.full((items, ITEM_COLUMNS), -7, np.int32),
    )
    headers = np.full((NUM_GROUPS, HEADER_COLUMNS), -7, np.int32)
    slots, starts, counts = (np.array(column, np.int32) for column in zip(*segments, strict=True))
    num_tiles, num_items = plan_lora(
        slots,
        starts,
        counts,
        meta,
        launches=[launch or launch_of()] * 4,
        in_features=in_features,
        widths=[[64] * (last - first) for first, last in GROUPS],
        tiles_out=tiles_out,
        headers_out=headers,
        items_out=items_out,
    )
    assert num_items == headers[:, NUM_ITEMS].sum()
    return tiles_out, headers, items_out, num_tiles


def meta_of(*ranks):
    meta = np.zeros((len(ranks), TILE_COLUMNS), np.int32)
    for slot, seven in enumerate(ranks):
        meta[slot] = [1000 + slot, 0, 0, slot, *seven, 2 * sum(seven), sum(seven), 0, 0, 0]
    return meta


def sizes(rows, a_rows, column):
    return rows | a_rows << 8 | column << 16


def test_plan_cuts_segments_into_tiles():
    meta = meta_of([16] * 7, [0, 0, 0, 0, 0, 0, 17])
    tiles, headers, items, num_tiles = plan([(BASE, 0, 3), (0, 3, 17), (1, 20, 2), (0, 22, 0)], meta)
    assert num_tiles == 3
    assert tiles[:3, :5].tolist() == [[1000, 3, 16, 0, 16], [1000, 19, 1, 0, 16], [1001, 20, 2, 1, 0]]
    assert (tiles[3:] == -7).all()
    assert headers[:, :2].tolist() == [[0, 2], [2, 2], [4, 2], [6, 3]]
    assert items[:2].tolist() == [
        [1000, 0 | 224 << 16, 3, sizes(16, 48, 0)],
        [1000, 0 | 224 << 16, 19, sizes(1, 48, 0)],
    ]
    assert items[6:9].tolist() == [
        [1000, 96 | 224 << 16, 3, sizes(16, 16, 0)],
        [1000, 96 | 224 << 16, 19, sizes(1, 16, 0)],
        [1001, 0 | 34 << 16, 20, sizes(2, 17, 0)],
    ]
    assert (items[9:] == -7).all()


def test_plan_cuts_ranks_into_blocks():
    _, headers, items, _ = plan([(0, 0, 20), (0, 20, 16)], meta_of([64] * 7), launch_of(tile_tokens=32))
    assert headers[:, NUM_ITEMS].tolist() == [2 * 3, 2 * 1, 2 * 2, 2 * 1]
    assert items[:4, ITEM_SIZES].tolist() == [sizes(20, 64, low) for low in (0, 64, 128)] + [sizes(16, 64, 0)]


@pytest.mark.parametrize(
    ("programs", "parts", "part"), [(1, 1, 4096), (2, 1, 4096), (3, 3, 1536), (8, 4, 1024), (999, 8, 512)]
)
def test_plan_cuts_the_input_by_the_number_of_items(programs, parts, part):
    """Two items: on three programs two waves of a third are less than one of the whole, with what a part costs to start."""
    launch = launch_of(max_splits=8, programs=programs)
    _, headers, _, _ = plan([(0, 0, 1), (0, 1, 1)], meta_of([16] * 7), launch)
    assert headers[0, :4].tolist() == [0, 2, part, parts]


def test_plan_refuses_what_does_not_fit():
    meta = meta_of([16] * 7)
    with pytest.raises(ValueError, match="tiles_out"):
        plan([(0, 0, 33)], meta, tiles=2)
    with pytest.raises(ValueError, match="items_out"):
        plan([(0, 0, 33)], meta, items=8)


def test_capacities_hold_any_batch():
    random = np.random.default_rng(0)
    for _ in range(200):
        rows, segments, tile_tokens = (
            int(random.integers(1, 300)),
            int(random.integers(1, 40)),
            int(random.choice([16, 32])),
        )
        cuts = np.sort(random.integers(0, rows + 1, segments - 1))
        counts = np.diff(np.concatenate([[0], cuts, [rows]]))
        ranks = random.integers(0, 33, (segments, 7))
        capacity = max_tiles(rows, segments, tile_tokens)
        plan(
            [(i, 0, c) for i, c in enumerate(counts)],
            meta_of(*ranks),
            launch_of(tile_tokens),
            capacity,
            max_shrink_items(capacity, 32),
        )


def test_launch_tiles_are_the_same_for_all_groups():
    for tokens in (1, 32, 128, 129, 1024, 8192):
        assert len({lora_launch_config(tokens, group).tile_tokens for group in range(4)}) == 1
    assert len(MODULES) == GROUPS[-1][1]
