"""A request on its way through the engine."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from engine.requests import Request
from engine.residency import ResidentAdapter


class Phase(Enum):
    WAITING = "waiting"
    PREFILL = "prefill"
    DECODE = "decode"
    ASIDE = "aside"  # it decoded, and goes on when what is merged is taken out
    FINISHING = "finishing"
    DONE = "done"


@dataclass(slots=True, eq=False)
class Sequence:
    """A request with its state. `slot` indexes the engine's per-sequence tables while it runs.

    prefill_tokens: tokens to compute before it decodes: the prompt, and after a preemption what it had generated too.
    pages: those of its pages that are known by name, from the first on: all of them, or those that the prefix cache can know
    (`UnifiedPool.names_pages`). held_pages: how many it holds in all, exact unless it decodes.
    cached_tokens: tokens whose KV was found in the prefix cache when it was last admitted; its prefill starts behind them.
    found_tokens: those that were found when it was first admitted; what a preempted request finds of its own is not counted.
    generated: tokens planned so far, exact unless it decodes; `Scheduler.planned_tokens` is exact always.
    join_tick, finish_tick, page_key: set by the decode set while it decodes.
    resident: the adapter that its rows are multiplied by: its own, unless one is merged for good (engine/running_set.py).
    """

    request: Request
    order: int
    prefill_tokens: int
    phase: Phase = Phase.WAITING
    slot: int = -1
    pages: list[int] = field(default_factory=list)
    held_pages: int = 0
    prefilled: int = 0
    cached_tokens: int = 0
    found_tokens: int = 0
    generated: int = 0
    preemptions: int = 0
    admitted_s: float | None = None
    load_wait_s: float = 0.0
    join_tick: int = 0
    finish_tick: int = 0
    page_key: int = 0
    resident: ResidentAdapter | None = None
