"""One question to the simulator: does a configuration meet the SLO at this rate?"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.adapter import AdapterSpec
from engine.config import ServingConfig
from planner.witness import Priced, Witness
from planner.workload import Piece, Workload
from sim.costs import Provenance
from sim.result import SimResult, Utilisation
from sim.simulate import Progress
from traces import Trace
from traces.metrics import Slo

Floats = NDArray[np.float64]
Simulate = Callable[..., SimResult]  # sim.simulate.simulate, or what a test puts in its place


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """What the simulator answered.

    scale: the rate, as a multiple of the trace's own. attainment: share of requests that met the SLO (0 where the
    simulation was broken off because `wanted` could not be reached any more). missed: share of the requests
    that missed each bound, and that were not served. provenance: the weakest of any step's price;
    extrapolated_share: of the steps (both None where nobody watched). use: shares of time and capacity, and facts
    (`sim.result.Utilisation`, `sim.bottleneck.facts_of`), and `duration_s`. by_adapter: attainment by adapter, where somebody watched.
    """

    scale: float
    wanted: float
    attainment: float
    aborted: bool
    metrics: Mapping[str, float]
    missed: Mapping[str, float]
    bottleneck: str
    kv_pages_max: float
    adapter_pages_max: float
    step_share: float
    provenance: Provenance | None = None
    extrapolated_share: float | None = None
    use: Mapping[str, float] = field(default_factory=dict)
    by_adapter: Mapping[str, float] = field(default_factory=dict)

    @property
    def meets(self) -> bool:
        return not self.aborted and self.attainment >= self.wanted

    @property
    def binding(self) -> str:
        """What most requests that miss the SLO miss."""
        return max(self.missed, key=lambda bound: self.missed[bound])


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Prober:
    """Asks the simulator. price: what a configuration's steps cost."""

    workload: Workload
    slo: Slo
    adapters: Mapping[str, AdapterSpec]
    price: Callable[[ServingConfig], Priced]
    simulate: Simulate
    seed: int = 0

    def __call__(self, config: ServingConfig, piece: Piece, scale: float, *, watch: bool = False) -> Probe:
        """Simulate a piece of the trace at `scale` times its own rate; `watch` where step prices come from.

        A simulation that is watched is of the piece as it is and runs to its end; others repeat a short trace and
        stop when the SLO is out of reach.
        """
        whole = self.workload.piece(piece) if watch else self.workload.long_piece(piece, config.replicas)
        trace = whole.scaled(scale)
        costs = self.price(config)
        witness = Witness(costs) if watch else None
        result = self.simulate(
            trace,
            config,
            witness or costs,
            adapters=self.adapters,
            slo=self.slo,
            seed=self.seed,
            abort=None if watch else out_of_reach(trace, self.slo),
        )
        return _probe(result, self.slo, scale, witness)


def out_of_reach(trace: Trace, slo: Slo) -> Callable[[Progress], bool]:
    """Return what tells, while a simulation runs, that the attainment can no longer be reached.

    A request that meets the SLO has finished by arrival + TTFT + (output tokens − 1) · TPOT. So of the requests
    whose such instant is past, at least all but the finished have missed; when these are too many, it is over.
    """
    columns = trace.columns
    due_s = np.sort(columns.arrival_s + slo.ttft_s + slo.tpot_s * (columns.output_tokens - 1))
    allowed = (1 - slo.attainment) * len(trace)

    def over(progress: Progress) -> bool:
        return int(due_s.searchsorted(progress.now_s)) - progress.finished > allowed

    return over


def _probe(result: SimResult, slo: Slo, scale: float, witness: Witness | None) -> Probe:
    latencies = _latencies(result.columns)
    use = result.utilisation
    return Probe(
        scale=scale,
        wanted=slo.attainment,
        attainment=0.0 if result.aborted else float(result.metrics["slo_attainment"]),
        aborted=result.aborted,
        metrics=metrics_of(result, slo),
        missed=_missed(latencies, slo),
        bottleneck=result.bottleneck,
        kv_pages_max=use.kv_pages_max,
        adapter_pages_max=use.adapter_pages_max,
        step_share=use.step_share,
        provenance=None if witness is None else witness.worst,
        extrapolated_share=None if witness is None else witness.extrapolated / max(1, witness.steps),
        use=_use(result),
        by_adapter={} if witness is None else _by_adapter(result.columns, latencies, slo),
    )


def metrics_of(result: SimResult, slo: Slo) -> dict[str, float]:
    """Return a simulation's metrics, and latencies at the SLO's percentile."""
    latencies = _latencies(result.columns)
    metrics = dict(result.metrics)
    for name in ("ttft", "tpot", "e2e"):
        metrics.setdefault(f"{name}_p{slo.percentile:g}_s", _percentile(latencies[name], slo.percentile))
    return metrics


def _use(result: SimResult) -> dict[str, float]:
    shares = {
        name: getattr(result.utilisation, name) for name in Utilisation.__slots__ if name != "time_shares"
    }
    return {
        **{name: float(value) for name, value in (shares | dict(result.facts)).items()},
        "duration_s": float(result.duration_s),
        "refused": float(sum(result.refused.values())),
    }


def _by_adapter(
    columns: Mapping[str, NDArray[Any]], latencies: Mapping[str, Floats], slo: Slo
) -> dict[str, float]:
    """Return the share of each adapter's requests that met the SLO; a request that was not served missed it."""
    met = (latencies["ttft"] <= slo.ttft_s) & ~np.isnan(latencies["e2e"])
    met &= np.isnan(latencies["tpot"]) | (latencies["tpot"] <= slo.tpot_s)
    if slo.e2e_s is not None:
        met &= latencies["e2e"] <= slo.e2e_s
    names = np.array(["" if name is None else str(name) for name in columns["adapter"]])
    known, index = np.unique(names, return_inverse=True)
    counts = np.bincount(index)
    shares = np.bincount(index, weights=met.astype(float)) / counts
    return {str(name): float(share) for name, share in zip(known, shares, strict=True) if name}


def _latencies(columns: Mapping[str, NDArray[Any]]) -> dict[str, Floats]:
    arrival, first, finish = (
        np.asarray(columns[name], dtype=float) for name in ("arrival_s", "first_token_s", "finish_s")
    )
    further = np.asarray(columns["output_tokens"], dtype=float) - 1
    tpot = np.full(len(arrival), np.nan)
    np.divide(finish - first, further, out=tpot, where=further > 0)
    return {"ttft": first - arrival, "tpot": tpot, "e2e": finish - arrival}


def _percentile(values: Floats, percentile: float) -> float:
    known = values[~np.isnan(values)]
    return float(np.percentile(known, percentile)) if len(known) else float("nan")


def _missed(latencies: Mapping[str, Floats], slo: Slo) -> dict[str, float]:
    bounds = {"TTFT": ("ttft", slo.ttft_s), "TPOT": ("tpot", slo.tpot_s), "E2E": ("e2e", slo.e2e_s)}
    missed = {
        label: float((latencies[name] > bound).mean())
        for label, (name, bound) in bounds.items()
        if bound is not None
    }
    return missed | {"not served": float(np.isnan(latencies["e2e"]).mean())}
