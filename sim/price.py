"""An `Envelope` as a plain function: the cost model is asked four times a step, which numpy is slow at.

The formula is written out as Python source with its numbers in it and compiled once a fit: 0.35 µs a question, where a loop over the ramps
takes 2 to 4 (broken lines over three sizes, a core of the development machine, 2026-11-22). Where this module itself is compiled
(`make compiled`), the loop is native and faster than the source.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from math import inf

from engine.compiled import folder
from sim.additive import Additive, Ramp
from sim.envelope import Envelope

COMPILED = folder() is not None

# The straight line `slope · x + base` up to x = `end`: (end, slope, base).
_Piece = tuple[float, float, float]


class _Feature:
    """What a limit says of one size: straight lines one behind the other, the last without an end."""

    __slots__ = ("bases", "ends", "index", "pieces", "slopes")

    def __init__(self, index: int, pieces: list[_Piece]) -> None:
        self.index = index
        self.pieces = pieces
        self.ends = [end for end, _, _ in pieces]
        self.slopes = [slope for _, slope, _ in pieces]
        self.bases = [base for _, _, base in pieces]

    def place(self, size: float) -> int:
        """Return which line a size is on."""
        place = 0
        for end in self.ends:
            if size < end:
                break
            place += 1
        return place


class _Limit:
    """One of the sums of which a price is the largest."""

    __slots__ = ("constant", "features")

    def __init__(self, constant: float, features: list[_Feature]) -> None:
        self.constant = float(constant)
        self.features = features


class Price:
    """Prices a point, and says how far ahead the price is a straight line. names: the sizes, in the order of the features."""

    __slots__ = ("_limits", "at")

    def __init__(self, model: Envelope, names: Sequence[str]) -> None:
        self._limits = [
            _Limit(
                limit.constant,
                [_Feature(index, _pieces(limit, index)) for index in sorted({r.index for r in limit.ramps})],
            )
            for limit in model.limits
        ]
        self.at: Callable[..., float] = self._summed if COMPILED else self._compiled(names)

    def line(self, sizes: Sequence[float], per_step: Sequence[float], steps: int) -> tuple[float, int]:
        """Return the slope of the price when sizes grow by `per_step` from step to step, and over how many steps (1 … `steps`) it holds.

        The price is the largest of its limits: the one that is largest now stays it until a steeper one has caught up.
        """
        most = float(steps - 1)
        lines: list[tuple[float, float]] = []
        for limit in self._limits:
            value, slope = limit.constant, 0.0
            for feature in limit.features:
                size, grows = sizes[feature.index], per_step[feature.index]
                place = feature.place(size)
                per_unit = feature.slopes[place]
                value += per_unit * size + feature.bases[place]
                if grows:
                    slope += per_unit * grows
                    room = (feature.ends[place] - size) / grows
                    if room < most:
                        most = room
            lines.append((value, slope))
        largest, steepest = lines[0] if len(lines) == 1 else max(lines)
        for value, slope in lines:
            if slope > steepest:
                most = min(most, (largest - value) / (slope - steepest))
        return steepest, int(most) + 1

    def _summed(self, *sizes: float) -> float:
        """Price a point without the source: what is faster where this module is compiled itself."""
        largest = -inf
        for limit in self._limits:
            value = limit.constant
            for feature in limit.features:
                size = sizes[feature.index]
                place = feature.place(size)
                value += feature.slopes[place] * size + feature.bases[place]
            if value > largest:
                largest = value
        return largest

    def _compiled(self, names: Sequence[str]) -> Callable[..., float]:
        lines = [f"def price({', '.join(names)}):"]
        # Python compares and multiplies two floats several times faster than a float and a large int.
        lines += [f"    {name} *= 1.0" for name in names]
        for number, limit in enumerate(self._limits):
            total = " + ".join(
                [repr(limit.constant), *(f"({_source(f.pieces, names[f.index])})" for f in limit.features)]
            )
            lines.append(f"    {'other' if number else 'largest'} = {total}")
            if number:
                lines += ["    if other > largest:", "        largest = other"]
        lines.append("    return largest")
        scope: dict[str, Callable[..., float]] = {}
        exec("\n".join(lines), {}, scope)
        return scope["price"]


def _pieces(limit: Additive, index: int) -> list[_Piece]:
    """Return what a limit says of one size, as straight lines one behind the other from 0 on."""
    ramps = [ramp for ramp in limit.ramps if ramp.index == index]
    knots = sorted({0.0, inf, *(knot for ramp in ramps for knot in (ramp.low, ramp.high))})
    return [_piece(ramps, low, high) for low, high in pairwise(knots)]


def _piece(ramps: Sequence[Ramp], low: float, high: float) -> _Piece:
    slope = base = 0.0
    for ramp in ramps:
        if ramp.high <= low:
            base += ramp.slope * (ramp.high - ramp.low)
        elif ramp.low <= low:
            slope += ramp.slope
            base -= ramp.slope * ramp.low
    return high, slope, base


def _source(pieces: Sequence[_Piece], name: str) -> str:
    """Return the pieces as an expression of the variable `name`: a tree of comparisons."""
    if len(pieces) == 1:
        _, slope, base = pieces[0]
        return f"{slope!r} * {name} + {base!r}" if base else f"{slope!r} * {name}"
    middle = len(pieces) // 2
    below, above = _source(pieces[:middle], name), _source(pieces[middle:], name)
    return f"({below} if {name} < {pieces[middle - 1][0]!r} else {above})"
