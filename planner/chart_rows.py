"""Answers as rows to draw and texts to show: seconds become milliseconds here, shares percent, and nowhere else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from planner.token_cost import token_cost
from traces import Trace

Row = dict[str, Any]
NAMES = {
    "recommended": "Recommended",
    "fewest_gpus": "Fewest GPUs",
    "nearest_miss": "Nearest miss",
}
# What bounds a configuration, as sim.bottleneck names it.
BINDING = {
    "matmul": "the base model's matrix products",
    "head": "the output layer",
    "LoRA": "the adapters' matrix products",
    "decode attention": "attention while decoding",
    "prefill attention": "attention over prompts",
    "collectives": "exchanges between GPUs",
    "host": "the CPU that prepares steps",
    "memory": "GPU memory",
    "batch slots": "the limit on requests at once",
    "adapter loads": "loading adapters",
    "none": "nothing: it is not saturated",
}


def binding(bottleneck: str) -> str:
    """Return what bounds a configuration in words."""
    return BINDING.get(bottleneck, bottleneck)


def choices(plan: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return a plan's choices by a name to show, the main ones first."""
    named = {label: plan[name] for name, label in NAMES.items() if plan.get(name) is not None}
    named |= {f"Alternative {number}": choice for number, choice in enumerate(plan["alternatives"], start=1)}
    return named


def shape(config: Mapping[str, Any]) -> str:
    """Return a configuration's shape in words."""
    replicas, tp = config["replicas"], config["tp"]
    each = "1 GPU" if tp == 1 else f"{tp} GPUs"
    return f"{replicas} {'replica' if replicas == 1 else 'replicas'} of {each}"


def choice_table(plan: Mapping[str, Any]) -> list[Row]:
    """Return one row a choice, in display units."""
    return [_choice_row(name, choice) for name, choice in choices(plan).items()]


def rate_rows(plan: Mapping[str, Any]) -> list[Row]:
    """Return the highest sustainable rate of each choice with its interval."""
    rows = []
    for name, choice in choices(plan).items():
        rate = choice["predicted"]["sustainable_rps"]
        rows.append(
            {
                "choice": name,
                "shape": shape(choice["config"]),
                "rps": rate["value"],
                "low": rate["low"],
                "high": rate["high"],
                "provenance": rate["provenance"],
                "meets": "yes" if choice["meets_slo"] else "no",
            }
        )
    return rows


def curve_rows(curve: Mapping[str, Any]) -> list[Row]:
    """Return the points of a rate curve in display units; `beyond`: above the highest sustainable rate."""
    rows = []
    for point in curve["points"]:
        row: Row = {
            "rate_rps": point["rate_rps"],
            "load_pct": percent(point["load"]),
            "provenance": point["predicted"]["slo_attainment"]["provenance"],
            "meets": "yes" if point["meets"] else "no",
        }
        for name, key, factor in (
            ("attainment_pct", "slo_attainment", 100.0),
            ("ttft_ms", "ttft_p95_s", 1e3),
            ("tpot_ms", "tpot_p95_s", 1e3),
        ):
            for suffix, part in (("", "value"), ("_low", "low"), ("_high", "high")):
                row[name + suffix] = _times(point["predicted"][key][part], factor)
        rows.append(row)
    return rows


def latency_rows(curve: Mapping[str, Any], slo: Mapping[str, Any]) -> list[Row]:
    """Return TTFT and TPOT by rate in long form, with the bound of each."""
    names = (("ttft", "Time to first token, p95", "ttft_s"), ("tpot", "Time per output token, p95", "tpot_s"))
    return [
        {
            "rate_rps": row["rate_rps"],
            "metric": label,
            "ms": row[f"{name}_ms"],
            "low": row[f"{name}_ms_low"],
            "high": row[f"{name}_ms_high"],
            "provenance": row["provenance"],
            "bound_ms": milliseconds(slo[bound]),
        }
        for row in curve_rows(curve)
        for name, label, bound in names
    ]


def traffic_rows(traffic: Mapping[str, Any]) -> list[Row]:
    """Return an adapter a row in display units."""
    return [
        {
            "place": row["place"],
            "adapter": row["adapter"],
            "rank": row["rank"],
            "requests": row["requests"],
            "share_pct": percent(row["share"]),
            "cumulative_pct": percent(row["cumulative_share"]),
            "hit_pct": percent(row["hit_rate"]),
            "load_wait_ms": milliseconds(row["load_wait_mean_s"]),
            "ttft_p99_ms": milliseconds(row["ttft_p99_s"]),
            "tpot_p99_ms": milliseconds(row["tpot_p99_s"]),
            "slo_pct": percent(row["slo_attainment"]),
            "meets": "meets" if row["meets"] else "misses",
        }
        for row in traffic["rows"]
    ]


def grid_rows(cells: Sequence[Mapping[str, Any]]) -> list[Row]:
    """Return the cells with texts to show. light: in the upper half of the rates, where colours are light."""
    rates = [cell["rps_per_gpu"] for cell in cells]
    middle = (min(rates) + max(rates)) / 2
    return [
        {
            "adapters": cell["adapters"],
            "rank": cell["rank"],
            "rps_per_gpu": cell["rps_per_gpu"],
            "text": f"{cell['rps_per_gpu']:.1f}" if cell["rps_per_gpu"] else "none",
            "light": cell["rps_per_gpu"] >= middle,
            "feasible": cell["rps_per_gpu"] > 0,
            "current": cell["current"],
            "pool_pct": percent(cell["pool_share"]),
            "why": cell["reason"] or "meets the SLO",
        }
        for cell in cells
    ]


def timeline_rows(timeline: Mapping[str, Any]) -> dict[str, list[Row]]:
    """Return a timeline's series in long form, by chart: requests, pages, loads, busy."""
    at_s = timeline["at_s"]

    def long(series: Mapping[str, Sequence[float]], factor: float = 1.0) -> list[Row]:
        return [
            {"at_s": instant, "what": what, "value": value * factor}
            for what, values in series.items()
            for instant, value in zip(at_s, values, strict=True)
        ]

    return {
        "requests": long({"running": timeline["running"], "waiting": timeline["waiting"]}),
        "pages": long(
            {"KV cache": timeline["kv_share"], "adapters": timeline["adapter_share"]},
            100.0,
        ),
        "loads": long({"loads a second": timeline["loads_per_s"]}),
        "busy": _spans(
            long(
                {f"replica {number}": share for number, share in enumerate(timeline["busy"], start=1)}, 100.0
            ),
            timeline["span_s"],
        ),
    }


def _spans(rows: Sequence[Row], span_s: float) -> list[Row]:
    """Return rows with the ends of the span of which each is the middle."""
    return [{**row, "from_s": row["at_s"] - span_s / 2, "to_s": row["at_s"] + span_s / 2} for row in rows]


def pareto_rows(points: Sequence[Mapping[str, Any]]) -> list[Row]:
    """Return the points of a Pareto chart in display units."""
    return [
        {
            **point,
            "bottleneck": binding(point["bottleneck"]),
            "tp_name": f"TP {point['tp']}",
            "ttft_ms": milliseconds(point["ttft_p95_s"]),
            "on_front": "yes" if point["front"] else "no",
        }
        for point in points
    ]


def pieces_of(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return on how much of the trace the points of a Pareto chart were tried, the longest first."""
    return list(dict.fromkeys(row["judged_on"] for row in sorted(rows, key=lambda row: row["judged_order"])))


def comparison_rows(rows: Sequence[Mapping[str, Any]]) -> list[Row]:
    """Return the rows of a comparison as texts."""
    return [
        {
            "metric": f"{row['metric']}, {row['unit']}" if row["unit"] else row["metric"],
            "left": _spread(row, "left"),
            "right": _spread(row, "right"),
            "change": "–" if row["change_pct"] is None else f"{row['change_pct']:+z.1f} %",
            "better": row["better"],
        }
        for row in rows
    ]


def cost_rows(sides: Mapping[str, tuple[Trace, Mapping[str, Any], float]]) -> list[Row]:
    """Return what tokens cost, two rows a side: at the trace's rate, and at the highest sustainable one. sides: trace, choice and dollars a
    GPU-hour by name.
    """
    rows: list[Row] = []
    for name, (trace, choice, price) in sides.items():
        gpus = choice["config"]["tp"] * choice["config"]["replicas"]
        rates = {
            "the trace's rate": trace.rate_rps,
            "the highest sustainable rate": choice["sustainable_rps"],
        }
        for at, rate_rps in rates.items():
            cost = token_cost(trace, gpus, rate_rps, price)
            rows.append(
                {
                    "side": name,
                    "GPUs": gpus,
                    "at": at,
                    "requests/s": rate_rps,
                    "$ an hour": None if cost is None else cost.usd_per_hour,
                    "$ per million output tokens": None if cost is None else cost.usd_per_million_output,
                    "$ per million tokens in all": None if cost is None else cost.usd_per_million_all,
                }
            )
    return rows


def memory_rows(rows: Sequence[Mapping[str, Any]]) -> list[Row]:
    """Return rows of memory with their bytes in GB."""
    return [{**row, "gb": gigabytes(row["bytes"])} for row in rows]


def fit_rows(rows: Sequence[Mapping[str, Any]]) -> list[Row]:
    """Return rows of adapters with the bytes of one in MB."""
    return [{**row, "mb": _times(row["adapter_bytes"], 1e-6)} for row in rows]


def gigabytes(count: float | None) -> float | None:
    """Return bytes in GB (10⁹)."""
    return _times(count, 1e-9)


def milliseconds(seconds: float | None) -> float | None:
    """Return seconds in milliseconds."""
    return _times(seconds, 1e3)


def percent(share: float | None) -> float | None:
    """Return a share in percent."""
    return _times(share, 100.0)


def interval(prediction: Mapping[str, Any], factor: float, unit: str) -> str:
    """Return a prediction's value in a unit."""
    value = _times(prediction["value"], factor)
    return "–" if value is None else f"{short(value)} {unit}"


def span(prediction: Mapping[str, Any], factor: float) -> str:
    """Return the interval of a prediction."""
    low, high = (_times(prediction[name], factor) for name in ("low", "high"))
    return "–" if low is None or high is None else f"{short(low)} to {short(high)}"


def short(value: float) -> str:
    """Return a number with about three digits; near a hundred (percent) with two behind the point."""
    if 99 <= abs(value) < 100:
        return f"{value:.2f}"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _choice_row(name: str, choice: Mapping[str, Any]) -> Row:
    config, predicted = choice["config"], choice["predicted"]
    memory = choice["memory_per_gpu_bytes"]
    return {
        "choice": name,
        "GPUs": config["tp"] * config["replicas"],
        "shape": shape(config),
        "requests at once": config["max_num_seqs"],
        "tokens a step": config["max_num_batched_tokens"],
        "sustains, requests/s": predicted["sustainable_rps"]["value"],
        "TTFT p95, ms": milliseconds(predicted["ttft_p95_s"]["value"]),
        "TPOT p95, ms": milliseconds(predicted["tpot_p95_s"]["value"]),
        "meet the SLO, %": percent(predicted["slo_attainment"]["value"]),
        "memory used, GB": gigabytes(memory["total"] - memory["free"] - memory["unused"]),
        "what binds": binding(choice["bottleneck"]),
        "$ an hour": choice["cost_usd_per_hour"],
        "costs rest on": predicted["sustainable_rps"]["provenance"],
    }


def _spread(row: Mapping[str, Any], side: str) -> str:
    value, low, high = (row[name] for name in (side, f"{side}_low", f"{side}_high"))
    if value is None:
        return "–"
    inner = "" if low is None or high is None or low == high else f" ({short(low)} to {short(high)})"
    return short(value) + inner


def _times(value: float | None, factor: float) -> float | None:
    return None if value is None else value * factor
