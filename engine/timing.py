"""GPU times by CUDA events over graph replays, as medians."""

from __future__ import annotations

from collections.abc import Callable

import torch

WARMUP_REPLAYS = 2
REPLAYS = 7


def captured_us(call: Callable[[], object], *, replays: int = REPLAYS) -> float:
    """Return the median microseconds of one replay of `call`, captured as a CUDA graph."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return event_us(graph.replay, replays=replays)


def event_us(call: Callable[[], object], *, replays: int = REPLAYS) -> float:
    """Return the median microseconds that the GPU spends on `call`."""
    for _ in range(WARMUP_REPLAYS):
        call()
    pairs = []
    for _ in range(replays):
        started, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        started.record()
        call()
        ended.record()
        pairs.append((started, ended))
    torch.cuda.synchronize()
    times = sorted(started.elapsed_time(ended) * 1e3 for started, ended in pairs)
    return times[len(times) // 2]
