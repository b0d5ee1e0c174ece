"""How the GPU's clock falls under prompts, whose products draw more power than the GPU may, averaged over some ten milliseconds.

A step of 1,024 tokens after decodes alone takes 21.3 ms, and 23.6 to 25 some 100 ms later (one H200, 2026-11-22); one of 512 11.4 and 13 to 14; one
of 128 hardly slows down, decodes do not. Prompts between decodes slow down only where they are most of the time. So a GPU has a level, 0 after
decodes alone and 1 where its average power has come to what it may be:

    with prompts   level' = (drive − level) / τ, at most 1; at 1 a step takes 1 + slowdown(tokens) times as long
    otherwise      level' = −level / τ; also with prompts so small that they do not slow down

`python -m engine profile` watches series of such steps, with decodes between them and without (`clock`), which give τ, drive and slowdown.
Costs are of a cool GPU; each replica has a level.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import exp, log

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

WATCHED_S = 0.4  # of a series: later it drifts with temperature, slowly
LEAST_SLOWDOWN = 0.005  # less is noise
TAUS_S = np.geomspace(0.01, 0.5, 40)
DRIVES = np.geomspace(1.05, 8.0, 40)


@dataclass(slots=True, unsafe_hash=True)  # not frozen: compiled, it could not be sent to another process
class Heating:
    """slowdowns: by how much a step of so many tokens takes longer at the limit, ascending in tokens; in between on a straight line."""

    tau_s: float
    drive: float
    tokens: tuple[float, ...]
    slowdowns: tuple[float, ...]

    def slowdown(self, tokens: float) -> float:
        """Return by how much a step with prompts of so many tokens in all is slower at the limit; 0.1 is a tenth."""
        return float(np.interp(tokens, (0.0, *self.tokens), (0.0, *self.slowdowns)))


class Heat:
    """The level of one replica's GPUs."""

    def __init__(self, heating: Heating) -> None:
        self._heating = heating
        self._tau_s, self._drive = heating.tau_s, heating.drive
        self._slowdowns: dict[int, float] = {}  # by tokens
        self._level = 0.0  # as of _at_s, when a step with prompts had last ended
        self._at_s = 0.0

    def run(self, cool_s: float, tokens: int, now_s: float) -> float:
        """Return what a step with prompts takes that starts now and would take `cool_s` on a cool GPU; the level is then that of its end."""
        tau_s, drive = self._tau_s, self._drive
        slowdown = self._slowdowns.get(tokens)
        if slowdown is None:
            slowdown = self._slowdowns[tokens] = self._heating.slowdown(tokens)
        if slowdown <= 0:
            return cool_s
        # The step before may be said to end later than this one starts, where recorded steps are priced.
        level = self._level * exp(min(0.0, self._at_s - now_s) / tau_s)
        free_s = tau_s * log((drive - level) / (drive - 1))
        if cool_s <= free_s:
            duration_s = cool_s
            self._level = drive + (level - drive) * exp(-cool_s / tau_s)
        else:
            duration_s = free_s + (cool_s - free_s) * (1 + slowdown)
            self._level = 1.0
        self._at_s = now_s + duration_s
        return duration_s


@dataclass(slots=True, eq=False)
class Series:
    """Times of steps one after the other, from a cool GPU on. decodes: so many decode steps follow each step with prompts; us: of all."""

    tokens: int
    decodes: int
    us: Floats


def fit_heating(series: Sequence[Series]) -> Heating | None:
    """Fit by least squares of relative errors; None where no series is of prompts alone, or nothing slows down."""
    alone = sorted((_beginning(one) for one in series if not one.decodes), key=lambda one: one.tokens)
    between = [one for one in series if one.decodes]
    if not alone:
        return None
    tau_s, drive = (grid.ravel() for grid in np.meshgrid(TAUS_S, DRIVES))
    errors = np.zeros(len(tau_s))
    slowdowns = np.empty((len(alone), len(tau_s)))
    for index, one in enumerate(alone):
        slowdowns[index], error = _slowdowns(one, tau_s, drive)
        errors += error
    sizes = [one.tokens for one in alone]
    for one in between:  # as far as those alone are, of the nearest size
        nearest = int(np.abs(np.array(sizes) - one.tokens).argmin())
        errors += _error(one, tau_s, drive, slowdowns[nearest])
    best = int(errors.argmin())
    if slowdowns[:, best].max() < LEAST_SLOWDOWN:
        return None
    found = tuple(slowdowns[:, best].tolist())
    return Heating(float(tau_s[best]), float(drive[best]), tuple(float(one.tokens) for one in alone), found)


def _beginning(one: Series) -> Series:
    count = int((one.us.cumsum() * 1e-6).searchsorted(WATCHED_S))
    return Series(one.tokens, 0, one.us[: max(2, count)])


def _limited(one: Series, tau_s: Floats, drive: Floats) -> Floats:
    """Return the share of each step with prompts that is run at the limit: a row a step, a column a pair of parameters."""
    prompts_us = one.us[:: one.decodes + 1]
    cool_s = float(np.quantile(prompts_us, 0.05)) * 1e-6
    level = np.zeros(len(tau_s))
    shares = []
    for index, us in enumerate(one.us.tolist()):
        if index % (one.decodes + 1):
            level = level * np.exp(-us * 1e-6 / tau_s)
            continue
        free_s = tau_s * np.log((drive - level) / (drive - 1))
        shares.append((1 - free_s / cool_s).clip(0, 1))
        level = np.minimum(1.0, drive + (level - drive) * np.exp(-us * 1e-6 / tau_s))
    return np.array(shares)


def _slowdowns(one: Series, tau_s: Floats, drive: Floats) -> tuple[Floats, Floats]:
    """Return the slowdown and the mean squared relative error at each pair of parameters: us = cool · (1 + slowdown · share)."""
    shares, weight = _limited(one, tau_s, drive), (1 / one.us)[:, None]
    a, b = weight, weight * shares  # two unknowns: the normal equations of every pair at once
    aa, ab, bb = (a * a).sum(axis=0), (a * b).sum(axis=0), (b * b).sum(axis=0)
    ay, by = a.sum(axis=0), b.sum(axis=0)
    determinant = aa * bb - ab * ab
    safe = np.where(determinant > 1e-12 * aa * bb, determinant, np.inf)
    more = (aa * by - ab * ay) / safe
    more = more.clip(0)
    cool = (ay - ab * more) / aa
    return more / cool, ((cool * a + more * b - 1) ** 2).mean(axis=0)


def _error(one: Series, tau_s: Floats, drive: Floats, slowdown: Floats) -> Floats:
    """Return the mean squared relative error of prompts between decodes, slowed down as far as those alone are."""
    prompts_us = one.us[:: one.decodes + 1]
    unit = (1 + slowdown * _limited(one, tau_s, drive)) / prompts_us[:, None]
    cool = unit.sum(axis=0) / (unit * unit).sum(axis=0)
    error: Floats = ((cool * unit - 1) ** 2).mean(axis=0)
    return error
