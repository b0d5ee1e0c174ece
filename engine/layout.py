"""Where things lie inside the pages of the pool: the size of a page, and the place of every row of an
adapter.

An adapter of given ranks has one layout, whatever pages it gets: a virtual space of whole pages in which each
row has a fixed place. The row table that a kernel reads maps rows to absolute places, once the pages are
known. docs/design.md, "One pool", is the contract.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from engine.errors import UserError
from engine.model_shape import MODULES, ROW_PARALLEL, ModelShape

ROW_ALIGN_BYTES = 128
"""Rows start at multiples of it: one full cache line of the GPU. Row tables count in it."""

Side = Literal["a", "b"]
Pairs = tuple[tuple[int, int], ...]
"""Seven pairs (of A, of B), in the order of MODULES."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PageGeometry:
    """One page: ``[num_layers, 2 (K, V), kv_heads, page_tokens, head_dim]``; ``kv_heads`` are this GPU's."""

    num_layers: int
    kv_heads: int
    head_dim: int
    page_tokens: int
    itemsize: int

    def __post_init__(self) -> None:
        for name in ("num_layers", "kv_heads", "head_dim", "page_tokens", "itemsize"):
            value = getattr(self, name)
            if value < 1:
                raise UserError(f"{name} (={value}) must be >= 1.")
        if self.page_bytes % ROW_ALIGN_BYTES:
            step = self._page_tokens_step
            raise UserError(
                f"page_tokens (={self.page_tokens}) makes pages of {self.page_bytes} bytes; "
                f"a multiple of {ROW_ALIGN_BYTES} is needed: page_tokens must be a multiple of {step}."
            )

    @property
    def token_elems(self) -> int:
        """Elements of one token's K and V over all layers."""
        return self.num_layers * 2 * self.kv_heads * self.head_dim

    @property
    def page_elems(self) -> int:
        """Elements of a page."""
        return self.token_elems * self.page_tokens

    @property
    def page_bytes(self) -> int:
        """Bytes of a page."""
        return self.page_elems * self.itemsize

    @property
    def units_per_page(self) -> int:
        """Units of ROW_ALIGN_BYTES in a page."""
        return self.page_bytes // ROW_ALIGN_BYTES

    @property
    def _page_tokens_step(self) -> int:
        return ROW_ALIGN_BYTES // math.gcd(self.token_elems * self.itemsize, ROW_ALIGN_BYTES)

    def page_tokens_for(self, wanted_bytes: int) -> int:
        """Return the smallest legal ``page_tokens`` whose pages hold ``wanted_bytes``."""
        step = self._page_tokens_step
        return -(-wanted_bytes // (self.token_elems * self.itemsize * step)) * step


def page_geometry(model: ModelShape, tp: int, page_tokens: int, itemsize: int) -> PageGeometry:
    """Return the page of one of ``tp`` GPUs. Raises UserError where a page is no multiple of 128 bytes."""
    return PageGeometry(
        num_layers=model.num_layers,
        kv_heads=model.kv_heads_per_rank(tp),
        head_dim=model.head_dim,
        page_tokens=page_tokens,
        itemsize=itemsize,
    )


Sharding = Literal["replicated", "block_diagonal", "slora"]
"""How an adapter is cut over the GPUs of a replica. Source: facts in arXiv:2311.03285 (slora) and arXiv:2510.23346 (the others).

With N GPUs, column-parallel modules (q,k,v,gate,up; the base's outputs are cut) and row-parallel ones (o, down; its inputs are):

    replicated      column: A [r, in] whole, B [r, out/N].        row: A [r, in/N], B [r, out] whole.
    block_diagonal  column: A [r/N, in], B's block [r/N, out/N].  row: A's block [r/N, in/N], B [r/N, out].
    slora           column: A [r/N, in], B [r, out/N].            row: A [r, in/N], B [r, out/N].

The first two need no communication: what a GPU computes is part of its own output, or of its own partial sum. Under slora column modules gather
h = A·x over the GPUs, and row modules sum it.
"""


def adapter_sharding(config_sharding: str, nblocks: int, tp: int) -> Sharding:
    """Return how an adapter of `nblocks` blocks (1: dense) is cut under a configuration's `lora_sharding`.

    Block-diagonal factors are cut at their blocks wherever that is exact; dense ones run `replicated` beside them. Raises UserError where the
    configuration asks for no communication and the blocks do not fit the GPUs.
    """
    if tp == 1:
        return "replicated"
    if config_sharding in ("slora", "slora_published"):
        return "slora"
    if nblocks > 1 and nblocks % tp == 0:
        return "block_diagonal"
    if nblocks > 1 and config_sharding == "block_diagonal":
        raise UserError(
            f"nblocks (={nblocks}) must be a multiple of tp (={tp}) under lora_sharding 'block_diagonal'; 'replicated' serves it as dense."
        )
    return "replicated"


def row_lengths(model: ModelShape, tp: int = 1, sharding: Sharding = "replicated") -> Pairs:
    """Return, for each module, the elements of a row of A and of a row of (transposed) B on one GPU."""
    shapes = model.linear_shapes(tp)
    lengths = []
    for module in MODULES:
        out, inputs = shapes[module]
        if sharding == "slora" and module in ROW_PARALLEL:
            out = divided(out, tp, f"{module}'s outputs")
        lengths.append((inputs, out))
    return tuple(lengths)


def row_counts(ranks: Sequence[int], tp: int = 1, sharding: Sharding = "replicated") -> Pairs:
    """Return, for each module, how many rows of A and of B one GPU holds. A rank that `tp` does not divide is cut as if it were padded."""
    if len(ranks) != len(MODULES):
        raise ValueError(f"ranks has {len(ranks)} entries, {len(MODULES)} are needed.")
    counts = []
    for module, rank in zip(MODULES, ranks, strict=True):
        part = -(-rank // tp)
        if sharding == "replicated":
            counts.append((rank, rank))
        elif sharding == "block_diagonal":
            counts.append((part, part))
        else:
            counts.append((rank if module in ROW_PARALLEL else part, rank))
    return tuple(counts)


def divided(value: int, tp: int, what: str) -> int:
    """Return value / tp. Raises UserError where it is no whole number."""
    if value % tp:
        raise UserError(f"tp (={tp}) must divide {what} (={value}).")
    return value // tp


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class AdapterLayout:
    """The places of an adapter's rows on one GPU, in an adapter's own space of ``num_pages`` pages.

    counts, lengths: rows and elements a row, by module and side. row_units: ``[num_rows]`` int64, where each
    row starts, as page ordinal × units per page + unit in the page. Build with ``adapter_layout``, which
    checks and caches. reserved_rows: entries a layer that the row table has room for beyond its own (engine/hot_table.py).
    """

    geometry: PageGeometry
    counts: Pairs
    lengths: Pairs
    row_units: NDArray[np.int64]
    num_pages: int
    _ordinals: NDArray[np.int64] = field(repr=False)
    reserved_rows: int = 0

    @property
    def num_rows(self) -> int:
        """Rows over all layers, A's and B's."""
        return len(self.row_units)

    @property
    def rows_per_layer(self) -> int:
        """Rows of one layer: 2R where A and B have the same ranks."""
        return sum(a + b for a, b in self.counts)

    @property
    def table_bytes(self) -> int:
        """Bytes of the row table, padding to 128 included."""
        return _align_up(4 * (self.num_rows + self.geometry.num_layers * self.reserved_rows))

    @property
    def payload_bytes(self) -> int:
        """Bytes of the weights themselves, without table, alignment and page ends."""
        a = sum(count[0] * length[0] for count, length in zip(self.counts, self.lengths, strict=True))
        b = sum(count[1] * length[1] for count, length in zip(self.counts, self.lengths, strict=True))
        return (a + b) * self.geometry.num_layers * self.geometry.itemsize

    @property
    def total_bytes(self) -> int:
        """Bytes of the pages taken."""
        return self.num_pages * self.geometry.page_bytes

    def rows(self, layer: int, module: int, side: Side) -> slice:
        """Return the row indices of one module's A or B in one layer; ``module`` indexes MODULES."""
        index = 0 if side == "a" else 1
        first = layer * self.rows_per_layer + sum(count[index] for count in self.counts[:module])
        if side == "b":
            first += sum(a for a, _ in self.counts)
        return slice(first, first + self.counts[module][index])

    def table(self, pages: Sequence[int] | NDArray[np.int64]) -> NDArray[np.int32]:
        """Return the table of an adapter in these pages: each row's pool offset in units of 128 bytes."""
        page_array = np.asarray(pages, dtype=np.int64)
        if page_array.shape != (self.num_pages,):
            raise ValueError(f"pages has shape {page_array.shape}, ({self.num_pages},) is needed.")
        units = self.geometry.units_per_page
        if (int(page_array.max()) + 1) * units > 2**31:
            raise ValueError(
                f"page {int(page_array.max())} is beyond the 2^31 units that a row table can reach."
            )
        shift = (page_array - np.arange(self.num_pages)) * units
        table: NDArray[np.int32] = (self.row_units + shift[self._ordinals]).astype(np.int32)
        return table


def adapter_layout(
    model: ModelShape,
    ranks: Sequence[int],
    geometry: PageGeometry,
    *,
    tp: int = 1,
    sharding: Sharding = "replicated",
    reserved_rows: int = 0,
) -> AdapterLayout:
    """Return the layout of an adapter with these seven ranks on one of ``tp`` GPUs; equal questions get the
    same object. reserved_rows: further entries a layer that its row table must have room for.

    Raises UserError, naming the ``page_tokens`` needed, where the row table or a row does not fit a page.
    """
    return _layout(row_counts(ranks, tp, sharding), row_lengths(model, tp, sharding), geometry, reserved_rows)


@lru_cache(maxsize=4096)
def _layout(counts: Pairs, lengths: Pairs, geometry: PageGeometry, reserved_rows: int = 0) -> AdapterLayout:
    bytes_of_rows = [
        _align_up(length[side] * geometry.itemsize)
        for side in (0, 1)
        for count, length in zip(counts, lengths, strict=True)
        for _ in range(count[side])
    ]
    if not bytes_of_rows:
        raise UserError("an adapter must target at least one linear.")
    row_sizes = np.tile(np.array(bytes_of_rows, dtype=np.int64) // ROW_ALIGN_BYTES, geometry.num_layers)
    entries = len(row_sizes) + geometry.num_layers * reserved_rows
    table_bytes = _align_up(4 * entries)
    needed = max(table_bytes, max(bytes_of_rows))
    if needed > geometry.page_bytes:
        what = f"row table of {entries} rows" if needed == table_bytes else "longest row"
        raise UserError(
            f"the adapter's {what} ({needed} bytes) does not fit a page of {geometry.page_bytes} bytes "
            f"(page_tokens = {geometry.page_tokens}): page_tokens must be at least "
            f"{geometry.page_tokens_for(needed)}."
        )
    row_units, ordinals = _place(row_sizes, table_bytes // ROW_ALIGN_BYTES, geometry.units_per_page)
    for array in (row_units, ordinals):
        array.setflags(write=False)
    return AdapterLayout(
        geometry=geometry,
        counts=counts,
        lengths=lengths,
        row_units=row_units,
        num_pages=int(ordinals[-1]) + 1,
        _ordinals=ordinals,
        reserved_rows=reserved_rows,
    )


def _place(
    row_sizes: NDArray[np.int64], first_unit: int, units_per_page: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Place rows one after the other, a row that would straddle going to the next page: (start units, page
    ordinals).

    One step a page, not a row: a running sum tells how many of the next rows fit.
    """
    ends = np.cumsum(row_sizes)
    starts = ends - row_sizes
    row_units = np.empty_like(row_sizes)
    ordinals = np.empty_like(row_sizes)
    row, page, used = 0, 0, first_unit
    while row < len(row_sizes):
        base = int(starts[row])
        stop = int(np.searchsorted(ends, base + units_per_page - used, side="right"))
        row_units[row:stop] = page * units_per_page + used + starts[row:stop] - base
        ordinals[row:stop] = page
        row, page, used = stop, page + 1, 0
    return row_units, ordinals


def _align_up(num_bytes: int) -> int:
    return -(-num_bytes // ROW_ALIGN_BYTES) * ROW_ALIGN_BYTES
