"""A request as the scheduler sees it: lengths and an adapter, no text."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any


@dataclass(slots=True, unsafe_hash=True, init=False)
class Request:
    """A value: nobody changes it (not `frozen`, which makes it three times as slow to make; a simulation makes millions).

    prompt_tokens and output_tokens are counts; output_tokens is the most that may be generated; adapter None is the base model.

    page_keys: what is in each full page of the prompt, in order: equal keys mean equal tokens from the prompt's start to that page's end,
    under the same adapter (engine/prefix_keys.py makes them). None: nothing is known of it, and nothing is shared.
    """

    request_id: int | str
    arrival_s: float
    prompt_tokens: int
    output_tokens: int
    adapter: str | None
    page_keys: tuple[Hashable, ...] | None

    def __init__(
        self,
        request_id: int | str,
        arrival_s: float,
        prompt_tokens: int,
        output_tokens: int,
        adapter: str | None = None,
        page_keys: tuple[Hashable, ...] | None = None,
    ) -> None:
        self.request_id = request_id
        self.arrival_s = arrival_s
        self.prompt_tokens = prompt_tokens
        self.output_tokens = output_tokens
        self.adapter = adapter
        self.page_keys = page_keys

    def __reduce__(self) -> tuple[Any, ...]:  # it travels to replicas; a compiled `__new__` calls `__init__`
        return Request, (
            self.request_id,
            self.arrival_s,
            self.prompt_tokens,
            self.output_tokens,
            self.adapter,
            self.page_keys,
        )
