"""What the cost-aware router knows of its replicas, and what one more request would cost on each. Torch-free.

The router asks nobody: it counts what it sent and what ended, and prices it by a few numbers that `python -m sim router-costs` takes
from a profile. A decision takes a fixed number of operations for each replica.

    wait    = prompts sent before that are not computed yet + the adapter's load, unless the replica has had it + turns for a slot
    batch   = rows · row_s + adapters · adapter_s                      with this request and its adapter among them
    prefill = prompt · (prefill_token_s + batch / chunk_tokens)        the others decode beside each chunk
    TTFT    = wait + prefill + step_s + batch
    cost    = TTFT + output · (step_s + batch)                         what the request itself takes
            + others · (prompt · prefill_token_s + output · (row_s + adapter_s if the adapter is new to the batch))

as in Toppings (arXiv:2401.11240): the marginal cost to prefill and to decode, and none where a promise would break, unless it would
break everywhere.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from engine.errors import UserError


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterCosts:
    """Seconds of a replica's work, and what is promised.

    prefill_token_s: a prompt's token; step_s: a decode step of nobody; row_s, adapter_s: what a row and a distinct adapter add to it;
    load_s: an adapter's copy to the GPU. resident_adapters: how many a GPU keeps. chunk_tokens: most prompt tokens of a step. Raises
    UserError naming the field.
    """

    prefill_token_s: float
    step_s: float
    row_s: float
    adapter_s: float
    load_s: float
    resident_adapters: int = 1_000_000
    chunk_tokens: int = 1024
    ttft_slo_s: float = 0.5
    tpot_slo_s: float = 0.05

    def __post_init__(self) -> None:
        for item in fields(self):
            value = getattr(self, item.name)
            number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
            above = item.name in ("step_s", "resident_adapters", "chunk_tokens", "ttft_slo_s", "tpot_slo_s")
            if not number or value < 0 or (above and value == 0):
                bound = "above 0" if above else "of at least 0"
                raise UserError(f"config: router_costs[{item.name!r}]={value!r} must be a number {bound}")

    @classmethod
    def from_json(cls, data: Any) -> RouterCosts:
        """Build from the JSON form. Raises UserError on what is missing, unknown or out of bounds."""
        if not isinstance(data, Mapping):
            raise UserError(f"config: router_costs={data!r} must be an object")
        known = {item.name for item in fields(cls)}
        for key in data:
            if key not in known:
                raise UserError(
                    f"config: router_costs has unknown key {key!r}; known keys: {', '.join(sorted(known))}"
                )
        try:
            return cls(**data)
        except TypeError:
            missing = next(item.name for item in fields(cls) if item.name not in data)
            raise UserError(f"config: router_costs lacks {missing!r}") from None


class ReplicaLedger:
    """What one replica was sent and has not ended."""

    __slots__ = ("_adapters", "_computed_at_s", "_costs", "_known", "_rows", "_slots")

    def __init__(self, costs: RouterCosts, slots: int) -> None:
        self._costs = costs
        self._slots = slots  # requests that run at a time
        self._rows = 0
        self._adapters: dict[str, int] = {}  # adapter -> unfinished requests
        self._known: OrderedDict[str, None] = (
            OrderedDict()
        )  # adapters that were loaded, least recently asked for first
        self._computed_at_s = -math.inf  # when the prompts sent so far are computed

    def price(self, adapter: str | None, prompt: int, output: int, now_s: float) -> tuple[bool, float]:
        """Return (whether a promise would break, seconds that a request would cost here). Smaller is better, in this order."""
        costs, others = self._costs, min(self._rows, self._slots - 1)
        new = adapter is not None and adapter not in self._adapters
        batch_s = self._batch_s(others + 1, new)
        step_s = costs.step_s + batch_s
        wait_s = max(0.0, self._computed_at_s - now_s)
        if new and adapter not in self._known:
            wait_s = max(wait_s, costs.load_s)
        queued = self._rows + 1 - self._slots
        if queued > 0:  # a slot is free each time that one of `slots` requests like this one has ended
            wait_s += queued * output * step_s / self._slots
        ttft_s = wait_s + self._prefill_s(prompt, batch_s) + step_s
        harm_s = others * (prompt * costs.prefill_token_s + output * (costs.row_s + new * costs.adapter_s))
        breaks = ttft_s > costs.ttft_slo_s or step_s > costs.tpot_slo_s
        return breaks, ttft_s + output * step_s + harm_s

    def _batch_s(self, rows: int, new_adapters: int) -> float:
        costs = self._costs
        return rows * costs.row_s + (len(self._adapters) + new_adapters) * costs.adapter_s

    def _prefill_s(self, prompt: int, batch_s: float) -> float:
        return prompt * (self._costs.prefill_token_s + batch_s / self._costs.chunk_tokens)

    def sent(self, adapter: str | None, prompt: int, now_s: float) -> None:
        """Note a request."""
        costs = self._costs
        prefill_s = self._prefill_s(prompt, self._batch_s(min(self._rows, self._slots), 0))
        self._computed_at_s = max(self._computed_at_s, now_s) + prefill_s
        self._rows += 1
        if adapter is None:
            return
        self._adapters[adapter] = self._adapters.get(adapter, 0) + 1
        self._known[adapter] = None
        self._known.move_to_end(adapter)
        if len(self._known) > costs.resident_adapters:
            self._known.popitem(last=False)

    def ended(self, adapter: str | None) -> None:
        """Note a request's end."""
        self._rows -= 1
        if adapter is not None:
            self._adapters[adapter] -= 1
            if not self._adapters[adapter]:
                del self._adapters[adapter]

    def forget(self) -> None:
        """Begin anew, as a replica that was started again: nothing is on its GPU."""
        self._known.clear()
        self._computed_at_s = -math.inf
