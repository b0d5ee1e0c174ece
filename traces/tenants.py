"""Real tenants' traffic over time, for rules R3 and R3-gen: which client was how busy, and how bursty, in which ten minutes.

Source: ServeGen's client rates (arXiv:2505.09999), CSV with client_id, window_start_s, rate_rps and, for R3-gen, iat_family and iat_shape.
"""

from __future__ import annotations

import math
import os
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, cast, get_args

import numpy as np

from traces.columns import Floats, Ints
from traces.errors import TraceError
from traces.importers import csv_records, number_of

WINDOW_S = 600
_FIELDS = {"client": "client_id", "window": "window_start_s", "rate": "rate_rps"}

Family = Literal["Gamma", "Weibull"]


@dataclass(frozen=True, slots=True)
class Gaps:
    """How a client's gaps between requests are distributed, their mean apart."""

    family: Family
    shape: float

    def draw_s(self, mean_s: float, count: int, rng: np.random.Generator) -> Floats:
        """Draw gaps of this mean."""
        if self.family == "Gamma":
            return rng.gamma(self.shape, mean_s / self.shape, count)
        return mean_s / math.gamma(1 + 1 / self.shape) * rng.weibull(self.shape, count)

    def left_s(self, mean_s: float, rng: np.random.Generator) -> float:
        """Draw what is left of the gap that goes on at an instant: gaps as likely as they are long, a uniform share of it."""
        if self.family == "Gamma":
            gap_s = rng.gamma(self.shape + 1, mean_s / self.shape)
        else:
            scale_s = mean_s / math.gamma(1 + 1 / self.shape)
            gap_s = scale_s * rng.gamma(1 + 1 / self.shape) ** (1 / self.shape)
        return float(gap_s * rng.random())


@dataclass(frozen=True, slots=True, eq=False)
class Tenants:
    """Clients by window. places: of each client in descending order of its summed rate, ties by client id. shapes: of gaps, as clients;
    None where the file does not tell them.
    """

    source: str
    clients: dict[int, Ints]  # window start -> ids, ascending
    rates_rps: dict[int, Floats]
    places: dict[int, int]
    shapes: dict[int, tuple[Gaps, ...]] | None = None

    def window(self, instant_s: float) -> int:
        """Return the window of an instant. Raises TraceError where nobody was there."""
        start = WINDOW_S * int(instant_s // WINDOW_S)
        if start not in self.clients:
            raise TraceError(
                f"{self.source}: has no clients at {instant_s:g} s, in the window from {start} s"
            )
        return start

    def gaps(self, window: int) -> tuple[Gaps, ...]:
        """Return how the gaps of a window's clients are distributed. Raises TraceError where the file does not tell."""
        if self.shapes is None:
            raise TraceError(f"{self.source}: rule R3-gen needs its columns iat_family and iat_shape")
        return self.shapes[window]

    def mean_rates(self, begins_s: int, ends_s: int) -> dict[int, float]:
        """Return each client's mean rate over windows that begin in a span."""
        totals: dict[int, float] = defaultdict(float)
        for window in range(begins_s, ends_s, WINDOW_S):
            if window in self.clients:
                for client, rate_rps in zip(self.clients[window], self.rates_rps[window], strict=True):
                    totals[int(client)] += float(rate_rps) * WINDOW_S / (ends_s - begins_s)
        return totals


def load_tenants(path: str | os.PathLike[str]) -> Tenants:
    """Read client rates, plain or gzip. Raises TraceError naming line and column."""
    rows: dict[int, dict[int, tuple[float, Gaps | None]]] = defaultdict(dict)
    totals: dict[int, float] = defaultdict(float)
    for place, row in csv_records(path, _FIELDS):
        client, window = (int(number_of(place, name, row[name])) for name in ("client_id", "window_start_s"))
        rate_rps = number_of(place, "rate_rps", row["rate_rps"])
        if rate_rps < 0 or window % WINDOW_S or client < 0 or window < 0:
            wrong = "rate_rps" if rate_rps < 0 else "client_id" if client < 0 else "window_start_s"
            raise TraceError(f"{place}: {wrong}={row[wrong]} must be at least 0, windows every {WINDOW_S} s")
        rows[window][client] = (rate_rps, _gaps(place, row))
        totals[client] += rate_rps
    if not rows:
        raise TraceError(f"{path}: has no rows")
    order = sorted(totals, key=lambda client: (-totals[client], client))
    shapes = {window: tuple(found[c][1] for c in sorted(found)) for window, found in rows.items()}
    told = all(gaps is not None for of_window in shapes.values() for gaps in of_window)
    return Tenants(
        source=str(path),
        clients={window: np.array(sorted(found)) for window, found in rows.items()},
        rates_rps={window: np.array([found[c][0] for c in sorted(found)]) for window, found in rows.items()},
        places={client: place for place, client in enumerate(order)},
        shapes=cast(dict[int, tuple[Gaps, ...]], shapes) if told else None,
    )


def _gaps(place: str, row: Mapping[str, str | None]) -> Gaps | None:
    if not row.get("iat_family"):
        return None
    family, shape = row["iat_family"], number_of(place, "iat_shape", row.get("iat_shape"))
    if family not in get_args(Family):
        raise TraceError(f"{place}: iat_family must be one of {', '.join(get_args(Family))}, not {family}")
    if not 0.01 <= shape <= 1e6:
        raise TraceError(f"{place}: iat_shape={shape:g} must be in 0.01..1000000")
    return Gaps(cast(Family, family), shape)
