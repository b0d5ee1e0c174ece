"""Registered adapters behind the GPU: packed in pinned host memory up to a bound, and on disk beyond it.

An adapter is packed once into pages of the GPU's layout. What the bound leaves no room for, and what was evicted for others, is read and
packed again when it is loaded: from its folder, or, for a random adapter without one, drawn again from its seed, with the same numbers.
"""

from __future__ import annotations

import contextlib
import hashlib
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import torch

from engine.adapter import AdapterSpec, spec_of_peft
from engine.blueprint import Blueprint
from engine.errors import UserError
from engine.host_cache import HostCache, Place
from engine.host_pages import Extent, HostPages, new_slab
from engine.layout import AdapterLayout
from engine.peft_adapter import fingerprint, load_peft_adapter, pack, pack_random, shard_adapter

READERS = 4  # threads that read and pack adapters; torch's own threads help each of them
SLAB_BYTES = 4 * 2**30  # most memory that is pinned in one call
GROWTH_BYTES = (
    2**28
)  # least that is pinned at a time while serving: little, as CUDA calls of other threads may wait for it


@dataclass(slots=True, eq=False)
class HostAdapter:
    """A registered adapter. extents: where its pages are, in order, while it is in host memory. source: what its files were like."""

    spec: AdapterSpec
    layout: AdapterLayout
    source: tuple[int, ...] = ()
    extents: tuple[Extent, ...] = ()
    removed: bool = False

    @property
    def num_bytes(self) -> int:
        return self.layout.total_bytes


@dataclass(frozen=True, slots=True)
class PreparedAdapter:
    """A checked adapter that nobody can load yet: `HostStore.put` registers it, `HostStore.discard` lets it go."""

    adapter: HostAdapter = field(repr=False)

    @property
    def spec(self) -> AdapterSpec:
        return self.adapter.spec


class HostStore:
    """All registered adapters, by name. Methods may be called from any thread and wait for no disk, but for `prepare` and `register_all`."""

    def __init__(
        self, blueprint: Blueprint, dtype: torch.dtype, device: torch.device, *, seed: int = 0, rank: int = 0
    ) -> None:
        self._rank = rank
        self.cache: HostCache[HostAdapter] = HostCache(blueprint.host_capacity_bytes)
        self._blueprint = blueprint
        self._dtype = dtype
        self._device = device
        self._seed = seed
        self._adapters: dict[str, HostAdapter] = {}
        self._pages = HostPages()
        self._lock = threading.Lock()  # of the cache, the pages and the names; never held for long
        self._growth = threading.Lock()  # held while memory is pinned
        self._readers = ThreadPoolExecutor(READERS, thread_name_prefix="adapter-reader")
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def __getitem__(self, name: str) -> HostAdapter:
        return self._adapters[name]

    def __contains__(self, name: object) -> bool:
        return name in self._adapters

    def __len__(self) -> int:
        return len(self._adapters)

    def where(self, name: str) -> Place:
        """Say whether an adapter is in host memory or on disk alone."""
        return self.cache.where(self._adapters[name])

    @property
    def pinned_bytes(self) -> int:
        """Bytes of the slabs, free pages included."""
        return self._pages.num_pages * self._blueprint.geometry.page_bytes

    # ---- registering ----

    def register_all(self) -> Iterator[str]:
        """Register every adapter of the blueprint, yielding each name when it is done.

        In their order they are packed into host memory as far as it holds them; the others stay on disk.
        """
        adapters = [
            self._adapter(spec) for spec in self._blueprint.adapters.values() if spec.kind != "dynamic"
        ]
        with self._lock:
            packed = [adapter for adapter in adapters if self.cache.fill(adapter, adapter.num_bytes)]
            for adapter in packed:
                self.cache.pin(adapter)
        self._grow(sum(adapter.layout.num_pages for adapter in packed))
        drawn = packed if self._stream is not None else []
        drawn = [adapter for adapter in drawn if adapter.spec.path is None]
        self._draw_all(drawn)
        fills = {adapter: self.read(adapter) for adapter in packed if not adapter.extents}
        try:
            for adapter in adapters:
                if adapter in fills:
                    fills[adapter].result()
                self._adapters[adapter.spec.name] = adapter
                yield adapter.spec.name
        finally:
            for fill in fills.values():
                fill.cancel()
        for adapter in packed:
            self.unpin(adapter)

    def prepare(self, spec: AdapterSpec) -> PreparedAdapter:
        """Read, check and pack an adapter; slow. It stays on disk where the loads under way leave no room in host memory.

        Raises UserError where it cannot be served, and where its files cannot be read.
        """
        self._blueprint.check_adapter(spec)
        adapter = self._adapter(spec)
        image = self._image(adapter)
        if self.pin(adapter) == "disk":
            try:
                self._write(adapter, image)
            except BaseException:
                self.abandon(adapter)
                raise
            self.unpin(adapter)
        return PreparedAdapter(adapter)

    def put(self, name: str, prepared: PreparedAdapter) -> None:
        """Register a prepared adapter; one that had the name before is removed."""
        if name in self._adapters:
            self.remove(name)
        self._adapters[name] = prepared.adapter

    def discard(self, prepared: PreparedAdapter) -> None:
        """Give back the memory of a prepared adapter that is not put."""
        with self._lock:
            self._retire(prepared.adapter)

    def remove(self, name: str) -> None:
        """Forget an adapter. A load of it that is under way still ends as it would; its memory goes with that. Raises KeyError."""
        with self._lock:
            self._retire(self._adapters.pop(name))

    def _adapter(self, spec: AdapterSpec) -> HostAdapter:
        source = () if spec.path is None else fingerprint(spec.path)
        return HostAdapter(spec, self._blueprint.layout_of(spec), source)

    # ---- for loads ----

    def pin(self, adapter: HostAdapter) -> Place | None:
        """Keep an adapter in host memory until `unpin`.

        Returns "host": it is there; "disk": it has room now and `read` must fill it; None: no room before another one is unpinned.
        """
        with self._lock:
            place = self.cache.where(adapter)
            if place == "disk":
                evicted = self.cache.admit(adapter, adapter.num_bytes)
                if evicted is None:
                    return None
                for other in evicted:
                    self._release(other)
            self.cache.pin(adapter)
        return place

    def unpin(self, adapter: HostAdapter) -> None:
        """End what `pin` began."""
        with self._lock:
            self.cache.unpin(adapter)
            if adapter.removed:
                self._retire(adapter)

    def read(self, adapter: HostAdapter) -> Future[None]:
        """Start to fill a pinned adapter's room from disk. Where that raises, `abandon` it."""
        return self._readers.submit(self._fill, adapter)

    def abandon(self, adapter: HostAdapter) -> None:
        """Unpin an adapter that could not be read: it is on disk again."""
        with self._lock:
            self.cache.unpin(adapter)
            self.cache.remove(adapter)
            self._release(adapter)

    def runs(self, adapter: HostAdapter) -> list[torch.Tensor]:
        """Return the memory of a pinned adapter's pages, in order, as runs of neighbours [pages, page_elems]."""
        return [self._pages.view(extent) for extent in adapter.extents]

    def image(self, name: str) -> torch.Tensor:
        """Return a copy of the pages of an adapter that is in host memory."""
        return torch.cat(self.runs(self._adapters[name]))

    def check_integrity(self) -> None:
        """Raise AssertionError unless the accounts agree and keep the bound; while nothing is being read."""
        with self._lock:
            self.cache.check_integrity()
            self._pages.check_integrity([adapter.extents for adapter in self.cache])
            for adapter in self.cache:
                pages = sum(extent.length for extent in adapter.extents)
                assert pages == adapter.layout.num_pages, f"{adapter.spec.name} has {pages} pages"
            for name, adapter in self._adapters.items():
                there = self.cache.where(adapter) == "host"
                assert there == bool(adapter.extents), f"{name} is in host memory: {there}"
                assert not adapter.removed, f"{name} is registered and removed"
        most = self.cache.capacity_bytes
        assert most is None or self.pinned_bytes <= most, "more memory is pinned than may be"

    def _retire(self, adapter: HostAdapter) -> None:
        """Give back an adapter's memory, now or with its last pin. The lock is held."""
        adapter.removed = True
        if self.cache.where(adapter) == "host" and not self.cache.is_pinned(adapter):
            self.cache.remove(adapter)
            self._release(adapter)

    def _release(self, adapter: HostAdapter) -> None:
        self._pages.release(adapter.extents)
        adapter.extents = ()

    # ---- memory ----

    def _write(self, adapter: HostAdapter, image: torch.Tensor) -> None:
        """Copy a page image into pages of host memory; by the stream, if it is on the GPU, and waiting for it."""
        adapter.extents = self._allocate(adapter.layout.num_pages)
        self._copy(adapter, image)
        if self._stream is not None and image.is_cuda:
            self._stream.synchronize()

    def _copy(self, adapter: HostAdapter, image: torch.Tensor) -> None:
        first = 0
        with self._on_stream():
            for run in self.runs(adapter):
                run.copy_(image[first : first + len(run)], non_blocking=True)
                first += len(run)

    def _allocate(self, count: int) -> tuple[Extent, ...]:
        """Take pages for an adapter that the cache has room for, pinning more memory where too little is."""
        while True:
            with self._lock:
                extents = self._pages.allocate(count)
            if extents is not None:
                return extents
            self._grow(count, least_bytes=GROWTH_BYTES)

    def _grow(self, count: int, least_bytes: int = 0) -> None:
        """Pin memory until `count` pages are free; at most as much as the bound allows."""
        page_bytes, most = self._blueprint.geometry.page_bytes, self.cache.capacity_bytes
        slab_pages = max(1, SLAB_BYTES // page_bytes)
        with self._growth:
            while (short := count - self._pages.num_free) > 0:
                pages = min(max(short, least_bytes // page_bytes), slab_pages)
                if most is not None:
                    pages = min(pages, most // page_bytes - self._pages.num_pages)
                with self._on_stream():  # a thread begins with the first GPU, which is another rank's
                    slab = new_slab(pages, self._blueprint.geometry.page_elems, self._dtype, self._device)
                with self._lock:
                    self._pages.add(slab)

    # ---- contents ----

    def _fill(self, adapter: HostAdapter) -> None:
        self._write(adapter, self._image(adapter))

    def _image(self, adapter: HostAdapter) -> torch.Tensor:
        """Return an adapter's pages anew: on the CPU, those of a random adapter on the device."""
        if adapter.spec.path is None:
            with self._on_stream():
                return self._draw(adapter)
        if fingerprint(adapter.spec.path) != adapter.source:
            raise UserError("changed since the adapter was registered", path=adapter.spec.path)
        return self._read(adapter)

    def _read(self, adapter: HostAdapter) -> torch.Tensor:
        spec, plan = adapter.spec, self._blueprint
        assert spec.path is not None
        found = spec_of_peft(spec.name, spec.path, plan.model.num_layers)
        if found.module_ranks != spec.module_ranks:
            raise UserError(
                f"ranks {found.module_ranks} are not those of adapter {spec.name!r}: {spec.module_ranks}",
                path=spec.path,
            )
        weights = load_peft_adapter(spec.path, plan.model, spec.name)
        weights = shard_adapter(weights, plan.model, plan.config.tp, self._rank, plan.sharding_of(spec))
        return pack(weights, adapter.layout, self._dtype)

    def _draw(self, adapter: HostAdapter, out: torch.Tensor | None = None) -> torch.Tensor:
        """Draw a random adapter; its numbers depend on the store's seed, the adapter's name and its layout alone."""
        digest = hashlib.blake2b(
            f"{self._seed}/{self._rank}/{adapter.spec.name}".encode(), digest_size=7
        ).digest()
        generator = torch.Generator(self._device).manual_seed(int.from_bytes(digest, "little"))
        return pack_random(adapter.layout, generator, self._dtype, out=out)

    def _draw_all(self, adapters: Sequence[HostAdapter]) -> None:
        """Draw random adapters on the GPU, each into the same memory, whence the stream copies it before the next."""
        if self._stream is None or not adapters:
            return
        with self._on_stream():
            size = (max(a.layout.num_pages for a in adapters), self._blueprint.geometry.page_elems)
            scratch = torch.empty(size, dtype=self._dtype, device=self._device)
            for adapter in adapters:
                adapter.extents = self._allocate(adapter.layout.num_pages)
                self._copy(adapter, self._draw(adapter, out=scratch[: adapter.layout.num_pages]))
        self._stream.synchronize()

    def _on_stream(self) -> contextlib.AbstractContextManager[object]:
        """Work of this thread goes to the store's own stream, not to that of the steps."""
        return contextlib.nullcontext() if self._stream is None else torch.cuda.stream(self._stream)
