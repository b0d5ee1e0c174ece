"""Real tenants' traffic over time, for rule R3: which client was how busy in which ten minutes.

Source: ServeGen's client rates (arXiv:2505.09999), CSV with client_id, window_start_s, rate_rps.
"""

from __future__ import annotations

import os
from collections import defaultdict
from dataclasses import dataclass

import numpy as np

from traces.columns import Floats, Ints
from traces.errors import TraceError
from traces.importers import csv_records, number_of

WINDOW_S = 600
_FIELDS = {"client": "client_id", "window": "window_start_s", "rate": "rate_rps"}


@dataclass(frozen=True, slots=True, eq=False)
class Tenants:
    """Clients by window. places: of each client in descending order of its summed rate, ties by client id."""

    source: str
    clients: dict[int, Ints]  # window start -> ids, ascending
    rates_rps: dict[int, Floats]
    places: dict[int, int]

    def window(self, instant_s: float) -> int:
        """Return the window of an instant. Raises TraceError where nobody was there."""
        start = WINDOW_S * int(instant_s // WINDOW_S)
        if start not in self.clients:
            raise TraceError(
                f"{self.source}: has no clients at {instant_s:g} s, in the window from {start} s"
            )
        return start


def load_tenants(path: str | os.PathLike[str]) -> Tenants:
    """Read client rates, plain or gzip. Raises TraceError naming line and column."""
    rows: dict[int, dict[int, float]] = defaultdict(dict)
    totals: dict[int, float] = defaultdict(float)
    for place, row in csv_records(path, _FIELDS):
        client, window = (int(number_of(place, name, row[name])) for name in ("client_id", "window_start_s"))
        rate_rps = number_of(place, "rate_rps", row["rate_rps"])
        if rate_rps < 0 or window % WINDOW_S:
            wrong = "rate_rps" if rate_rps < 0 else "window_start_s"
            raise TraceError(f"{place}: {wrong}={row[wrong]} must be at least 0, windows every {WINDOW_S} s")
        rows[window][client] = rate_rps
        totals[client] += rate_rps
    if not rows:
        raise TraceError(f"{path}: has no rows")
    order = sorted(totals, key=lambda client: (-totals[client], client))
    return Tenants(
        source=str(path),
        clients={window: np.array(sorted(found)) for window, found in rows.items()},
        rates_rps={window: np.array([found[c] for c in sorted(found)]) for window, found in rows.items()},
        places={client: place for place, client in enumerate(order)},
    )
