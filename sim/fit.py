"""Fit each measured operator on its own, by methods that cannot go negative, and say how far off they are on
rows held out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from engine.step import StepShape
from sim.curve import Curve, best_curve
from sim.envelope import Envelope, best_envelope
from sim.profile import LINEARS, Profile, Table

Floats = NDArray[np.float64]

ADDITIVE = {
    "attention_decode": ("rows", "kv_tokens", "kv_max"),
    "attention_prefill": (
        "tokens",
        "pairs",
        "kv_max",
    ),  # kv_max: a program walks a chunk's keys one after the other
}
# Columns made of the table's: weights read by tiles of one token and by larger ones cost differently.
LORA = ("adapters", "tokens", "single_bytes", "shared_bytes", "token_bytes")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class FitQuality:
    """Absolute relative errors of a fit, on the rows it saw and on rows held out of it (k-fold; NaN where
    there were too few).
    """

    name: str
    rows: int
    method: str
    median_error: float
    worst_error: float
    held_out_median_error: float
    held_out_worst_error: float


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class FitReport:
    """How well a profile is described: by operator, and for whole steps.

    step_errors: predicted over measured − 1 of each whole step, held out; what intervals are drawn from.
    step_shapes: these steps, where they are known.
    """

    operators: tuple[FitQuality, ...]
    steps: FitQuality | None
    step_errors: Floats
    step_shapes: tuple[StepShape, ...] = ()


@dataclass(frozen=True, slots=True)
class LoraRegime:
    """LoRA in steps of at most `most_tokens` tokens: larger ones run the kernels with other tiles, at another
    cost.
    """

    most_tokens: float
    envelope: Envelope


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class OperatorFits:
    """Microseconds of one layer's operators by TP degree, and of what a step does once.

    Curves are by tokens, rows or bytes.
    """

    matmul: Mapping[tuple[int, str], Curve]
    elementwise: Mapping[int, Curve]
    additive: Mapping[str, Mapping[int, Envelope]]
    lora: Mapping[int, tuple[LoraRegime, ...]]
    sample: Curve
    transfer: Envelope
    host: Envelope
    collective: Mapping[tuple[int, str], Curve]  # by GPUs and operation
    quality: tuple[FitQuality, ...]
    largest: Mapping[str, Mapping[str, float]]  # operator -> column -> largest measured


_adopted: dict[Profile, OperatorFits] = {}


def adopt_fits(profile: Profile, fits: OperatorFits) -> None:
    """Take the fits of a profile that were made in another process, instead of making them again."""
    _adopted[profile] = fits


@lru_cache(maxsize=8)
def fit_operators(profile: Profile) -> OperatorFits:
    """Fit every operator of a profile; one profile is fitted once."""
    return _adopted.get(profile) or _fitted(profile)


def _fitted(profile: Profile) -> OperatorFits:
    qualities: list[FitQuality] = []
    operators = profile.operators
    matmul, elementwise, collective = {}, {}, {}
    for tp in _values(operators["matmul"], "tp"):
        for linear in LINEARS:
            table = operators["matmul"].where(tp=tp, linear=linear)
            if len(table):
                matmul[tp, linear] = _curve(f"matmul {linear} tp{tp}", table, "tokens", qualities)
    for tp in _values(operators["elementwise"], "tp"):
        elementwise[tp] = _curve(
            f"elementwise tp{tp}", operators["elementwise"].where(tp=tp), "tokens", qualities
        )
    for ranks in _values(operators["collective"], "ranks"):
        for op in dict.fromkeys(operators["collective"].words["op"]):
            table = operators["collective"].where(ranks=ranks, op=op)
            if len(table):
                collective[ranks, op] = _curve(f"{op} {ranks} ranks", table, "bytes", qualities)
    additive = {name: _by_tp(name, operators[name], columns, qualities) for name, columns in ADDITIVE.items()}
    return OperatorFits(
        matmul=matmul,
        elementwise=elementwise,
        additive=additive,
        lora={
            tp: _lora_regimes(tp, operators["lora"].where(tp=tp), qualities)
            for tp in _values(operators["lora"], "tp")
        },
        sample=_curve("sample", operators["sample"], "rows", qualities),
        transfer=_additive("transfer", operators["transfer"], ("bytes",), qualities),
        host=_additive("host", profile.host, ("rows", "prefill_chunks"), qualities),
        collective=collective,
        quality=tuple(qualities),
        largest={
            name: {column: float(values.max()) for column, values in table.numbers.items()}
            for name, table in operators.items()
            if len(table)
        },
    )


def quality(name: str, method: str, fitted: Floats, held_out: Floats, measured: Floats) -> FitQuality:
    """Compare predictions with measurements."""
    seen = np.abs(fitted / measured - 1)
    unseen = np.abs(held_out / measured - 1)
    unseen = unseen[~np.isnan(unseen)]
    return FitQuality(
        name=name,
        rows=len(measured),
        method=method,
        median_error=float(np.median(seen)),
        worst_error=float(seen.max()),
        held_out_median_error=float(np.median(unseen)) if len(unseen) else float("nan"),
        held_out_worst_error=float(unseen.max()) if len(unseen) else float("nan"),
    )


def _values(table: Table, column: str) -> list[int]:
    return [int(value) for value in np.unique(table.numbers[column])]


def _curve(name: str, table: Table, column: str, qualities: list[FitQuality]) -> Curve:
    x, y = table.numbers[column], table.numbers["us"]
    curve, held_out = best_curve(x, y)
    qualities.append(quality(name, "monotone curve", curve.many(x), held_out, y))
    return curve


def _additive(name: str, table: Table, columns: tuple[str, ...], qualities: list[FitQuality]) -> Envelope:
    features = np.stack([table.numbers[column] for column in columns], axis=1)
    y = table.numbers["us"]
    choice = best_envelope(features, y)
    qualities.append(quality(name, choice.method, choice.model.many(features), choice.held_out, y))
    return choice.model


def _lora_regimes(tp: int, table: Table, qualities: list[FitQuality]) -> tuple[LoraRegime, ...]:
    """Fit each tile size on its own; the largest step measured with a tile size is where it ends."""
    regimes = []
    sizes = _values(table, "tile_tokens")
    for size in sizes:
        rows = table.where(tile_tokens=size)
        most_tokens = float("inf") if size == sizes[-1] else float(rows.numbers["tokens"].max())
        shared = rows.numbers["bytes"] - rows.numbers["single_bytes"]
        rows = Table({**rows.numbers, "shared_bytes": shared}, rows.words)
        envelope = _additive(f"lora tp{tp} tiles of {size}", rows, LORA, qualities)
        regimes.append(LoraRegime(most_tokens, envelope))
    return tuple(regimes)


def _by_tp(
    name: str, table: Table, columns: tuple[str, ...], qualities: list[FitQuality]
) -> dict[int, Envelope]:
    return {
        tp: _additive(f"{name} tp{tp}", table.where(tp=tp), columns, qualities) for tp in _values(table, "tp")
    }
