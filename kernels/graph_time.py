"""How the kernel benchmarks measure: the GPU's time of captured launches, held against the bytes or operations that cannot be avoided.

The launches of a graph take their weights or KV in turn from more of them than the 60 MB L2 holds, so that all come from memory, as in a
model of many layers.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import torch

BYTES_PER_S = 4.3e12  # H200, between its measured read and copy rates (shared/facts/h200.md, 2026-11-21)
FLOPS_PER_S = 790e12  # bf16 matrix products, the same place
ROTATED_BYTES = 150e6
MAX_RELATIVE_ERROR = 1e-2  # bf16


def graph_us(run: Callable[[], object], replays: int) -> float:
    """Capture `run` in a CUDA graph and return the median time of a replay."""
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return replay_us(graph, replays)


def replay_us(graph: torch.cuda.CUDAGraph, replays: int) -> float:
    """Return the median time of a replay of a captured graph."""
    for _ in range(3):
        graph.replay()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(replays + 1)]
    events[0].record()
    for event in events[1:]:
        graph.replay()
        event.record()
    torch.cuda.synchronize()
    return 1e3 * float(np.median([a.elapsed_time(b) for a, b in itertools.pairwise(events)]))


def bytes_us(moved_bytes: float) -> float:
    """Return the time to move so many bytes."""
    return moved_bytes / BYTES_PER_S * 1e6


def timed(us: float, bound_us: float) -> dict[str, float]:
    """Return the fields of a row that every benchmark has."""
    return {"us": round(us, 2), "bound_us": round(bound_us, 2), "ratio": round(us / bound_us, 2)}


def relative_error(out: torch.Tensor, expected: torch.Tensor) -> float:
    """Return ‖out − expected‖ / ‖expected‖; infinity if anything is not finite."""
    error = ((out.float() - expected.float()).norm() / expected.float().norm()).item()
    return error if error == error else float("inf")


class WrongResultError(RuntimeError):
    """A kernel's result is not the reference's."""


def check_error(what: str, error: float) -> float:
    """Return the relative error. Raises WrongResultError where it is too large."""
    if not error < MAX_RELATIVE_ERROR:
        raise WrongResultError(f"{what}: relative error {error:.2e}")
    return error
