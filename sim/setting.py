"""What decides a step's cost beside what is in it: model, parallelism, GPU."""

from __future__ import annotations

from dataclasses import dataclass

from engine.model_shape import ModelShape
from sim.exchange import Exchange


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What composes a step's cost beside its shape.

    sample_rows: most rows whose next token is computed in a step: the engine computes min(padded tokens,
    max_num_seqs) of them. exchange, collectives: what LoRA exchanges between the GPUs, and by what. gpu: another
    kind than the profiled one, by whose specification operators are scaled.
    """

    tp: int
    model: ModelShape
    graph_max_tokens: int
    sample_rows: int
    exchange: Exchange = "local"
    collectives: str = "fast"
    gpu: str | None = None
