"""What a simulation says."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from sim.observe import StepRow

if TYPE_CHECKING:
    import pandas as pd

Column = NDArray[Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Utilisation:
    """Shares of time and capacity, over all replicas.

    step_share: of the time a step ran. gpu_share: of it the GPU computed (the rest of a step waits for the
    host). link_share: adapters were copied. kv_pages_*, adapter_pages_*: shares of a replica's pool.
    sequences_*: shares of max_num_seqs. Means are over time. batch_mean: sequences that decode in a step.
    time_shares: of the GPU's time, by what it is spent on.
    """

    step_share: float
    gpu_share: float
    link_share: float
    kv_pages_mean: float
    kv_pages_max: float
    adapter_pages_mean: float
    adapter_pages_max: float
    sequences_mean: float
    sequences_max: float
    batch_mean: float
    time_shares: Mapping[str, float]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SimResult:
    """Metrics, and what they come from.

    columns: by request, in the trace's order, as a run record's requests, and `refused`: the reason, else
    None. bottleneck: what bounds this configuration on this trace, in a word, and `facts` that say why.
    steps: the steps that ran where they were recorded. merging: under merge='dynamic', how often the weights changed, and what the cost of that
    rests on.
    """

    metrics: Mapping[str, float]
    columns: Mapping[str, Column]
    utilisation: Utilisation
    bottleneck: str
    facts: Mapping[str, float]
    refused: Mapping[str, int]
    adapter_loads: int
    duration_s: float
    aborted: bool = False
    steps: tuple[StepRow, ...] | None = None
    merging: Mapping[str, int | str] | None = None

    @property
    def requests(self) -> pd.DataFrame:
        """The columns as a data frame."""
        import pandas as pd  # half a second to import: not every user of a result needs it

        return pd.DataFrame(dict(self.columns))

    def to_json(self) -> dict[str, Any]:
        """Return metrics, utilisation and bottleneck as JSON holds them: NaN is null."""
        shares = {
            name: getattr(self.utilisation, name) for name in Utilisation.__slots__ if name != "time_shares"
        }
        return {
            "metrics": plain(self.metrics),
            "utilisation": plain(shares) | {"time_shares": plain(self.utilisation.time_shares)},
            "bottleneck": self.bottleneck,
            "facts": plain(self.facts),
            "refused": dict(self.refused),
            **({} if self.merging is None else {"merging": dict(self.merging)}),
        }


def plain(values: Mapping[str, float]) -> dict[str, float | None]:
    """Return numbers as JSON holds them: NaN and infinity are null."""
    return {name: (value if np.isfinite(value) else None) for name, value in values.items()}
