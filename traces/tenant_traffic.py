"""Traffic of real tenants, arrivals and lengths too: rule R3-gen.

Each client sends in each ten minutes by a renewal process of its own, Gamma or Weibull gaps with the shape that was fitted to it, at its own rate
times one factor that brings all together to the rate that is asked for: who is busy when, and how bursty each is, stays; the rule R3, which
overlays tenants on another trace's arrivals, loses the latter. A process is met in its midst: its first gap is what is left of one (drawn by
length, then a uniform share), so that the expected number of requests is rate times time whatever the shape.

Lengths are drawn from the client's densities of the six hours, prompt and output independently: no joint data exist. Where a client has
none for these hours, from its latest earlier ones, else from all clients of these hours, weighted by their rates.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from traces.assign import Assignment, adapter_name, adapters_of, rank_of
from traces.columns import Floats, Ints, TraceColumns
from traces.errors import TraceError
from traces.native import json_lines
from traces.tenants import WINDOW_S, Gaps, Tenants
from traces.trace import Trace

LENGTHS_WINDOW_S = 6 * 3600
ARRIVALS, PROMPTS, OUTPUTS = 10, 11, 12  # numbers of the random streams
MOST_REQUESTS = 10**8
_FIELDS = ("input_tokens", "output_tokens")


@dataclass(frozen=True, slots=True, eq=False)
class Density:
    """Lengths in tokens and the running sum of their probabilities."""

    tokens: Ints
    running: Floats

    @classmethod
    def of(cls, tokens: Ints, weights: Floats) -> Density:
        """Build from weights that need not sum to 1."""
        return cls(tokens, np.cumsum(weights / weights.sum()))

    def draw(self, count: int, rng: np.random.Generator) -> Ints:
        """Draw lengths; a length of 0 is taken as 1."""
        place = np.searchsorted(self.running, rng.random(count), side="right")
        lengths: Ints = np.maximum(1, self.tokens[np.minimum(place, len(self.tokens) - 1)])
        return lengths

    @property
    def weights(self) -> Floats:
        """The probabilities."""
        return np.diff(self.running, prepend=0.0)


Lengths = tuple[Density, Density]  # of prompts, of outputs


@dataclass(frozen=True, slots=True, eq=False)
class TenantLengths:
    """Densities of lengths by client and by the start of six hours."""

    source: str
    known: Mapping[int, Mapping[int, Lengths]]
    pools: dict[int, Lengths] = field(default_factory=dict)  # worked out when they are wanted

    def of(self, client: int, instant_s: float, tenants: Tenants) -> Lengths:
        """Return a client's densities at an instant, or what stands for them. Raises TraceError where nobody's are known."""
        window = LENGTHS_WINDOW_S * int(instant_s // LENGTHS_WINDOW_S)
        earlier = [start for start in self.known.get(client, {}) if start <= window]
        if earlier:
            return self.known[client][max(earlier)]
        if window not in self.pools:
            self.pools[window] = self._pool(window, tenants)
        return self.pools[window]

    def _pool(self, window: int, tenants: Tenants) -> Lengths:
        weights = {
            client: rate_rps
            for client, rate_rps in tenants.mean_rates(window, window + LENGTHS_WINDOW_S).items()
            if window in self.known.get(client, {}) and rate_rps > 0
        }
        if not weights:
            raise TraceError(f"{self.source}: knows nobody's lengths in the six hours from {window} s")
        prompts, outputs = (
            Density.of(
                np.concatenate([self.known[client][window][which].tokens for client in weights]),
                np.concatenate(
                    [rate * self.known[client][window][which].weights for client, rate in weights.items()]
                ),
            )
            for which in range(2)
        )
        return prompts, outputs


def load_tenant_lengths(path: str | os.PathLike[str]) -> TenantLengths:
    """Read ServeGen's densities of lengths, JSONL, plain or gzip. Raises TraceError naming the line."""
    known: dict[int, dict[int, Lengths]] = defaultdict(dict)
    for number, row in json_lines(path):
        place = f"{path}:{number}"
        client, window = (_whole(place, row, name) for name in ("client_id", "window_start_s"))
        if window % LENGTHS_WINDOW_S:
            raise TraceError(
                f"{place}: window_start_s={window} must be a multiple of {LENGTHS_WINDOW_S} s, six hours"
            )
        prompts, outputs = (_density(place, row, name) for name in _FIELDS)
        known[client][window] = (prompts, outputs)
    if not known:
        raise TraceError(f"{path}: has no rows")
    return TenantLengths(str(path), known)


def _whole(place: str, row: Mapping[str, Any], name: str) -> int:
    value = row.get(name)
    if type(value) is not int or value < 0:
        raise TraceError(f"{place}: {name} must be a whole number of at least 0, not {str(value)[:60]}")
    return value


def _density(place: str, row: Mapping[str, Any], name: str) -> Density:
    given = row.get(name)
    try:
        if not isinstance(given, dict):
            raise ValueError
        tokens = np.array([int(length) for length in given], dtype=np.int64)
        weights = np.array(list(given.values()), dtype=np.float64)
        if not (len(tokens) and tokens.min() >= 0 and weights.min() >= 0 and 0 < weights.sum() < 1e300):
            raise ValueError
    except (ValueError, TypeError, OverflowError):
        raise TraceError(
            f"{place}: {name} must be an object of lengths in tokens and probabilities"
        ) from None
    return Density.of(tokens, weights)


def synthesize_tenants(
    tenants: Tenants,
    lengths: TenantLengths,
    how: Assignment,
    *,
    rate_rps: float,
    duration_s: float,
    requests: int | None = None,
) -> Trace:
    """Generate tenants' traffic from `how.offset_s` of their time on, each request with its tenant's adapter; equal arguments, equal traces.

    rate_rps: the expected mean over `duration_s`. requests: stop at so many instead of after duration_s, which is then only where the mean is
    taken. The row number is the id. Raises TraceError for numbers out of bounds, a window without clients, or gaps' shapes that are not told.
    """
    if not 0 < rate_rps <= 1e6:
        raise TraceError(f"rate must be above 0 and at most 1000000 requests a second, not {rate_rps}")
    if not (duration_s > 0 and rate_rps * duration_s <= MOST_REQUESTS):
        raise TraceError(f"requests must be in 1..{MOST_REQUESTS}, not {rate_rps * duration_s:g}")
    ends_at_s = how.offset_s + duration_s
    factor = rate_rps * duration_s / _expected(tenants, how.offset_s, ends_at_s)
    parts: list[tuple[Floats, Ints, Ints, Ints]] = []
    count = 0
    begins_s = how.offset_s
    while begins_s < ends_at_s if requests is None else count < requests:
        window = tenants.window(begins_s)
        until_s = window + WINDOW_S if requests is not None else min(window + WINDOW_S, ends_at_s)
        parts.append(_window_rows(tenants, lengths, how.seed, factor, window, (begins_s, until_s)))
        count += len(parts[-1][0])
        begins_s = float(window + WINDOW_S)
    arrivals_s, places, prompts, outputs = (
        np.concatenate([part[column] for part in parts])[:requests] for column in range(4)
    )
    if not len(arrivals_s):
        raise TraceError(f"{tenants.source}: no request arrives in {duration_s:g} s from {how.offset_s:g} s")
    drawn = adapters_of(places, range(len(places)), how, tenants)
    kept, index = np.unique(drawn, return_inverse=True)
    columns = TraceColumns(
        ids=range(len(places)),
        arrival_s=(arrivals_s - how.offset_s).round(6),
        prompt_tokens=prompts,
        output_tokens=outputs,
        adapter_index=index.astype(np.int64),
        adapter_names=tuple(adapter_name(place) for place in kept.tolist()),
        adapter_ranks=tuple(rank_of(how, place) for place in kept.tolist()),
    )
    return Trace.from_columns(columns, "tenants")


def _expected(tenants: Tenants, begins_s: float, ends_s: float) -> float:
    """Return the expected number of requests at the tenants' own rates."""
    expected, at_s = 0.0, begins_s
    while at_s < ends_s:
        window = tenants.window(at_s)
        expected += float(tenants.rates_rps[window].sum()) * (min(window + WINDOW_S, ends_s) - at_s)
        at_s = float(window + WINDOW_S)
    if not expected > 0:
        raise TraceError(f"{tenants.source}: nobody sends anything from {begins_s:g} to {ends_s:g} s")
    return expected


def _window_rows(
    tenants: Tenants,
    lengths: TenantLengths,
    seed: int,
    factor: float,
    window: int,
    span_s: tuple[float, float],
) -> tuple[Floats, Ints, Ints, Ints]:
    """Return arrivals, tenants' places and lengths of one window, in order of time, ties by client."""
    found: list[tuple[Floats, Ints, Ints, Ints]] = []
    clients = tenants.clients[window].tolist()
    for client, rate_rps, gaps in zip(
        clients, tenants.rates_rps[window].tolist(), tenants.gaps(window), strict=True
    ):
        if not rate_rps > 0:
            continue
        arrivals, prompts, outputs = (
            np.random.default_rng([seed, stream, client, window]) for stream in (ARRIVALS, PROMPTS, OUTPUTS)
        )
        instants_s = renewals_s(gaps, 1 / (factor * rate_rps), span_s, arrivals)
        count = len(instants_s)
        if count:
            prompt, output = lengths.of(client, window, tenants)
            place = np.full(count, tenants.places[client], dtype=np.int64)
            found.append((instants_s, place, prompt.draw(count, prompts), output.draw(count, outputs)))
    if not found:
        none = np.empty(0, dtype=np.int64)
        return np.empty(0), none, none, none
    instants_s, places, prompt_tokens, output_tokens = (
        np.concatenate([part[column] for part in found]) for column in range(4)
    )
    order = np.argsort(instants_s, kind="stable")
    return instants_s[order], places[order], prompt_tokens[order], output_tokens[order]


def renewals_s(gaps: Gaps, mean_s: float, span_s: tuple[float, float], rng: np.random.Generator) -> Floats:
    """Draw the instants in a span of a renewal process that has gone on for long, with gaps of a shape and a mean."""
    begins_s, ends_s = span_s
    drawn = [np.array([begins_s + gaps.left_s(mean_s, rng)])]
    while drawn[-1][-1] < ends_s:
        wanted = 16 + int(1.2 * (ends_s - drawn[-1][-1]) / mean_s)
        drawn.append(drawn[-1][-1] + np.cumsum(gaps.draw_s(mean_s, min(wanted, 10**6), rng)))
    instants_s: Floats = np.concatenate(drawn)
    return instants_s[instants_s < ends_s]
