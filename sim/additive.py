"""Sums of nonnegative ramps: time by several sizes, never negative and never falling."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import inf

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import nnls

Floats = NDArray[np.float64]

KNOT_QUANTILES = (0.25, 0.5, 0.75)


@dataclass(frozen=True, slots=True)
class Ramp:
    """`slope` × how far feature `index` is between `low` and `high`."""

    index: int
    low: float
    high: float
    slope: float = 1.0


@dataclass(frozen=True, slots=True)
class Additive:
    """constant + Σ slope · (clip(x, low, high) − low), all coefficients ≥ 0."""

    constant: float
    ramps: tuple[Ramp, ...]

    def scaled(self, factor: float) -> Additive:
        """Return this times a factor."""
        ramps = tuple(Ramp(ramp.index, ramp.low, ramp.high, ramp.slope * factor) for ramp in self.ramps)
        return Additive(self.constant * factor, ramps)

    def over_model(self, layers: int, per_layer: Sequence[float]) -> Additive:
        """Return `layers` times this, for features of the whole model, of which a layer has `per_layer`."""
        ramps = tuple(
            Ramp(
                r.index,
                r.low / per_layer[r.index],
                r.high / per_layer[r.index],
                r.slope * per_layer[r.index] * layers,
            )
            for r in self.ramps
        )
        return Additive(self.constant * layers, ramps)

    def stretched(self, factors: Sequence[float]) -> Additive:
        """Return this for features that are `factors` times what was measured:

        a slope for each, the knots where they are.
        """
        ramps = tuple(
            Ramp(ramp.index, ramp.low, ramp.high, ramp.slope * factors[ramp.index]) for ramp in self.ramps
        )
        return Additive(self.constant, ramps)

    def many(self, features: Floats) -> Floats:
        """Return the values at rows of features."""
        total = np.full(len(features), self.constant)
        for ramp, covered in zip(self.ramps, _covered(features, self.ramps).T, strict=True):
            total += ramp.slope * covered
        return total


def _covered(features: Floats, ramps: Sequence[Ramp]) -> Floats:
    """Return how far each row's features are up each ramp, its slope left out: one column a ramp."""
    low = np.array([ramp.low for ramp in ramps])
    covered: Floats = features[:, [ramp.index for ramp in ramps]]
    covered = covered.clip(low, [ramp.high for ramp in ramps])
    beyond: Floats = covered - low
    return beyond


def fit_additive(features: Floats, y: Floats, ramps: Sequence[Ramp]) -> Additive:
    """Fit by nonnegative least squares on relative errors; ramps that get no slope are left out."""
    matrix = np.ones((len(y), len(ramps) + 1))
    matrix[:, 1:] = _covered(features, ramps)
    matrix /= y[:, None]
    largest = matrix.max(axis=0)
    scale = np.where(largest > 0, largest, 1.0)
    weights, _ = nnls(matrix / scale, np.ones(len(y)))
    weights = weights / scale
    kept = [(ramp, slope) for ramp, slope in zip(ramps, weights[1:].tolist(), strict=True) if slope > 0]
    return Additive(
        float(weights[0]), tuple(Ramp(ramp.index, ramp.low, ramp.high, slope) for ramp, slope in kept)
    )


def straight_lines(features: Floats) -> list[Ramp]:
    """Return one ramp a feature, without ends."""
    return [Ramp(index, 0.0, inf) for index in range(features.shape[1])]


def broken_lines(features: Floats) -> list[Ramp]:
    """Return ramps between the quartiles of each feature's values."""
    ramps = []
    for index in range(features.shape[1]):
        values = np.unique(features[:, index])
        knots = (
            np.unique(np.quantile(values[values > 0], KNOT_QUANTILES)) if (values > 0).any() else np.empty(0)
        )
        edges = [0.0, *knots.tolist(), inf]
        ramps += [Ramp(index, low, high) for low, high in pairwise(edges)]
    return ramps
