"""How much a client may ask for, and how the server ends."""

from __future__ import annotations

from dataclasses import dataclass, fields

from engine.errors import UserError


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerLimits:
    """Bounds of the server.

    max_queue: requests that may wait beyond the `max_num_seqs` that run; the next gets a 429.
    max_body_bytes: of a request. max_prompts: in one completion request. max_stop, max_stop_chars: stop texts of a request, and characters of one.
    max_adapters: registered at a time; max_adapter_bytes: of one adapter's safetensors file.
    concurrent_loads: adapters being read and packed at a time.
    drain_timeout_s: how long SIGTERM lets running requests finish.
    """

    max_queue: int = 1024
    max_body_bytes: int = 4 * 2**20
    max_prompts: int = 128
    max_stop: int = 4
    max_stop_chars: int = 256
    max_adapters: int = 10_000
    max_adapter_bytes: int = 4 * 2**30
    concurrent_loads: int = 2
    drain_timeout_s: float = 30.0

    def __post_init__(self) -> None:
        for field in fields(self):
            value, least = (
                getattr(self, field.name),
                0 if field.name in ("max_queue", "drain_timeout_s") else 1,
            )
            if not value >= least:
                raise UserError(f"{field.name}={value} must be at least {least}")
