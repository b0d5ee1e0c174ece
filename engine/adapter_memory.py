"""Adapters in host memory, and their way to the GPU.

Each adapter is packed once into pages of the GPU's layout (pinned when there is a GPU). A load writes the row table for the pages it was
given and copies each byte once, on a stream of its own, runs of neighbouring pages in one copy; an event tells when it is there.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from engine.adapter import AdapterSpec
from engine.blueprint import Blueprint
from engine.errors import UserError
from engine.layout import AdapterLayout
from engine.model import Buffers
from engine.peft_adapter import load_peft_adapter, pack, pack_random, shard_adapter
from engine.step import Load
from kernels.lora_plan import RANKS, SLOT, TABLE_UNIT, TILE_COLUMNS


@dataclass(frozen=True, slots=True)
class HostAdapter:
    """An adapter's page image [pages, page_elems] in host memory, and the layout it is in."""

    spec: AdapterSpec
    layout: AdapterLayout
    image: torch.Tensor


class HostStore:
    """All registered adapters, by name."""

    def __init__(
        self, blueprint: Blueprint, dtype: torch.dtype, device: torch.device, *, seed: int = 0
    ) -> None:
        self._blueprint = blueprint
        self._dtype = dtype
        self._device = device
        self._seed = seed
        self._adapters: dict[str, HostAdapter] = {}

    def __getitem__(self, name: str) -> HostAdapter:
        return self._adapters[name]

    def __len__(self) -> int:
        return len(self._adapters)

    def register_all(self) -> Iterator[str]:
        """Pack every adapter of the blueprint, yielding each name when it is done."""
        for number, (name, spec) in enumerate(self._blueprint.adapters.items()):
            layout = self._blueprint.layout(name)
            image = self._random(layout, number) if spec.path is None else self._read(spec, layout)
            self._adapters[name] = HostAdapter(spec, layout, image)
            yield name

    def _random(self, layout: AdapterLayout, number: int) -> torch.Tensor:
        generator = torch.Generator(self._device).manual_seed(self._seed * 1_000_003 + number)
        drawn = pack_random(layout, generator, self._dtype)
        image = self._empty(layout)
        image.copy_(drawn)
        return image

    def _read(self, spec: AdapterSpec, layout: AdapterLayout) -> torch.Tensor:
        assert spec.path is not None
        config = self._blueprint.config
        adapter = load_peft_adapter(spec.path, self._blueprint.model, spec.name)
        if adapter.spec.module_ranks != spec.module_ranks:
            raise UserError(
                f"{spec.path}: ranks {adapter.spec.module_ranks} are not those of adapter {spec.name!r}: {spec.module_ranks}"
            )
        adapter = shard_adapter(adapter, self._blueprint.model, config.tp, 0, config.lora_sharding)
        image = self._empty(layout)
        image.copy_(pack(adapter, layout, self._dtype))
        return image

    def _empty(self, layout: AdapterLayout) -> torch.Tensor:
        size = (layout.num_pages, layout.geometry.page_elems)
        return torch.empty(size, dtype=self._dtype, pin_memory=self._device.type == "cuda")


@dataclass(slots=True)
class _Flight:
    name: str
    done: torch.cuda.Event | None


class AdapterLoader:
    """Copies adapters into the pool. `adapter_meta [adapters, 16]` tells the batch builder where each resident one is."""

    def __init__(self, store: HostStore, buffers: Buffers, num_adapters: int, units_per_page: int) -> None:
        self._store = store
        self._buffers = buffers
        self._units_per_page = units_per_page
        self._stream = torch.cuda.Stream() if buffers.pool.is_cuda else None
        self._flights: list[_Flight] = []
        self.adapter_meta = np.zeros((max(1, num_adapters), TILE_COLUMNS), dtype=np.int32)

    @property
    def num_loading(self) -> int:
        return len(self._flights)

    def start(self, load: Load) -> None:
        """Start a load."""
        adapter = self._store[load.adapter]
        table = adapter.layout.table(load.pages)
        adapter.image[0].view(torch.int32)[: len(table)] = torch.from_numpy(table)
        self.register(load.slot, load.pages, adapter.spec)
        if self._stream is None:
            self._copy(adapter.image, load.pages)
            self._flights.append(_Flight(load.adapter, None))
            return
        with torch.cuda.stream(self._stream):
            self._copy(adapter.image, load.pages)
            done = torch.cuda.Event()
            done.record(self._stream)
        self._flights.append(_Flight(load.adapter, done))

    def register(self, slot: int, pages: Sequence[int], spec: AdapterSpec) -> None:
        """Tell where the adapter of a slot is."""
        meta = self.adapter_meta[slot]
        meta[TABLE_UNIT] = pages[0] * self._units_per_page
        meta[SLOT] = slot
        meta[RANKS : RANKS + 7] = spec.module_ranks

    def _copy(self, image: torch.Tensor, pages: tuple[int, ...]) -> None:
        for first, length in _runs(pages):
            target = self._buffers.pool[pages[first] : pages[first] + length]
            target.copy_(image[first : first + length], non_blocking=True)

    def finished(self) -> list[str]:
        """Return the adapters whose loads have ended since the last call."""
        ended = [flight.name for flight in self._flights if flight.done is None or flight.done.query()]
        if ended:
            self._flights = [flight for flight in self._flights if flight.name not in ended]
        return ended


def _runs(pages: tuple[int, ...]) -> list[tuple[int, int]]:
    """Return (ordinal of the first page, length) of each run of neighbouring pages."""
    runs: list[tuple[int, int]] = []
    for ordinal, page in enumerate(pages):
        if runs and page == pages[ordinal - 1] + 1:
            runs[-1] = (runs[-1][0], runs[-1][1] + 1)
        else:
            runs.append((ordinal, 1))
    return runs
