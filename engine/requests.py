"""A request as the scheduler sees it: lengths and an adapter, no text."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """prompt_tokens and output_tokens are counts; output_tokens is the most that may be generated; adapter None is the base model."""

    request_id: int | str
    arrival_s: float
    prompt_tokens: int
    output_tokens: int
    adapter: str | None = None
