"""Merging in a running engine: which adapter the weights hold, and what must happen to the pool for it."""

from __future__ import annotations

import time

from engine.adapter_loader import AdapterLoader
from engine.blueprint import Blueprint
from engine.errors import UserError
from engine.host_store import HostAdapter
from engine.hot_table import HotTable
from engine.model import Buffers
from engine.static_merge import PackedAdapter, StaticMerge
from engine.step import Load
from engine.switch_ops import switch_ops_for
from engine.weights import ModelWeights
from kernels.lora_plan import RANKS, TABLE_UNIT

PREPARED = 8  # most choices of ranks whose plans are made before serving; others are made, and half a second waited for, when first merged


class Merging:
    """The weights of a runner under `merge='hot'` or `'dynamic'`. What it sends goes behind the step in flight, on the same stream."""

    def __init__(
        self, blueprint: Blueprint, weights: ModelWeights, buffers: Buffers, loader: AdapterLoader
    ) -> None:
        self.static = StaticMerge(weights, blueprint.model, switch_ops_for(blueprint.config.backend))
        self.merged: str | None = None
        self._from: HostAdapter | None = None  # what was registered under that name
        self._buffers = buffers
        self._loader = loader
        self._held: Load | None = None
        self._checked: dict[str, tuple[HostAdapter, bool]] = {}
        if blueprint.config.merge == "dynamic":
            ranks = {spec.module_ranks for spec in blueprint.adapters.values() if spec.kind != "dynamic"}
            for one in sorted(ranks, key=max, reverse=True)[
                :PREPARED
            ]:  # the largest first: plans share its scratch
                self.static.prepare(one)

    def merge_for_good(self, load: Load) -> None:
        """Copy an adapter to the GPU, wait for it, merge it, and leave its negative in the pool. Once: later calls find it there.

        Raises UserError where it cannot be loaded or merged.
        """
        if self._held is not None:
            if self._held != load:
                raise ValueError(f"{self._held.adapter} is merged at {self._held.slot}, not {load}")
            return
        self._loader.start(load)
        while load.adapter not in self._loader.finished():
            for name, reason in self._loader.failed():
                raise UserError(f"adapter {name!r}: {reason}")
            time.sleep(1e-3)
        adapter = self._packed(load.slot)
        self.static.merge_(adapter, load.adapter)
        self.static.negate_(adapter)
        self._loader.hot = HotTable(load.adapter, self._loader.layout_of(load.adapter), load.pages)
        self.merged, self._held = load.adapter, load

    def follow(self, wanted: str | None) -> None:
        """Make the weights what the next step needs. An adapter to be merged has passed `may_merge` and is on the GPU."""
        if self._held is not None:
            return
        adapter = None if wanted is None else self._loader.host_adapter(wanted)
        if wanted == self.merged and adapter is self._from:
            return
        if wanted is None:
            self.static.unmerge_()
        else:
            self.static.merge_(self._packed(self._loader.slots[wanted]), wanted, checked=True)
        self.merged, self._from = wanted, adapter

    def may_merge(self, name: str) -> bool:
        """Whether an adapter on the GPU is no larger than the weights it changes. Waits for the device, once an adapter."""
        adapter = self._loader.host_adapter(name)
        known = self._checked.get(name)
        if known is None or known[0] is not adapter:
            known = adapter, self._fits(name)
            self._checked[name] = known
        return known[1]

    def _fits(self, name: str) -> bool:
        try:
            self.static.check(self._packed(self._loader.slots[name]), name)
        except UserError:
            return False
        return True

    def _packed(self, slot: int) -> PackedAdapter:
        meta = self._loader.adapter_meta[slot]
        ranks = tuple(int(rank) for rank in meta[RANKS : RANKS + 7])
        return PackedAdapter(pool=self._buffers.pool, table_unit=int(meta[TABLE_UNIT]), ranks=ranks)
