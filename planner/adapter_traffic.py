"""Each adapter's share of the traffic and what its requests got, from one simulated run."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from sim.result import SimResult
from traces.metrics import Slo, metrics


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterRow:
    """One adapter, `place` 1 the most asked for. NaN where no request came so far.

    hit_rate: share of its requests that never waited for its load. meets: its own requests meet the SLO as often as is promised of all.
    """

    adapter: str
    rank: int | None
    place: int
    requests: int
    share: float
    cumulative_share: float
    hit_rate: float
    load_wait_mean_s: float
    ttft_p99_s: float
    tpot_p99_s: float
    slo_attainment: float
    meets: bool

    def to_json(self) -> dict[str, Any]:
        """Return the JSON form; NaN stays."""
        return asdict(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterTraffic:
    """All adapters, the most asked for first, and what the GPUs did for them."""

    rows: tuple[AdapterRow, ...]
    loads: int
    evictions: int
    hit_rate: float
    missing: int

    def to_json(self) -> dict[str, Any]:
        """Return the JSON form; NaN stays."""
        return {
            "rows": [row.to_json() for row in self.rows],
            "loads": self.loads,
            "evictions": self.evictions,
            "hit_rate": self.hit_rate,
            "missing": self.missing,
        }


def adapter_traffic(result: SimResult, slo: Slo) -> AdapterTraffic:
    """Break a simulated run down by adapter. missing: adapters whose requests miss the SLO more often than is promised."""
    names = np.array(["" if name is None else name for name in result.columns["adapter"]], dtype=object)
    rows: list[AdapterRow] = []
    asked = names != ""
    unique, inverse, counts = np.unique(names[asked].astype(str), return_inverse=True, return_counts=True)
    total, seen = int(counts.sum()), 0
    positions = np.flatnonzero(asked)
    for place, index in enumerate(np.argsort(-counts, kind="stable").tolist(), start=1):
        mine = positions[inverse == index]
        seen += len(mine)
        rows.append(_row(result, slo, mine, str(unique[index]), place, len(mine) / total, seen / total))
    return AdapterTraffic(
        rows=tuple(rows),
        loads=result.adapter_loads,
        evictions=int(result.facts["evictions"]),
        hit_rate=float(result.metrics["adapter_hit_rate"]),
        missing=sum(not row.meets for row in rows),
    )


def _row(
    result: SimResult,
    slo: Slo,
    mine: np.ndarray[Any, Any],
    name: str,
    place: int,
    share: float,
    cumulative: float,
) -> AdapterRow:
    columns = {column: values[mine] for column, values in result.columns.items()}
    found = metrics(columns, slo)
    waits_s = np.asarray(columns["load_wait_s"], dtype=float)
    known_s = waits_s[~np.isnan(waits_s)]
    rank = columns["rank"][0]
    return AdapterRow(
        adapter=name,
        rank=None if rank is None else int(rank),
        place=place,
        requests=len(mine),
        share=share,
        cumulative_share=cumulative,
        hit_rate=found["adapter_hit_rate"],
        load_wait_mean_s=float(known_s.mean()) if len(known_s) else float("nan"),
        ttft_p99_s=found["ttft_p99_s"],
        tpot_p99_s=found["tpot_p99_s"],
        slo_attainment=found["slo_attainment"],
        meets=found["slo_attainment"] >= slo.attainment,
    )
