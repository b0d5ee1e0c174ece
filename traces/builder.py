"""Builds a trace row by row, and refuses a row that makes no sense.

Every way into a trace (the native file, the importers, a list of requests) comes through here, so a bad field
is refused in the same words wherever it comes from.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Mapping
from typing import Any, NoReturn

import numpy as np

from traces.columns import BASE_MODEL, MAX_BLOCK, BlockColumn, TraceColumns
from traces.errors import TraceError
from traces.ids import IdColumn

MAX_RANK = 256
MAX_TOKENS = 2**31 - 1  # a request's tokens are counted in int32 on the GPU


class TraceBuilder:
    """Collects checked rows.

    `source` names the whole, as a file's path does. `field_names` says what a field is called there, for
    errors.
    """

    def __init__(
        self, source: str, *, raw_arrivals: bool = False, field_names: Mapping[str, str] | None = None
    ) -> None:
        self._field_names = field_names or {}
        self._source = source
        self._raw_arrivals = raw_arrivals
        self._place = ""
        self._ids = IdColumn()
        self._arrival_s = array("d")
        self._raw_arrival_s = array("d")
        self._prompt_tokens = array("q")
        self._output_tokens = array("q")
        self._adapter_index = array("q")
        self._adapter_slots: dict[str, int] = {}
        self._adapter_ranks: list[int | None] = []
        self._sessions: list[str | None] = []  # empty until a row has one
        self._session_names: dict[str, str] = {}
        self._prefix_blocks = BlockColumn()

    def add(self, place: str, row: Mapping[str, Any]) -> None:
        """Append one row given by the native field names; keys it does not know are ignored.

        `place` begins an error, as `trace.jsonl:12`. Raises TraceError on the first field that is
        missing or wrong.
        """
        self._place = place
        self._add_id(row)
        self._add_arrival(row)
        self._prompt_tokens.append(self._whole(row, "prompt_tokens", 1, MAX_TOKENS))
        self._output_tokens.append(self._whole(row, "output_tokens", 1, MAX_TOKENS))
        self._add_adapter(row)
        self._add_session(row)
        self._add_blocks(row)

    def columns(self) -> TraceColumns:
        """Return what was added. Raises TraceError if that is nothing."""
        if not self._ids:
            raise TraceError(f"{self._source}: the trace is empty: it has no request")
        spread = not self._raw_arrivals and self._raw_arrival_s != self._arrival_s
        return TraceColumns(
            ids=self._ids.values(),
            arrival_s=np.frombuffer(self._arrival_s, dtype=np.float64),
            prompt_tokens=np.frombuffer(self._prompt_tokens, dtype=np.int64),
            output_tokens=np.frombuffer(self._output_tokens, dtype=np.int64),
            adapter_index=np.frombuffer(self._adapter_index, dtype=np.int64),
            adapter_names=tuple(self._adapter_slots),
            adapter_ranks=tuple(self._adapter_ranks),
            sessions=tuple(self._sessions) if self._sessions else None,
            prefix_blocks=self._prefix_blocks if self._prefix_blocks.known else None,
            raw_arrival_s=np.frombuffer(self._raw_arrival_s, dtype=np.float64) if spread else None,
        )

    def _fail(self, field: str, problem: str) -> NoReturn:
        raise TraceError(f"{self._place}: {self._field_names.get(field, field)} {problem}")

    def _add_id(self, row: Mapping[str, Any]) -> None:
        id_ = row.get("id")
        if id_ is None:
            id_ = len(self._ids)
        if type(id_) is not int and (type(id_) is not str or not id_):
            self._fail("id", f"must be a whole number or a text, not {_show(id_)}")
        before = self._ids.add(id_, self._place)
        if before is not None:
            self._fail("id", f"{_show(id_)} was already used at {before}")

    def _add_arrival(self, row: Mapping[str, Any]) -> None:
        field = "arrival_s"
        raw_s = arrival_s = self._seconds(row, field)
        if not self._raw_arrivals and row.get("arrival_spread_s") is not None:
            field = "arrival_spread_s"
            arrival_s = self._seconds(row, field)
        if self._arrival_s and arrival_s < self._arrival_s[-1]:
            before_s = self._arrival_s[-1]
            self._fail(
                field, f"{arrival_s!r} is before {before_s!r} of the row above: sort the trace by time"
            )
        self._arrival_s.append(arrival_s)
        self._raw_arrival_s.append(raw_s)

    def _seconds(self, row: Mapping[str, Any], field: str) -> float:
        value = row.get(field)
        if type(value) is float and 0 <= value < 1e300:
            return value
        if value is None:
            self._fail(field, "is missing")
        if isinstance(value, bool) or not isinstance(value, (int, float, np.integer, np.floating)):
            self._fail(field, f"must be a number of seconds, not {_show(value)}")
        if not -1e300 < value < 1e300:  # false for NaN too
            self._fail(field, f"must be finite, not {_show(value)}")
        if value < 0:
            self._fail(field, f"must be at least 0, not {_show(value)}")
        return float(value)

    def _whole(self, row: Mapping[str, Any], field: str, low: int, high: int) -> int:
        value = row.get(field)
        if type(value) is int and low <= value <= high:
            return value
        if value is None:
            self._fail(field, "is missing")
        return self._whole_value(value, field, low, high)

    def _whole_value(self, value: Any, field: str, low: int, high: int) -> int:
        if isinstance(value, bool) or not isinstance(value, (int, float, np.integer, np.floating)):
            self._fail(field, f"must be a whole number, not {_show(value)}")
        if isinstance(value, float) and not (math.isfinite(value) and value == math.floor(value)):
            self._fail(field, f"must be a whole number, not {_show(value)}")
        if not low <= value <= high:
            self._fail(field, f"must be in {low}..{high}, not {_show(value)}")
        return int(value)

    def _add_adapter(self, row: Mapping[str, Any]) -> None:
        name, rank = row.get("adapter"), row.get("rank")
        if rank is not None:
            rank = self._whole_value(rank, "rank", 1, MAX_RANK)
        if name is None:
            if rank is not None:
                self._fail("rank", f"is {rank}, but the request names no adapter")
            self._adapter_index.append(BASE_MODEL)
            return
        if type(name) is not str or not name:
            self._fail("adapter", f"must be a name or null, not {_show(name)}")
        slot = self._adapter_slots.setdefault(name, len(self._adapter_ranks))
        if slot == len(self._adapter_ranks):
            self._adapter_ranks.append(rank)
        elif self._adapter_ranks[slot] is None:
            self._adapter_ranks[slot] = rank
        elif rank is not None and rank != self._adapter_ranks[slot]:
            known = f"{self._adapter_ranks[slot]} earlier: an adapter has one rank"
            self._fail("rank", f"of adapter {_show(name)} is {rank}, but {known}")
        self._adapter_index.append(slot)

    def _add_session(self, row: Mapping[str, Any]) -> None:
        session = row.get("session")
        if session is not None and type(session) is not str:
            if type(session) is not int:
                self._fail("session", f"must be a text or null, not {_show(session)}")
            session = str(session)
        if session is not None:
            session = self._session_names.setdefault(
                session, session
            )  # one text, however many requests have it
            if not self._sessions:
                self._sessions = [None] * (len(self._ids) - 1)
        if self._sessions or session is not None:
            self._sessions.append(session)

    def _add_blocks(self, row: Mapping[str, Any]) -> None:
        blocks = row.get("prefix_blocks")
        if blocks is not None and not (
            isinstance(blocks, (list, tuple)) and all(type(b) is int and 0 <= b <= MAX_BLOCK for b in blocks)
        ):
            wanted = "a list of whole numbers of at least 0 and below 2^64"
            self._fail("prefix_blocks", f"must be {wanted}, not {_show(blocks)}")
        self._prefix_blocks.append(blocks)


def _show(value: Any) -> str:
    """Show a value as a user would find it in the file, cut to a length that keeps the error on one line."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
