"""What the GPUs of a replica exchange in a step takes, composed of exchanges timed alone.

    row-parallel linears, each with the norm behind it    (2·L + 1) · T(tokens · hidden)
    logits of sampled rows                                T(rows · vocabulary / N)
    S-LoRA's parts of h                                   L · Σ over messages of T(tokens · rank of an average token)

Under N GPUs that were not measured, from 2 with α = T(2) at the fewest bytes:

    all-reduce, all-gather by NCCL   α·log2 N + (T(2) − α)·2(N − 1)/N     a tree's depth, a ring's bytes (Patarasuk and Yuan, 2009)
    kernels that read their peers    α + (T(2) − α)·(N − 1)               each GPU reads all the others
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import log2
from typing import Literal

from engine.config import ServingConfig
from engine.errors import UserError
from engine.model_shape import ModelShape
from engine.peer_limits import MOST_PEER_BYTES
from sim.curve import Curve

Exchange = Literal["local", "slora", "slora_published"]
"""How much LoRA exchanges: nothing (one GPU, replicated or block-diagonal factors), or S-LoRA's parts of h, coalesced or as published."""

Microseconds = Callable[[float], float]  # of bytes

PLANE_BYTES = (
    4 * 4
)  # of an element of h that peers read: four planes, about, in fp32 (kernels/lora_shards.py)
MESSAGES = {"slora": (2, 2), "slora_published": (5, 2)}  # all-gathers and all-reduces a layer


def exchange_of(config: ServingConfig) -> Exchange:
    """Return how much LoRA exchanges under a configuration."""
    if config.tp == 1 or config.lora_sharding == "replicated" or config.lora_sharding == "block_diagonal":
        return "local"
    return config.lora_sharding


@dataclass(frozen=True, slots=True, kw_only=True)
class Exchanges:
    """Microseconds of a step's exchanges. base_us: by tokens and sampled rows; lora_us: by tokens and the bytes on one GPU of an average
    token's adapter."""

    base_us: Callable[[int, int], float]
    lora_us: Callable[[int, float], float]


def no_exchanges() -> Exchanges:
    """Return those of one GPU."""
    return Exchanges(base_us=lambda tokens, rows: 0.0, lora_us=lambda tokens, token_bytes: 0.0)


def exchanges_of(
    curves: Mapping[tuple[int, str], Curve],
    model: ModelShape,
    tp: int,
    exchange: Exchange,
    collectives: str,
    itemsize: int,
    source: str,
    link: float = 1.0,
) -> Exchanges:
    """Compose. curves: by (GPUs, operation): all_reduce, and where measured all_gather, nccl_add_norm, peer_add_norm.

    link: how much longer bytes take between the GPUs than between those measured. Raises UserError where no all-reduce between 2 GPUs is known.
    """
    if tp == 1:
        return no_exchanges()
    layers, row_bytes = model.num_layers, model.hidden_size * itemsize
    reduce_us, gather_us = (
        _between(curves, tp, names, source, link) for names in (("all_reduce",), ("all_gather", "all_reduce"))
    )
    nccl_us = _between(curves, tp, ("nccl_add_norm", "all_reduce"), source, link)
    peer_us = _peers(curves, tp, link) if collectives == "fast" else None
    most = MOST_PEER_BYTES.get(tp, 0)

    logits_bytes = -(-model.vocab_size // tp) * itemsize

    def base_us(tokens: int, rows: int) -> float:
        size = tokens * row_bytes
        by = nccl_us if peer_us is None or size > most else peer_us
        return (2 * layers + 1) * by(size) + gather_us(rows * logits_bytes)

    rank_bytes = itemsize * layers * sum(out + inner for out, inner in model.linear_shapes(1).values()) / tp

    def lora_us(tokens: int, token_bytes: float) -> float:
        if exchange == "local":
            return 0.0
        message = tokens * itemsize * token_bytes / rank_bytes
        if exchange == "slora" and peer_us is not None:
            return layers * 4 * peer_us(message * PLANE_BYTES / itemsize)
        gathers, reduces = MESSAGES[exchange]
        return layers * (gathers * gather_us(message) + reduces * reduce_us(message))

    return Exchanges(base_us=base_us, lora_us=lora_us)


def _between(
    curves: Mapping[tuple[int, str], Curve], ranks: int, names: tuple[str, ...], source: str, link: float
) -> Microseconds:
    """Return NCCL's microseconds between so many GPUs by the first of these operations that is known: as measured, or from 2."""
    for name in names:
        measured = curves.get((ranks, name))
        if measured is not None:
            return _stretched(measured, 1.0, link)
    for name in names:
        two = curves.get((2, name))
        if two is not None:
            return _stretched(two, log2(ranks), link * 2 * (ranks - 1) / ranks)
    raise UserError(f"{source}: no all-reduce between 2 GPUs is known, so tp={ranks} cannot be priced")


def _peers(curves: Mapping[tuple[int, str], Curve], ranks: int, link: float) -> Microseconds | None:
    measured = curves.get((ranks, "peer_add_norm"))
    if measured is not None:
        return _stretched(measured, 1.0, link)
    two = curves.get((2, "peer_add_norm"))
    return None if two is None else _stretched(two, 1.0, link * (ranks - 1))


def _stretched(curve: Curve, depth: float, moved: float) -> Microseconds:
    """Return a curve with its latency, what the fewest bytes take, times `depth`, and the rest times `moved`."""
    alpha_us = float(curve.y[0])
    return lambda num_bytes: alpha_us * depth + (curve(num_bytes) - alpha_us) * moved
