"""Times of GPU work by CUDA events over graph replays, as medians; on a CPU, where only the tool is tried, by the wall clock."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch

WARMUP_REPLAYS = 2
REPLAYS = 7


def captured_us(call: Callable[[], object], device: torch.device, *, replays: int = REPLAYS) -> float:
    """Return the median microseconds of one replay of `call`, captured as a CUDA graph."""
    if device.type != "cuda":
        return event_us(call, device, replays=1)
    stream = torch.cuda.Stream(device)
    with torch.cuda.stream(stream):
        call()
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return event_us(graph.replay, device, replays=replays)


def event_us(
    call: Callable[[], object], device: torch.device, *, replays: int = REPLAYS, warmup: int = WARMUP_REPLAYS
) -> float:
    """Return the median microseconds that the device spends on `call`, after `warmup` of them."""
    if device.type != "cuda":
        started_s = time.perf_counter()
        call()
        return (time.perf_counter() - started_s) * 1e6
    for _ in range(warmup):
        call()
    pairs = []
    for _ in range(replays):
        started, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        started.record()
        call()
        ended.record()
        pairs.append((started, ended))
    torch.cuda.synchronize(device)
    times = sorted(started.elapsed_time(ended) * 1e3 for started, ended in pairs)
    return float(times[len(times) // 2])


def series_us(calls: Sequence[Callable[[], object]], device: torch.device) -> list[float]:
    """Return the microseconds of each of these calls, one after the other."""
    if device.type != "cuda":
        return [event_us(call, device) for call in calls]
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(len(calls) + 1)]
    marks[0].record()
    for call, mark in zip(calls, marks[1:], strict=True):
        call()
        mark.record()
    torch.cuda.synchronize(device)
    return [before.elapsed_time(after) * 1e3 for before, after in pairwise(marks)]


def synchronize(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
