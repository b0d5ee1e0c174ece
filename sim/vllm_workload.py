"""The request stream of a measured vLLM run, rebuilt as ../shared/measured_vllm/make_stream.py does it: arrivals near-exact, lengths statistical."""

from __future__ import annotations

import heapq
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.special import ndtr

from engine.errors import UserError
from sim.vllm_data import Row, number, part
from traces import Trace
from traces.columns import TraceColumns

LENGTH_SEED, RANK_SEED = 1, 1  # as in make_stream.py: the source's own draws are not known
SHORTEST = 4  # tokens, of prompt and output

# How prompt and output go together is not stored. ShareGPT V3 was cut into pieces, half of which begin with an answer: then "prompt" is a long answer
# and "output" the short question after it. Questions have 94.5 tokens on average, answers 348.5 (WildChat, arXiv:2405.01470, table 1), so
# E[p·o] / (E[p] E[o]) = 94.5 · 348.5 / ((94.5 + 348.5) / 2)² = 0.671. A Gaussian copula over the length tables has that at a correlation of -0.355.
LENGTH_CORRELATION = -0.355


@dataclass(frozen=True, slots=True)
class LengthTable:
    """ShareGPT's lengths as quantiles; `at` scales them to a run's own mean."""

    quantiles: Any
    tokens: Any
    mean: float

    def at(self, normal: Any, mean: float) -> Any:
        """Return the lengths at standard normal scores, with about this mean, at least SHORTEST each."""
        drawn = np.interp(ndtr(normal), self.quantiles, self.tokens) * mean / self.mean
        return np.maximum(SHORTEST, np.rint(drawn)).astype(np.int64)


def length_tables(path: Path) -> dict[str, LengthTable]:
    """Read lengths.json. Raises UserError naming the file."""
    try:
        table = json.loads(path.read_text(encoding="utf-8"))["llama2_tokens"]
        return {
            name: LengthTable(
                np.array(table[name]["quantile_q"], dtype=float),
                np.array(table[name]["quantile_tokens"], dtype=float),
                float(table[name]["table_mean"]),
            )
            for name in ("prompt", "output")
        }
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: is not a length table: {error}") from None


def arrivals(rates: Sequence[float], horizon_s: float) -> Iterator[tuple[float, int]]:
    """Yield (instant, adapter) of Poisson sources at these rates, drawn in the benchmark's own order with its own seed.

    The benchmark draws the next gap of a source when its last request is sent, from one numpy stream seeded with 0.
    """
    rng = np.random.RandomState(0)
    waiting = []
    for adapter, rate in enumerate(rates):
        at_s = rng.exponential(1.0 / rate)
        if at_s < horizon_s:
            waiting.append((at_s, adapter))
    heapq.heapify(waiting)
    while waiting:
        at_s, adapter = waiting[0]
        yield at_s, adapter
        following_s = at_s + rng.exponential(1.0 / rates[adapter])
        if following_s < horizon_s:
            heapq.heapreplace(waiting, (following_s, adapter))
        else:
            heapq.heappop(waiting)


def shuffled_rates(cycle: Sequence[float], count: int) -> list[float]:
    """Return each adapter's rate: the cycle repeated, then shuffled with the benchmark's seed."""
    rates = [cycle[index % len(cycle)] for index in range(count)]
    random.Random(0).shuffle(rates)
    return rates


def stream(run: Row, tables: dict[str, LengthTable], place: str, horizon_s: float) -> Trace:
    """Return the requests of a run as a trace; which adapter has which rank is not known, and drawn."""
    count = int(number(run, "n_adapters", place))
    rates = shuffled_rates(_cycle(run, "adapter_rates_cycle", place), count)
    pool = part(run, "pool", place)
    sent = list(arrivals(rates, horizon_s))
    if not sent:
        raise UserError(f"{place}: no request arrives within {horizon_s:g} s")
    prompts, outputs = lengths(
        tables, len(sent), number(pool, "mean_prompt", place), number(pool, "mean_output", place)
    )
    ranks = [int(rank) for rank in _cycle(run, "adapter_ranks_cycle", place)]
    of_adapter = [ranks[index % len(ranks)] for index in range(count)]
    random.Random(RANK_SEED).shuffle(of_adapter)
    columns = TraceColumns(
        ids=tuple(range(len(sent))),
        arrival_s=np.array([at_s for at_s, _ in sent]),
        prompt_tokens=prompts,
        output_tokens=outputs,
        adapter_index=np.array([adapter for _, adapter in sent], dtype=np.int64),
        adapter_names=tuple(f"a{index}" for index in range(count)),
        adapter_ranks=tuple(of_adapter),
    )
    return Trace.from_columns(columns, str(run.get("run")))


def lengths(
    tables: dict[str, LengthTable], count: int, mean_prompt: float, mean_output: float
) -> tuple[Any, Any]:
    """Return prompt and output lengths of `count` requests."""
    first, second = np.random.default_rng(LENGTH_SEED).standard_normal((2, count))
    other = LENGTH_CORRELATION * first + (1 - LENGTH_CORRELATION**2) ** 0.5 * second
    return tables["prompt"].at(first, mean_prompt), tables["output"].at(other, mean_output)


def _cycle(run: Row, name: str, place: str) -> list[float]:
    value = run.get(name)
    if (
        not isinstance(value, list)
        or not value
        or not all(isinstance(x, int | float) and x > 0 for x in value)
    ):
        raise UserError(f"{place}: {name}={value!r} must be a list of numbers above 0")
    return [float(x) for x in value]
