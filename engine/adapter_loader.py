"""The way of adapters from host memory, or from disk through it, to the GPU.

A load writes the row table for the pages it was given into the adapter's first page and copies each byte once, on a stream of its own, runs of
neighbouring pages in one copy; an event tells when it is there. Nothing here waits: what is not ready is looked at again on the next turn.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass
from enum import Enum

import numpy as np
import torch

from engine.errors import UserError
from engine.host_store import HostAdapter, HostStore
from engine.hot_table import HotTable
from engine.layout import AdapterLayout
from engine.model import Buffers
from engine.step import Load
from kernels.lora_plan import FIRST_B, LAYER_ROWS, RANKS, SLOT, TABLE_UNIT, TILE_COLUMNS


class _Stage(Enum):
    WAITING = "waiting"  # for room in host memory, or for an earlier copy of the same pages
    READING = "reading"
    COPYING = "copying"
    FINISHED = "finished"
    FAILED = "failed"


@dataclass(slots=True, eq=False)
class _Flight:
    load: Load
    adapter: HostAdapter
    stage: _Stage = _Stage.WAITING
    read: Future[None] | None = None
    copied: torch.cuda.Event | None = None


class AdapterLoader:
    """Copies adapters into the pool. `adapter_meta [adapters, 16]` tells the batch builder where each resident one is.

    num_adapters: most that are on the GPU at a time.
    """

    def __init__(self, store: HostStore, buffers: Buffers, num_adapters: int, units_per_page: int) -> None:
        self._store = store
        self._buffers = buffers
        self._units_per_page = units_per_page
        self._stream = torch.cuda.Stream(buffers.pool.device) if buffers.pool.is_cuda else None
        self._flights: list[_Flight] = []
        self._finished: list[str] = []
        self._failed: list[tuple[str, str]] = []
        self.slots: dict[str, int] = {}  # where each adapter was loaded last
        self.hot: HotTable | None = None  # the adapter that is merged for good
        self.adapter_meta = np.zeros((max(1, num_adapters), TILE_COLUMNS), dtype=np.int32)

    @property
    def num_loading(self) -> int:
        """Loads started and not over."""
        return len(self._flights)

    def start(self, load: Load) -> None:
        """Start a load; `finished` or `failed` tell how it ended."""
        if load.adapter not in self._store:
            self._failed.append((load.adapter, "the adapter is not registered"))
            return
        adapter = self._store[load.adapter]
        self.slots[load.adapter] = load.slot
        self.register(load.slot, load.pages, adapter.layout)
        flight = _Flight(load, adapter)
        waits = any(other.stage is _Stage.WAITING for other in self._flights)
        self._flights.append(flight)
        if not waits:
            self._claim(flight)

    def finished(self) -> list[str]:
        """Return the adapters whose loads have ended since the last call."""
        self._advance()
        names, self._finished = self._finished, []
        return names

    def failed(self) -> list[tuple[str, str]]:
        """Return the adapters whose loads have failed since the last call, each with the reason in words for anybody: no paths.

        Nothing was written to their pages, and they are on disk again.
        """
        self._advance()
        failures, self._failed = self._failed, []
        return failures

    def register(self, slot: int, pages: Sequence[int], layout: AdapterLayout) -> None:
        """Tell where the adapter of a slot is, and how many ranks of it this GPU has."""
        meta = self.adapter_meta[slot]
        meta[TABLE_UNIT] = pages[0] * self._units_per_page
        meta[SLOT] = slot
        meta[RANKS : RANKS + 7] = [rows_of_b for _, rows_of_b in layout.counts]
        meta[LAYER_ROWS] = layout.rows_per_layer
        meta[FIRST_B] = sum(rows_of_a for rows_of_a, _ in layout.counts)
        if self.hot is not None and layout.reserved_rows:
            meta[RANKS : RANKS + 7] = self.hot.ranks_with(layout)
            meta[LAYER_ROWS] += self.hot.layout.rows_per_layer
            meta[FIRST_B] += sum(rows_of_a for rows_of_a, _ in self.hot.layout.counts)

    def host_adapter(self, name: str) -> HostAdapter:
        """Return a registered adapter."""
        return self._store[name]

    def layout_of(self, name: str) -> AdapterLayout:
        """Return the layout of a registered adapter."""
        return self._store[name].layout

    def reset(self) -> None:
        """Forget all loads: wait until none of them touches memory any more, and report none."""
        wait([flight.read for flight in self._flights if flight.read is not None])
        if self._stream is not None:
            self._stream.synchronize()
        for flight in self._flights:
            if flight.stage is _Stage.COPYING:
                self._store.unpin(flight.adapter)
            elif flight.read is not None:
                self._store.abandon(flight.adapter)
        self._flights, self._finished, self._failed = [], [], []

    # ---- stages ----

    def _advance(self) -> None:
        """Take every load as far as it can go now. Host memory is had in the order of the loads."""
        blocked = False
        for flight in self._flights:
            if flight.stage is _Stage.WAITING and not blocked:
                self._claim(flight)
                blocked = flight.stage is _Stage.WAITING
            if flight.stage is _Stage.READING:
                self._end_read(flight)
            if flight.stage is _Stage.COPYING:
                self._end_copy(flight)
        over = (_Stage.FINISHED, _Stage.FAILED)
        if any(flight.stage in over for flight in self._flights):
            self._flights = [flight for flight in self._flights if flight.stage not in over]

    def _claim(self, flight: _Flight) -> None:
        """Pin the adapter's host memory; copy it, or have it read first."""
        if self._in_use(flight):
            return
        place = self._store.pin(flight.adapter)
        if place == "host":
            self._begin_copy(flight)
        elif place == "disk":
            flight.stage = _Stage.READING
            flight.read = self._store.read(flight.adapter)

    def _in_use(self, flight: _Flight) -> bool:
        """Whether an earlier load of the same adapter is under way: its row table may not be overwritten."""
        return any(
            other.adapter is flight.adapter
            and other is not flight
            and other.stage in (_Stage.READING, _Stage.COPYING)
            for other in self._flights
        )

    def _end_read(self, flight: _Flight) -> None:
        assert flight.read is not None
        if not flight.read.done():
            return
        error = flight.read.exception()
        if error is None:
            self._begin_copy(flight)
            return
        self._store.abandon(flight.adapter)
        flight.stage = _Stage.FAILED
        self._failed.append((flight.load.adapter, _reason(error)))

    def _begin_copy(self, flight: _Flight) -> None:
        flight.stage = _Stage.COPYING
        load, runs = flight.load, self._store.runs(flight.adapter)
        layout = flight.adapter.layout
        table = layout.table(load.pages)
        if self.hot is not None and layout.reserved_rows:
            table = self.hot.table_with(layout, table)
        runs[0][0].view(torch.int32)[: len(table)] = torch.from_numpy(table)
        stream = contextlib.nullcontext() if self._stream is None else torch.cuda.stream(self._stream)
        with stream:
            self._copy(runs, load.pages)
            if self._stream is not None:
                flight.copied = torch.cuda.Event()
                flight.copied.record(self._stream)

    def _copy(self, runs: list[torch.Tensor], pages: tuple[int, ...]) -> None:
        pool, ordinal = self._buffers.pool, 0
        for run in runs:
            for first, length in _neighbours(pages[ordinal : ordinal + len(run)]):
                page = pages[ordinal + first]
                pool[page : page + length].copy_(run[first : first + length], non_blocking=True)
            ordinal += len(run)

    def _end_copy(self, flight: _Flight) -> None:
        if flight.copied is None or flight.copied.query():
            self._store.unpin(flight.adapter)
            flight.stage = _Stage.FINISHED
            self._finished.append(flight.load.adapter)


def _reason(error: BaseException) -> str:
    """Return why a load failed, without paths and without the adapter's name, for which users may have another."""
    what = error.reason if isinstance(error, UserError) else type(error).__name__
    return f"the adapter cannot be loaded: {what}"


def _neighbours(pages: Sequence[int]) -> list[tuple[int, int]]:
    """Return (ordinal of the first page, length) of each run of neighbouring pages."""
    runs: list[tuple[int, int]] = []
    for ordinal, page in enumerate(pages):
        if runs and page == pages[ordinal - 1] + 1:
            runs[-1] = (runs[-1][0], runs[-1][1] + 1)
        else:
            runs.append((ordinal, 1))
    return runs
