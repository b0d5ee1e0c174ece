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
from engine.replica_process import Timeline, timeline_of
from engine.replicas import Replicas
from engine.requests import Request
from engine.scheduler import RefusedError
from traces import Trace, TraceRequest

SPIN_S = 200e-6  # the last bit before an arrival is waited for actively, as sleeping oversleeps


@dataclass(slots=True)
class Served:
    """A trace's request and what became of it. replica: which one served it last, where there are several."""

    asked: TraceRequest
    timeline: Timeline
    replica: int | None = None


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
    sent: list[Generation | str] = []
    started_s = time.perf_counter()
    engine.clock = lambda: time.perf_counter() - started_s
    told_s = 0.0
    while len(sent) < len(asked) or engine.busy:
        now_s = engine.clock()
        while len(sent) < len(asked) and asked[len(sent)].request.arrival_s <= now_s:
            sent.append(_send(engine, asked[len(sent)]))
        if not engine.turn():
            _idle(engine, asked[len(sent)].request.arrival_s if len(sent) < len(asked) else None)
        if now_s - told_s >= 1.0:
            told_s = now_s
            progress(now_s, engine.scheduler.num_unfinished)
    return [
        Served(item.asked, Timeline(refused=found) if isinstance(found, str) else timeline_of(found))
        for item, found in zip(asked, sent, strict=True)
    ]


def replay_on_replicas(
    replicas: Replicas,
    plan: Blueprint,
    trace: Trace,
    *,
    seed: int = 0,
    progress: Callable[[float, int], None] = lambda _s, _n: None,
) -> list[Served]:
    """As `replay`, on replicas behind their router. `plan` is of the whole configuration."""
    asked = [_prepare(plan, request, seed) for request in trace.requests]
    found: dict[int | str, tuple[int, Timeline]] = {}
    started_s = time.perf_counter()
    replicas.begin(started_s)
    sent, told_s = 0, 0.0
    while sent < len(asked) or replicas.num_unfinished:
        now_s = time.perf_counter() - started_s
        while sent < len(asked) and asked[sent].request.arrival_s <= now_s:
            replicas.submit(asked[sent].request, asked[sent].prompt)
            sent += 1
        wait_s = asked[sent].request.arrival_s - now_s if sent < len(asked) else 0.01
        for request_id, replica, timeline in replicas.ended(max(0.0, min(wait_s - SPIN_S, 0.01))):
            found[request_id] = replica, timeline
        if now_s - told_s >= 1.0:
            told_s = now_s
            progress(now_s, replicas.num_unfinished)
    return [
        Served(item.asked, timeline, replica)
        for item in asked
        for replica, timeline in [found[item.asked.id]]
    ]


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


def _send(engine: Engine, prepared: Prepared) -> Generation | str:
    """Queue a request; return why, where it can never run."""
    try:
        return engine.add(prepared.request, prepared.prompt)
    except RefusedError as error:
        return str(error)


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

    Where the trace has `prefix_blocks` they are a column too, so that the record can be simulated; where there were several replicas, `replica`.
    """
    shares = any(item.asked.prefix_blocks is not None for item in served)
    routed = any(item.replica is not None for item in served)
    rows = []
    for item in served:
        timeline, asked = item.timeline, item.asked
        row: dict[str, Any] = {
            "id": asked.id,
            "arrival_s": asked.arrival_s,
            "scheduled_s": timeline.scheduled_s,
            "first_token_s": timeline.first_token_s,
            "finish_s": timeline.finish_s if timeline.first_token_s is not None else None,
            "prompt_tokens": asked.prompt_tokens,
            "output_tokens": asked.output_tokens,
            "adapter": asked.adapter,
            "rank": None if asked.adapter is None else ranks[asked.adapter],
            "load_wait_s": timeline.load_wait_s,
            "preemptions": timeline.preemptions,
            "cached_tokens": timeline.found_tokens,
        }
        if shares:
            row["prefix_blocks"] = asked.prefix_blocks
        if routed:
            row["replica"] = item.replica
        rows.append(row)
    return pd.DataFrame(rows).astype({"scheduled_s": float, "first_token_s": float, "finish_s": float})


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
