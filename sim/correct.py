"""Whole measured steps correct the composed operators: one factor a group, never negative, drawn towards 1."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import nnls

from sim.envelope import folds
from sim.fit import FitQuality, quality

Floats = NDArray[np.float64]

GROUPS = ("dense", "attention_decode", "attention_prefill", "lora", "head", "exchange", "lora_exchange")
STRENGTHS = (
    1e-4,
    1e-3,
    1e-2,
    1e-1,
)  # of the pull towards 1; the one with the smallest held-out error is taken


LEAST_STEPS = 30  # of a kind, for a correction of its own
HELD_UP = 1.3  # times what the GPU's work takes: the host's launches held the step up


@dataclass(frozen=True, slots=True)
class Correction:
    """step = constant + Σ factor · group."""

    constant_us: float
    factors: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Corrections:
    """Of decodes alone, and of steps with prompts: products of few tokens read weights, those of many are bound by what the GPU can do."""

    decodes: Correction
    prompts: Correction


def correct(
    groups_us: Floats, measured_us: Floats, prompts: NDArray[np.bool_]
) -> tuple[Corrections, FitQuality | None, Floats]:
    """Fit the corrections; return them, how good they are, and the relative errors held out.

    prompts: which steps have them. Where there are too few of either kind, one correction does for both; without steps it changes nothing.
    """
    if not len(measured_us):
        nothing = Correction(0.0, dict.fromkeys(GROUPS, 1.0))
        return Corrections(nothing, nothing), None, np.empty(0)
    kinds = [~prompts, prompts]
    if min(int(kind.sum()) for kind in kinds) < LEAST_STEPS:
        kinds = [np.ones(len(measured_us), dtype=bool)]
    fitted, held_out, found = np.empty(len(measured_us)), np.empty(len(measured_us)), []
    for kind in kinds:
        weights, held_out[kind] = _correct(groups_us[kind], measured_us[kind])
        fitted[kind] = _predict(weights, groups_us[kind])
        found.append(Correction(float(weights[0]), dict(zip(GROUPS, weights[1:].tolist(), strict=True))))
    fit = quality("whole step", "corrected sum", fitted, held_out, measured_us)
    return Corrections(found[0], found[-1]), fit, held_out / measured_us - 1


def _correct(groups_us: Floats, measured_us: Floats) -> tuple[Floats, Floats]:
    """Return constant and factors, and what each step was predicted to take without it."""
    trials = []
    for strength in STRENGTHS:
        predicted = np.empty(len(measured_us))
        for fold in folds(len(measured_us)):
            rest = np.ones(len(measured_us), dtype=bool)
            rest[fold] = False
            predicted[fold] = _predict(_solve(groups_us[rest], measured_us[rest], strength), groups_us[fold])
        trials.append((float(np.abs(predicted / measured_us - 1).mean()), strength, predicted))
    _, strength, held_out = min(trials, key=lambda trial: trial[0])
    return _solve(groups_us, measured_us, strength), held_out


def launches_us(work_us: Floats, measured_us: Floats) -> float:
    """Return what the host takes to launch an eager step's kernels: the slowest of the steps that took far longer than the GPU's work. 0: few did.

    The slowest, as hosts differ by two times (medians of 49 and 90 ms on two machines with H200s) and a plan is for any of them.
    """
    late = measured_us[measured_us > HELD_UP * work_us]
    return float(late.max()) if 2 * len(late) > len(measured_us) else 0.0


def _predict(weights: Floats, groups_us: Floats) -> Floats:
    total: Floats = weights[0] + groups_us @ weights[1:]
    return total


def _solve(groups_us: Floats, measured_us: Floats, strength: float) -> Floats:
    """Least squares of relative errors, with rows that pull the constant to 0 and every factor to 1."""
    count = len(measured_us)
    columns = (
        np.column_stack([np.ones(count), groups_us]) / measured_us[:, None]
        if count
        else np.empty((0, 1 + len(GROUPS)))
    )
    unit = np.array([float(np.median(measured_us)) if count else 1.0, *np.ones(len(GROUPS))])
    pull = np.sqrt(strength * max(count, 1)) / unit
    matrix = np.vstack([columns, np.diag(pull)])
    target = np.concatenate([np.ones(count), [0.0], pull[1:]])
    solution: Floats = nnls(matrix, target)[0]
    return solution
