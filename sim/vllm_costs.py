"""What a step of vLLM costs, from a profile, under one configuration: the same answers that `sim.costs` gives for our engine."""

from __future__ import annotations

from functools import cached_property
from math import log2
from typing import Any, Literal

from engine.step import StepShape
from sim.segment import DecodeRun
from sim.vllm_profile import VllmProfile
from sim.vllm_steps import (
    EXTRA_VOCABULARY,
    MANY_ROWS,
    TOKEN_KNOTS,
    KernelGrid,
    adapter_tiles,
    token_terms,
)

Provenance = Literal["measured", "interpolated", "extrapolated"]

# An all-reduce between two GPUs on NVLink, by NCCL (../shared/facts/h200.md, H200, 2026-11-21): 9.7 µs, and 250 µs for 64 MiB.
ALL_REDUCE_S = 9.7e-6
ALL_REDUCE_S_PER_BYTE = (250e-6 - 9.7e-6) / 64 / 2**20
ACTIVATION_BYTES = 2


class VllmCosts:
    """Seconds of steps and loads of one vLLM engine with `max_loras` slots of `max_lora_rank` on `tp` GPUs; 0 slots: LoRA is off."""

    def __init__(self, profile: VllmProfile, *, max_loras: int, max_lora_rank: int, tp: int = 1) -> None:
        self.profile = profile
        self.max_loras, self.max_lora_rank, self.tp = max_loras, max_lora_rank, tp
        self.grid = KernelGrid(
            model=profile.model, rank=max_lora_rank, tp=tp, max_graph_tokens=profile.max_graph_tokens
        )
        self._seconds = {name: profile.seconds.get(name, 0.0) for name in profile.seconds}
        self._scale = profile.tp / tp  # of what is cut over the GPUs: products, KV cache
        self._kv_s = self._seconds["kv_tokens"] * self._scale
        self._rows_s = self._seconds["rows"]
        self._tile_s = self._seconds["adapter_tiles"] if max_loras else 0.0
        self._by_tokens: dict[int, tuple[float, float]] = {}
        self._by_rows: dict[int, tuple[float, float]] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        return _costs, (self.profile, self.max_loras, self.max_lora_rank, self.tp)

    # ---- what the simulation asks ----

    @property
    def heating(self) -> None:
        """Nothing is known of it."""

    def step_s(self, shape: StepShape) -> float:
        """Time of a step without loads."""
        tokens, rows = shape.decode_rows + shape.prefill_tokens, shape.sample_rows
        base_s, adapter_s = self._by_tokens.get(tokens) or self._tokens_s(tokens)
        total_s = base_s + (shape.decode_kv_tokens + shape.prefill_kv_tokens) * self._kv_s
        head_s, head_adapter_s = self._by_rows.get(rows) or self._head_s(rows)
        total_s += head_s
        if shape.lora_adapters:
            total_s += shape.lora_adapters * (adapter_s + head_adapter_s)
            tiles = adapter_tiles(shape.decode_rows, shape.prefill_tokens, shape.lora_adapters)
            total_s += self._tile_s * tiles
        return total_s

    def decode_run(self, shape: StepShape, steps: int) -> DecodeRun:
        """Time of `steps` decode steps: `shape`, then one more KV token a row each."""
        return DecodeRun(self.step_s(shape), shape.decode_rows * self._kv_s, steps)

    def host_s(self, shape: StepShape) -> float:
        """Nothing: the host's part is in the step, as nothing overlaps."""
        return 0.0

    def load_s(self, num_bytes: int) -> float:
        """Time to load an adapter into its slot, whatever its size (copies are small and many); the step stands still meanwhile."""
        return self.profile.load_s

    def parts_s(self, shape: StepShape) -> dict[str, float]:
        """Time of a step by what it is spent on; the values add up to `step_s`."""
        kv_s = (shape.decode_kv_tokens + shape.prefill_kv_tokens) * self._kv_s
        head_s = shape.sample_rows * self._rows_s
        whole_s = self.step_s(shape)
        base_s = self._base_s(self.grid.padded(shape.tokens))
        return {
            "matmul": base_s,
            "head": head_s,
            "decode attention": kv_s,
            "LoRA": max(0.0, whole_s - base_s - kv_s - head_s),
        }

    def provenance(self, shape: StepShape) -> Provenance:
        """Say where the price of a step comes from: within what was measured, or not."""
        largest = self.profile.largest
        within = (
            self.tp == self.profile.tp
            and shape.tokens <= largest.get("tokens", 0)
            and shape.decode_kv_tokens <= largest.get("kv_tokens", 0)
            and shape.lora_adapters <= largest.get("adapters", 0)
            and self.max_loras <= largest.get("slots", 0)
            and self.max_lora_rank <= largest.get("rank", 0)
        )
        return "interpolated" if within else "extrapolated"

    # ---- what tokens and rows decide ----

    def _tokens_s(self, tokens: int) -> tuple[float, float]:
        """Return the seconds of a step that tokens alone decide, and those of each adapter."""
        padded = self.grid.padded(tokens)
        total_s, adapter_s = self._base_s(padded), 0.0
        if self.max_loras:
            blocks = self.grid.layer_blocks(padded)
            few = padded < MANY_ROWS
            total_s += self._seconds["lora"] + blocks * self._slot_s(few)
            adapter_s = self._seconds["adapters_few" if few else "adapters_many"]
            adapter_s += blocks * self._seconds["adapter_blocks"]
        found = self._by_tokens[tokens] = (total_s, adapter_s)
        return found

    def _head_s(self, rows: int) -> tuple[float, float]:
        blocks = self.grid.head_blocks(rows) if self.max_loras else 0.0
        found = self._by_rows[rows] = (
            rows * self._rows_s + blocks * self._slot_s(rows < MANY_ROWS),
            blocks * self._seconds["adapter_blocks"],
        )
        return found

    def _slot_s(self, few: bool) -> float:
        """Seconds of a block in every slot's grid."""
        return (self.max_loras + 1) * self._seconds["slot_blocks_few" if few else "slot_blocks_many"]

    def _base_s(self, padded: int) -> float:
        """Return the base model's seconds; on other GPUs than were measured, weights and products are shared and sums exchanged."""
        fixed_s = self._seconds["step"]
        ramps_s = sum(
            value * self._seconds[f"tokens_from_{knot}"]
            for knot, value in zip(TOKEN_KNOTS, token_terms(padded), strict=True)
        )
        if self._scale == 1:
            return fixed_s + ramps_s
        weights_s = min(fixed_s, self._weights_s)
        return fixed_s - weights_s + (weights_s + ramps_s) * self._scale + self._exchange_s(padded)

    @cached_property
    def _weights_s(self) -> float:
        """Seconds to read the weights once, at the rate at which the KV cache is read: what a step of one token is bound by."""
        model = self.profile.model
        rate_s = self._seconds["kv_tokens"] / self.profile.kv_bytes_per_token
        return model.weight_bytes(self.profile.tp) * rate_s

    def _exchange_s(self, padded: int) -> float:
        """Seconds of two sums over the GPUs a layer."""
        size = padded * self.profile.model.hidden_size * ACTIVATION_BYTES
        one_s = ALL_REDUCE_S * log2(self.tp) + size * ALL_REDUCE_S_PER_BYTE * 2 * (self.tp - 1) / self.tp
        return 2 * self.profile.model.num_layers * one_s if self.tp > 1 else 0.0


def slot_bytes_by_shape(profile: VllmProfile, tp: int) -> tuple[float, float]:
    """Return a slot's bytes, fixed and per rank, on one of `tp` GPUs: of the shape, where they were not measured.

    Linears cut by columns have B cut; A, and B of those cut by rows, is on every GPU (vLLM without `--fully-sharded-loras`). Embedding and head have
    room for 256 extra tokens each.
    """
    model = profile.model
    rank_elements = sum(out + into for out, into in model.linear_shapes(tp).values()) * model.num_layers
    rank_elements += (
        2 * (model.vocab_size + EXTRA_VOCABULARY) // tp + 2 * model.hidden_size + 2 * EXTRA_VOCABULARY
    )
    return 3.0 * EXTRA_VOCABULARY * model.hidden_size * 2, rank_elements * 2.0


def _costs(profile: VllmProfile, max_loras: int, max_lora_rank: int, tp: int) -> VllmCosts:
    return VllmCosts(profile, max_loras=max_loras, max_lora_rank=max_lora_rank, tp=tp)
