"""vLLM's adapter slots on the GPU: a fixed number, filled by an LRU that is asked for each active adapter in every step.

vLLM 0.8.5 touches the active adapters one by one, in the order of a Python set (`LRUCacheWorkerLoRAManager._apply_adapters`), and a load evicts
what was touched longest ago. When every slot was used in the last step, that may be an adapter which this very step still needs: it is loaded
again a moment later and evicts the next, until the one is reached that is not needed any more. So a new adapter costs 1 + S/6 loads on average,
not 1.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection
from zlib import crc32


def set_order(name: str) -> int:
    """Return where an adapter stands in a set: vLLM's is Python's hash, another in each process, so any fixed order is as good."""
    return crc32(name.encode())


class VllmSlots:
    """Which adapters hold one of `count` slots. loads, evictions: so far."""

    pages_held = 0  # slots lie outside the KV cache

    def __init__(self, count: int) -> None:
        self.count = count
        self.loads = 0
        self.evictions = 0
        self._held: dict[str, int] = {}  # adapter -> the last step known to have used it
        self._order: dict[str, int] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._held

    def __len__(self) -> int:
        return len(self._held)

    def left(self, name: str, step: int) -> None:
        """Note the last step that an adapter was used in."""
        self._held[name] = step

    def enter(self, active: Collection[str], started: Collection[str], step: int) -> int:
        """Bring the adapters of a step into slots; return how many loads that took.

        active: all that the step uses, at most `count`. started: those among them that the step before did not use.
        """
        if all(name in self._held for name in started):
            return 0
        loads = self.loads
        new = set(started)
        held = self._in_order({name: step - 1 for name in active if name not in new and name in self._held})
        for name in sorted(active, key=self._place):
            if name in held:
                held.move_to_end(name)
                continue
            if len(held) >= self.count:
                held.popitem(last=False)
                self.evictions += 1
            held[name] = step
            self.loads += 1
        self._held = dict(held)
        return self.loads - loads

    def _in_order(self, used: dict[str, int]) -> OrderedDict[str, int]:
        """Return what holds a slot as the LRU has it: by last use, those of one step as they were touched in it."""
        merged = self._held | used
        return OrderedDict(sorted(merged.items(), key=lambda item: (item[1], self._place(item[0]))))

    def _place(self, name: str) -> int:
        place = self._order.get(name)
        if place is None:
            place = self._order[name] = set_order(name)
        return place
