"""The ids of a trace's requests: each once, and a million of them in few bytes."""

from __future__ import annotations

from array import array
from collections.abc import Sequence

import numpy as np

Ids = Sequence[int | str]

MOST = 2**63 - 1


class IdColumn:
    """Collects ids and finds the repeated.

    Ascending whole numbers, as most files have, take eight bytes each; of anything else each id is remembered to know it again.
    """

    def __init__(self) -> None:
        self._ascending = array("q")
        self._rows: dict[int | str, int] = {}  # of each id, once they are not ascending whole numbers
        self._lines = array("q")
        self._places = ""  # how a row's place begins, its number left out

    def __len__(self) -> int:
        return len(self._lines)

    def add(self, id_: int | str, place: str) -> str | None:
        """Append an id that was read at a place, as `trace.jsonl:12`; return where it was before, None for a new one."""
        self._places = place.rstrip("0123456789")
        line = int(place[len(self._places) :] or -1)
        if not self._rows:
            if isinstance(id_, int) and (self._ascending[-1] if self._ascending else -MOST) < id_ <= MOST:
                self._ascending.append(id_)
                self._lines.append(line)
                return None
            self._rows = {known: row for row, known in enumerate(self._ascending)}
        if id_ in self._rows:
            return f"{self._places}{self._lines[self._rows[id_]]}"
        self._rows[id_] = len(self._lines)
        self._lines.append(line)
        return None

    def values(self) -> Ids:
        """Return the ids in the order of the rows."""
        return tuple(self._rows) if self._rows else compact(self._ascending)


def compact(numbers: array[int]) -> Ids:
    """Return whole numbers as a range where they are one."""
    if len(numbers) and numbers[-1] - numbers[0] == len(numbers) - 1 and _ascending(numbers):
        return range(numbers[0], numbers[-1] + 1)
    return numbers


def taken(ids: Ids, rows: np.ndarray[tuple[int], np.dtype[np.int64]]) -> Ids:
    """Return the ids of some rows."""
    if isinstance(ids, range | array):
        return compact(array("q", np.asarray(ids, dtype=np.int64)[rows].tobytes()))
    return tuple(ids[row] for row in rows.tolist())


def _ascending(numbers: array[int]) -> bool:
    return bool((np.diff(np.frombuffer(numbers, dtype=np.int64)) == 1).all())
