"""A cost model that one can compute by hand, and small configurations."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from engine.adapter import AdapterSpec
from engine.blueprint import Blueprint, blueprint
from engine.config import ServingConfig
from engine.residency import AdapterFootprint
from engine.step import StepShape
from sim.heating import Heating
from sim.segment import DecodeRun
from traces import Trace, TraceRequest


@dataclass(frozen=True)
class ConstantCosts:
    """step = `step` + `token` · tokens + `kv` · decode KV tokens; a load takes `load` + bytes · `byte`.

    straight: so many steps ahead are priced at once.
    """

    step: float = 1.0
    token: float = 0.0
    kv: float = 0.0
    host: float = 0.0
    load: float = 0.0
    byte: float = 0.0
    straight: int = 10**9
    heating: Heating | None = None

    def step_s(self, shape: StepShape) -> float:
        return self.step + self.token * shape.tokens + self.kv * shape.decode_kv_tokens

    def decode_run(self, shape: StepShape, steps: int) -> DecodeRun:
        return DecodeRun(self.step_s(shape), self.kv * shape.decode_rows, min(steps, self.straight))

    def host_s(self, shape: StepShape) -> float:
        return self.host

    def load_s(self, num_bytes: int) -> float:
        return self.load + self.byte * num_bytes

    def parts_s(self, shape: StepShape) -> Mapping[str, float]:
        return {"all": self.step_s(shape)}


def small_plan(
    pages: int = 64,
    footprints: Mapping[str, AdapterFootprint] | None = None,
    **changes: Any,
) -> Blueprint:
    """A blueprint whose pool and adapters are as small as a test wants."""
    config = ServingConfig(
        **{
            "max_num_seqs": 4,
            "max_num_batched_tokens": 16,
            "max_model_len": 64,
            "page_tokens": 16,
            "num_pages": pages,
            **changes,
        }
    )
    plan = blueprint(config.with_changes(num_pages=None), {})
    return replace(
        plan,
        config=config,
        adapters={name: AdapterSpec(name=name) for name in footprints or {}},
        footprints=dict(footprints or {}),
        memory=replace(plan.memory, num_pages=pages),
    )


def trace_of(*rows: tuple[Any, ...]) -> Trace:
    """A trace of (arrival_s, prompt, output[, adapter]) rows; ids are 0, 1, …"""
    return Trace(
        TraceRequest(
            id=number,
            arrival_s=row[0],
            prompt_tokens=row[1],
            output_tokens=row[2],
            adapter=row[3] if len(row) > 3 else None,
        )
        for number, row in enumerate(rows)
    )
