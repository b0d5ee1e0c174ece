"""Rules that attach an adapter and a rank to every request, bit for bit the same in any language.

No public LLM-serving trace carries LoRA adapter ids, so they are drawn: each request hashes (seed, rule, key)
to a number in [0, 1) and picks an adapter by its popularity. The definitions are those of the trace
collection that the project is tested against (its section 4); they use SHA-256 and sequential float64 sums,
and no library generator.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

import numpy as np

from traces.columns import BASE_MODEL, Floats, Ints, TraceColumns
from traces.errors import TraceError
from traces.tenants import Tenants
from traces.trace import Trace

Rule = Literal["R1", "R1-slora", "R2", "R3"]
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
    columns = trace.columns
    rows = row_numbers(columns)
    if how.rule == "R2":
        drawn = _sticky(columns, rows, how, trace.name)
    elif how.rule == "R3":
        if tenants is None:
            raise TraceError(f"{trace.name}: rule R3 needs the rates of tenants")
        drawn = _by_tenant(columns, rows, how, tenants)
    else:
        x = np.array([u(how.seed, how.rule, row) for row in rows])
        drawn = _popular(how, x)
    if how.base_share > 0:
        base = np.array([u(how.seed, "base", row) < how.base_share for row in rows])
        drawn = np.where(base, BASE_MODEL, drawn)
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


def row_numbers(columns: TraceColumns) -> list[int]:
    """Return each request's row in its source: its id where all ids are whole numbers, else its position."""
    ids = [id_ for id_ in columns.ids if isinstance(id_, int)]
    return ids if len(ids) == len(columns.ids) else list(range(len(columns.ids)))


def _popular(how: Assignment, x: Floats) -> Ints:
    if how.rule == "R1-slora":
        scaled = [math.floor(how.adapters * value ** (1 / how.alpha)) for value in x.tolist()]
        return np.minimum(np.array(scaled, dtype=np.int64), how.adapters - 1)
    return pick(cdf(zipf(how.adapters, how.zipf_s)), x)


def _sticky(columns: TraceColumns, rows: list[int], how: Assignment, name: str) -> Ints:
    if columns.sessions is None:
        raise TraceError(f"{name}: rule R2 is sticky by session, but no request has a session; use R1")
    sessions = zip(columns.sessions, rows, strict=True)
    keys = [f"solo:{row}" if session is None else session for session, row in sessions]
    distinct = list(dict.fromkeys(keys))
    drawn = _popular(how, np.array([u(how.seed, "R2", key) for key in distinct]))
    by_key = dict(zip(distinct, drawn.tolist(), strict=True))
    return np.array([by_key[key] for key in keys], dtype=np.int64)


def _by_tenant(columns: TraceColumns, rows: list[int], how: Assignment, tenants: Tenants) -> Ints:
    arrivals_s = columns.arrival_s - columns.arrival_s[0]
    running = {window: cdf(rates) for window, rates in tenants.rates_rps.items()}
    each = max(1, -(-how.adapters // len(tenants.places)))  # adapters of a tenant
    own = cdf(zipf(each, how.zipf_s))
    drawn = []
    for row, arrival_s in zip(rows, arrivals_s.tolist(), strict=True):
        window = tenants.window(how.offset_s + arrival_s)
        client = tenants.clients[window][pick(running[window], np.array([u(how.seed, "R3", row)]))[0]]
        place = tenants.places[int(client)]
        if each > 1:
            place = place * each + int(pick(own, np.array([u(how.seed, "R3", f"{row}:sub")]))[0])
        drawn.append(place % how.adapters)
    return np.array(drawn, dtype=np.int64)


def _require(holds: bool, field: str, value: object, bound: str) -> None:
    if not holds:
        raise TraceError(f"{field} must be {bound}, not {value}")
