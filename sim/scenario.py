"""What happens to a cluster while it serves: replicas that fail and come back, and traffic that swells.

    {"failures": [{"replica": 1, "at_s": 20, "recovers_at_s": 50}],
     "rates": [{"at_s": 0, "scale": 1}, {"at_s": 60, "scale": 3}],
     "bursts": [{"at_s": 30, "duration_s": 5, "scale": 4}]}

A replica that fails loses what it had; its unfinished requests go to the others from the start, as `engine/replicas.py` sends them, and
it comes back empty. Rates say how many times faster the trace's arrivals come, straight between their points and level before the first
and behind the last; a burst multiplies that while it lasts.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from engine.errors import UserError
from engine.json_files import read_json
from traces import Trace

LEAST_SCALE = 1e-3


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """A replica that dies at an instant; recovers_at_s: when it serves again, None: never."""

    replica: int
    at_s: float
    recovers_at_s: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class RatePoint:
    """From here on, straight to the next point, arrivals come `scale` times as fast as in the trace."""

    at_s: float
    scale: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Burst:
    """Arrivals come `scale` times as fast again for a while."""

    at_s: float
    duration_s: float
    scale: float


Item = TypeVar("Item", Failure, RatePoint, Burst)


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """Failures, and how fast the traffic comes."""

    failures: tuple[Failure, ...] = ()
    rates: tuple[RatePoint, ...] = ()
    bursts: tuple[Burst, ...] = ()

    @classmethod
    def load(cls, path: Path) -> Scenario:
        """Read a JSON file. Raises UserError naming the place."""
        return cls.from_json(read_json(path), str(path))

    @classmethod
    def from_json(cls, data: Any, source: str = "scenario") -> Scenario:
        """Build from the JSON form. Raises UserError naming the place."""
        known = {item.name for item in fields(cls)}
        if not isinstance(data, dict) or set(data) - known:
            raise UserError(f"{source}: a scenario must be an object of {', '.join(sorted(known))}")
        scenario = cls(
            failures=tuple(_items(Failure, data.get("failures", []), f"{source}: failures")),
            rates=tuple(_items(RatePoint, data.get("rates", []), f"{source}: rates")),
            bursts=tuple(_items(Burst, data.get("bursts", []), f"{source}: bursts")),
        )
        scenario._check(source)
        return scenario

    def _check(self, source: str) -> None:
        scales = [(f"rates[{index}]", point.scale) for index, point in enumerate(self.rates)]
        scales += [(f"bursts[{index}]", burst.scale) for index, burst in enumerate(self.bursts)]
        for place, scale in scales:
            if scale < LEAST_SCALE:
                raise UserError(f"{source}: {place}: scale={scale} must be at least {LEAST_SCALE}")
        for index, (one, other) in enumerate(zip(self.rates, self.rates[1:], strict=False)):
            if other.at_s < one.at_s:
                raise UserError(
                    f"{source}: rates[{index + 1}]: at_s={other.at_s} is before the point ahead of it"
                )
        for index, failure in enumerate(self.failures):
            if failure.recovers_at_s is not None and failure.recovers_at_s <= failure.at_s:
                raise UserError(
                    f"{source}: failures[{index}]: recovers_at_s={failure.recovers_at_s} must be after at_s={failure.at_s}"
                )

    def check_replicas(self, replicas: int) -> None:
        """Raise UserError where a failure is of a replica that is not there or down already, or leaves none."""
        down: set[int] = set()
        for at_s, fails, replica in self.events():
            if replica >= replicas:
                raise UserError(f"scenario: failures: replica={replica} of {replicas}: they count from 0")
            if fails and replica in down:
                raise UserError(f"scenario: failures: replica {replica} is down already at {at_s:g} s")
            (down.add if fails else down.discard)(replica)
            if len(down) == replicas:
                raise UserError(f"scenario: failures: no replica is left at {at_s:g} s")

    def events(self) -> list[tuple[float, bool, int]]:
        """Return (instant, whether it fails, replica) in order; what comes back at an instant does before another fails."""
        found = []
        for failure in self.failures:
            found.append((failure.at_s, True, failure.replica))
            if failure.recovers_at_s is not None:
                found.append((failure.recovers_at_s, False, failure.replica))
        return sorted(found)

    def arrivals_of(self, trace: Trace) -> Trace:
        """Return the trace at the scenario's pace: the same requests in the same order, at other instants."""
        if not self.rates and not self.bursts:
            return trace
        columns = replace(trace.columns, arrival_s=self._warped(trace.columns.arrival_s), raw_arrival_s=None)
        return Trace.from_columns(columns, trace.name)

    def _warped(
        self, trace_s: np.ndarray[Any, np.dtype[np.float64]]
    ) -> np.ndarray[Any, np.dtype[np.float64]]:
        """Return when as much of the trace has passed: the integral of the pace, solved for its end."""
        pieces = list(self._pieces())
        passed = 0.0
        warped = np.empty_like(trace_s)
        for start_s, end_s, pace, slope in pieces:
            span_s = end_s - start_s
            until = math.inf if span_s == math.inf else passed + span_s * (pace + slope * span_s / 2)
            rows = (trace_s >= passed) & (trace_s < until)
            ahead = trace_s[rows] - passed
            if slope:  # pace · x + slope / 2 · x² = ahead, in the form that does not cancel
                warped[rows] = start_s + 2 * ahead / (pace + np.sqrt(pace * pace + 2 * slope * ahead))
            else:
                warped[rows] = start_s + ahead / pace
            passed = until
        return warped

    def _pieces(self) -> Iterator[tuple[float, float, float, float]]:
        """Yield (start, end, pace at the start, its slope), one behind the other from 0 on; the last is level."""
        edges = {0.0, *(point.at_s for point in self.rates)}
        edges |= {edge for burst in self.bursts for edge in (burst.at_s, burst.at_s + burst.duration_s)}
        ordered = sorted(edges)
        for start_s, end_s in zip(ordered, [*ordered[1:], math.inf], strict=True):
            factor = math.prod(
                burst.scale for burst in self.bursts if burst.at_s <= start_s < burst.at_s + burst.duration_s
            )
            scale = self._scale_from(start_s)
            slope = 0.0
            if end_s < math.inf:
                slope = (self._scale_until(end_s) - scale) / (end_s - start_s)
            yield start_s, end_s, factor * scale, factor * slope

    def _scale_from(self, at_s: float) -> float:
        """Return the rates' scale just behind an instant."""
        before = [point for point in self.rates if point.at_s <= at_s]
        after = [point for point in self.rates if point.at_s > at_s]
        if not before:
            return self.rates[0].scale if self.rates else 1.0
        return _between(before[-1], after[0], at_s) if after else before[-1].scale

    def _scale_until(self, at_s: float) -> float:
        """Return the rates' scale just ahead of an instant."""
        before = [point for point in self.rates if point.at_s < at_s]
        after = [point for point in self.rates if point.at_s >= at_s]
        if not before:
            return self.rates[0].scale if self.rates else 1.0
        return _between(before[-1], after[0], at_s) if after else before[-1].scale


def _between(one: RatePoint, other: RatePoint, at_s: float) -> float:
    share = (at_s - one.at_s) / (other.at_s - one.at_s)
    return one.scale + share * (other.scale - one.scale)


def _items(kind: type[Item], data: Any, place: str) -> Iterator[Item]:
    if not isinstance(data, list):
        raise UserError(f"{place} must be a list")
    names = [item.name for item in fields(kind)]
    for index, row in enumerate(data):
        here = f"{place}[{index}]"
        if not isinstance(row, dict) or set(row) - set(names):
            raise UserError(f"{here} must be an object of {', '.join(names)}")
        values: dict[str, Any] = {}
        for name in names:
            value: Any = row.get(name)
            if value is None and name == "recovers_at_s":
                continue
            whole = name == "replica"
            number = isinstance(value, int if whole else (int, float)) and not isinstance(value, bool)
            if not number or not math.isfinite(value) or value < 0:
                raise UserError(f"{here}: {name}={value!r} must be a {'whole ' * whole}number of at least 0")
            values[name] = value
        yield kind(**values)
