"""Time the sum over two GPUs with residual and norm in one kernel beside other sums: python -m docs.measured.peer_add_rms_norm OUT.json."""

import json
import sys

import torch
import torch.distributed as dist
import torch.distributed._symmetric_memory as symmetric_memory
from torch.multiprocessing.spawn import spawn

from kernels.peer_add_rms_norm import peer_add_rms_norm_
from kernels.rms_norm import add_rms_norm_

RANKS, HIDDEN, CALLS, REPLAYS = 2, 4096, 32, 10
ROWS = (1, 16, 32, 64, 128, 256, 512, 1024)


def measure(rank, out):
    """Time all on one rank; rank 0 prints and writes."""
    device = torch.device("cuda", rank)
    torch.cuda.set_device(device)
    dist.init_process_group(
        "nccl", init_method="tcp://127.0.0.1:29533", rank=rank, world_size=RANKS, device_id=device
    )
    group = dist.group.WORLD.group_name
    shared = [_shared(device, group) for _ in range(2)]
    torch.cuda.synchronize()
    dist.barrier()
    found = []
    for rows in ROWS:
        line = {"rows": rows}
        for name, call in _calls(rank, rows, shared, device, group).items():
            line[name] = round(_graph_us(call), 2)
        found.append(line)
        if rank == 0:
            print(line, flush=True)
    if rank == 0:
        with open(out, "w", encoding="utf-8") as file:
            json.dump(found, file, indent=1)
    dist.destroy_process_group()


def _shared(device, group):
    data = symmetric_memory.empty(max(ROWS) * HIDDEN, dtype=torch.bfloat16, device=device)
    pads = symmetric_memory.empty(max(ROWS) * RANKS, dtype=torch.int32, device=device)
    pads.zero_()
    data.normal_()
    handles = [symmetric_memory.rendezvous(tensor, group) for tensor in (data, pads)]
    tables = [torch.tensor(list(handle.buffer_ptrs), dtype=torch.uint64, device=device) for handle in handles]
    return data, *tables, handles


def _calls(rank, rows, shared, device, group):
    weight = torch.ones(HIDDEN, dtype=torch.bfloat16, device=device)
    residual = torch.randn(rows, HIDDEN, device=device).bfloat16()
    own = torch.randn(rows, HIDDEN, device=device).bfloat16()
    flat = [data[: rows * HIDDEN] for data, *_ in shared]

    def peer(turn):
        _, buffers, pads, _ = shared[turn]
        x = flat[turn].view(rows, HIDDEN)
        peer_add_rms_norm_(x, buffers, pads, 0, residual, weight, 1e-5, rank=rank, ranks=RANKS)

    def nccl(turn):
        dist.all_reduce(own)
        add_rms_norm_(own, residual, weight, 1e-5)

    def one_shot(turn):
        total = torch.ops.symm_mem.one_shot_all_reduce(flat[turn], "sum", group)
        add_rms_norm_(total.view(rows, HIDDEN), residual, weight, 1e-5)

    def two_shot(turn):
        torch.ops.symm_mem.two_shot_all_reduce_(flat[turn], "sum", group)
        add_rms_norm_(flat[turn].view(rows, HIDDEN), residual, weight, 1e-5)

    return {"peer": peer, "nccl": nccl, "one_shot": one_shot, "two_shot": two_shot}


def _graph_us(call):
    """Return the time of one call in a captured run of them, over the two buffers in turn."""

    def run():
        for number in range(CALLS):
            call(number % 2)

    run()
    torch.cuda.synchronize()
    dist.barrier()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    for _ in range(3):
        graph.replay()
    torch.cuda.synchronize()
    dist.barrier()
    began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    began.record()
    for _ in range(REPLAYS):
        graph.replay()
    ended.record()
    torch.cuda.synchronize()
    dist.barrier()
    return began.elapsed_time(ended) * 1e3 / (CALLS * REPLAYS)


if __name__ == "__main__":
    spawn(measure, args=(sys.argv[1],), nprocs=RANKS)
