"""Monotone curves through measurements: time by one size."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.interpolate import PchipInterpolator
from scipy.optimize import isotonic_regression

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True, eq=False)
class Curve:
    """A nondecreasing curve:

    measurements made monotone (isotonic regression), interpolated between, flat below the first size, and
    beyond the last straight on with the mean slope from the size of half that.
    """

    x: Floats
    y: Floats
    within: Callable[[Floats], Floats]

    def __call__(self, x: float) -> float:
        """Return the value at a size."""
        last = float(self.x[-1])
        if x <= last:
            return float(self.within(np.array([max(x, float(self.x[0]))]))[0])
        return float(self.y[-1]) + (x - last) * self._tail_slope()

    def many(self, x: Floats) -> Floats:
        """Return the values at some sizes."""
        return np.array([self(float(value)) for value in x])

    def _tail_slope(self) -> float:
        if len(self.x) == 1:
            return 0.0
        before = max(0, int(np.searchsorted(self.x, self.x[-1] / 2, side="right")) - 1)
        before = min(before, len(self.x) - 2)
        return float((self.y[-1] - self.y[before]) / (self.x[-1] - self.x[before]))


@dataclass(frozen=True, slots=True, eq=False)
class _LogLog:
    """Interpolation in log-log; a class, not a function in a function, so that a fit can go to other processes."""

    log: PchipInterpolator

    def __call__(self, at: Floats) -> Floats:
        return np.asarray(np.exp(self.log(np.log(at))))


@dataclass(frozen=True, slots=True, eq=False)
class _Straight:
    """Straight lines from point to point."""

    x: Floats
    y: Floats

    def __call__(self, at: Floats) -> Floats:
        return np.asarray(np.interp(at, self.x, self.y))


def fit_curve(x: Floats, y: Floats, kind: str = "pchip") -> Curve:
    """Fit a curve; measurements at one size are averaged. kind: "linear", or "pchip" in log-log."""
    sizes, index = np.unique(x, return_inverse=True)
    count = np.bincount(index)
    mean = np.bincount(index, weights=y) / count
    # Relative errors count: a weight of 1/y² makes a percent cost the same everywhere.
    level = np.asarray(isotonic_regression(mean, weights=count / mean**2).x)
    if kind == "pchip" and len(sizes) > 2 and sizes[0] > 0:
        log = PchipInterpolator(np.log(sizes), np.log(level))
        return Curve(sizes, level, _LogLog(log))
    return Curve(sizes, level, _Straight(sizes, level))


def held_out(x: Floats, y: Floats, kind: str) -> Floats:
    """Predict each inner size from the others; NaN at the two ends, which nothing surrounds."""
    predicted = np.full(len(x), np.nan)
    sizes = np.unique(x)
    for size in sizes[1:-1]:
        rest = x != size
        predicted[~rest] = fit_curve(x[rest], y[rest], kind)(float(size))
    return predicted


def best_curve(x: Floats, y: Floats) -> tuple[Curve, Floats]:
    """Fit the kind of curve with the smaller held-out error; return it and its held-out predictions."""
    trials = {kind: held_out(x, y, kind) for kind in ("linear", "pchip")}
    errors = {kind: _mean_error(predicted, y) for kind, predicted in trials.items()}
    kind = min(errors, key=lambda name: errors[name])
    return fit_curve(x, y, kind), trials[kind]


def _mean_error(predicted: Floats, y: Floats) -> float:
    known = ~np.isnan(predicted)
    return float(np.abs(predicted[known] / y[known] - 1).mean()) if known.any() else 0.0
