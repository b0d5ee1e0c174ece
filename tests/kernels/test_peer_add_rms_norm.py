"""Sum over ranks, residual and norm in one kernel: alone anywhere, and between two GPUs where there are two."""

import pytest
import torch
from torch.multiprocessing.spawn import spawn

from kernels.peer_add_rms_norm import peer_add_rms_norm_
from kernels.peer_add_rms_norm_ref import peer_add_rms_norm_ as reference
from tests.kernels.tolerances import assert_close

HIDDEN = 512
RANKS = 2
ROWS = (1, 33, 700)


def addresses(tensors, device):
    return (
        torch.tensor([tensor.data_ptr() for tensor in tensors], dtype=torch.int64)
        .view(torch.uint64)
        .to(device)
    )


@pytest.mark.parametrize("rows", [0, 1, 7])
def test_one_rank_is_the_plain_norm(target, rows):
    device, dtype = target
    x, residual = (torch.randn(rows, 96, device=device).to(dtype) for _ in range(2))
    weight = torch.randn(96, device=device).to(dtype)
    expected_residual = residual.clone()
    expected = reference([x], expected_residual, weight, 1e-5)
    pads = torch.zeros(max(1, rows), dtype=torch.int32, device=device)
    out = peer_add_rms_norm_(
        x, addresses([x], device), addresses([pads], device), 0, residual, weight, 1e-5, rank=0, ranks=1
    )
    assert torch.equal(residual, expected_residual)
    if rows:
        assert_close(out, expected)


def test_arguments_are_checked(target):
    device, dtype = target
    x = torch.zeros(2, 96, device=device, dtype=dtype)
    pads = torch.zeros(2, dtype=torch.int32, device=device)
    good = dict(
        x=x, buffers=addresses([x], device), pads=addresses([pads], device), offset=0, residual=x.clone(),
        weight=x[0].clone(), eps=1e-5, rank=0, ranks=1,
    )  # fmt: skip
    wrong = dict(
        offset=3, buffers=good["buffers"].view(torch.int64), residual=x[:1].clone(), weight=x.clone()
    )
    for name, value in wrong.items():
        with pytest.raises(ValueError, match=name):
            peer_add_rms_norm_(**{**good, name: value})


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < RANKS, reason="needs two GPUs that reach each other's memory")
def test_two_gpus_agree_bit_for_bit_and_with_the_reference():
    spawn(_rank, args=(29671,), nprocs=RANKS)


def _rank(rank, port):
    import torch.distributed as dist
    import torch.distributed._symmetric_memory as symmetric_memory

    device = torch.device("cuda", rank)
    torch.cuda.set_device(device)
    dist.init_process_group(
        "nccl", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=RANKS, device_id=device
    )
    group = dist.group.WORLD.group_name
    shared = []
    for _ in range(2):  # two buffers in turn, as kernels/peers.py asks
        data = symmetric_memory.empty(max(ROWS) * HIDDEN, dtype=torch.bfloat16, device=device)
        pads = symmetric_memory.empty(max(ROWS) * RANKS, dtype=torch.int32, device=device)
        pads.zero_()
        handles = [symmetric_memory.rendezvous(tensor, group) for tensor in (data, pads)]
        tables = [
            torch.tensor(list(handle.buffer_ptrs), dtype=torch.int64).view(torch.uint64).to(device)
            for handle in handles
        ]
        shared.append((data, *tables, handles))
    torch.cuda.synchronize()
    dist.barrier()
    for rows in ROWS:
        generator = torch.Generator("cpu").manual_seed(rows)
        parts = [torch.randn(rows, HIDDEN, generator=generator).bfloat16().to(device) for _ in range(RANKS)]
        residual = torch.randn(rows, HIDDEN, generator=generator).bfloat16().to(device)
        weight = torch.randn(HIDDEN, generator=generator).bfloat16().to(device)
        for turn in range(6):
            data, buffers, pads, _ = shared[turn % 2]
            x = data[: rows * HIDDEN].view(rows, HIDDEN)
            x.copy_(parts[rank])
            found, expected_residual = residual.clone(), residual.clone()
            out = peer_add_rms_norm_(x, buffers, pads, 0, found, weight, 1e-5, rank=rank, ranks=RANKS)
            expected = reference(parts, expected_residual, weight, 1e-5)
            assert torch.equal(found, expected_residual)
            assert_close(out, expected)
            first = out.clone()
            dist.broadcast(first, 0)
            assert torch.equal(first, out)
    dist.destroy_process_group()
