"""Row tables under `merge='hot'`: an adapter whose weights already hold the merged one computes (own − merged).

The merged adapter's rows, B negated, stay in the pool once. Every other adapter's row table names, for each linear, its own rows and behind them
those: to the kernels it is one adapter of both ranks. So nothing is stored twice, no two tiles add to the same place, and nothing more is launched.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from engine.layout import AdapterLayout, Pairs


class HotTable:
    """The merged adapter's place: its layout and its row table, in units of the pool."""

    def __init__(self, name: str, layout: AdapterLayout, pages: tuple[int, ...]) -> None:
        self.name = name
        self.layout = layout
        self.table = layout.table(pages)

    def ranks_with(self, layout: AdapterLayout) -> list[int]:
        """Return the ranks of the seven linears of an adapter and this one together."""
        pairs = zip(layout.counts, self.layout.counts, strict=True)
        return [own[1] + hot[1] for own, hot in pairs]

    def table_with(self, layout: AdapterLayout, table: NDArray[np.int32]) -> NDArray[np.int32]:
        """Return an adapter's row table with this one's rows in it."""
        both = np.concatenate([table, self.table])
        return np.take(both, _order(layout.counts, self.layout.counts, layout.geometry.num_layers))


@lru_cache(maxsize=256)
def _order(own: Pairs, hot: Pairs, num_layers: int) -> NDArray[np.int64]:
    """Return, for the rows of both, layer by layer, A before B and module by module, where they are in the two tables one after the other."""
    own_rows, hot_rows = (np.array(pairs).T.ravel() for pairs in (own, hot))  # A of the seven, then B of them
    own_at, hot_at = np.cumsum(own_rows) - own_rows, np.cumsum(hot_rows) - hot_rows
    hot_first = num_layers * int(own_rows.sum())
    layer: list[NDArray[np.int64]] = []
    steps: list[NDArray[np.int64]] = []
    for a, count, b, more in zip(own_at, own_rows, hot_at, hot_rows, strict=True):
        layer += [np.arange(a, a + count), hot_first + np.arange(b, b + more)]
        steps += [np.full(count, own_rows.sum()), np.full(more, hot_rows.sum())]
    first, step = np.concatenate(layer), np.concatenate(steps)
    return (first[None, :] + np.arange(num_layers)[:, None] * step[None, :]).ravel()
