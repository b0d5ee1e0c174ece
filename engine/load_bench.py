"""How fast adapters reach the GPU, and what steps beside it lose: loads back to back, and decode steps without and with loads running."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from engine.runner import Runner
from engine.step import Load
from engine.step_profile import MadeUpStep, StepBench
from engine.timing import synchronize

LOADS = 64
IN_FLIGHT = 8  # loads under way at a time beside steps: as many as the scheduler starts
REPEATS = 5
STEPS = 200
WARMUP_STEPS = 10
DECODE_ROWS = 32
DECODE_KV_TOKENS = 512


def bench_loads(
    runner: Runner, *, loads: int = LOADS, steps: int = STEPS, seed: int = 0
) -> list[dict[str, Any]]:
    """Measure loads of registered adapters that are in host memory, on a runner whose graphs are captured; return rows.

    `loads`: adapters back to back, into neighbouring pages and into pages at random, each seen from the first start to the last `finished`.
    `decode`: the median and 99th percentile of captured steps of 32 rows with an adapter each, alone and with loads always under way.
    The pool's contents are lost; the adapters measured must fit it together, beside the rows' KV.
    """
    names = [name for name in runner.blueprint.adapters if runner.store.where(name) == "host"]
    used = names[: DECODE_ROWS + loads]
    rng = np.random.default_rng(seed)
    rows = [_load_row(runner, used[-loads:], scattered=scattered, rng=rng) for scattered in (False, True)]
    bench = StepBench(runner, used)  # not before: it places adapters where the loads above went
    count = min(DECODE_ROWS, runner.blueprint.config.max_num_seqs)
    step = MadeUpStep(decodes=tuple((DECODE_KV_TOKENS, used[row % len(used)]) for row in range(count)))
    return rows + _decode_rows(runner, bench, step, used[-loads:], steps)


def _load_row(
    runner: Runner, names: Sequence[str], *, scattered: bool, rng: np.random.Generator
) -> dict[str, Any]:
    """Load adapters back to back, several times; the fastest time and the median count."""
    wanted = _loads(runner, names, scattered, rng)
    num_bytes = sum(load.num_bytes for load in wanted)
    times_s = sorted(_load_s(runner, wanted) for _ in range(REPEATS))
    median_s = times_s[len(times_s) // 2]
    return {
        "case": "loads",
        "pages": "scattered" if scattered else "neighbours",
        "adapters": len(wanted),
        "bytes": num_bytes,
        "seconds": median_s,
        "gb_per_s": num_bytes / median_s / 1e9,
        "best_gb_per_s": num_bytes / times_s[0] / 1e9,
    }


def _loads(runner: Runner, names: Sequence[str], scattered: bool, rng: np.random.Generator) -> list[Load]:
    """Return loads into the pool's last pages, one adapter's after the other's; into the first again where the pool is too small."""
    total = runner.blueprint.memory.num_pages
    order = rng.permutation(total) if scattered else np.arange(total)
    loads, first = [], 0
    for name in names:
        footprint = runner.blueprint.footprints[name]
        if first + footprint.pages > total:
            first = 0
        pages = tuple(order[first : first + footprint.pages].tolist())
        first += footprint.pages
        loads.append(Load(name, 0, pages, footprint.copy_bytes))
    return loads


def _load_s(runner: Runner, wanted: Sequence[Load]) -> float:
    loader = runner.loader
    synchronize(runner.device)
    began_s = time.perf_counter()
    for load in wanted:
        loader.start(load)
    while loader.num_loading:
        loader.finished()
    return time.perf_counter() - began_s


class _Feeder:
    """Keeps loads of some adapters under way, each into the pages where it is already."""

    def __init__(self, runner: Runner, bench: StepBench, names: Sequence[str]) -> None:
        self._runner = runner
        self._loads = [
            Load(
                name,
                bench.residents[name].slot,
                tuple(bench.residents[name].pages),
                bench.residents[name].footprint.copy_bytes,
            )
            for name in names
        ]
        self._sizes = {load.adapter: load.num_bytes for load in self._loads}
        self._next = 0
        self.num_bytes = 0

    def feed(self) -> None:
        """Note what has arrived and start as many loads."""
        loader = self._runner.loader
        self.num_bytes += sum(self._sizes[name] for name in loader.finished())
        for _ in range(
            min(IN_FLIGHT, len(self._loads)) - loader.num_loading
        ):  # no more: they may end as fast as they start
            loader.start(self._loads[self._next % len(self._loads)])
            self._next += 1
            if self._runner.device.type != "cuda":
                break  # a copy on the CPU is over when it has started

    def drain(self) -> None:
        """Wait for what is under way."""
        while self._runner.loader.num_loading:
            self._runner.loader.finished()


def _decode_rows(
    runner: Runner, bench: StepBench, step: MadeUpStep, names: Sequence[str], steps: int
) -> list[dict[str, Any]]:
    planned, batch = bench.prepare(step)
    call = bench.caller(planned, batch)
    feeder = _Feeder(runner, bench, names)
    alone_s, _ = _timed_steps(runner, call, lambda: None, steps)
    beside_s, elapsed_s = _timed_steps(runner, call, feeder.feed, steps)
    feeder.drain()
    common = {"case": "decode", "rows": len(step.decodes), "kv_tokens": DECODE_KV_TOKENS}
    alone, beside = _percentiles(alone_s), _percentiles(beside_s)
    speed = {
        "gb_per_s": feeder.num_bytes / elapsed_s / 1e9,
        "slower_percent": (beside["median_ms"] / alone["median_ms"] - 1) * 100,
    }
    return [common | {"loads": False} | alone, common | {"loads": True} | beside | speed]


def _timed_steps(
    runner: Runner, call: Callable[[], None], meanwhile: Callable[[], None], steps: int
) -> tuple[list[float], float]:
    """Return each step's seconds on the device, and the wall time of all; `meanwhile` is called while each one runs."""
    for _ in range(WARMUP_STEPS):
        meanwhile()
        call()
    synchronize(runner.device)
    times_s = []
    began_s = time.perf_counter()
    for _ in range(steps):
        times_s.append(_timed_step(runner.device, call, meanwhile))
    return times_s, time.perf_counter() - began_s


def _timed_step(device: torch.device, call: Callable[[], None], meanwhile: Callable[[], None]) -> float:
    if device.type != "cuda":
        began_s = time.perf_counter()
        call()
        duration_s = time.perf_counter() - began_s
        meanwhile()
        return duration_s
    started, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    started.record()
    call()
    ended.record()
    meanwhile()
    while not ended.query():
        meanwhile()
    duration_ms: float = started.elapsed_time(ended)
    return duration_ms * 1e-3


def _percentiles(times_s: Sequence[float]) -> dict[str, float]:
    median_s, p99_s = np.percentile(np.array(times_s), [50, 99]).tolist()
    return {"steps": len(times_s), "median_ms": median_s * 1e3, "p99_ms": p99_s * 1e3}
