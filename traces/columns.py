"""The rows of a trace, one by one and by column."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from traces.errors import TraceError

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

BASE_MODEL = -1  # adapter_index of a request that uses no adapter


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

    ids: tuple[int | str, ...]
    arrival_s: Floats
    prompt_tokens: Ints
    output_tokens: Ints
    adapter_index: Ints
    adapter_names: tuple[str, ...] = ()
    adapter_ranks: tuple[int | None, ...] = ()
    sessions: tuple[str | None, ...] | None = None
    prefix_blocks: tuple[tuple[int, ...] | None, ...] | None = None
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
            ids=tuple(self.ids[row] for row in listed),
            arrival_s=self.arrival_s[rows],
            prompt_tokens=self.prompt_tokens[rows],
            output_tokens=self.output_tokens[rows],
            adapter_index=new_index,
            adapter_names=tuple(self.adapter_names[i] for i in kept.tolist()),
            adapter_ranks=tuple(self.adapter_ranks[i] for i in kept.tolist()),
            sessions=None if sessions is None else tuple(sessions[row] for row in listed),
            prefix_blocks=None if blocks is None else tuple(blocks[row] for row in listed),
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
