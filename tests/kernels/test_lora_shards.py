"""What S-LoRA's tensor parallelism exchanges: messages packed and collected are the h of the whole adapter; and GPUs read each other's parts."""

import numpy as np
import pytest
import torch
from torch.multiprocessing.spawn import spawn

from kernels.lora_plan import COLUMN_PARALLEL, GROUPS, RANKS, TILE_COLUMNS
from kernels.lora_shards import lora_collect, lora_collect_peers, lora_pack_part
from kernels.lora_shards_ref import lora_collect as collect_ref
from kernels.lora_shards_ref import lora_pack_part as pack_ref
from tests.kernels.test_peer_add_rms_norm import addresses
from tests.kernels.tolerances import assert_close

SPLITS = 3
ADAPTERS = ((16, 16, 16, 16, 16, 16, 16), (3, 0, 17, 1, 70, 0, 65), (0, 0, 0, 0, 0, 0, 8))
SEGMENTS = ((0, 1), (1, 16), (1, 5), (2, 2), (0, 7))  # (adapter, rows) of a tile
TILE_TOKENS = 16
ROWS = 34  # three of them of no tile
WIDTH = 224


def lists(device):
    """The tiles of SEGMENTS, their number and headers that say SPLITS planes."""
    tiles = np.full((8, TILE_COLUMNS), 2**30, np.int32)
    start = 2
    for tile, (adapter, rows) in zip(tiles, SEGMENTS, strict=False):
        tile[:] = 0
        tile[1:3] = start, rows
        tile[RANKS : RANKS + 7] = ADAPTERS[adapter]
        start += rows
    headers = np.zeros((4, 8), np.int32)
    headers[:, 3] = SPLITS
    arrays = {"tiles": tiles, "num_tiles": np.array([len(SEGMENTS)], np.int32), "headers": headers}
    return {name: torch.from_numpy(array).to(device) for name, array in arrays.items()}


def parts_and_h(group, ranks, seed=0):
    """Return each GPU's bridge [SPLITS, ROWS, WIDTH], NaN where nothing is written, and the h [ROWS, WIDTH] that they make."""
    rng = np.random.default_rng(seed)
    first, last = GROUPS[group]
    h = np.full((ROWS, WIDTH), np.nan, np.float32)
    bridges = np.full((ranks, SPLITS, ROWS, WIDTH), np.nan, np.float32)
    row = 2
    for adapter, rows in SEGMENTS:
        here = slice(row, row + rows)
        column, part_column = 0, 0
        for rank in ADAPTERS[adapter][first:last]:
            planes = rng.normal(size=(ranks, SPLITS, rows, rank)).astype(np.float32)
            if not COLUMN_PARALLEL[first]:
                bridges[:, :, here, column : column + rank] = planes
                h[here, column : column + rank] = planes.sum((0, 1))
            else:
                part = -(-rank // ranks)
                h[here, column : column + rank] = planes[0].sum(0)
                for gpu in range(ranks):
                    mine = planes[0][:, :, gpu * part : (gpu + 1) * part]
                    bridges[gpu][:, here, part_column : part_column + mine.shape[2]] = mine
                    # The last GPU's ranks past the adapter's are zero rows of A.
                    bridges[gpu][:, here, part_column + mine.shape[2] : part_column + part] = 0
                part_column += part
            column += rank
        row += rows
    return torch.from_numpy(bridges), torch.from_numpy(h)


def check_h(out, h, dtype=torch.float32):
    written = ~torch.isnan(h)
    assert torch.isnan(out[0].cpu()[~written]).all()
    assert_close(out[0].cpu()[written], h[written], dtype)


def common_of(group, ranks):
    return dict(group=group, ranks=ranks, tile_tokens=TILE_TOKENS, num_programs=3)


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("group", range(4))
def test_packed_and_collected_is_h(target, group, ranks):
    device, dtype = target
    work = lists(device)
    bridges, h = parts_and_h(group, ranks)
    modules = GROUPS[group][1] - GROUPS[group][0]
    column = COLUMN_PARALLEL[GROUPS[group][0]]
    common = common_of(group, ranks)
    messages = []
    for bridge in bridges:
        message = torch.full((modules, ROWS, 70), float("nan"), dtype=dtype, device=device)
        lora_pack_part(bridge.to(device), **work, message=message, **common)
        expected = torch.full_like(message, float("nan"))
        pack_ref(bridge.to(device), **work, message=expected, **common)
        assert torch.equal(torch.isnan(message), torch.isnan(expected))
        assert_close(message.nan_to_num(), expected.nan_to_num())
        messages.append(message)
    received = torch.stack(messages, dim=1) if column else torch.stack(messages).sum(0)[:, None]
    out = torch.full((1, ROWS, WIDTH), float("nan"), device=device)
    lora_collect(received, **work, out=out, **common)
    check_h(out, h, dtype)
    expected = collect_ref(received, **work, out=torch.full_like(out, float("nan")), **common)
    assert torch.equal(out.nan_to_num(), expected.nan_to_num())


@pytest.mark.parametrize("group", range(4))
def test_collecting_from_one_gpu_is_its_own_sum(target, group):
    device, _ = target
    bridges, h = parts_and_h(group, 1)
    bridge = bridges[0].to(device)
    pads = torch.zeros(3, dtype=torch.int32, device=device)
    out = torch.full((1, ROWS, WIDTH), float("nan"), device=device)
    lora_collect_peers(
        bridge, addresses([bridge], device), addresses([pads], device), 0, **lists(device), out=out, rank=0, **common_of(group, 1)
    )  # fmt: skip
    check_h(out, h)


def test_arguments_are_checked(target):
    device, dtype = target
    bridge = torch.zeros(SPLITS, ROWS, WIDTH, device=device)
    message = torch.zeros(3, ROWS, 70, dtype=dtype, device=device)
    with pytest.raises(ValueError, match="message"):
        lora_pack_part(bridge, **lists(device), message=message[:2], **common_of(0, 2))
    with pytest.raises(ValueError, match="received must have 2 parts"):
        lora_collect(message[:, None], **lists(device), out=bridge[:1], **common_of(0, 2))
    with pytest.raises(ValueError, match="buffers"):
        lora_collect_peers(
            bridge, bridge, bridge, 0, **lists(device), out=bridge[:1], rank=0, **common_of(0, 2)
        )  # fmt: skip


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs GPUs that reach each other's memory")
def test_gpus_collect_from_each_other():
    spawn(_rank, args=(29673, torch.cuda.device_count()), nprocs=torch.cuda.device_count())


def _rank(rank, port, ranks):
    import torch.distributed as dist

    from engine.peer_memory import peer_buffer

    device = torch.device("cuda", rank)
    torch.cuda.set_device(device)
    dist.init_process_group(
        "nccl", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=ranks, device_id=device
    )
    shared = [peer_buffer(SPLITS * ROWS * WIDTH, torch.float32, device) for _ in range(2)]
    pads = peer_buffer(3 * ranks, torch.int32, device)
    for turn in range(24):
        group = turn % 4
        bridges, h = parts_and_h(group, ranks, seed=turn)
        bridge = shared[turn % 2].data.view(SPLITS, ROWS, WIDTH)
        bridge.copy_(bridges[rank])
        out = torch.full((1, ROWS, WIDTH), float("nan"), device=device)
        lora_collect_peers(
            bridge, shared[turn % 2].addresses, pads.addresses, 0, **lists(device), out=out, rank=rank, **common_of(group, ranks)
        )  # fmt: skip
        check_h(out, h)
    dist.destroy_process_group()
