"""What a configuration is tried on: the trace, and shorter pieces of it to try many on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

import numpy as np

from engine.errors import UserError
from engine.model_shape import ModelShape
from traces import Trace
from traces.columns import BlockColumn, Blocks

Piece = Literal["screen", "window", "stretch", "trace"]
PIECES: tuple[Piece, ...] = get_args(Piece)  # ever longer

SCREEN_REQUESTS = 300  # enough to tell a setting that is half as good
WINDOW_REQUESTS = 800  # a minute at the highest rate of a replica with one GPU: longer than a request stays
STRETCH_REQUESTS = 3000  # half a minute at the highest rate of eight replicas
REQUESTS_A_REPLICA = 500  # fewer, and a replica could be late with all of them before it shows
LONG_ENOUGH = 0.7  # of that: a stretch that is to be compared on is taken as it is
MOST_REPEATED = 16_000  # requests: a trace is not repeated beyond this
LENGTH_STEP = 1024  # max_model_len is a multiple of this


@dataclass(frozen=True, slots=True, eq=False)
class Workload:
    """The trace at the rate that is asked for, and its busiest stretches of some hundred requests."""

    screen: Trace
    window: Trace
    stretch: Trace
    trace: Trace

    @classmethod
    def of(cls, trace: Trace) -> Workload:
        """Cut a trace. Raises UserError where its requests all come at one instant: it has no rate."""
        if trace.rate_rps <= 0:
            raise UserError(
                f"{trace.name}: all requests arrive at one instant, so there is no rate to plan for"
            )
        stretch = busiest(trace, STRETCH_REQUESTS)
        window = busiest(stretch, WINDOW_REQUESTS)
        return cls(screen=busiest(window, SCREEN_REQUESTS), window=window, stretch=stretch, trace=trace)

    @property
    def rate_rps(self) -> float:
        return self.trace.rate_rps

    def piece(self, name: Piece) -> Trace:
        """Return a piece by its name."""
        pieces: dict[Piece, Trace] = {
            "screen": self.screen,
            "window": self.window,
            "stretch": self.stretch,
            "trace": self.trace,
        }
        return pieces[name]

    def long_piece(self, name: Piece, replicas: int) -> Trace:
        """Return a piece; the trace repeated, if need be, so that it keeps so many replicas busy for a while.

        A trace that is over before its queue has grown says nothing of a rate that can be sustained.
        """
        piece = self.piece(name)
        wanted = min(MOST_REPEATED, REQUESTS_A_REPLICA * replicas)
        if name not in ("stretch", "trace") or (name == "stretch" and len(piece) > LONG_ENOUGH * wanted):
            return piece
        return repeated(piece, -(-wanted // len(piece)))


def busiest(trace: Trace, count: int) -> Trace:
    """Return the `count` consecutive requests that arrive within the shortest time (the first such stretch).

    A trace that is hardly longer is returned whole.
    """
    if len(trace) <= count * 4 // 3:
        return trace
    arrivals = trace.columns.arrival_s
    spans_s = arrivals[count - 1 :] - arrivals[: len(arrivals) - count + 1]
    first = int(np.argmin(spans_s))
    columns = trace.columns.take(np.arange(first, first + count))
    start_s = float(arrivals[first])
    part = Trace.from_columns(columns, trace.name)
    return part.window(start_s, np.inf)


def repeated(trace: Trace, times: int) -> Trace:
    """Return the trace so many times in a row, a mean gap between the copies: its rate is kept.

    Copies share no prefix blocks: otherwise every prompt of the second would be in the prefix cache.
    """
    if times <= 1:
        return trace
    count = len(trace)
    columns = trace.columns.take(np.tile(np.arange(count), times))
    arrivals = trace.columns.arrival_s
    period_s = float(arrivals[-1] - arrivals[0]) + 1 / trace.rate_rps
    shifts_s = np.repeat(np.arange(times) * period_s, count)
    columns = replace(
        columns,
        ids=range(count * times),
        arrival_s=columns.arrival_s + shifts_s,
        raw_arrival_s=None,
        prefix_blocks=_apart(columns.prefix_blocks, count),
    )
    return Trace.from_columns(columns, trace.name)


def _apart(blocks: Sequence[Blocks | None] | None, count: int) -> BlockColumn | None:
    """Number the blocks of each further copy of `count` rows anew."""
    if blocks is None:
        return None
    most = 1 + max((block for row in blocks[:count] for block in row or ()), default=0)
    return BlockColumn(
        None if row is None else [block + number // count * most for block in row]
        for number, row in enumerate(blocks)
    )


def longest_request(trace: Trace) -> int:
    """Return the most prompt and output tokens of one request."""
    return int((trace.columns.prompt_tokens + trace.columns.output_tokens).max())


def max_model_len(trace: Trace, model: ModelShape) -> int:
    """Return the context that the trace needs, in steps of LENGTH_STEP, at most the model's own."""
    steps = -(-longest_request(trace) // LENGTH_STEP)
    return min(steps * LENGTH_STEP, model.max_position_embeddings)


def too_long(trace: Trace, length: int) -> int:
    """Return how many requests do not fit a context of `length` tokens."""
    return int(((trace.columns.prompt_tokens + trace.columns.output_tokens) > length).sum())
