"""The largest of a few sums: time that one of several limits decides, by several sizes.

A kernel is bound by bytes, by operations or by latency, whichever takes longest. Each limit is a sum of
nonnegative terms, so the envelope is never negative and never falls. Which rows a limit rules is found by
turns: fit each limit to its rows, give each row to the limit that is largest there (Magnani and Boyd, Convex
piecewise-linear fitting, 2009).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from sim.additive import Additive, broken_lines, fit_additive, straight_lines

Floats = NDArray[np.float64]

FOLDS = 10
LIMITS = (2, 3)  # numbers of limits to try
STARTS = 4  # first guesses of which rows a limit rules
TURNS = 12
GOOD_ENOUGH = 0.002  # mean relative error held out: below what a measurement repeats to


@dataclass(frozen=True, slots=True)
class Envelope:
    """The largest of `limits`."""

    limits: tuple[Additive, ...]

    def scaled(self, factor: float) -> Envelope:
        """Return this times a factor."""
        return Envelope(tuple(limit.scaled(factor) for limit in self.limits))

    def stretched(self, factors: Sequence[float]) -> Envelope:
        """Return this with the slope of each feature times its factor."""
        return Envelope(tuple(limit.stretched(factors) for limit in self.limits))

    def over_model(self, layers: int, per_layer: Sequence[float]) -> Envelope:
        """Return `layers` times this, for features of the whole model, of which a layer has `per_layer`."""
        return Envelope(tuple(limit.over_model(layers, per_layer) for limit in self.limits))

    def many(self, features: Floats) -> Floats:
        """Return the values at rows of features."""
        values: Floats = np.max([limit.many(features) for limit in self.limits], axis=0)
        return values


@dataclass(frozen=True, slots=True)
class Choice:
    """A fit, how it was made, and what each row was predicted to be by a fit that had not seen it."""

    model: Envelope
    method: str
    held_out: Floats


def best_envelope(features: Floats, y: Floats) -> Choice:
    """Fit by straight lines, by broken lines and by several limits.

    The simplest is taken that no other beats by a tenth of its held-out error; where that is below
    GOOD_ENOUGH no other is tried.
    """
    best, least = None, np.inf
    for method, fit in _methods(features).items():
        predicted = held_out(features, y, fit)
        error = _error(predicted, y)
        if best is None or error < 0.9 * least:
            best, least = Choice(fit(features, y), method, predicted), error
        if least < GOOD_ENOUGH:
            break
    assert best is not None
    return best


def _methods(features: Floats) -> dict[str, Callable[[Floats, Floats], Envelope]]:
    lines, broken = straight_lines(features), broken_lines(features)
    methods: dict[str, Callable[[Floats, Floats], Envelope]] = {
        "lines": lambda x, y: Envelope((fit_additive(x, y, lines),)),
        "broken lines": lambda x, y: Envelope((fit_additive(x, y, broken),)),
    }
    for count in LIMITS:
        methods[f"max of {count} lines"] = partial(fit_limits, count=count)
    return methods


def held_out(features: Floats, y: Floats, fit: Callable[[Floats, Floats], Envelope]) -> Floats:
    """Predict each fold of the rows from the others."""
    predicted = np.full(len(y), float(y.mean()))
    for fold in folds(len(y)):
        rest = np.ones(len(y), dtype=bool)
        rest[fold] = False
        if rest.any():
            predicted[fold] = fit(features[rest], y[rest]).many(features[fold])
    return predicted


def fit_limits(features: Floats, y: Floats, count: int) -> Envelope:
    """Fit the largest of `count` straight limits, from a few first guesses; the best by mean relative error."""
    rng = np.random.default_rng(0)
    logs = np.log1p(features)
    logs = (logs - logs.mean(axis=0)) / (logs.std(axis=0) + 1e-9)
    best = Envelope((fit_additive(features, y, straight_lines(features)),))
    least = _error(best.many(features), y)
    turns: dict[bytes, _Turn | None] = {}  # guesses soon come to the same rows
    for _ in range(STARTS if len(y) > count else 0):
        centres = logs[rng.choice(len(y), count, replace=False)]
        ruler = ((logs[:, None] - centres[None]) ** 2).sum(axis=-1).argmin(axis=1)
        for _ in range(TURNS):
            state = ruler.tobytes()
            if state not in turns:
                turns[state] = _turn(features, y, ruler, count)
            turn = turns[state]
            if turn is None:
                break
            if turn.error < least:
                best, least = turn.model, turn.error
            if (turn.ruler == ruler).all():
                break
            ruler = turn.ruler
    return best


@dataclass(frozen=True, slots=True, eq=False)
class _Turn:
    """Limits fitted to the rows that each ruled, and which limit rules each row then."""

    model: Envelope
    error: float
    ruler: NDArray[np.intp]


def _turn(features: Floats, y: Floats, ruler: NDArray[np.intp], count: int) -> _Turn | None:
    """Fit a limit to the rows of each that rules enough of them; None where none does."""
    rules = (ruler == index for index in range(count))
    ruled = [rows for rows in rules if np.count_nonzero(rows) > features.shape[1]]
    if not ruled:
        return None
    lines = straight_lines(features)
    model = Envelope(tuple(fit_additive(features[rows], y[rows], lines) for rows in ruled))
    values = np.array([limit.many(features) for limit in model.limits])
    return _Turn(model, _error(values.max(axis=0), y), values.argmax(axis=0))


def _error(predicted: Floats, y: Floats) -> float:
    return float(np.abs(predicted / y - 1).mean())


def folds(count: int) -> list[NDArray[np.int64]]:
    """Return the rows of each fold: a fixed shuffle cut in at most FOLDS parts."""
    order = np.random.default_rng(0).permutation(count)
    return [order[start :: min(FOLDS, count)] for start in range(min(FOLDS, count))]
