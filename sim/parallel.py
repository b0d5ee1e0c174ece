"""Whole steps measured under tensor parallelism: what corrects those composed of operators."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray

from engine.errors import UserError
from engine.model_shape import ModelShape, load_model_shape
from engine.step import SHAPE_FIELDS, StepShape
from sim.exchange import Exchange

Floats = NDArray[np.float64]

SCHEMA_VERSION = 1
LOCAL = ("base", "replicated", "block_diagonal")  # what measurements call the ways that exchange nothing


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ParallelSteps:
    """Steps of one model on `tp` GPUs, with one way to exchange."""

    source: str
    model: ModelShape
    tp: int
    exchange: Exchange
    collectives: str
    steps: tuple[StepShape, ...]
    steps_us: Floats


def parse_parallel(data: Any, source: str) -> tuple[list[ParallelSteps], list[dict[str, Any]]]:
    """Check the JSON form that `python -m engine profile --tp N` writes; return its steps by way of exchanging, and the exchanges timed alone.

    Raises UserError naming the place.
    """
    if not isinstance(data, dict) or data.get("schema_version") != SCHEMA_VERSION:
        raise UserError(
            f"{source}: a profile of tensor parallelism must be an object of schema_version {SCHEMA_VERSION}"
        )
    for name, kind in (("model", str), ("tp", int), ("steps", list), ("collective", list)):
        if not isinstance(data.get(name), kind):
            raise UserError(f"{source}: {name}={data.get(name)!r} must be a {kind.__name__}")
    model = load_model_shape(data["model"])
    found: dict[tuple[Exchange, str], tuple[list[StepShape], list[float]]] = {}
    for index, row in enumerate(data["steps"]):
        place = f"{source}: steps[{index}]"
        if not isinstance(row, dict):
            raise UserError(f"{place} must be an object")
        if "gpu_us" not in row:
            continue  # a whole burst
        key = _exchange(row.get("lora_sharding"), place), str(row.get("collectives"))
        shapes, times_us = found.setdefault(key, ([], []))
        try:
            shapes.append(StepShape.from_json(row["shape"]))
            times_us.append(float(row["gpu_us"]))
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{place}: {error}") from None
        if times_us[-1] <= 0:
            raise UserError(f"{place}: gpu_us={times_us[-1]} must be above 0")
    steps = [
        ParallelSteps(
            source=source,
            model=model,
            tp=data["tp"],
            exchange=exchange,
            collectives=collectives,
            steps=tuple(shapes),
            steps_us=np.array(times_us),
        )
        for (exchange, collectives), (shapes, times_us) in found.items()
    ]
    return steps, data["collective"]


def parallel_files(profile: Path, gpu: str) -> list[Path]:
    """Return the files beside a profile that measured tensor parallelism on the same kind of GPU."""
    return sorted(profile.parent.glob(f"*.{gpu.lower()}.tp*.json"))


def nearest(
    known: Iterable[ParallelSteps], model: ModelShape, tp: int, exchange: Exchange, collectives: str
) -> ParallelSteps | None:
    """Return the steps that say most about a setting: of this way to exchange before others, this model, this many GPUs, this means."""

    def distance(steps: ParallelSteps) -> tuple[bool, bool, float, bool]:
        far = abs(np.log2(steps.tp / tp))
        return steps.exchange != exchange, steps.model != model, float(far), steps.collectives != collectives

    return min(known, key=distance, default=None)


def with_base(steps: ParallelSteps, known: Iterable[ParallelSteps]) -> ParallelSteps:
    """Return steps together with those that had no adapters and ran the same otherwise: they say what the base takes."""
    if steps.exchange == "local":
        return steps
    of_base = [
        (shape, us)
        for other in known
        if (other.exchange, other.model, other.tp, other.collectives)
        == ("local", steps.model, steps.tp, steps.collectives)
        for shape, us in zip(other.steps, other.steps_us.tolist(), strict=True)
        if not shape.lora_adapters
    ]
    return replace(
        steps,
        steps=(*steps.steps, *(shape for shape, _ in of_base)),
        steps_us=np.array([*steps.steps_us.tolist(), *(us for _, us in of_base)]),
    )


def within(shape: StepShape, steps: Iterable[StepShape]) -> bool:
    """Return whether no size of a step is beyond the largest of these."""
    known = list(steps)
    return all(
        getattr(shape, name) <= max((getattr(step, name) for step in known), default=0)
        for name in SHAPE_FIELDS
    )


def covered(shape: StepShape, parallel: ParallelSteps) -> bool:
    """Return whether no size of a step is beyond the largest that was measured: `within`, quick to ask for every step."""
    return all(getattr(shape, name) <= largest for name, largest in _largest(parallel))


@lru_cache(maxsize=32)
def _largest(parallel: ParallelSteps) -> tuple[tuple[str, float], ...]:
    return tuple(
        (name, max((getattr(step, name) for step in parallel.steps), default=0)) for name in SHAPE_FIELDS
    )


@lru_cache(maxsize=32)
def measured_shapes(parallel: ParallelSteps) -> frozenset[StepShape]:
    """Return the steps that were measured, to look one up."""
    return frozenset(parallel.steps)


def _exchange(name: Any, place: str) -> Exchange:
    if name in LOCAL:
        return "local"
    if name in get_args(Exchange):
        chosen: Exchange = name
        return chosen
    raise UserError(f"{place}: lora_sharding={name!r} is not known")
