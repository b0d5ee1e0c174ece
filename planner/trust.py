"""How far predictions can be trusted: against every recorded run, and whether a scenario stays within what was measured."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from math import isfinite
from typing import Any

import numpy as np

from engine.adapter import AdapterSpec
from engine.config import ServingConfig
from engine.graph_sizes import padded_tokens
from engine.step import StepShape
from sim.costs import StepCosts, costs_for
from sim.fit import fit_operators
from sim.profile import Profile
from sim.simulate import simulate
from sim.validate import RUNS, costs_of_records, validate
from traces import Trace

BANDS_PCT = (5.0, 10.0)
FAMILIES = {"ttft": "TTFT", "tpot": "TPOT", "e2e": "End to end"}  # latencies, by how a metric's name begins
OTHER = "Throughput"
LEVEL_NAMES = {
    "under50": "under 50 %",
    "50to80": "50 to 80 %",
    "80to95": "80 to 95 %",
    "saturated": "95 % and more",
    "all": "all loads",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Extent:
    """One size of a step: how far it was measured, and what a scenario's steps have of it.

    p50, p95, most: of the scenario's steps; *_pct: of the largest measured. beyond: share of the steps that lie beyond it.
    """

    size: str
    measured: float
    p50: float
    p95: float
    most: float
    p50_pct: float
    p95_pct: float
    most_pct: float
    beyond: float


def recorded_runs() -> dict[str, Any]:
    """Hold the simulator against every run that ships; return `sim validate`'s outcome, each row with its family, unit and load in words."""
    outcome = validate(RUNS, costs_of_records())
    rows = [_labelled(row) for row in outcome["rows"]]
    return {
        "runs": outcome["runs"],
        "rows": rows,
        "lines": {
            family: band_lines([row for row in rows if row["family"] == family])
            for family in dict.fromkeys(row["family"] for row in rows)
        },
        "summary": outcome["summary"],
        "bias": bias_rows(outcome["summary"]),
        "within": within(outcome["rows"]),
    }


def bias_rows(summary: Mapping[str, Mapping[str, Mapping[str, float | None]]]) -> list[dict[str, Any]]:
    """Return the summary as rows: load level, metric, bias and errors in percent."""
    return [
        {"load_level": LEVEL_NAMES.get(level, level), "metric": metric_name(metric), **numbers}
        for level, metrics in summary.items()
        if level != "all"
        for metric, numbers in metrics.items()
        if not metric.startswith("output_tokens")  # the same as requests where all finish
    ]


def within(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the share of the rows whose error is within each band."""
    errors = [abs(row["error_pct"]) for row in rows if row["error_pct"] is not None]
    return [
        {
            "band_pct": band,
            "share": sum(error <= band for error in errors) / len(errors) if errors else None,
            "rows": len(errors),
        }
        for band in BANDS_PCT
    ]


def band_lines(rows: Iterable[Mapping[str, Any]]) -> list[dict[str, float]]:
    """Return the ends of the lines predicted = measured and of the bands around it, over what the rows measured."""
    measured = [row["measured"] for row in rows if row["measured"]]
    if not measured:
        return []
    ends = (min(measured) * 0.8, max(measured) * 1.25)
    return [
        {
            "measured": end,
            "equal": end,
            **{f"low{band:g}": end * (1 - band / 100) for band in BANDS_PCT},
            **{f"high{band:g}": end * (1 + band / 100) for band in BANDS_PCT},
        }
        for end in ends
    ]


def metric_name(metric: str) -> str:
    """Return a metric's key in words."""
    parts = metric.removesuffix("_s").split("_")
    family = FAMILIES.get(parts[0])
    if family is None:
        return {"throughput_rps": "Requests/s", "output_tokens_per_s": "Output tokens/s"}.get(metric, metric)
    return f"{family} {parts[1]}"


def domain(
    trace: Trace, config: ServingConfig, adapters: Mapping[str, AdapterSpec], profile: Profile
) -> dict[str, Any]:
    """Place the steps of a simulated scenario in what the profile measured.

    shares: of the steps by where their price comes from. extents: size by size.
    """
    costs = costs_for(profile, config)
    result = simulate(trace, config, costs, adapters=adapters, record_steps=True)
    shapes = [step.shape for step in result.steps or ()]
    counted = Counter(costs.provenance(shape) for shape in shapes)
    total = max(1, len(shapes))
    facts = profile.provenance
    return {
        "steps": len(shapes),
        "shares": [
            {"provenance": kind, "share": counted[kind] / total}
            for kind in ("measured", "interpolated", "extrapolated")
        ],
        "extents": [asdict(extent) for extent in _extents(shapes, profile, config, costs)],
        "profile": {
            "gpu": facts.get("gpu_name") or profile.gpu,
            "model": profile.model.name,
            "date": facts.get("date"),
            "commit": str(facts.get("commit") or "")[:12],
            "same_gpu": profile.gpu.lower() == config.gpu.lower(),
            "same_model": profile.model.name == config.model.lower(),
        },
    }


def _extents(
    shapes: Sequence[StepShape], profile: Profile, config: ServingConfig, costs: StepCosts
) -> list[Extent]:
    """Return the extents by size, those that the scenario never has left out."""
    largest, layers = fit_operators(profile).largest, costs.setting.model.num_layers
    decode, prefill, lora = largest["attention_decode"], largest["attention_prefill"], largest["lora"]
    padded = [float(padded_tokens(shape.tokens, config.graph_max_tokens)) for shape in shapes]
    sizes: list[tuple[str, float, list[float]]] = [
        ("tokens in a step", largest["matmul"]["tokens"], padded),
        ("requests that decode", decode["rows"], [float(shape.decode_rows) for shape in shapes]),
        (
            "context tokens they read",
            decode["kv_tokens"],
            [float(shape.decode_kv_tokens) for shape in shapes],
        ),
        (
            "longest context of a request that decodes",
            decode["kv_max"],
            [float(shape.decode_kv_max) for shape in shapes],
        ),
        ("longest context of a prompt", prefill["kv_max"], [float(shape.prefill_kv_max) for shape in shapes]),
        ("distinct adapters", lora["adapters"], [float(shape.lora_adapters) for shape in shapes]),
        (
            "adapter bytes read",
            lora["bytes"] * layers,
            [float(shape.lora_bytes) for shape in shapes],
        ),
        (
            "adapter bytes × tokens",
            lora["token_bytes"] * layers,
            [float(shape.lora_token_bytes) for shape in shapes],
        ),
    ]
    return [_extent(name, measured, np.array(values)) for name, measured, values in sizes if any(values)]


def _extent(name: str, measured: float, values: np.ndarray[Any, Any]) -> Extent:
    p50, p95, most = (float(np.quantile(values, share)) for share in (0.5, 0.95, 1.0))
    return Extent(
        size=name,
        measured=measured,
        p50=p50,
        p95=p95,
        most=most,
        p50_pct=100 * p50 / measured,
        p95_pct=100 * p95 / measured,
        most_pct=100 * most / measured,
        beyond=float((values > measured).mean()),
    )


def _labelled(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return a row of `sim validate` with what a chart says of it; latencies in milliseconds."""
    family = FAMILIES.get(row["metric"].split("_")[0], OTHER)
    factor = 1.0 if family == OTHER else 1e3
    known = {name: value for name, value in row.items() if not isinstance(value, list | dict)}
    return known | {
        "family": family,
        "name": metric_name(row["metric"]),
        "unit": "a second" if family == OTHER else "ms",
        "measured": _times(row["measured"], factor),
        "predicted": _times(row["predicted"], factor),
        "load_level": LEVEL_NAMES.get(row["load_level"], row["load_level"]),
    }


def _times(value: float | None, factor: float) -> float | None:
    return value * factor if value is not None and isfinite(value) else None
