"""Synthetic traces like real ones: drawn from a few published statistics of a source, none of its rows.

Lengths follow the published quantiles and mean (`traces.synth.Quantiles`). Arrivals have the published rate and CV of gaps, and where
both are published and Gamma gaps would come all at once, also the variance over the mean of the arrivals in each second. Prefixes are
reused as often as published: conversations, each request of which starts with what an earlier one had.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from traces.columns import Floats, Ints
from traces.errors import TraceError
from traces.synth import Quantiles, Workload, synthesize
from traces.trace import Trace

Like = Literal["azure-conv", "azure-code", "mooncake"]
Blocks = tuple[int, ...]

BLOCK_TOKENS = 512  # of a prefix block, as in Mooncake's traces
OPEN = 256  # conversations that may go on at a time: an assumption, no statistic of it is published
ARRIVALS, REUSE = 0, 3  # numbers of the random streams; lengths have 1 and 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Reuse:
    """How prompts repeat each other's start.

    going_on: share of requests that go on with a conversation. hits: share of all blocks that an endless cache would have, the first block,
    a system prompt that all share, among them.
    """

    going_on: float
    hits: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """What is published of a source. idc: variance over mean of arrivals by second, where Gamma gaps do not do."""

    workload: Workload
    idc: float | None = None
    reuse: Reuse | None = None


# Rates, CVs, means, IDC and quantiles (p10 to max) as published with the project's trace collection, section 1.1,
# for the first 40 minutes of each source; the shortest length was read from the same files. Mooncake's own CV
# (2.97) is an artefact of its 3 s clock: Poisson arrivals (CV 1) stand in. Of Mooncake's 12,031 requests 7,373 start
# differently behind the common first block, and 36.6 % of its blocks repeat (the same collection, section 3).
LIKE: dict[Like, Source] = {
    "azure-conv": Source(
        workload=Workload(
            rate_rps=5.91,
            cv=1.08,
            prompt=Quantiles(tokens=(2, 220, 1015, 4074, 4085, 4122, 14050), mean=1195),
            output=Quantiles(tokens=(7, 50, 115, 421, 448, 598, 1000), mean=202),
        )
    ),
    "azure-code": Source(
        workload=Workload(
            rate_rps=3.13,
            cv=12.6,
            prompt=Quantiles(tokens=(3, 150, 1465, 5177, 7168, 7436, 7437), mean=2040),
            output=Quantiles(tokens=(6, 7, 13, 55, 88, 249, 1899), mean=28),
        ),
        idc=12.9,
    ),
    "mooncake": Source(
        workload=Workload(
            rate_rps=3.28,
            cv=1.0,
            prompt=Quantiles(tokens=(891, 974, 7284, 27991, 40411, 89869, 124847), mean=12428),
            output=Quantiles(tokens=(1, 24, 356, 606, 712, 1170, 2000), mean=347),
        ),
        reuse=Reuse(going_on=1 - 7373 / 12031, hits=0.366),
    ),
}


def synthesize_like(
    source: Source, count: int, seed: int, *, rate_rps: float | None = None, max_model_len: int | None = None
) -> Trace:
    """Draw `count` requests like a source; equal arguments give equal traces.

    rate_rps: another rate, by another pace of the same arrivals. max_model_len: prompts are cut so that prompt and output fit; an output
    may have half of it. Raises TraceError for a number out of bounds.
    """
    pace = 1.0 if rate_rps is None else rate_rps / source.workload.rate_rps
    workload = source.workload if rate_rps is None else replace(source.workload, rate_rps=rate_rps)
    columns = synthesize(workload, count, seed).columns
    if source.idc is not None:
        gaps_s = bursts_of(source.workload.rate_rps, source.workload.cv, source.idc).gaps_s(
            count, np.random.default_rng([seed, ARRIVALS])
        )
        columns = replace(columns, arrival_s=(np.cumsum(gaps_s) / pace).round(6))
    trace = Trace.from_columns(columns, "synthetic")
    if max_model_len is not None:
        trace = cut(trace, max_model_len)
    if source.reuse is not None:
        trace = with_prefixes(trace, source.reuse, np.random.default_rng([seed, REUSE]))
    return trace


def cut(trace: Trace, max_model_len: int) -> Trace:
    """Return the trace with outputs of at most half of `max_model_len` tokens, and prompts of at most what is left of it."""
    if max_model_len < 2:
        raise TraceError(f"max_model_len must be at least 2, not {max_model_len}")
    outputs = np.minimum(trace.columns.output_tokens, max_model_len // 2)
    prompts = np.minimum(trace.columns.prompt_tokens, max_model_len - outputs)
    return Trace.from_columns(
        replace(trace.columns, prompt_tokens=prompts, output_tokens=outputs), trace.name
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Bursts:
    """Poisson arrivals at `rate_rps` in phases of mean `on_s`, between pauses of mean `off_s`, both exponential."""

    rate_rps: float
    on_s: float
    off_s: float

    def gaps_s(self, count: int, rng: np.random.Generator) -> Floats:
        """Draw gaps between arrivals: some pauses, geometrically many, before each."""
        leave = 1 / self.on_s
        pauses = rng.geometric(self.rate_rps / (self.rate_rps + leave), count) - 1
        waits_s = rng.gamma(pauses + 1.0, 1 / (self.rate_rps + leave))
        away_s = np.where(pauses > 0, rng.gamma(np.maximum(pauses, 1), self.off_s), 0.0)
        gaps_s: Floats = waits_s + away_s
        return gaps_s


def bursts_of(rate_rps: float, cv: float, idc: float) -> Bursts:
    """Return the interrupted Poisson process of this rate, CV of gaps and IDC of one second.

        CV² − 1 = 2 λ ω / a²,   IDC − 1 = (CV² − 1) · (1 − (1 − exp(−a)) / a),   a = ω + ω'

    λ: rate in a phase, ω and ω': rates of leaving a phase and a pause (Fischer and Meier-Hellstern, The MMPP cookbook, 1993).
    """
    excess = cv * cv - 1
    wanted = (idc - 1) / excess
    if not 0 < wanted < 1:
        raise TraceError(f"idc must be in 1..{cv * cv:g}, the square of the CV, not {idc}")
    low, high = 1e-9, 1e9
    for _ in range(200):
        a = math.sqrt(low * high)
        low, high = (a, high) if 1 + math.expm1(-a) / a < wanted else (low, a)
    leaving, returning = excess * a * a / 2, rate_rps * a  # times the rate in a phase
    inside = (leaving + returning) / a
    return Bursts(rate_rps=inside, on_s=inside / leaving, off_s=inside / returning)


def with_prefixes(trace: Trace, reuse: Reuse, rng: np.random.Generator) -> Trace:
    """Return the trace as conversations: `sessions`, and the `prefix_blocks` of each prompt.

    A request that goes on does so with that open conversation whose last prompt was the longest that is not longer, and has that one's start:
    the same share of what it can have in each, such that `reuse.hits` of all blocks repeat, or as many as can in a short trace.
    """
    prompts = trace.columns.prompt_tokens
    parents = _parents(prompts, rng.random(len(prompts)) < reuse.going_on)
    blocks = -(-prompts // BLOCK_TOKENS)
    whole = prompts // BLOCK_TOKENS
    known = np.where(parents >= 0, np.minimum(whole[parents], blocks), 0)
    shared = _shared(known, parents >= 0, blocks, reuse.hits)
    rows: list[Blocks] = []
    sessions: list[str] = []
    fresh = 1  # number of the next block that nobody had
    for row, (parent, count, taken) in enumerate(
        zip(parents.tolist(), blocks.tolist(), shared.tolist(), strict=True)
    ):
        start = rows[parent][:taken] if parent >= 0 else (0,)
        own = count - len(start)
        rows.append((*start, *range(fresh, fresh + own)))
        fresh += own
        sessions.append(sessions[parent] if parent >= 0 else f"c{row}")
    columns = replace(trace.columns, sessions=tuple(sessions), prefix_blocks=tuple(rows))
    return Trace.from_columns(columns, trace.name)


def _parents(prompts: Ints, goes_on: NDArray[np.bool_]) -> Ints:
    """Return which row each row goes on from, −1 where it starts a conversation."""
    parents = np.full(len(prompts), -1, dtype=np.int64)
    is_open: list[int] = []  # the last row of each conversation, the latest last
    lengths = prompts.tolist()
    for row, length in enumerate(lengths):
        able = [other for other in is_open if lengths[other] <= length] if goes_on[row] else []
        if able:
            parent = max(able, key=lengths.__getitem__)
            is_open.remove(parent)
            parents[row] = parent
        is_open = [*is_open, row][-OPEN:]
    return parents


def _shared(known: Ints, goes_on: NDArray[np.bool_], blocks: Ints, hits: float) -> Ints:
    """Return how many blocks each row has from its parent, at least the first, so that a share `hits` of all repeats."""
    wanted = hits * float(blocks.sum())

    def at(share: float) -> Ints:
        taken: Ints = np.where(goes_on, np.maximum(1, np.rint(share * known)), 0).astype(np.int64)
        return taken

    low, high = 0.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        repeats = float(at(middle).sum()) + float((~goes_on).sum() - 1)
        low, high = (middle, high) if repeats < wanted else (low, middle)
    return at(high)


def repeated_share(trace: Trace) -> float:
    """Return the share of a trace's prefix blocks that an endless cache of one adapter would have; 0 where it has none."""
    seen: set[Blocks] = set()
    total = found = 0
    for blocks in trace.columns.prefix_blocks or ():
        total += len(blocks or ())
        hit = True
        chain = 0
        for end, block in enumerate(blocks or (), start=1):
            key = (end, chain, block)
            chain = hash(key)
            hit = hit and key in seen
            found += hit
            seen.add(key)
    return found / total if total else 0.0
