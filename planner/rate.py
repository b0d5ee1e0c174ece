"""The highest rate at which something still holds, by few and dear questions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import exp, log, sqrt

from planner.probe import Probe

MOST_PROBES = 14
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
    probes. Then by attainment: its logit is close to a line in the logarithm of the rate.
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
        if passed is None:
            scale /= 1 + reach
        elif failed is None:
            scale = min(ceiling, scale * (1 + reach))
        else:
            scale = _between(passed, failed)
        reach *= 2
    return RateRange(passed, failed, MOST_PROBES)


def _done(passed: Probe | None, failed: Probe | None, ceiling: float, tolerance: float) -> bool:
    if passed is None:
        return failed is not None and failed.scale < LOWEST * ceiling
    if failed is None:
        return passed.scale >= ceiling
    return failed.scale <= passed.scale * (1 + tolerance)


def _between(passed: Probe, failed: Probe) -> float:
    """Return a scale between two, where their attainments say that the bound is met."""
    low, high = passed.scale, failed.scale
    if failed.aborted:
        return sqrt(low * high)
    above, wanted, below = (_logit(share) for share in (passed.attainment, passed.wanted, failed.attainment))
    part = (above - wanted) / (above - below) if above > below else 0.5
    return low * exp(log(high / low) * min(0.8, max(0.2, part)))


def _logit(share: float) -> float:
    inside = min(0.9999, max(0.0001, share))
    return log(inside / (1 - inside))
