"""Results as aligned text."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from sim.fit import FitReport
from sim.intervals import Interval
from sim.result import SimResult

MOST_REASONS = 3  # of refusals are shown; the JSON form has all


def result_lines(result: SimResult) -> list[str]:
    """Show a simulation: metrics, what was used, what bounds it."""
    rows = [[name, _metric(name, value)] for name, value in result.metrics.items()]
    use = result.utilisation
    rows += [[f"use: {name}", f"{getattr(use, name):.1%}"] for name in _SHARES]
    rows += [["decoding sequences a step", f"{use.batch_mean:.1f}"]]
    rows += [[f"GPU time: {part}", f"{share:.1%}"] for part, share in use.time_shares.items()]
    rows += [["bottleneck", result.bottleneck]]
    reasons = sorted(result.refused.items(), key=lambda item: -item[1])
    rows += [["refused", str(sum(result.refused.values()))]] if reasons else []
    rows += [[f"  {reason}", str(count)] for reason, count in reasons[:MOST_REASONS]]
    return aligned(rows)


def interval_lines(found: Mapping[str, Interval]) -> list[str]:
    """Show where metrics should lie, nine times of ten, and what their predictions rest on."""
    rows = [["where it should lie (90 %)", "from", "to", "rests on"]] if found else []
    rows += [
        [name, _metric(name, item.low), _metric(name, item.high), item.provenance]
        for name, item in found.items()
    ]
    return ["", *aligned(rows)] if rows else []


def fit_lines(report: FitReport) -> list[str]:
    """Show how well a profile is described; errors are absolute and relative."""
    fits = [*report.operators, *([report.steps] if report.steps is not None else [])]
    rows = [["what", "rows", "by", "median", "worst", "held out: median", "worst"]]
    for fit in fits:
        errors = (fit.median_error, fit.worst_error, fit.held_out_median_error, fit.held_out_worst_error)
        rows.append([fit.name, str(fit.rows), fit.method, *(_percent(100 * error) for error in errors)])
    return aligned(rows)


def validation_lines(outcome: Mapping[str, Any]) -> list[str]:
    """Show every comparison, then the summary by load level."""
    rows = [["run", "load", "metric", "measured", "predicted", "error"]]
    for row in outcome["rows"]:
        values = [_metric(row["metric"], row[name]) for name in ("measured", "predicted")]
        rows.append(
            [row["run"], row["load_level"], row["metric"], *values, _percent(row["error_pct"], sign=True)]
        )
    rows += [[], ["load", "", "metric", "median |error|", "worst |error|", "bias"]]
    for level, by_metric in outcome["summary"].items():
        for metric, errors in by_metric.items():
            worst = (errors["median_abs_error_pct"], errors["worst_abs_error_pct"])
            cells = [*(_percent(error) for error in worst), _percent(errors["bias_pct"], sign=True)]
            rows.append([level, "", metric, *cells])
    return [*aligned(rows), "", *_verdict_lines(outcome), "", *_agreement_lines(outcome)]


def _verdict_lines(outcome: Mapping[str, Any]) -> list[str]:
    """Show what is asked, and what twins and intervals say."""
    met = {True: "met", False: "missed", None: "not told"}
    rows = [["asked", "where", "runs", "value", "target", "noise floor", "allowed"]]
    for row in outcome["verdicts"]:
        numbers = (row[f"{name}_pct"] for name in ("value", "target", "noise", "allowed"))
        what = f"{row['metric']}, {row['statistic']} |error|"
        cells = [what, row["where"], str(row["runs"]), *(_percent(number) for number in numbers)]
        rows.append([*cells, met[row["met"]]])
    coverage = outcome["coverage"]
    shares = (coverage["bootstrap_pct"], coverage["stretched_pct"])
    held = f"90 % intervals hold: {_percent(shares[0])} of the measurements, stretched by other runs {_percent(shares[1])}"
    return [*aligned(rows), held, *(f"lacking: {line}" for line in outcome["shortfalls"])]


def _agreement_lines(outcome: Mapping[str, Any]) -> list[str]:
    """Show how runs agree request by request and step by step."""
    rows = [["request by request", "", "correlation", "median |error|", "bias"]]
    for row in outcome["requests"]:
        correlation = "–" if row["correlation"] is None else f"{row['correlation']:.3f}"
        errors = (_percent(row["median_abs_error_pct"]), _percent(row["bias_pct"], sign=True))
        rows.append([row["run"], row["metric"], correlation, *errors])
    rows += [[], ["step by step", "", "steps", "median |error|", "bias", "total"]]
    for row in outcome["steps"]:
        errors = (_percent(row["median_abs_error_pct"]), _percent(row["bias_pct"], sign=True))
        total = _percent(row["total_error_pct"], sign=True)
        rows.append([row["run"], row["kind"], f"{row['steps']:,}", *errors, total])
    return aligned(rows)


def bench_lines(rows: Iterable[Mapping[str, Any]], modules: str) -> list[str]:
    """Show the speed at each load, and whether compiled modules ran."""
    cells = [["load", "requests", "requests/s", "peak memory"]]
    for row in rows:
        memory = f"{row['peak_rss_bytes'] / 1e6:.0f} MB"
        cells.append([row["load"], f"{row['requests']:,}", f"{row['requests_per_s']:,.0f}", memory])
    return [*aligned(cells), modules]


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Pad cells to columns; the first column is left-aligned, and so is any that holds no number."""
    count = max(len(row) for row in rows)
    widths = [max((len(row[i]) for row in rows if i < len(row)), default=0) for i in range(count)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=False)).rstrip()
        for row in rows
    ]


_SHARES = (
    "step_share",
    "gpu_share",
    "link_share",
    "kv_pages_mean",
    "kv_pages_max",
    "adapter_pages_mean",
    "adapter_pages_max",
    "sequences_mean",
)


def _metric(name: str, value: float | None) -> str:
    if value is None or value != value:
        return "–"
    if name.endswith("_s") and not name.endswith("_per_s"):
        return f"{value * 1e3:,.2f} ms"
    return f"{value:,.0f}" if value == int(value) and abs(value) >= 10 else f"{value:,.3f}"


def _percent(value: float | None, *, sign: bool = False) -> str:
    if value is None or value != value:
        return "–"
    return f"{value:+.1f} %" if sign else f"{value:.1f} %"
