"""From observed steps to the coefficients of a step: least squares on relative errors, nothing below 0, and what the fit did not see as its judge."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import nnls

from engine.errors import UserError
from sim.vllm_steps import TERMS, Floats, KernelGrid, StepFacts, terms

FOLDS = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Observation:
    """A measured step time: of one kind of step, or the mean over steps of several kinds with their shares.

    name: tells it from others, and decides whether it is held out. weight: beside 1 of a step that was measured alone.
    """

    name: str
    group: str
    seconds: float
    mix: tuple[tuple[float, StepFacts], ...]
    weight: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class StepFit:
    """Coefficients by term, and relative errors: in sample by group, and held out."""

    seconds: Mapping[str, float]
    errors: Mapping[str, float]
    largest: Mapping[str, float]


def fit_steps(observations: Sequence[Observation], grids: Mapping[int, KernelGrid]) -> StepFit:
    """Fit. grids: by `max_lora_rank`. Raises UserError where nothing was observed."""
    if not observations:
        raise UserError("no step was measured: there is nothing to fit")
    rows = np.array([_row(observation, grids) for observation in observations])
    times = np.array([observation.seconds for observation in observations])
    weights = np.array([observation.weight for observation in observations])
    whole = _solve(rows, times, weights)
    held_out = np.full(len(times), np.nan)
    folds = np.array([_fold(observation.name) for observation in observations])
    for fold in range(FOLDS):
        left, out = folds != fold, folds == fold
        if out.any() and left.any():
            held_out[out] = rows[out] @ _solve(rows[left], times[left], weights[left]) / times[out] - 1
    errors = {"observations": float(len(times)), **_errors(observations, rows @ whole / times - 1, held_out)}
    return StepFit(
        seconds=dict(zip(TERMS, whole.tolist(), strict=True)),
        errors=errors,
        largest=_largest(observations),
    )


def _row(observation: Observation, grids: Mapping[int, KernelGrid]) -> Floats:
    total = np.zeros(len(TERMS))
    for share, facts in observation.mix:
        total += share * terms(facts, grids[facts.rank])
    return total


def _solve(rows: Floats, times: Floats, weights: Floats) -> Floats:
    """Minimise Σ weight · (predicted / measured − 1)² with no coefficient below 0; columns are scaled to be alike."""
    scaled = rows * (np.sqrt(weights) / times)[:, None]
    norms = np.linalg.norm(scaled, axis=0)
    used = norms > 0
    found = np.zeros(rows.shape[1])
    found[used] = nnls(scaled[:, used] / norms[used], np.sqrt(weights))[0] / norms[used]
    return found


def _fold(name: str) -> int:
    return int(sha256(name.encode()).hexdigest(), 16) % FOLDS


def _errors(observations: Sequence[Observation], in_sample: Floats, held_out: Floats) -> dict[str, float]:
    groups = np.array([observation.group for observation in observations])
    known = np.isfinite(held_out)
    values = {
        "in_sample_mape": _mape(in_sample),
        "held_out_mape": _mape(held_out[known]),
        "held_out_p90": float(np.quantile(np.abs(held_out[known]), 0.9)) if known.any() else 0.15,
    }
    for group in dict.fromkeys(groups.tolist()):
        values[f"held_out_mape_{group}"] = _mape(held_out[known & (groups == group)])
    return values


def _mape(errors: NDArray[np.float64]) -> float:
    return float(np.abs(errors).mean()) if len(errors) else 0.0


def _largest(observations: Sequence[Observation]) -> dict[str, float]:
    facts = [item for observation in observations for _, item in observation.mix]
    return {
        "tokens": max(item.tokens for item in facts),
        "kv_tokens": max(item.kv_tokens for item in facts),
        "adapters": max(item.adapters for item in facts),
        "slots": max(item.slots for item in facts),
        "rank": max(item.rank for item in facts if item.slots) if any(item.slots for item in facts) else 0,
    }
