"""Synthetic workloads:

arrivals and lengths drawn from a seed; adapters are attached afterwards by `traces.assign`.

Arrivals are a renewal process with Gamma gaps. Lengths are either uniform, as in S-LoRA's benchmark, or
follow the published quantiles of a real trace. Prompt and output lengths are drawn independently: no joint
statistics are published.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from traces.columns import BASE_MODEL, Floats, Ints, TraceColumns
from traces.errors import TraceError
from traces.trace import Trace

PROBABILITIES = (0.0, 0.10, 0.50, 0.90, 0.95, 0.99, 1.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Uniform:
    """Lengths drawn uniformly from low <= tokens < high, as numpy's randint does."""

    low: int
    high: int

    def __post_init__(self) -> None:
        if not 1 <= self.low < self.high:
            raise TraceError(f"lengths must be LOW,HIGH with 1 <= LOW < HIGH, not {self.low},{self.high}")

    def draw(self, count: int, rng: np.random.Generator) -> Ints:
        """Draw `count` lengths in tokens."""
        return rng.integers(self.low, self.high, count)


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantiles:
    """Lengths with given quantiles at PROBABILITIES (min, p10, p50, p90, p95, p99, max) and a given mean.

    Between two quantiles the logarithm of the length rises as t^γ from one to the other, t being the position
    between them: monotone, so the quantiles are exact. Straight lines (γ = 1) miss the published mean by up
    to 30 %; the one γ that meets it is solved for.
    """

    tokens: tuple[int, ...]
    mean: float

    def __post_init__(self) -> None:
        ascending = all(a <= b for a, b in zip(self.tokens, self.tokens[1:], strict=False))
        if len(self.tokens) != len(PROBABILITIES) or not ascending or self.tokens[0] < 1:
            raise TraceError(f"quantiles must be {len(PROBABILITIES)} ascending lengths, not {self.tokens}")

    def at(self, x: Floats, bend: float) -> Floats:
        """Return the quantile function at x in [0, 1), γ = `bend`, before rounding to whole tokens."""
        edges, logs = np.array(PROBABILITIES), np.log(np.array(self.tokens))
        segment = np.clip(np.searchsorted(edges, x, side="right") - 1, 0, len(edges) - 2)
        t = (x - edges[segment]) / (edges[segment + 1] - edges[segment])
        lengths: Floats = np.exp(logs[segment] + (logs[segment + 1] - logs[segment]) * t**bend)
        return lengths

    def bend(self) -> float:
        """Return the γ in 1/8..8 whose mean is the published one, or the nearest end."""
        grid = (np.arange(20_000) + 0.5) / 20_000
        low, high = math.log(1 / 8), math.log(8.0)
        for _ in range(40):  # the mean falls as γ grows
            middle = (low + high) / 2
            too_long = float(self.at(grid, math.exp(middle)).mean()) > self.mean
            low, high = (middle, high) if too_long else (low, middle)
        return math.exp((low + high) / 2)

    def draw(self, count: int, rng: np.random.Generator) -> Ints:
        """Draw `count` lengths in tokens."""
        return np.rint(self.at(rng.random(count), self.bend())).astype(np.int64)


Lengths = Uniform | Quantiles


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """What a synthetic trace looks like: the rate, the CV of the gaps between arrivals, and the lengths."""

    rate_rps: float
    cv: float
    prompt: Lengths
    output: Lengths

    def __post_init__(self) -> None:
        if not 0 < self.rate_rps <= 1e6:
            raise TraceError(
                f"rate must be above 0 and at most 1000000 requests a second, not {self.rate_rps}"
            )
        if not 0.01 <= self.cv <= 100:
            raise TraceError(f"cv must be in 0.01..100, not {self.cv}")


# S-LoRA, arXiv:2311.03285, benchmarks/trace.py at c1ddf48: both lengths U[8, 512), cv 1, 1 to 10 a second.
S_LORA = Workload(rate_rps=2.0, cv=1.0, prompt=Uniform(low=8, high=512), output=Uniform(low=8, high=512))


def synthesize(workload: Workload, count: int, seed: int, name: str = "synthetic") -> Trace:
    """Draw `count` requests; equal arguments give equal traces.

    Times are rounded to microseconds; the first gap starts at 0. Raises TraceError for a count or a seed out
    of bounds.
    """
    if not 1 <= count <= 10**8:
        raise TraceError(f"requests must be in 1..100000000, not {count}")
    if seed < 0:
        raise TraceError(f"seed must be at least 0, not {seed}")
    arrivals, prompts, outputs = (np.random.default_rng([seed, stream]) for stream in range(3))
    columns = TraceColumns(
        ids=tuple(range(count)),
        arrival_s=np.cumsum(gamma_gaps_s(workload.rate_rps, workload.cv, count, arrivals)).round(6),
        prompt_tokens=workload.prompt.draw(count, prompts),
        output_tokens=workload.output.draw(count, outputs),
        adapter_index=np.full(count, BASE_MODEL, dtype=np.int64),
    )
    return Trace.from_columns(columns, name)


def gamma_gaps_s(rate_rps: float, cv: float, count: int, rng: np.random.Generator) -> Floats:
    """Draw gaps between arrivals, in seconds:

    Gamma of shape 1/cv² and scale cv²/rate, so mean 1/rate and CV cv.
    """
    return rng.gamma(1 / cv**2, cv**2 / rate_rps, count)
