"""The rows of a trace, one by one and by column."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import overload

import numpy as np
from numpy.typing import NDArray

from traces.errors import TraceError
from traces.ids import Ids, taken

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

Blocks = tuple[int, ...]

BASE_MODEL = -1  # adapter_index of a request that uses no adapter
MAX_BLOCK = 2**64 - 1


class BlockColumn(Sequence["Blocks | None"]):
    """The prefix blocks of each request, eight bytes a block; a row is a tuple, or None where it has none."""

    def __init__(self, rows: Iterable[Sequence[int] | None] = ()) -> None:
        self._blocks = array("Q")
        self._ends = array("q")
        self._given = bytearray()  # 0 where a row has none
        for row in rows:
            self.append(row)

    def append(self, blocks: Sequence[int] | None) -> None:
        """Add a row."""
        self._blocks.extend(blocks or ())
        self._given.append(blocks is not None)
        self._ends.append(len(self._blocks))

    @property
    def known(self) -> bool:
        """Whether any row has blocks."""
        return any(self._given)

    def __len__(self) -> int:
        return len(self._ends)

    @overload
    def __getitem__(self, row: int) -> Blocks | None: ...
    @overload
    def __getitem__(self, row: slice) -> tuple[Blocks | None, ...]: ...
    def __getitem__(self, row: int | slice) -> Blocks | tuple[Blocks | None, ...] | None:
        if isinstance(row, slice):
            return tuple(self[place] for place in range(*row.indices(len(self))))
        place = row + len(self) if row < 0 else row
        if not 0 <= place < len(self):
            raise IndexError(row)
        if not self._given[place]:
            return None
        return tuple(self._blocks[self._ends[place - 1] if place else 0 : self._ends[place]])


def distinct_blocks(rows: Sequence[Blocks | None]) -> int:
    """Return how many different blocks there are."""
    if isinstance(rows, BlockColumn):
        return len(np.unique(np.frombuffer(rows._blocks, dtype=np.uint64)))
    return len(set(chain.from_iterable(row or () for row in rows)))


@dataclass(frozen=True, slots=True, kw_only=True)
class TraceRequest:
    """One request: arrival in seconds from the trace's start, lengths in tokens.

    No adapter is the base model; no rank means that the trace does not tell it.
    """

    id: int | str
    arrival_s: float
    prompt_tokens: int
    output_tokens: int
    adapter: str | None = None
    rank: int | None = None
    session: str | None = None
    prefix_blocks: tuple[int, ...] | None = None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TraceColumns:
    """The same requests by column, in arrival order.

    `adapter_index[i]` points into `adapter_names` and `adapter_ranks` (rank None: not told), or is
    BASE_MODEL. `raw_arrival_s` is the source's own coarse clock where `arrival_s` holds arrivals spread
    within its ticks.
    """

    ids: Ids
    arrival_s: Floats
    prompt_tokens: Ints
    output_tokens: Ints
    adapter_index: Ints
    adapter_names: tuple[str, ...] = ()
    adapter_ranks: tuple[int | None, ...] = ()
    sessions: tuple[str | None, ...] | None = None
    prefix_blocks: Sequence[Blocks | None] | None = None
    raw_arrival_s: Floats | None = None

    def __post_init__(self) -> None:
        count = len(self.ids)
        needed = (self.arrival_s, self.prompt_tokens, self.output_tokens, self.adapter_index)
        optional = (self.sessions, self.prefix_blocks, self.raw_arrival_s)
        if any(column is not None and len(column) != count for column in (*needed, *optional)):
            raise TraceError(f"columns must all have {count} rows, as ids has")
        if len(self.adapter_names) != len(self.adapter_ranks):
            raise TraceError("adapter_names and adapter_ranks must have one length")
        if count == 0:
            raise TraceError("a trace must have at least one request")

    def take(self, rows: Ints) -> TraceColumns:
        """Return the given rows, in the given order; adapters that no row uses any more are dropped."""
        index = self.adapter_index[rows]
        kept, compact = np.unique(index[index != BASE_MODEL], return_inverse=True)
        new_index = np.full(len(rows), BASE_MODEL, dtype=np.int64)
        new_index[index != BASE_MODEL] = compact
        listed = rows.tolist()
        sessions, blocks = self.sessions, self.prefix_blocks
        return replace(
            self,
            ids=taken(self.ids, rows),
            arrival_s=self.arrival_s[rows],
            prompt_tokens=self.prompt_tokens[rows],
            output_tokens=self.output_tokens[rows],
            adapter_index=new_index,
            adapter_names=tuple(self.adapter_names[i] for i in kept.tolist()),
            adapter_ranks=tuple(self.adapter_ranks[i] for i in kept.tolist()),
            sessions=None if sessions is None else tuple(sessions[row] for row in listed),
            prefix_blocks=None if blocks is None else BlockColumn(blocks[row] for row in listed),
            raw_arrival_s=None if self.raw_arrival_s is None else self.raw_arrival_s[rows],
        )

    def requests(self) -> tuple[TraceRequest, ...]:
        """Return the same rows one by one."""
        count = len(self.ids)
        names = [*self.adapter_names, None]  # index BASE_MODEL = -1 is the last
        ranks = [*self.adapter_ranks, None]
        return tuple(
            TraceRequest(
                id=id_,
                arrival_s=arrival_s,
                prompt_tokens=prompt_tokens,
                output_tokens=output_tokens,
                adapter=names[adapter],
                rank=ranks[adapter],
                session=session,
                prefix_blocks=blocks,
            )
            for id_, arrival_s, prompt_tokens, output_tokens, adapter, session, blocks in zip(
                self.ids,
                self.arrival_s.tolist(),
                self.prompt_tokens.tolist(),
                self.output_tokens.tolist(),
                self.adapter_index.tolist(),
                self.sessions or (None,) * count,
                self.prefix_blocks or (None,) * count,
                strict=True,
            )
        )
