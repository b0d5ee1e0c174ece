"""Serves a trace in real time and keeps the record of it: what happened to each request, and what each step was."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any
from zlib import crc32

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from engine.engine import Engine, Generation, StepRecord
from engine.requests import Request
from engine.scheduler import RefusedError
from traces import Trace, TraceRequest

SPIN_S = 200e-6  # the last bit before an arrival is waited for actively, as sleeping oversleeps


@dataclass(slots=True)
class Served:
    """A trace's request and what became of it; `refused` says why where it never ran."""

    asked: TraceRequest
    generation: Generation | None
    refused: str | None = None


def replay(
    engine: Engine,
    trace: Trace,
    *,
    seed: int = 0,
    progress: Callable[[float, int], None] = lambda _s, _n: None,
) -> list[Served]:
    """Send each request at its arrival, counted from the call, with a random prompt; return when all are done.

    progress: called about once a second with (seconds since the start, requests unfinished).
    """
    prompts = _prompts(trace, engine.blueprint.model.vocab_size, seed)
    served: list[Served] = []
    asked = trace.requests
    started_s = time.perf_counter()
    engine.clock = lambda: time.perf_counter() - started_s
    told_s = 0.0
    while len(served) < len(asked) or engine.busy:
        now_s = engine.clock()
        while len(served) < len(asked) and asked[len(served)].arrival_s <= now_s:
            served.append(_send(engine, asked[len(served)], prompts))
        if not engine.turn():
            _idle(engine, asked, len(served))
        if now_s - told_s >= 1.0:
            told_s = now_s
            progress(now_s, engine.scheduler.num_unfinished)
    return served


def _prompts(trace: Trace, vocab_size: int, seed: int) -> NDArray[np.int32]:
    """Return one long run of random tokens; prompts are windows of it, each from its own start."""
    longest = max(request.prompt_tokens for request in trace.requests)
    rng = np.random.default_rng(seed)
    return rng.integers(0, vocab_size, longest + 4099, dtype=np.int32)


def _send(engine: Engine, asked: TraceRequest, tokens: NDArray[np.int32]) -> Served:
    request = Request(
        request_id=asked.id,
        arrival_s=asked.arrival_s,
        prompt_tokens=asked.prompt_tokens,
        output_tokens=asked.output_tokens,
        adapter=asked.adapter,
    )
    start = crc32(str(asked.id).encode()) % 4099
    try:
        return Served(asked, engine.add(request, tokens[start : start + asked.prompt_tokens]))
    except RefusedError as error:
        return Served(asked, None, str(error))


def _idle(engine: Engine, asked: tuple[TraceRequest, ...], sent: int) -> None:
    """Nothing can run: wait for the next arrival, or a little while an adapter is on its way."""
    if engine.runner.loader.num_loading:
        time.sleep(20e-6)
    elif sent < len(asked):
        wait_s = asked[sent].arrival_s - engine.clock()
        if wait_s > SPIN_S:
            time.sleep(min(wait_s - SPIN_S, 0.01))


def requests_frame(served: list[Served], ranks: Mapping[str, int]) -> pd.DataFrame:
    """Return a run record's requests, in the trace's order; times are NaN where a request was refused."""
    rows = []
    for item in served:
        generation, asked = item.generation, item.asked
        row: dict[str, Any] = {
            "id": asked.id,
            "arrival_s": asked.arrival_s,
            "scheduled_s": np.nan,
            "first_token_s": np.nan,
            "finish_s": np.nan,
            "prompt_tokens": asked.prompt_tokens,
            "output_tokens": asked.output_tokens,
            "adapter": asked.adapter,
            "rank": None if asked.adapter is None else ranks[asked.adapter],
            "load_wait_s": 0.0,
            "preemptions": 0,
        }
        if generation is not None:
            row["scheduled_s"] = generation.sequence.admitted_s
            row["first_token_s"] = generation.first_token_s
            row["finish_s"] = generation.finish_s
            row["load_wait_s"] = generation.sequence.load_wait_s
            row["preemptions"] = generation.sequence.preemptions
        rows.append(row)
    return pd.DataFrame(rows)


def steps_frame(steps: list[StepRecord]) -> pd.DataFrame:
    """Return a run record's steps: start and duration on the GPU, the host's time, and the shape's facts."""
    rows = []
    for step in steps:
        row: dict[str, Any] = {
            "start_s": step.ended_s - step.gpu_s,
            "duration_s": step.gpu_s,
            "host_s": step.host_s,
            "waiting": step.waiting,
            "kv_pages": step.kv_pages,
            "adapter_pages": step.adapter_pages,
        }
        rows.append(row | step.shape.to_json())
    return pd.DataFrame(rows)
