"""Pinned host memory in a few large slabs, handed out in pages of the pool's size.

Slabs are anonymous memory in huge pages where the kernel has them, touched by many threads and then pinned in one call each: torch's own pinned
allocator rounds every tensor up to a power of two.
"""

from __future__ import annotations

import contextlib
import mmap
import weakref
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from engine.errors import UserError

PORTABLE = 1  # cudaHostRegisterPortable: pinned for all contexts


class Extent(NamedTuple):
    """Neighbouring pages of one slab."""

    slab: int
    first: int
    length: int


@dataclass(slots=True, eq=False, weakref_slot=True)
class Slab:
    """Host memory [pages, page_elems], pinned where there is a GPU, until nobody refers to the slab any more."""

    pages: torch.Tensor


def new_slab(num_pages: int, page_elems: int, dtype: torch.dtype, device: torch.device) -> Slab:
    """Map and pin memory. Takes about a second for some GB. Raises UserError where it cannot be had."""
    num_bytes = num_pages * page_elems * dtype.itemsize
    try:
        memory = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except (OSError, OverflowError, MemoryError):
        raise UserError(f"no {num_bytes} bytes of host memory for adapters: set host_memory_bytes") from None
    with contextlib.suppress(OSError):  # a kernel without huge pages
        memory.madvise(mmap.MADV_HUGEPAGE)
    flat = torch.frombuffer(memory, dtype=torch.uint8)
    slab = Slab(flat.view(dtype).view(num_pages, page_elems))
    if device.type == "cuda":
        flat[:: mmap.PAGESIZE].zero_()  # by torch's threads: pinning touches with one
        _pin(slab, flat, memory)
    return slab


def _pin(slab: Slab, flat: torch.Tensor, memory: mmap.mmap) -> None:
    runtime = torch.cuda.cudart()
    error = int(runtime.cudaHostRegister(flat.data_ptr(), flat.numel(), PORTABLE))
    if error:
        raise UserError(
            f"{flat.numel()} bytes of host memory for adapters cannot be pinned (CUDA error {error}): "
            "set host_memory_bytes"
        )
    # Unpinned before it is unmapped: the finalizer holds the mapping until then. At exit the driver does it.
    weakref.finalize(slab, _unpin, flat.data_ptr(), memory).atexit = False


def _unpin(address: int, memory: mmap.mmap) -> None:
    torch.cuda.cudart().cudaHostUnregister(address)
    del memory


class HostPages:
    """The accounts of the slabs' pages. Not for several threads at once: the host store locks."""

    def __init__(self) -> None:
        self._slabs: list[Slab] = []
        self._free: list[Extent] = []  # in order of place; neighbours are joined
        self.num_free = 0
        self.num_pages = 0

    def add(self, slab: Slab) -> None:
        """Hand out a further slab's pages."""
        self._slabs.append(slab)
        extent = Extent(len(self._slabs) - 1, 0, len(slab.pages))
        self.num_pages += extent.length
        self.release([extent])

    def allocate(self, count: int) -> tuple[Extent, ...] | None:
        """Take `count` pages, next to each other if possible, else in as few runs as there are; None if fewer are free."""
        if count > self.num_free:
            return None
        self.num_free -= count
        fitting = [extent for extent in self._free if extent.length >= count]
        if fitting:
            return (self._take(min(fitting, key=lambda extent: extent.length), count),)
        taken: list[Extent] = []
        for extent in sorted(self._free, key=lambda extent: -extent.length):
            part = min(count, extent.length)
            taken.append(self._take(extent, part))
            count -= part
            if not count:
                break
        return tuple(taken)

    def _take(self, extent: Extent, count: int) -> Extent:
        index = bisect_left(self._free, extent)
        rest = Extent(extent.slab, extent.first + count, extent.length - count)
        self._free[index : index + 1] = [rest] if rest.length else []
        return Extent(extent.slab, extent.first, count)

    def release(self, extents: Iterable[Extent]) -> None:
        """Give pages back."""
        for extent in extents:
            self.num_free += extent.length
            index = bisect_left(self._free, extent)
            if index < len(self._free) and _adjoin(extent, self._free[index]):
                extent = Extent(extent.slab, extent.first, extent.length + self._free.pop(index).length)
            if index and _adjoin(self._free[index - 1], extent):
                before = self._free[index - 1]
                self._free[index - 1] = Extent(before.slab, before.first, before.length + extent.length)
            else:
                self._free.insert(index, extent)

    def view(self, extent: Extent) -> torch.Tensor:
        """Return the memory of an extent: [length, page_elems]."""
        return self._slabs[extent.slab].pages[extent.first : extent.first + extent.length]

    def check_integrity(self, holders: Iterable[Sequence[Extent]]) -> None:
        """Raise AssertionError unless every page is free or held exactly once."""
        seen: set[tuple[int, int]] = set()
        for extent in [*self._free, *(extent for extents in holders for extent in extents)]:
            pages = {(extent.slab, extent.first + page) for page in range(extent.length)}
            assert not pages & seen, f"a page of {extent} is there twice"
            seen |= pages
        assert len(seen) == self.num_pages, f"{self.num_pages - len(seen)} pages are lost"
        assert self.num_free == sum(extent.length for extent in self._free)


def _adjoin(first: Extent, second: Extent) -> bool:
    return first.slab == second.slab and first.first + first.length == second.first
