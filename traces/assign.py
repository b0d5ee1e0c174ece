"""Rules that attach an adapter and a rank to every request, bit for bit the same in any language.

No public LLM-serving trace carries LoRA adapter ids, so they are drawn: each request hashes (seed, rule, key)
to a number in [0, 1) and picks an adapter by its popularity. The definitions are those of the trace
collection that the project is tested against (its section 4); they use SHA-256 and sequential float64 sums,
and no library generator.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, cast, get_args

import numpy as np

from traces.columns import BASE_MODEL, Floats, Ints, TraceColumns
from traces.errors import TraceError
from traces.tenants import WINDOW_S, Tenants
from traces.trace import Trace

Rule = Literal["R1", "R1-slora", "R2", "R3", "R3-gen"]
RankOrder = Literal["interleave", "hot-small", "hot-large", "hash"]

RANK_MIXES: dict[str, tuple[int, ...]] = {
    "S1": (8,),  # S1, S2 and S4 are S-LoRA's settings
    "S2": (8, 16, 32, 64),
    "S4": (16, 32, 64),
    "WIDE": (8, 16, 32, 64, 128),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Assignment:
    """How adapters and ranks are drawn.

    R1: independent by request, popularity Zipf `zipf_s` over `adapters`. R1-slora: independent, popularity
    P(index < k) = (k / n)^alpha, uniform at alpha 1. R2: sticky by session, so that prefix reuse survives. R3: by real tenants' rates at the
    time of the request, `offset_s` into theirs; tenants share adapters where there are fewer, and have several, Zipf `zipf_s`, where there are more.
    R3-gen: the same of traffic that the tenants' own statistics make (`traces.tenant_traffic`).
    `base_share` of the requests use the base model alone.
    """

    rule: Rule = "R1"
    adapters: int = 100
    zipf_s: float = 0.92
    alpha: float = 1.0
    rank_mix: tuple[int, ...] = RANK_MIXES["WIDE"]
    rank_order: RankOrder = "interleave"
    base_share: float = 0.0
    offset_s: float = 36_000.0
    seed: int = 20240607

    def __post_init__(self) -> None:
        _require(self.rule in get_args(Rule), "rule", self.rule, f"one of {', '.join(get_args(Rule))}")
        _require(1 <= self.adapters <= 10**6, "adapters", self.adapters, "in 1..1000000")
        _require(0 <= self.zipf_s <= 10, "zipf_s", self.zipf_s, "in 0..10")
        _require(0.001 <= self.alpha <= 1000, "alpha", self.alpha, "in 0.001..1000")
        _require(len(self.rank_mix) > 0, "rank_mix", self.rank_mix, "at least one rank")
        _require(
            all(1 <= rank <= 256 for rank in self.rank_mix), "rank_mix", self.rank_mix, "ranks in 1..256"
        )
        orders = ", ".join(get_args(RankOrder))
        _require(self.rank_order in get_args(RankOrder), "rank_order", self.rank_order, f"one of {orders}")
        _require(0 <= self.offset_s <= 1e9, "offset_s", self.offset_s, "in 0..1e9")
        _require(0 <= self.base_share <= 1, "base_share", self.base_share, "in 0..1")


def assign(trace: Trace, how: Assignment, tenants: Tenants | None = None) -> Trace:
    """Return the trace with adapters and ranks drawn anew. tenants: for rule R3.

    A request's row number j, which keys R1 and the base share, is its id where all ids are whole numbers (the
    importers give the row in the source file, before any row is dropped), else its position. Raises
    TraceError for R2 on a trace that has no sessions, and for R3 without tenants or where it is longer than theirs.
    """
    if how.rule == "R3-gen":
        raise TraceError(
            "rule R3-gen makes arrivals and lengths too: it is for synth, not assign; R3 assigns"
        )
    columns = trace.columns
    rows = row_numbers(columns)
    if how.rule == "R2":
        drawn = _sticky(columns, rows, how, trace.name)
    elif how.rule == "R3":
        if tenants is None:
            raise TraceError(f"{trace.name}: rule R3 needs the rates of tenants")
        drawn = _by_tenant(columns, rows, how, tenants)
    else:
        drawn = _popular(how, _hashed(how.seed, how.rule, rows))
    if how.base_share > 0:
        drawn = np.where(_hashed(how.seed, "base", rows) < how.base_share, BASE_MODEL, drawn)
    kept, index = np.unique(drawn[drawn != BASE_MODEL], return_inverse=True)
    adapter_index = np.full(len(rows), BASE_MODEL, dtype=np.int64)
    adapter_index[drawn != BASE_MODEL] = index
    assigned = replace(
        columns,
        adapter_index=adapter_index,
        adapter_names=tuple(adapter_name(i) for i in kept.tolist()),
        adapter_ranks=tuple(rank_of(how, i) for i in kept.tolist()),
    )
    return Trace.from_columns(assigned, trace.name)


def u(seed: int, rule: str, key: object) -> float:
    """Return the first 8 bytes, big-endian, of SHA-256("seed:rule:key"), divided by 2^64."""
    digest = hashlib.sha256(f"{seed}:{rule}:{key}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def zipf(count: int, s: float) -> Floats:
    """Return the weights (i + 1)^-s, i = 0..count-1: index 0 is the most popular."""
    return np.array([float(i + 1) ** -s for i in range(count)])


def cdf(weights: Sequence[float] | Floats) -> Floats:
    """Return the running float64 sum of w_i / Σw in index order."""
    w = np.asarray(weights, dtype=np.float64)
    total = np.cumsum(w)[-1]  # cumsum adds one by one; np.sum adds in pairs and differs in the last bit
    return np.cumsum(w / total)


def pick(running: Floats, x: Floats) -> Ints:
    """Return, for each x, the first i with running[i] > x, else the last."""
    return np.minimum(np.searchsorted(running, x, side="right"), len(running) - 1)


def adapter_name(index: int) -> str:
    """Return the id of the adapter of an index: a0000 is the most popular."""
    return f"a{index:04d}"


def rank_of(how: Assignment, index: int) -> int:
    """Return the rank of the adapter of an index.

    interleave: the mix over and over. hot-small and hot-large: the mix ascending or descending over equal
    blocks of indices. hash: drawn by the index alone.
    """
    mix, size = how.rank_mix, len(how.rank_mix)
    if how.rank_order == "interleave":
        return mix[index % size]
    if how.rank_order == "hash":
        return mix[min(math.floor(size * u(how.seed, "rank", index)), size - 1)]
    return sorted(mix, reverse=how.rank_order == "hot-large")[index * size // how.adapters]


def row_numbers(columns: TraceColumns) -> Sequence[int]:
    """Return each request's row in its source: its id where all ids are whole numbers, else its position."""
    if all(isinstance(id_, int) for id_ in columns.ids):
        return cast(Sequence[int], columns.ids)
    return range(len(columns.ids))


def _hashed(seed: int, rule: str, keys: Iterable[object]) -> Floats:
    return np.fromiter((u(seed, rule, key) for key in keys), dtype=np.float64)


def _popular(how: Assignment, x: Floats) -> Ints:
    if how.rule == "R1-slora":
        scaled = [math.floor(how.adapters * value ** (1 / how.alpha)) for value in x.tolist()]
        return np.minimum(np.array(scaled, dtype=np.int64), how.adapters - 1)
    return pick(cdf(zipf(how.adapters, how.zipf_s)), x)


def _sticky(columns: TraceColumns, rows: Sequence[int], how: Assignment, name: str) -> Ints:
    if columns.sessions is None:
        raise TraceError(f"{name}: rule R2 is sticky by session, but no request has a session; use R1")
    known: dict[str, float] = {}
    x = np.empty(len(rows))
    for place, (session, row) in enumerate(zip(columns.sessions, rows, strict=True)):
        if session is None:
            x[place] = u(how.seed, "R2", f"solo:{row}")
            continue
        if session not in known:
            known[session] = u(how.seed, "R2", session)
        x[place] = known[session]
    return _popular(how, x)


def _by_tenant(columns: TraceColumns, rows: Sequence[int], how: Assignment, tenants: Tenants) -> Ints:
    """Draw a tenant of each request's window, window by window, and an adapter of the tenant's."""
    instants_s = how.offset_s + (columns.arrival_s - columns.arrival_s[0])
    x = _hashed(how.seed, "R3", rows)
    places = np.empty(len(rows), dtype=np.int64)
    starts = WINDOW_S * (instants_s // WINDOW_S)
    for start in np.unique(starts).tolist():
        window = tenants.window(start)
        here = starts == start
        known = np.array([tenants.places[client] for client in tenants.clients[window].tolist()])
        places[here] = known[pick(cdf(tenants.rates_rps[window]), x[here])]
    return adapters_of(places, rows, how, tenants)


def adapters_of(places: Ints, rows: Sequence[int], how: Assignment, tenants: Tenants) -> Ints:
    """Return the adapters of requests of tenants given by their places: tenants share adapters where there are fewer, and draw among several
    of their own where there are more.
    """
    each = max(1, -(-how.adapters // len(tenants.places)))  # adapters of a tenant
    if each > 1:
        own = _hashed(how.seed, how.rule, (f"{row}:sub" for row in rows))
        places = places * each + pick(cdf(zipf(each, how.zipf_s)), own)
    return places % how.adapters


def _require(holds: bool, field: str, value: object, bound: str) -> None:
    if not holds:
        raise TraceError(f"{field} must be {bound}, not {value}")
