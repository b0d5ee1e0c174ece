"""A request on its way through the engine."""

from __future__ import annotations

from dataclasses import dataclass
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


_WAITING = Phase.WAITING  # Python looks a member of an enumeration up in 0.15 µs, a global in none


@dataclass(slots=True, eq=False, init=False)
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
    phase: Phase
    slot: int
    pages: list[int]
    held_pages: int
    prefilled: int
    cached_tokens: int
    found_tokens: int
    generated: int
    preemptions: int
    admitted_s: float | None
    load_wait_s: float
    join_tick: int
    finish_tick: int
    page_key: int
    resident: ResidentAdapter | None

    def __init__(
        self,
        request: Request,
        order: int,
        prefill_tokens: int,
        phase: Phase = _WAITING,
        slot: int = -1,
        pages: list[int] | None = None,
        resident: ResidentAdapter | None = None,
    ) -> None:
        self.request = request
        self.order = order
        self.prefill_tokens = prefill_tokens
        self.phase = phase
        self.slot = slot
        self.pages = [] if pages is None else pages
        self.held_pages = 0
        self.prefilled = 0
        self.cached_tokens = 0
        self.found_tokens = 0
        self.generated = 0
        self.preemptions = 0
        self.admitted_s = None
        self.load_wait_s = 0.0
        self.join_tick = 0
        self.finish_tick = 0
        self.page_key = 0
        self.resident = resident
