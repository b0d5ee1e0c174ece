"""How a simulation agrees with a record beyond its metrics: by group of adapters, request by request, and step by step."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from sim.heating import Heat, Heating
from sim.records import RecordedRun, recorded_steps
from sim.replica import StepTimes
from sim.result import SimResult, plain
from traces.metrics import metrics

Floats = NDArray[np.float64]

GROUP_METRICS = ("ttft_p50_s", "ttft_p95_s", "tpot_p50_s", "e2e_p50_s", "e2e_p95_s")
THIRDS = ("hot", "middle", "rare")  # of the requests, by how popular their adapter is in the run
KINDS = ("decode", "mixed", "prompt")  # of steps: decodes alone, with prompts beside them, prompts alone


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupRow:
    """One metric of the requests of one group of adapters in one run. by: what groups them."""

    run: str
    load_level: str
    by: str
    group: str
    requests: int
    metric: str
    measured: float
    predicted: float

    def to_json(self) -> dict[str, Any]:
        numbers = {
            "measured": self.measured,
            "predicted": self.predicted,
            "error_pct": error_pct(self.predicted, self.measured),
        }
        texts = {
            name: getattr(self, name) for name in ("run", "load_level", "by", "group", "requests", "metric")
        }
        return texts | plain(numbers)


def error_pct(predicted: float, measured: float) -> float:
    """Return predicted over measured − 1, in percent; NaN where that cannot be told."""
    return 100 * (predicted / measured - 1) if measured else float("nan")


def by_group(run: RecordedRun, result: SimResult, level: str) -> Iterator[GroupRow]:
    """Compare the requests of each rank, and of hot, middle and rare adapters; nothing where a run has one group only."""
    predicted = result.requests
    for by, labels in (("rank", _ranks(run.requests)), ("popularity", _popularity(run.requests))):
        names = [name for name in dict.fromkeys(labels) if name]
        if len(names) < 2:
            continue
        for name in sorted(names, key=_order):
            rows = np.array([label == name for label in labels])
            measured, simulated = metrics(run.requests[rows]), metrics(predicted[rows])
            for metric in GROUP_METRICS:
                yield GroupRow(
                    run=run.name,
                    load_level=level,
                    by=by,
                    group=name,
                    requests=int(rows.sum()),
                    metric=metric,
                    measured=measured[metric],
                    predicted=simulated[metric],
                )


def _ranks(requests: pd.DataFrame) -> list[str]:
    pairs = zip(requests["adapter"].tolist(), requests["rank"].tolist(), strict=True)
    return [f"rank {rank:.0f}" if isinstance(adapter, str) else "base" for adapter, rank in pairs]


def _popularity(requests: pd.DataFrame) -> list[str]:
    """Return which third of the requests with an adapter each is in, the most popular adapters first; "" for the base model."""
    adapters = requests["adapter"].tolist()
    counts = pd.Series([name for name in adapters if isinstance(name, str)], dtype=object).value_counts()
    if len(counts) < len(THIRDS):
        return [""] * len(adapters)
    counts = counts.sort_index().sort_values(ascending=False, kind="stable")
    before = (counts.cumsum() - counts) / counts.sum()
    third = {
        str(name): THIRDS[min(2, int(3 * share))]
        for name, share in zip(counts.index, before.tolist(), strict=True)
    }
    return [third[name] if isinstance(name, str) else "" for name in adapters]


def _order(name: str) -> tuple[int, str]:
    if name in THIRDS:
        return THIRDS.index(name), name
    return int(name.split()[1]) if name.startswith("rank") else -1, name


def by_request(run: RecordedRun, result: SimResult, level: str) -> list[dict[str, Any]]:
    """Compare TTFT, TPOT and E2E request by request: correlation, median absolute error and signed median error in percent."""
    measured, predicted = _latencies(run.requests), _latencies(result.columns)
    rows: list[dict[str, Any]] = []
    for name, of_run in measured.items():
        of_simulation = predicted[name]
        known = np.isfinite(of_run) & np.isfinite(of_simulation) & (of_run > 0)
        a, b = of_run[known], of_simulation[known]
        errors = 100 * (b / a - 1)
        varies = len(a) > 2 and a.std() > 0 and b.std() > 0
        numbers = {
            "correlation": float(np.corrcoef(a, b)[0, 1]) if varies else float("nan"),
            "median_abs_error_pct": float(np.median(np.abs(errors))) if len(a) else float("nan"),
            "bias_pct": float(np.median(errors)) if len(a) else float("nan"),
        }
        rows.append(
            {"run": run.name, "load_level": level, "metric": name, "requests": len(a)} | plain(numbers)
        )
    return rows


def _latencies(requests: Mapping[str, Any] | pd.DataFrame) -> dict[str, Floats]:
    names = ("arrival_s", "first_token_s", "finish_s", "output_tokens")
    arrival_s, first_s, finish_s, tokens = (np.asarray(requests[name], dtype=float) for name in names)
    tpot_s = np.full(len(tokens), np.nan)
    np.divide(finish_s - first_s, tokens - 1, out=tpot_s, where=tokens > 1)
    return {"ttft_s": first_s - arrival_s, "tpot_s": tpot_s, "e2e_s": finish_s - arrival_s}


def by_step(run: RecordedRun, costs: StepTimes) -> list[dict[str, Any]]:
    """Price the recorded shapes: relative error by kind of step (median, signed and absolute, and p95), and of their total time.

    Steps with prompts run on GPUs as hot as the steps before made them. Where only some steps were kept, these stand for the rest, one right
    behind the other.
    """
    steps = recorded_steps(run)
    if not steps:
        return []
    measured = np.array([duration_s for _, duration_s in steps])
    predicted = np.array([costs.step_s(shape) for shape, _ in steps])
    if costs.heating is not None:
        prompts = [(index, shape.tokens) for index, (shape, _) in enumerate(steps) if shape.prefill_chunks]
        heats, starts_s = _heats(run, costs.heating), _starts_s(run)
        for index, tokens in prompts:
            predicted[index] = heats[index].run(float(predicted[index]), tokens, float(starts_s[index]))
    kinds = np.array([kind_of(shape.decode_rows, shape.prefill_chunks) for shape, _ in steps])
    found = [("all", np.ones(len(steps), dtype=bool)), *((kind, kinds == kind) for kind in KINDS)]
    return [
        {"run": run.name, "kind": kind, "steps": int(rows.sum())}
        | _step_errors(predicted[rows], measured[rows])
        for kind, rows in found
        if rows.any()
    ]


def _heats(run: RecordedRun, heating: Heating) -> list[Heat]:
    """Return the heat of the replica that ran each step."""
    replicas = run.steps["replica"].tolist() if "replica" in run.steps else [0] * len(run.steps)
    of_replica = {replica: Heat(heating) for replica in replicas}
    return [of_replica[replica] for replica in replicas]


def _starts_s(run: RecordedRun) -> Floats:
    """Return when each step started; of a thinned record, if those kept had followed each other."""
    steps = run.steps
    if run.steps_every == 1 and "start_s" in steps:
        return np.asarray(steps["start_s"], dtype=float)
    durations_s = steps["duration_s"].astype(float)
    ends_s = durations_s.groupby(steps["replica"]).cumsum() if "replica" in steps else durations_s.cumsum()
    return np.asarray(ends_s - durations_s, dtype=float)


def kind_of(decode_rows: int, prefill_chunks: int) -> str:
    """Name the kind of a step."""
    return "decode" if not prefill_chunks else "mixed" if decode_rows else "prompt"


def _step_errors(predicted: Floats, measured: Floats) -> dict[str, float | None]:
    errors = 100 * (predicted / measured - 1)
    return plain(
        {
            "median_abs_error_pct": float(np.median(np.abs(errors))),
            "p95_abs_error_pct": float(np.quantile(np.abs(errors), 0.95)),
            "bias_pct": float(np.median(errors)),
            "total_error_pct": float(100 * (predicted.sum() / measured.sum() - 1)),
        }
    )


def group_summary(rows: Iterable[GroupRow]) -> list[dict[str, Any]]:
    """Return median, worst and signed mean error over runs by group and metric."""
    frame = pd.DataFrame(
        [
            {"by": r.by, "group": r.group, "metric": r.metric, "error": error_pct(r.predicted, r.measured)}
            for r in rows
        ]
    )
    if frame.empty:
        return []
    found = []
    for (by, group, metric), errors in frame.dropna().groupby(["by", "group", "metric"], sort=False)["error"]:
        numbers = {
            "median_abs_error_pct": float(errors.abs().median()),
            "worst_abs_error_pct": float(errors.abs().max()),
            "bias_pct": float(errors.mean()),
        }
        found.append({"by": by, "group": group, "metric": metric, "runs": len(errors)} | plain(numbers))
    return found
