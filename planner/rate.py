"""The highest rate at which something still holds, by few and dear questions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import exp, log, log1p

from planner.probe import Probe

MOST_PROBES = 14
USUAL_SLOPE = 25.0  # of the attainment's logit against the logarithm of the rate, near the bound
LOWEST = 1e-3  # of the ceiling: what does not hold there is taken to hold nowhere


@dataclass(frozen=True, slots=True)
class RateRange:
    """The highest scale that was seen to meet the SLO, and the lowest above it seen to miss it.

    `passed` is None where nothing met it. `failed` is None where the ceiling met it.
    """

    passed: Probe | None
    failed: Probe | None
    probes: int

    @property
    def scale(self) -> float:
        """The highest scale that met the SLO; 0 where none did."""
        return 0.0 if self.passed is None else self.passed.scale


def highest_scale(
    probe: Callable[[float], Probe], guess: float, ceiling: float, *, tolerance: float, reach: float
) -> RateRange:
    """Search the highest scale of at most `ceiling` that meets the SLO, to within `tolerance` (relative).

    guess: where to begin; reach: how far off it may be (relative), which doubles until the answer is between two
    probes. Steps follow the attainment, whose logit is close to a line in the logarithm of the rate.
    """
    passed: Probe | None = None
    failed: Probe | None = None
    scale = min(guess, ceiling)
    for count in range(1, MOST_PROBES + 1):
        found = probe(scale)
        if found.meets:
            passed = found
        else:
            failed = found
        if _done(passed, failed, ceiling, tolerance):
            return RateRange(passed, failed, count)
        if passed is not None and failed is not None:
            scale = _between(passed, failed, tolerance)
        else:
            scale = min(ceiling, _beyond(found, reach))
            reach *= 2
    return RateRange(passed, failed, MOST_PROBES)


def _done(passed: Probe | None, failed: Probe | None, ceiling: float, tolerance: float) -> bool:
    if passed is None:
        return failed is not None and failed.scale < LOWEST * ceiling
    if failed is None:
        return passed.scale >= ceiling
    return failed.scale <= passed.scale * (1 + tolerance)


def _beyond(found: Probe, reach: float) -> float:
    """Return the next scale while all probes were on one side.

    It is where a usual slope says that the bound is met and a little more, to have one on the other side.
    """
    if found.aborted:
        return found.scale / (1 + reach)
    gap = (logit(found.attainment) - logit(found.wanted)) / USUAL_SLOPE
    step = max(log1p(reach) / 2, min(log1p(2 * reach), abs(gap) * 1.2))
    return found.scale * exp(step if found.meets else -step)


def _between(passed: Probe, failed: Probe, tolerance: float) -> float:
    """Return a scale between two: where their attainments say that the bound is met, and past it.

    Past it as seen from the nearer of the two, by less than the tolerance: then that one and the new one close in on
    the answer.
    """
    low, high = log(passed.scale), log(failed.scale)
    if failed.aborted:
        return exp((low + high) / 2)
    above, wanted, below = (logit(share) for share in (passed.attainment, passed.wanted, failed.attainment))
    part = (above - wanted) / (above - below) if above > below else 0.5
    past = log1p(tolerance) * (0.45 if part < 0.5 else -0.45)
    margin = 0.15 * (high - low)
    return exp(min(high - margin, max(low + margin, low + part * (high - low) + past)))


def logit(share: float) -> float:
    """Return the logit of a share, which is held within 0.001 and 0.999."""
    inside = min(0.999, max(0.001, share))
    return log(inside / (1 - inside))
