"""The requests that run: the slots, pages and adapters that they hold."""

from __future__ import annotations

from collections.abc import Iterator

from engine.sequence import Phase, Sequence
from engine.unified_pool import UnifiedPool

# Python looks a member of an enumeration up in 0.15 µs, a global in none; these are asked for in every plan.
_PREFILL = Phase.PREFILL
_FINISHING = Phase.FINISHING


class RunningSet:
    """Sequences from their admission until what they hold is given back.

    active: those in prefill or decode, oldest admission first. finishing: those whose last token is planned, in a step that is not complete.
    adapters: how many of either use each adapter. merged: an adapter that is in the weights for good: its requests' rows need no LoRA, and
    those of the base take it out again.
    """

    def __init__(self, max_num_seqs: int, memory: UnifiedPool, merged: str | None = None) -> None:
        self.active: dict[Sequence, None] = {}
        self.finishing: dict[Sequence, None] = {}
        self.adapters: dict[str, int] = {}
        self.free_slots = list(range(max_num_seqs - 1, -1, -1))
        self._max_num_seqs = max_num_seqs
        self._memory = memory
        self._merged = merged

    def __len__(self) -> int:
        return len(self.active) + len(self.finishing)

    def __iter__(self) -> Iterator[Sequence]:
        yield from self.active
        yield from self.finishing

    def start(self, sequence: Sequence, pages: int, matched: list[int], now_s: float) -> None:
        """Give a sequence what it needs to run: its adapter, which is there, a slot and `pages` pages, the `matched` ones among them."""
        request, name = sequence.request, sequence.request.adapter
        if name is not None:
            sequence.resident = resident = self._memory.residency.acquire(name)
            self.adapters[name] = self.adapters.get(name, 0) + 1
            if sequence.admitted_s is None and resident.load_finished_s > request.arrival_s:
                sequence.load_wait_s = resident.load_finished_s - max(
                    request.arrival_s, resident.load_started_s
                )
        if self._merged is not None:
            merged = self._memory.residency.get(self._merged)
            sequence.resident = None if name == self._merged else sequence.resident or merged
        sequence.pages = self._memory.admit(request, pages, matched)
        sequence.held_pages = pages
        sequence.slot = self.free_slots.pop()
        sequence.phase = _PREFILL
        if sequence.admitted_s is None:
            sequence.admitted_s = now_s
        self.active[sequence] = None

    def finish(self, sequence: Sequence) -> None:
        """Note that no further token of a sequence will be planned; it holds what it has until `let_go`."""
        del self.active[sequence]
        self.finishing[sequence] = None
        sequence.phase = _FINISHING

    def let_go(self, sequence: Sequence) -> None:
        """Take everything from a sequence, which is in neither of the two lists any more."""
        self._memory.release(sequence.pages, sequence.held_pages - len(sequence.pages))
        sequence.pages = []
        sequence.held_pages = 0
        self.free_slots.append(sequence.slot)
        sequence.slot = -1
        sequence.resident = None
        name = sequence.request.adapter
        if name is not None:
            self._memory.residency.release(name)
            users = self.adapters[name] - 1
            if users:
                self.adapters[name] = users
            else:
                del self.adapters[name]

    def check_integrity(self) -> None:
        """Raise AssertionError unless slots are conserved and every adapter is counted as often as it is used."""
        slots = [sequence.slot for sequence in self]
        assert sorted(slots + self.free_slots) == list(range(self._max_num_seqs)), "slots are not conserved"
        users: dict[str, int] = {}
        for sequence in self:
            if (name := sequence.request.adapter) is not None:
                users[name] = users.get(name, 0) + 1
        assert users == self.adapters
        residency = self._memory.residency
        assert all(
            residency.get(name).users == count + (name in residency.pinned) for name, count in users.items()
        )
