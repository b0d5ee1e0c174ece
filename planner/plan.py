"""A plan: what is recommended, what it will do, what else there is, and what all that rests on."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from engine.config import ServingConfig
from planner.headroom import Resource, first_to_break
from planner.retraining import Retraining
from planner.space import Infeasible
from planner.trial import Trial
from planner.workload import Piece
from sim.intervals import Interval
from traces.metrics import Slo

_NUMBER = re.compile(r"\d+(\.\d+)?")
Objective = Literal["goodput", "min-gpus", "pareto"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """A configuration and what is predicted of it.

    predicted: metrics at the rate that is asked for, by key, and `sustainable_rps`. judged_on, predicted_on: what
    piece of the trace `sustainable_rps` and the metrics come from. memory_per_gpu_bytes: adds up to the GPU's memory; adapters and KV at
    their peak at the highest sustainable rate. bottleneck: what bounds it there. misses: what most requests that
    miss the SLO at the rate asked for miss, where it is not met. resources: what is used at the highest rate, the fullest first.
    adapters_missing: attainment, at the rate asked for, of the adapters that miss the SLO's, the worst first.
    cost_usd_per_million_tokens: of prompts and outputs together, at the highest sustainable rate.
    """

    config: ServingConfig
    predicted: Mapping[str, Interval]
    sustainable_rps: float
    judged_on: Piece
    predicted_on: Piece
    memory_per_gpu_bytes: Mapping[str, int]
    bottleneck: str
    cost_usd_per_hour: float | None
    meets_slo: bool
    misses: str | None
    resources: tuple[Resource, ...] = ()
    adapters_missing: Mapping[str, float] = field(default_factory=dict)
    cost_usd_per_million_tokens: float | None = None

    @property
    def breaks_first(self) -> Resource | None:
        """The resource with the least headroom at the highest sustainable rate."""
        return first_to_break(list(self.resources))

    def to_json(self) -> dict[str, Any]:
        """Return the JSON form."""
        return {
            "config": self.config.to_json(),
            "predicted": {name: value.to_json() for name, value in self.predicted.items()},
            "sustainable_rps": self.sustainable_rps,
            "judged_on": self.judged_on,
            "predicted_on": self.predicted_on,
            "memory_per_gpu_bytes": dict(self.memory_per_gpu_bytes),
            "bottleneck": self.bottleneck,
            "cost_usd_per_hour": self.cost_usd_per_hour,
            "meets_slo": self.meets_slo,
            "misses": self.misses,
            "resources": [item.to_json() for item in self.resources],
            "breaks_first": None if self.breaks_first is None else self.breaks_first.name,
            "adapters_missing_slo": dict(self.adapters_missing),
            "cost_usd_per_million_tokens": self.cost_usd_per_million_tokens,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class RunnerUp:
    """The second best, and what it would take to prefer it."""

    config: ServingConfig
    sustainable_rps: float
    would_take: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Return the JSON form."""
        return {
            "config": self.config.to_json(),
            "sustainable_rps": self.sustainable_rps,
            "would_take": list(self.would_take),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """The answer. `recommended` is None where no configuration meets the SLO: then there is `nearest`.

    interrupted: by Ctrl-C: the best so far. front: with the objective `pareto`, what no other beats in GPUs and in rate.
    """

    objective: Objective
    gpus: int
    rate_rps: float
    requests: int
    recommended: Choice | None
    fewest_gpus: Choice | None
    nearest: Choice | None
    alternatives: tuple[Choice, ...]
    slo: Slo
    assumptions: tuple[str, ...]
    warnings: tuple[str, ...]
    retraining: tuple[Retraining, ...]
    trials: tuple[Trial, ...]
    impossible: tuple[Infeasible, ...]
    interrupted: bool = False
    front: tuple[Choice, ...] = ()
    runner_up: RunnerUp | None = None

    def trial_rows(self) -> list[dict[str, Any]]:
        """Return everything that was tried, one object each."""
        rows = [trial.to_json() for trial in self.trials]
        return rows + [setting.to_json() for setting in self.impossible]

    @property
    def why_not(self) -> str | None:
        """Why nothing is recommended: the nearest miss and what binds; None where something is."""
        if self.recommended is not None:
            return None
        near = self.nearest
        if near is None:
            # Settings that fail alike differ in their numbers: one of each kind is enough.
            kinds = {_NUMBER.sub("", item.reason): item.reason for item in reversed(self.impossible)}
            return f"no feasible configuration: {'; '.join(sorted(kinds.values())[:3])}"
        return (
            f"no feasible configuration within {self.gpus} GPUs: the nearest, TP {near.config.tp} × {near.config.replicas}, "
            f"sustains {near.sustainable_rps:.2f} of {self.rate_rps:.2f} req/s; what binds: {near.misses}, {near.bottleneck}"
        )

    def to_json(self) -> dict[str, Any]:
        """Return the JSON form."""
        slo = self.slo
        return {
            "recommended": _json(self.recommended),
            "fewest_gpus": _json(self.fewest_gpus),
            "nearest_miss": _json(self.nearest),
            "why_not": self.why_not,
            "alternatives": [choice.to_json() for choice in self.alternatives],
            "objective": self.objective,
            "gpus": self.gpus,
            "trace": {"requests": self.requests, "rate_rps": self.rate_rps},
            "slo": {
                "ttft_s": slo.ttft_s,
                "tpot_s": slo.tpot_s,
                "e2e_s": slo.e2e_s,
                "percentile": slo.percentile,
                "attainment": slo.attainment,
            },
            "assumptions": list(self.assumptions),
            "warnings": list(self.warnings),
            "retraining": [item.to_json() for item in self.retraining],
            "runner_up": None if self.runner_up is None else self.runner_up.to_json(),
            "pareto": [choice.to_json() for choice in self.front],
            "trials": self.trial_rows(),
        }


def _json(choice: Choice | None) -> dict[str, Any] | None:
    return None if choice is None else choice.to_json()
