"""docs/validation.md from the object of `sim validate`: every figure on the page is computed, none is typed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from sim.validation_plot import PANELS, validation_svg

PAGE, PLOT = "validation.md", "validation.svg"
LEVELS = ("under50", "50to80", "80to95", "saturated", "all")
SHOWN = tuple(metric for metric, _, _ in PANELS)
MORE = ("ttft_p95_s", "tpot_p95_s", "tpot_p99_s", "e2e_p50_s", "e2e_p99_s")
MET = {True: "met", False: "**missed**", None: "not told"}

Rows = Sequence[Sequence[str]]


def write_page(
    folder: Path, outcome: Mapping[str, Any], command: str, also: Mapping[str, Any] | None = None
) -> None:
    """Write the page and its plot into a folder. command: what made it; also: the object of other runs, whose rows are not committed."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / PLOT).write_text(validation_svg(outcome["rows"]), encoding="utf-8")
    text = "\n".join(page_lines(outcome, command, also)) + "\n"
    (folder / PAGE).write_text(text, encoding="utf-8")


def page_lines(
    outcome: Mapping[str, Any], command: str, also: Mapping[str, Any] | None = None
) -> Iterator[str]:
    """Yield the page's lines."""
    yield "# Validation: the simulator against recorded runs"
    yield ""
    yield f"Made by `{command}`; do not edit. {outcome['runs']} records of the engine on GPUs, {outcome['noise']['pairs']} pairs of them of"
    yield "one trace. The cost model is fitted to the profile's grid of steps; no record is used to fit it. How each metric is defined:"
    yield "[metrics.md](metrics.md); how records are made: `docs/measured/record_runs.py`; how a GPU is calibrated: [calibration.md](calibration.md)."
    yield ""
    yield f"![predicted against measured]({PLOT})"
    yield ""
    for part in (_verdicts, _levels, _runs, _facts, _groups, _requests, _steps, _noise, _coverage):
        yield from part(outcome)
    if also is not None:
        yield from _also(also)


def _verdicts(outcome: Mapping[str, Any]) -> Iterator[str]:
    yield "## What is asked"
    yield ""
    yield "*Allowed* is the target, or twice the noise floor where that is more: the same statistic of the differences between two records of"
    yield "one trace."
    yield ""
    rows = [
        [
            f"{row['metric']}, {row['statistic']} absolute error",
            row["where"],
            str(row["runs"]),
            _percent(row["value_pct"]),
            _percent(row["target_pct"]),
            _percent(row["noise_pct"]),
            _percent(row["allowed_pct"]),
            MET[row["met"]],
        ]
        for row in outcome["verdicts"]
    ]
    yield from _table(("what", "where", "runs", "value", "target", "noise", "allowed", ""), rows)
    for line in outcome["shortfalls"]:
        yield f"* Lacking: {line}."
    if outcome["shortfalls"]:
        yield ""


def _levels(outcome: Mapping[str, Any]) -> Iterator[str]:
    yield "## By load level"
    yield ""
    yield "Median |error| · worst |error| · bias (signed mean), percent."
    yield ""
    levels = [level for level in LEVELS if level in outcome["summary"]]
    rows = []
    for metric in (*SHOWN, *MORE):
        cells = [outcome["summary"][level].get(metric) for level in levels]
        rows.append([metric, *(_three(cell) for cell in cells)])
    yield from _table(("metric", *levels), rows)


def _three(cell: Mapping[str, float | None] | None) -> str:
    if cell is None:
        return "–"
    median, worst, bias = (cell[name] for name in ("median_abs_error_pct", "worst_abs_error_pct", "bias_pct"))
    return f"{_number(median)} · {_number(worst)} · {_number(bias, sign=True)}"


def _runs(outcome: Mapping[str, Any]) -> Iterator[str]:
    yield "## Every run"
    yield ""
    yield "Measured, and the prediction's error in percent."
    yield ""
    by_run: dict[str, dict[str, Mapping[str, Any]]] = {}
    for row in outcome["rows"]:
        by_run.setdefault(row["run"], {})[row["metric"]] = row
    rows = []
    for run, found in by_run.items():
        cells = [run, next(iter(found.values()))["load_level"]]
        for metric, _, unit in PANELS:
            measured = found[metric]["measured"]
            shown = (
                "–"
                if measured is None
                else f"{unit * measured:,.0f}"
                if unit * measured >= 1000
                else f"{unit * measured:.3g}"
            )
            cells.append(f"{shown} ({_number(found[metric]['error_pct'], sign=True)})")
        rows.append(cells)
    yield from _table(("run", "load", *(title for _, title, _ in PANELS)), rows)


def _facts(outcome: Mapping[str, Any]) -> Iterator[str]:
    yield "## What was run"
    yield ""
    rows = []
    for fact in outcome["run_facts"]:
        ranks = fact["ranks"]
        spread = "–" if not ranks else str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"
        split = f"TP {fact['tp']}, {fact['lora_sharding']}" if fact["tp"] > 1 else "TP 1"
        split += f" × {fact['replicas']}" if fact["replicas"] > 1 else ""
        load = "–" if fact["load"] is None else f"{fact['load']:.2f}"
        cells = (fact["requests"], f"{fact['duration_s']:.0f}", fact["adapters"], spread, split, load)
        rows.append([fact["run"], *(str(cell) for cell in cells), fact["machine"]])
    yield from _table(
        ("run", "requests", "seconds", "adapters", "ranks", "GPUs", "load", "GPU, driver, commit, date"), rows
    )


def _groups(outcome: Mapping[str, Any]) -> Iterator[str]:
    summary = outcome["groups"]["summary"]
    if not summary:
        return
    yield "## By group of adapters"
    yield ""
    yield "*hot*, *middle*, *rare*: thirds of a run's requests, the most popular adapters first. Median · worst · bias, percent, over the runs"
    yield "that have the group."
    yield ""
    metrics = list(dict.fromkeys(row["metric"] for row in summary))
    keys = list(dict.fromkeys((row["by"], row["group"]) for row in summary))
    rows = []
    for by, group in keys:
        found = {row["metric"]: row for row in summary if (row["by"], row["group"]) == (by, group)}
        runs = str(max(row["runs"] for row in found.values()))
        rows.append([by, group, runs, *(_three(found.get(metric)) for metric in metrics)])
    yield from _table(("by", "group", "runs", *metrics), rows)


def _requests(outcome: Mapping[str, Any]) -> Iterator[str]:
    yield "## Request by request"
    yield ""
    yield "Correlation of predicted with measured · median |error| · median error, percent."
    yield ""
    by_run: dict[str, dict[str, Mapping[str, Any]]] = {}
    for row in outcome["requests"]:
        by_run.setdefault(row["run"], {})[row["metric"]] = row
    metrics = ("ttft_s", "tpot_s", "e2e_s")
    rows = [[run, *(_of_requests(found.get(metric)) for metric in metrics)] for run, found in by_run.items()]
    yield from _table(("run", *metrics), rows)


def _of_requests(row: Mapping[str, Any] | None) -> str:
    if row is None or row["median_abs_error_pct"] is None:
        return "–"
    correlation = "–" if row["correlation"] is None else f"{row['correlation']:.3f}"
    return f"{correlation} · {_number(row['median_abs_error_pct'])} · {_number(row['bias_pct'], sign=True)}"


def _steps(outcome: Mapping[str, Any]) -> Iterator[str]:
    if not outcome["steps"]:
        return
    yield "## Step by step"
    yield ""
    yield "The recorded batch shapes priced one by one, so that no queue is between: median |error| · 95th percentile of |error| · median error,"
    yield "percent (number of steps). *total*: of the sum of all steps' times."
    yield ""
    kinds = list(dict.fromkeys(row["kind"] for row in outcome["steps"]))
    by_run: dict[str, dict[str, Mapping[str, Any]]] = {}
    for row in outcome["steps"]:
        by_run.setdefault(row["run"], {})[row["kind"]] = row
    rows = []
    for run, found in by_run.items():
        cells = [_of_steps(found.get(kind)) for kind in kinds]
        rows.append([run, *cells, _number(found["all"]["total_error_pct"], sign=True)])
    yield from _table(("run", *kinds, "total"), rows)


def _of_steps(row: Mapping[str, Any] | None) -> str:
    if row is None:
        return "–"
    errors = (row["median_abs_error_pct"], row["p95_abs_error_pct"])
    return f"{_number(errors[0])} · {_number(errors[1])} · {_number(row['bias_pct'], sign=True)} ({row['steps']:,})"


def _noise(outcome: Mapping[str, Any]) -> Iterator[str]:
    noise = outcome["noise"]
    yield "## The noise floor"
    yield ""
    if not noise["pairs"]:
        yield "No trace was recorded twice, so there is none."
        yield ""
        return
    yield "Two records of the same trace under the same configuration: the second's difference to the first, percent of their mean."
    yield ""
    metrics = (*SHOWN, "tpot_p95_s", "e2e_p50_s")
    pairs = list(dict.fromkeys((row["run"], row["again"]) for row in noise["rows"]))
    rows = []
    for run, again in pairs:
        found = {
            row["metric"]: row["difference_pct"]
            for row in noise["rows"]
            if (row["run"], row["again"]) == (run, again)
        }
        rows.append([f"{run}, {again}", *(_number(found.get(metric), sign=True) for metric in metrics)])
    for name, key in (("median of absolute values", "median_pct"), ("worst", "worst_pct")):
        found = {metric: noise["summary"].get(metric, {}).get(key) for metric in metrics}
        rows.append([f"*{name}*", *(_number(found[metric]) for metric in metrics)])
    yield from _table(("records", *metrics), rows)


def _coverage(outcome: Mapping[str, Any]) -> Iterator[str]:
    coverage = outcome["coverage"]
    if coverage["bootstrap_pct"] is None:
        return
    yield "## Intervals"
    yield ""
    yield f"How many measurements the {coverage['wanted_pct']:.0f} % intervals hold. *bootstrap*: over the held-out errors of whole steps, pushed"
    yield "through the queue (`sim/intervals.py`), knowing no record. *stretched*: by a factor a family of metrics that the records of **other**"
    yield "traces tell (leave one trace out);"
    yield "the drawn lines in the plot."
    yield ""
    rows = [
        [metric, _percent(found["bootstrap_pct"]), _percent(found["stretched_pct"])]
        for metric, found in coverage["by_metric"].items()
    ]
    rows.append(["*all*", _percent(coverage["bootstrap_pct"]), _percent(coverage["stretched_pct"])])
    yield from _table(("metric", "bootstrap", "stretched"), rows)
    told = [f"{family} {factor:.2f}" for family, factor in coverage["stretch"].items() if factor is not None]
    if told:
        yield f"Factors that all records together tell: {', '.join(told)}."
        yield ""


def _also(outcome: Mapping[str, Any]) -> Iterator[str]:
    yield "## Slices of real traces"
    yield ""
    yield f"{outcome['runs']} runs whose requests are rows of real traces, which are not committed; only their errors are. Error in percent."
    yield ""
    by_run: dict[str, dict[str, Any]] = {}
    levels: dict[str, str] = {}
    for row in outcome["rows"]:
        by_run.setdefault(row["run"], {})[row["metric"]] = row["error_pct"]
        levels[row["run"]] = row["load_level"]
    rows = [
        [run, levels[run], *(_number(found.get(metric), sign=True) for metric in SHOWN)]
        for run, found in by_run.items()
    ]
    yield from _table(("run", "load", *SHOWN), rows)


def _table(head: Sequence[str], rows: Rows) -> Iterator[str]:
    yield f"| {' | '.join(head)} |"
    yield f"|{'---|' * len(head)}"
    for row in rows:
        yield f"| {' | '.join(row)} |"
    yield ""


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{value:.1f} %"


def _number(value: float | None, *, sign: bool = False) -> str:
    return "–" if value is None else f"{value:+.1f}" if sign else f"{value:.1f}"
