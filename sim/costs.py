"""What a step costs: operators composed to a model at a TP degree, corrected by whole steps.

    step = L · (Σ matmul + elementwise + decode attention + prefill attention + LoRA) + head + sample + collectives

with tokens padded to the graphs' sizes as the engine pads them. Then whole measured steps correct each group
by a factor ≥ 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from engine.config import ServingConfig
from engine.errors import UserError
from engine.graph_sizes import padded_tokens
from engine.model_shape import ModelShape, load_model_shape
from engine.step import StepShape
from sim.compose import Layer, layer_of
from sim.correct import GROUPS, Correction, correct
from sim.envelope import Envelope
from sim.fit import FitReport, fit_operators
from sim.profile import Profile

Floats = NDArray[np.float64]
Provenance = Literal["measured", "interpolated", "extrapolated"]

DEFAULT_MAX_NUM_SEQS = ServingConfig().max_num_seqs
MEASURED_BACKEND = "triton"  # profiles are of the GPU's kernels


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What composes a step's cost beside its shape.

    sample_rows: most rows whose next token is computed in a step: the engine computes min(padded tokens,
    max_num_seqs) of them.
    """

    tp: int
    model: ModelShape
    graph_max_tokens: int
    sample_rows: int


class StepCosts:
    """Seconds of steps, loads and the host's turns under one setting. Build with `fit_costs` or `costs_for`."""

    def __init__(self, profile: Profile, setting: Setting) -> None:
        self.profile = profile
        self.setting = setting
        self._fits = fit_operators(profile)
        self._layer = layer_of(self._fits, profile, setting.model, setting.tp)
        self._correction, self.report = _correction_of(profile)
        self._dense: dict[
            int, tuple[float, float, float]
        ] = {}  # padded tokens -> matmuls etc., head etc., collectives
        self._fixed: dict[int, float] = {}  # tokens -> seconds that they alone decide
        layers, factor = setting.model.num_layers, self._correction.factors
        self._decode = _Price(self._layer.attention_decode.scaled(layers * factor["attention_decode"] * 1e-6))
        self._prefill = _Price(
            self._layer.attention_prefill.scaled(layers * factor["attention_prefill"] * 1e-6)
        )
        # A shape's bytes are of all layers, the measurements' of one.
        per_layer = (1.0, 1.0, 1 / layers, 1 / layers, 1 / layers)
        self._lora_regimes = tuple(
            (
                regime.most_tokens,
                _Price(regime.envelope.over_model(layers, per_layer).scaled(factor["lora"] * 1e-6)),
            )
            for regime in self._layer.lora
        )
        self._host = _Price(self._fits.host.scaled(1e-6))
        self._transfer = _Price(self._fits.transfer.scaled(1e-6))
        self._measured = frozenset(profile.steps)

    def __reduce__(self) -> tuple[Any, ...]:
        return StepCosts, (self.profile, self.setting)

    # ---- what the simulation asks ----

    def step_s(self, shape: StepShape) -> float:
        """GPU time of a step."""
        tokens = shape.decode_rows + shape.prefill_tokens
        fixed_s = self._fixed.get(tokens)
        total_s = self._fixed_s(tokens) if fixed_s is None else fixed_s
        if shape.decode_rows:
            total_s += self._decode((shape.decode_rows, shape.decode_kv_tokens, shape.decode_kv_max))
        if shape.prefill_chunks:
            total_s += self._prefill(
                (shape.prefill_tokens, shape.prefill_chunks, shape.prefill_pairs, shape.prefill_kv_tokens)
            )
        if shape.lora_adapters:
            total_s += self._lora(shape)
        return total_s

    def decode_run_s(self, shape: StepShape, steps: int) -> Floats:
        """GPU time of each of `steps` decode steps: `shape`, then one more KV token a row each."""
        rows, kv_tokens, kv_max = shape.decode_rows, shape.decode_kv_tokens, shape.decode_kv_max
        total_s = self.step_s(shape)
        first_s = self._decode((rows, kv_tokens, kv_max))
        further = steps - 1
        last_s = self._decode.straight_to(
            (rows, kv_tokens, kv_max), (rows, kv_tokens + rows * further, kv_max + further)
        )
        if last_s is not None:  # in closed form: a third of the time of the arrays below
            slope_s = (last_s - first_s) / further if further else 0.0
            line_s = np.arange(steps, dtype=np.float64)
            line_s *= slope_s
            line_s += total_s
            return line_s
        ahead = np.arange(steps)
        times_s = self._decode.run((float(rows), kv_tokens + rows * ahead, kv_max + ahead), steps)
        times_s += total_s - first_s
        return times_s

    def host_s(self, shape: StepShape) -> float:
        """CPU time of one turn of the engine's loop: plan, pack, launch, complete."""
        return self._host((shape.decode_rows, shape.prefill_chunks))

    def load_s(self, num_bytes: int) -> float:
        """Time to copy an adapter of so many bytes to the GPU."""
        return self._transfer((num_bytes,))

    def parts_s(self, shape: StepShape) -> dict[str, float]:
        """GPU time of a step by what it is spent on; the values add up to `step_s`."""
        factor = self._correction.factors
        padded = padded_tokens(shape.tokens, self.setting.graph_max_tokens)
        dense_us, head_us, collective_us = self._dense_us(padded)
        parts = {
            "matmul": (dense_us * factor["dense"] + self._correction.constant_us) * 1e-6,
            "head": head_us * factor["head"] * 1e-6,
            "collectives": collective_us * 1e-6,
            "decode attention": 0.0,
            "prefill attention": 0.0,
            "LoRA": 0.0,
        }
        if shape.decode_rows:
            parts["decode attention"] = self._decode(
                (shape.decode_rows, shape.decode_kv_tokens, shape.decode_kv_max)
            )
        if shape.prefill_chunks:
            parts["prefill attention"] = self._prefill(
                (shape.prefill_tokens, shape.prefill_chunks, shape.prefill_pairs, shape.prefill_kv_tokens)
            )
        if shape.lora_adapters:
            parts["LoRA"] = self._lora(shape)
        return parts

    def provenance(self, shape: StepShape) -> Provenance:
        """Say where the price of a step comes from.

        measured: this very step was measured. interpolated: every size lies within what was measured, of this
        model at this TP degree. extrapolated: otherwise.
        """
        if not self._layer.measured or not self._within(shape):
            return "extrapolated"
        return "measured" if self.setting.tp == 1 and shape in self._measured else "interpolated"

    def _within(self, shape: StepShape) -> bool:
        largest, layers = self._fits.largest, self.setting.model.num_layers
        lora, prefill, decode = largest["lora"], largest["attention_prefill"], largest["attention_decode"]
        padded = padded_tokens(shape.tokens, self.setting.graph_max_tokens)
        return (
            padded <= largest["matmul"]["tokens"]
            and shape.decode_rows <= decode["rows"]
            and shape.decode_kv_tokens <= decode["kv_tokens"]
            and shape.prefill_pairs <= prefill["pairs"]
            and shape.prefill_kv_tokens <= prefill["kv_tokens"]
            and shape.lora_adapters <= lora["adapters"]
            and shape.lora_bytes <= lora["bytes"] * layers
            and shape.lora_token_bytes <= lora["token_bytes"] * layers
        )

    def _lora(self, shape: StepShape) -> float:
        tokens = shape.decode_rows + shape.prefill_tokens
        price = next(price for most_tokens, price in self._lora_regimes if tokens <= most_tokens)
        single = shape.lora_single_bytes
        return price(
            (
                shape.lora_adapters,
                shape.lora_tokens,
                single,
                shape.lora_bytes - single,
                shape.lora_token_bytes,
            )
        )

    # ---- what tokens alone decide ----

    def _fixed_s(self, tokens: int) -> float:
        dense_us, head_us, collective_us = self._dense_us(
            padded_tokens(tokens, self.setting.graph_max_tokens)
        )
        factor = self._correction.factors
        total_us = dense_us * factor["dense"] + head_us * factor["head"] + collective_us
        self._fixed[tokens] = total_s = (total_us + self._correction.constant_us) * 1e-6
        return total_s

    def _dense_us(self, padded: int) -> tuple[float, float, float]:
        found = self._dense.get(padded)
        if found is None:
            rows = min(padded, self.setting.sample_rows)
            found = self._dense[padded] = (
                self._layer.dense_us(padded) * self.setting.model.num_layers,
                self._layer.head_us(rows),
                self._layer.collectives_us(padded, rows),
            )
        return found


def fit_costs(
    profile: Profile,
    tp: int = 1,
    *,
    model: ModelShape | None = None,
    graph_max_tokens: int | None = None,
    max_num_seqs: int = DEFAULT_MAX_NUM_SEQS,
) -> StepCosts:
    """Fit a profile and compose its operators to `model` (None: the profiled one) on `tp` GPUs.

    graph_max_tokens, max_num_seqs: of the configuration that will run; None is the profile's. Raises
    UserError where the model cannot be cut over so many GPUs, or collectives are needed and nothing is known
    of them.
    """
    setting = Setting(
        tp=tp,
        model=model or profile.model,
        graph_max_tokens=profile.graph_max_tokens if graph_max_tokens is None else graph_max_tokens,
        sample_rows=max_num_seqs,
    )
    return StepCosts(profile, setting)


def costs_for(profile: Profile, config: ServingConfig) -> StepCosts:
    """Fit a profile and compose it to what a configuration serves: its model, TP degree, graphs and batch.

    Raises UserError where the profile is of another GPU, element type or backend: it says nothing about them.
    """
    for name, measured, wanted in (
        ("gpu", profile.gpu.lower(), config.gpu.lower()),
        ("dtype", profile.dtype, config.dtype),
        ("page_tokens", profile.page_tokens, config.page_tokens),
        ("backend", MEASURED_BACKEND, config.backend),
    ):
        if measured != wanted:
            raise UserError(f"{profile.source}: was measured with {name}={measured!r}, not {wanted!r}")
    return fit_costs(
        profile,
        config.tp,
        model=load_model_shape(config.model),
        graph_max_tokens=config.graph_max_tokens,
        max_num_seqs=config.max_num_seqs,
    )


class _Price:
    """An `Envelope` in plain floats: a few times faster at one point than numpy."""

    __slots__ = ("_bent", "_limits")

    def __init__(self, model: Envelope) -> None:
        self._limits = tuple(
            (
                limit.constant,
                tuple((r.index, r.slope) for r in limit.ramps if r.low == 0 and r.high == np.inf),
                tuple((r.index, r.low, r.high, r.slope) for r in limit.ramps if r.low > 0 or r.high < np.inf),
            )
            for limit in model.limits
        )
        self._bent = any(ramps for _, _, ramps in self._limits)

    def __call__(self, features: Sequence[float]) -> float:
        largest = 0.0
        for total, lines, ramps in self._limits:
            for index, slope in lines:
                total += slope * features[index]
            for index, low, high, slope in ramps:
                value = features[index]
                if value > low:
                    total += slope * ((value if value < high else high) - low)
            if total > largest:
                largest = total
        return largest

    def straight_to(self, first: Sequence[float], last: Sequence[float]) -> float | None:
        """Return the value at `last` if the model is a straight line from `first` to it, else None.

        The largest of straight lines is convex: where one of them is the largest at both ends, it is in
        between.
        """
        if self._bent:
            return None
        values = [self._values(features) for features in (first, last)]
        largest = max(values[1])
        rulers = (values[0].index(max(values[0])), values[1].index(largest))
        return largest if rulers[0] == rulers[1] else None

    def _values(self, features: Sequence[float]) -> list[float]:
        return [
            constant + sum([slope * features[index] for index, slope in lines])
            for constant, lines, _ in self._limits
        ]

    def run(self, features: Sequence[float | Floats | NDArray[np.int64]], steps: int) -> Floats:
        """Return the values where features are arrays of `steps` values, or one value for all."""
        largest: Floats | None = None
        for constant, lines, ramps in self._limits:
            total = np.full(steps, constant)
            for index, slope in lines:
                total += slope * features[index]
            for index, low, high, slope in ramps:
                total += slope * (np.minimum(np.maximum(features[index], low), high) - low)
            largest = total if largest is None else np.maximum(largest, total)
        assert largest is not None
        return largest


@lru_cache(maxsize=8)
def _correction_of(profile: Profile) -> tuple[Correction, FitReport]:
    """Correct the profiled model's composition by its whole steps; one profile is corrected once."""
    fits = fit_operators(profile)
    layer = layer_of(fits, profile, profile.model, 1)
    groups = np.array([_groups_us(profile, layer, shape) for shape in profile.steps]).reshape(-1, len(GROUPS))
    correction, quality, errors = correct(groups, profile.steps_us)
    return correction, FitReport(operators=fits.quality, steps=quality, step_errors=errors)


def _groups_us(profile: Profile, layer: Layer, shape: StepShape) -> tuple[float, ...]:
    """Return a step's composed microseconds by group, in the order of GROUPS."""
    layers = profile.model.num_layers
    padded = padded_tokens(shape.tokens, profile.graph_max_tokens)
    decode = np.array([[shape.decode_rows, shape.decode_kv_tokens, shape.decode_kv_max]], dtype=float)
    prefill = np.array(
        [[shape.prefill_tokens, shape.prefill_chunks, shape.prefill_pairs, shape.prefill_kv_tokens]],
        dtype=float,
    )
    single = shape.lora_single_bytes / layers
    lora = np.array(
        [
            [
                shape.lora_adapters,
                shape.lora_tokens,
                single,
                shape.lora_bytes / layers - single,
                shape.lora_token_bytes / layers,
            ]
        ]
    )
    regime = next(regime for regime in layer.lora if shape.tokens <= regime.most_tokens)
    return (
        layers * layer.dense_us(padded),
        layers * float(layer.attention_decode.many(decode)[0]) if shape.decode_rows else 0.0,
        layers * float(layer.attention_prefill.many(prefill)[0]) if shape.prefill_chunks else 0.0,
        layers * float(regime.envelope.many(lora)[0]) if shape.lora_adapters else 0.0,
        layer.head_us(min(padded, DEFAULT_MAX_NUM_SEQS)),
    )
