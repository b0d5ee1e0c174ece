"""Serves a trace in real time and keeps the record of it: what happened to each request, and what each step was."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from engine.blueprint import Blueprint
from engine.engine import Engine, Generation, StepRecord
from engine.prefix_keys import keys_of_tokens, tokens_of_blocks
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


@dataclass(frozen=True, slots=True)
class Prepared:
    """A request ready to be sent, with its prompt's tokens."""

    asked: TraceRequest
    request: Request
    prompt: NDArray[np.int32]


def replay(
    engine: Engine,
    trace: Trace,
    *,
    seed: int = 0,
    progress: Callable[[float, int], None] = lambda _s, _n: None,
) -> list[Served]:
    """Send each request at its arrival, counted from when all prompts are made; return when all are done.

    Prompts are random: two share their start exactly as far as the trace's `prefix_blocks` say, and nothing where it has none.
    progress: called about once a second with (seconds since the start, requests unfinished).
    """
    asked = [_prepare(engine.blueprint, request, seed) for request in trace.requests]
    served: list[Served] = []
    started_s = time.perf_counter()
    engine.clock = lambda: time.perf_counter() - started_s
    told_s = 0.0
    while len(served) < len(asked) or engine.busy:
        now_s = engine.clock()
        while len(served) < len(asked) and asked[len(served)].request.arrival_s <= now_s:
            served.append(_send(engine, asked[len(served)]))
        if not engine.turn():
            _idle(engine, asked[len(served)].request.arrival_s if len(served) < len(asked) else None)
        if now_s - told_s >= 1.0:
            told_s = now_s
            progress(now_s, engine.scheduler.num_unfinished)
    return served


def _prepare(blueprint: Blueprint, asked: TraceRequest, seed: int) -> Prepared:
    config = blueprint.config
    prompt = tokens_of_blocks(
        asked.prefix_blocks, asked.prompt_tokens, blueprint.model.vocab_size, seed, asked.id
    )
    request = Request(
        request_id=asked.id,
        arrival_s=asked.arrival_s,
        prompt_tokens=asked.prompt_tokens,
        output_tokens=asked.output_tokens,
        adapter=asked.adapter,
        page_keys=keys_of_tokens(asked.adapter, prompt, config.page_tokens)
        if config.prefix_caching
        else None,
    )
    return Prepared(asked, request, prompt)


def _send(engine: Engine, prepared: Prepared) -> Served:
    try:
        return Served(prepared.asked, engine.add(prepared.request, prepared.prompt))
    except RefusedError as error:
        return Served(prepared.asked, None, str(error))


def _idle(engine: Engine, next_arrival_s: float | None) -> None:
    """Nothing can run: wait for the next arrival, or a little while an adapter is on its way."""
    if engine.runner.loader.num_loading:
        time.sleep(20e-6)
    elif next_arrival_s is not None:
        wait_s = next_arrival_s - engine.clock()
        if wait_s > SPIN_S:
            time.sleep(min(wait_s - SPIN_S, 0.01))


def requests_frame(served: list[Served], ranks: Mapping[str, int]) -> pd.DataFrame:
    """Return a run record's requests, in the trace's order; times are NaN where a request was refused.

    Where the trace has `prefix_blocks` they are a column too, so that the record can be simulated.
    """
    shares = any(item.asked.prefix_blocks is not None for item in served)
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
            "cached_tokens": 0,
        }
        if shares:
            row["prefix_blocks"] = asked.prefix_blocks
        if generation is not None:
            row["scheduled_s"] = generation.sequence.admitted_s
            row["first_token_s"] = generation.first_token_s
            row["finish_s"] = generation.finish_s
            row["load_wait_s"] = generation.sequence.load_wait_s
            row["preemptions"] = generation.sequence.preemptions
            row["cached_tokens"] = generation.sequence.found_tokens
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
