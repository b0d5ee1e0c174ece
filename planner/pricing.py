"""What steps cost under a configuration, fitted once and sent to every worker process."""

from __future__ import annotations

import pickle
from typing import Any

from engine.config import ServingConfig
from sim.costs import StepCosts, costs_for
from sim.fit import OperatorFits, adopt_fits, fit_operators
from sim.profile import Profile


class Pricing:
    """Prices configurations by a profile. It travels with the profile's fits: a fit takes seconds."""

    def __init__(self, profile: Profile, fits: OperatorFits | None = None) -> None:
        self.profile = profile
        if fits is not None:
            adopt_fits(profile, fits)

    def __call__(self, config: ServingConfig) -> StepCosts:
        """Return what the steps of a configuration cost."""
        return costs_for(self.profile, config)

    def __reduce__(self) -> tuple[Any, ...]:
        fits = fit_operators(self.profile)
        return Pricing, (self.profile, fits if _travels(fits) else None)


def _travels(fits: OperatorFits) -> bool:
    """Whether fits can be sent to another process; else it makes its own."""
    try:
        pickle.dumps(fits)
    except (AttributeError, TypeError, pickle.PicklingError):
        return False
    return True
