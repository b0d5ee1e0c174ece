"""What a step costs: operators composed to a model at a TP degree, corrected by whole steps.

    step = L · (Σ matmul + elementwise + decode attention + prefill attention + LoRA) + head + sample + collectives

with tokens padded to the graphs' sizes as the engine pads them. Then whole measured steps correct each group
by a factor ≥ 0: decodes alone, and steps with prompts, these as on a cool GPU (`sim/heating.py`). A step
larger than any graph is launched kernel by kernel, and takes no less than the host needs for that.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from engine.budget import gpu_spec
from engine.config import ServingConfig
from engine.errors import UserError
from engine.graph_sizes import padded_tokens
from engine.model_shape import ModelShape, load_model_shape
from engine.step import StepShape
from sim.compose import Layer, Slower, layer_of
from sim.correct import GROUPS, Corrections, correct, launches_us
from sim.exchange import Exchange, exchange_of
from sim.fit import FitReport, fit_operators
from sim.heating import Heating, fit_heating
from sim.parallel import ParallelSteps, covered, measured_shapes, nearest, with_base
from sim.price import Price
from sim.profile import Profile
from sim.segment import DecodeRun
from sim.setting import Setting
from sim.step_sum import StepSum

Floats = NDArray[np.float64]
Provenance = Literal["measured", "interpolated", "extrapolated"]

DEFAULT_MAX_NUM_SEQS = ServingConfig().max_num_seqs
MEASURED_BACKEND = "triton"  # profiles are of the GPU's kernels


class StepCosts:
    """Seconds of steps, loads and the host's turns under one setting. Build with `fit_costs` or `costs_for`."""

    def __init__(self, profile: Profile, setting: Setting) -> None:
        self.profile = profile
        self.setting = setting
        self._fits = fit_operators(profile)
        self._layer = layer_of(
            self._fits, profile, setting.model, setting.tp, setting.exchange, setting.collectives, setting.gpu
        )
        self._parallel = None if setting.tp == 1 else _parallel_of(profile, setting)
        corrections, self.report = _correction_of(profile, self._parallel)
        # Whole steps of several GPUs were measured as they ran; what was corrected by those of one GPU is of a cool one.
        self.heating = _heating_of(profile) if self._parallel is None else None
        self._launches_s = (
            _eager_launches_us(profile) * setting.model.num_layers / profile.model.num_layers * 1e-6
        )
        self._decodes = StepSum(self._layer, setting, corrections.decodes)
        self._prompts = StepSum(self._layer, setting, corrections.prompts)
        self._host_s: dict[int, float] = {}  # by rows and chunks
        self._host = Price(self._fits.host.scaled(1e-6), ("rows", "chunks"))
        host = 1.0 if setting.gpu is None else Slower.of(profile.gpu_spec, gpu_spec(setting.gpu)).host
        self._transfer = Price(self._fits.transfer.stretched((host,)).scaled(1e-6), ("num_bytes",))
        self._measured = frozenset(profile.steps)
        self._captured_tokens = setting.graph_max_tokens

    def __reduce__(self) -> tuple[Any, ...]:
        return _composed, (self.profile, self.setting)

    # ---- what the simulation asks ----

    def step_s(self, shape: StepShape) -> float:
        """GPU time of a step, on a cool GPU."""
        whole = self._prompts if shape.prefill_chunks else self._decodes
        total_s = whole.step_s(shape)
        if shape.lora_adapters and shape.decode_rows + shape.prefill_tokens > self._captured_tokens:
            total_s = max(total_s, self._launches_s)
        return total_s

    def decode_run(self, shape: StepShape, steps: int) -> DecodeRun:
        """GPU time of up to `steps` decode steps: `shape`, then one more KV token a row each, as far as it grows along a straight line."""
        rows = shape.decode_rows
        sizes = (rows, shape.decode_kv_tokens, shape.decode_kv_max)
        slope_s, straight = self._decodes.decode.line(sizes, (0, rows, 1), steps)
        return DecodeRun(self.step_s(shape), slope_s, straight)

    def host_s(self, shape: StepShape) -> float:
        """CPU time of one turn of the engine's loop: plan, pack, launch, complete."""
        rows, chunks = shape.decode_rows, shape.prefill_chunks
        key = (chunks << 32) + rows
        found = self._host_s.get(key)
        if found is None:
            found = self._host_s[key] = self._host.at(rows, chunks)
        return found

    def load_s(self, num_bytes: int) -> float:
        """Time to copy an adapter of so many bytes to the GPU."""
        return self._transfer.at(num_bytes)

    def parts_s(self, shape: StepShape) -> dict[str, float]:
        """GPU time of a step by what it is spent on; the values add up to `step_s`."""
        parts = (self._prompts if shape.prefill_chunks else self._decodes).parts_s(shape)
        if shape.lora_adapters and shape.tokens > self._captured_tokens:
            parts["launches"] = max(0.0, self._launches_s - sum(parts.values()))
        return parts

    def provenance(self, shape: StepShape) -> Provenance:
        """Say where the price of a step comes from.

        measured: this very step was measured. interpolated: every size lies within what was measured, of this
        model at this TP degree. extrapolated: otherwise.
        """
        if self.setting.gpu is not None:
            return "extrapolated"
        if shape.lora_adapters and shape.tokens > self._captured_tokens:
            return "extrapolated"  # the host's launches vary by three times
        if self._parallel is not None:
            return self._parallel_provenance(self._parallel, shape)
        if not self._layer.measured or not self._within(shape):
            return "extrapolated"
        return "measured" if self.setting.tp == 1 and shape in self._measured else "interpolated"

    def _parallel_provenance(self, parallel: ParallelSteps, shape: StepShape) -> Provenance:
        setting = self.setting
        same = (parallel.model, parallel.tp, parallel.exchange, parallel.collectives) == (
            setting.model,
            setting.tp,
            setting.exchange,
            setting.collectives,
        )
        if not same or not covered(shape, parallel):
            return "extrapolated"
        return "measured" if shape in measured_shapes(parallel) else "interpolated"

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
            and shape.prefill_kv_max <= prefill["kv_max"]
            and shape.lora_adapters <= lora["adapters"]
            and shape.lora_bytes <= lora["bytes"] * layers
            and shape.lora_token_bytes <= lora["token_bytes"] * layers
        )


def fit_costs(
    profile: Profile,
    tp: int = 1,
    *,
    model: ModelShape | None = None,
    graph_max_tokens: int | None = None,
    max_num_seqs: int = DEFAULT_MAX_NUM_SEQS,
    exchange: Exchange = "local",
    collectives: str = "fast",
    gpu: str | None = None,
) -> StepCosts:
    """Fit a profile and compose its operators to `model` (None: the profiled one) on `tp` GPUs.

    graph_max_tokens, max_num_seqs: of the configuration that will run; None is the profile's. exchange,
    collectives: what LoRA exchanges between the GPUs, and by what. gpu: the kind to scale to. Raises
    UserError where the model cannot be cut over so many GPUs, or collectives are needed and nothing is known
    of them.
    """
    setting = Setting(
        tp=tp,
        model=model or profile.model,
        graph_max_tokens=profile.graph_max_tokens if graph_max_tokens is None else graph_max_tokens,
        sample_rows=max_num_seqs,
        exchange=exchange,
        collectives=collectives,
        gpu=None if gpu is None or gpu_spec(gpu).name == profile.gpu.lower() else gpu,
    )
    return _composed(profile, setting)


@lru_cache(maxsize=64)
def _composed(profile: Profile, setting: Setting) -> StepCosts:
    """Return one object a setting: what it has priced, it keeps."""
    return StepCosts(profile, setting)


def costs_for(profile: Profile, config: ServingConfig) -> StepCosts:
    """Fit a profile and compose it to what a configuration serves: its model, TP degree, graphs and batch.

    For another GPU of the catalogue the operators are scaled by its specification. Raises UserError where the profile is of another element type
    or backend: it says nothing about them.
    """
    for name, measured, wanted in (
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
        exchange=exchange_of(config),
        collectives=config.collectives,
        gpu=config.gpu,
    )


def _parallel_of(profile: Profile, setting: Setting) -> ParallelSteps | None:
    return nearest(profile.parallel, setting.model, setting.tp, setting.exchange, setting.collectives)


@lru_cache(maxsize=8)
def _heating_of(profile: Profile) -> Heating | None:
    """Fit how the profiled GPU slows down under prompts, once."""
    return fit_heating(profile.clock)


def _hot(profile: Profile, shapes: Sequence[StepShape]) -> Floats:
    """Return how many times as long as on a cool GPU steps of one GPU were measured to take: those with prompts were measured hot."""
    heating = _heating_of(profile)
    slowdowns = [
        heating.slowdown(shape.tokens) if heating is not None and shape.prefill_chunks else 0.0
        for shape in shapes
    ]
    return 1 + np.array(slowdowns, dtype=float)


@lru_cache(maxsize=32)
def _correction_of(profile: Profile, parallel: ParallelSteps | None) -> tuple[Corrections, FitReport]:
    """Correct a composition by whole steps that ran as graphs: of one GPU, or of several. Each is corrected once."""
    fits = fit_operators(profile)
    if parallel is None:
        model, steps = profile.model, profile.steps
        steps_us = profile.steps_us / _hot(profile, steps)
        layer = layer_of(fits, profile, model, 1)
    else:
        parallel = with_base(parallel, profile.parallel)
        model, steps, steps_us = parallel.model, parallel.steps, parallel.steps_us
        layer = layer_of(fits, profile, model, parallel.tp, parallel.exchange, parallel.collectives)
    captured = [i for i, shape in enumerate(steps) if shape.tokens <= profile.graph_max_tokens]
    steps, steps_us = tuple(steps[i] for i in captured), steps_us[captured]
    groups = np.array([_groups_us(profile, model, layer, shape) for shape in steps]).reshape(-1, len(GROUPS))
    prompts = np.array([shape.prefill_chunks > 0 for shape in steps], dtype=bool)
    corrections, quality, errors = correct(groups, steps_us, prompts)
    report = FitReport(operators=fits.quality, steps=quality, step_errors=errors, step_shapes=steps)
    return corrections, report


@lru_cache(maxsize=32)
def _eager_launches_us(profile: Profile) -> float:
    """Return what the host takes to launch a step with adapters that no graph is large enough for."""
    correction = _correction_of(profile, None)[0].prompts
    layer = layer_of(fit_operators(profile), profile, profile.model, 1)
    rows = [
        (_groups_us(profile, profile.model, layer, shape), slower, us)
        for shape, slower, us in zip(
            profile.steps, _hot(profile, profile.steps).tolist(), profile.steps_us.tolist(), strict=True
        )
        if shape.tokens > profile.graph_max_tokens and shape.lora_adapters
    ]
    if not rows:
        return 0.0
    factors = np.array([correction.factors[name] for name in GROUPS])
    work_us = np.array([groups for groups, _, _ in rows]) @ factors + correction.constant_us
    hot = np.array([slower for _, slower, _ in rows])
    return launches_us(work_us * hot, np.array([us for *_, us in rows]))


def _groups_us(profile: Profile, model: ModelShape, layer: Layer, shape: StepShape) -> tuple[float, ...]:
    """Return a step's composed microseconds by group, in the order of GROUPS."""
    layers = model.num_layers
    padded = padded_tokens(shape.tokens, profile.graph_max_tokens)
    decode = np.array([[shape.decode_rows, shape.decode_kv_tokens, shape.decode_kv_max]], dtype=float)
    prefill = np.array(
        [[shape.prefill_tokens, shape.prefill_pairs, shape.prefill_kv_max]],
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
        layer.exchanges.base_us(padded, min(padded, DEFAULT_MAX_NUM_SEQS)),
        layer.exchanges.lora_us(padded, shape.lora_token_bytes / shape.lora_tokens)
        if shape.lora_tokens
        else 0.0,
    )
