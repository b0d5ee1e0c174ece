"""A configuration with some of its policies changed, and what has to go with that."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from engine.config import ServingConfig
from planner.space import Values
from traces import Trace
from traces.columns import BASE_MODEL
from traces.metrics import Slo


@dataclass(frozen=True, slots=True)
class Variants:
    """Makes variants. ttft_s: what the scheduler `slo` holds first tokens to; popularity: requests by adapter, for placements."""

    ttft_s: float
    popularity: Mapping[str, float]

    @classmethod
    def of(cls, trace: Trace, slo: Slo) -> Variants:
        """Take both from what is asked."""
        index = trace.columns.adapter_index
        counts = np.bincount(index[index != BASE_MODEL], minlength=len(trace.columns.adapter_names)).tolist()
        named = zip(trace.columns.adapter_names, counts, strict=True)
        return cls(slo.ttft_s, {name: float(count) for name, count in named if count})

    def vary(self, config: ServingConfig, **changes: Any) -> ServingConfig:
        """Return a configuration with these changes. Raises UserError where they cannot be."""
        wanted = {
            name: changes.get(name, getattr(config, name)) for name in ("scheduler", "placement", "merge")
        }
        most = min(self.popularity, key=lambda name: (-self.popularity[name], name), default=None)
        return config.with_changes(
            **changes,
            merge_adapter=most if wanted["merge"] == "hot" else None,
            ttft_slo_s=self.ttft_s if wanted["scheduler"] == "slo" else None,
            adapter_popularity={} if wanted["placement"] == "everywhere" else dict(self.popularity),
        )

    def others(self, config: ServingConfig, values: Values) -> list[dict[str, Any]]:
        """Return the single changes that lead away from a configuration."""
        return [
            {name: value}
            for name, given in values.items()
            for value in given
            if value != getattr(config, name)
        ]
