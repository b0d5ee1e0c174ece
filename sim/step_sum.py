"""Prices steps of one kind, decodes alone or with prompts: the operators of a layer over all layers, each group corrected."""

from __future__ import annotations

from collections.abc import Callable

from engine.graph_sizes import padded_tokens
from engine.step import StepShape
from sim.compose import Layer
from sim.correct import Correction
from sim.price import Price
from sim.setting import Setting

LoraPrice = Callable[[int, int, int, int, int], float]


class StepSum:
    """Prices steps of one kind: the operators of a layer, corrected."""

    def __init__(self, layer: Layer, setting: Setting, correction: Correction) -> None:
        self._layer, self._setting, self._correction = layer, setting, correction
        self._dense: dict[
            int, tuple[float, float, float]
        ] = {}  # padded tokens -> matmuls etc., head etc., collectives
        self._by_tokens: dict[
            int, tuple[float, LoraPrice]
        ] = {}  # seconds that they alone decide, and how LoRA is priced
        layers, factor = setting.model.num_layers, correction.factors
        self.decode = Price(
            layer.attention_decode.scaled(layers * factor["attention_decode"] * 1e-6),
            ("rows", "kv_tokens", "kv_max"),
        )
        self._prefill = Price(
            layer.attention_prefill.scaled(layers * factor["attention_prefill"] * 1e-6),
            ("tokens", "pairs", "kv_max"),
        )
        # A shape's bytes are of all layers, the measurements' of one.
        per_layer = (1.0, 1.0, 1 / layers, 1 / layers, 1 / layers)
        self._lora_regimes = tuple(
            (
                regime.most_tokens,
                Price(
                    regime.envelope.over_model(layers, per_layer).scaled(factor["lora"] * 1e-6),
                    ("adapters", "tokens", "single_bytes", "shared_bytes", "token_bytes"),
                ),
            )
            for regime in layer.lora
        )
        self._exchange_s = None if setting.exchange == "local" else self._lora_exchange_s

    def step_s(self, shape: StepShape) -> float:
        """Return a step's GPU time."""
        rows = shape.decode_rows
        tokens = rows + shape.prefill_tokens
        total_s, lora_s = self._by_tokens.get(tokens) or self._of_tokens(tokens)
        if rows:
            total_s += self.decode.at(rows, shape.decode_kv_tokens, shape.decode_kv_max)
        if shape.prefill_chunks:
            total_s += self._prefill_s(shape)
        if shape.lora_adapters:
            single = shape.lora_single_bytes
            total_s += lora_s(
                shape.lora_adapters,
                shape.lora_tokens,
                single,
                shape.lora_bytes - single,
                shape.lora_token_bytes,
            )
            if self._exchange_s is not None:
                total_s += self._exchange_s(shape)
        return total_s

    def parts_s(self, shape: StepShape) -> dict[str, float]:
        """Return a step's GPU time by what it is spent on."""
        correction = self._correction
        factor = correction.factors
        padded = padded_tokens(shape.tokens, self._setting.graph_max_tokens)
        dense_us, head_us, collective_us = self._dense_us(padded)
        parts = {
            "matmul": (dense_us * factor["dense"] + correction.constant_us) * 1e-6,
            "head": head_us * factor["head"] * 1e-6,
            "collectives": collective_us * factor["exchange"] * 1e-6,
            "decode attention": 0.0,
            "prefill attention": 0.0,
            "LoRA": 0.0,
        }
        if shape.decode_rows:
            parts["decode attention"] = self.decode.at(
                shape.decode_rows, shape.decode_kv_tokens, shape.decode_kv_max
            )
        if shape.prefill_chunks:
            parts["prefill attention"] = self._prefill_s(shape)
        if shape.lora_adapters:
            parts["LoRA"] = self._lora_s(shape)
            if self._exchange_s is not None:
                parts["collectives"] += self._exchange_s(shape)
        return parts

    def _prefill_s(self, shape: StepShape) -> float:
        return self._prefill.at(shape.prefill_tokens, shape.prefill_pairs, shape.prefill_kv_max)

    def _lora_s(self, shape: StepShape) -> float:
        single = shape.lora_single_bytes
        return self._of_tokens(shape.tokens)[1](
            shape.lora_adapters,
            shape.lora_tokens,
            single,
            shape.lora_bytes - single,
            shape.lora_token_bytes,
        )

    def _lora_exchange_s(self, shape: StepShape) -> float:
        padded = padded_tokens(shape.tokens, self._setting.graph_max_tokens)
        token_bytes = shape.lora_token_bytes / shape.lora_tokens
        return (
            self._layer.exchanges.lora_us(padded, token_bytes)
            * self._correction.factors["lora_exchange"]
            * 1e-6
        )

    # ---- what tokens alone decide ----

    def _of_tokens(self, tokens: int) -> tuple[float, LoraPrice]:
        dense_us, head_us, collective_us = self._dense_us(
            padded_tokens(tokens, self._setting.graph_max_tokens)
        )
        factor = self._correction.factors
        total_us = dense_us * factor["dense"] + head_us * factor["head"] + collective_us * factor["exchange"]
        lora = next(price for most_tokens, price in self._lora_regimes if tokens <= most_tokens)
        self._by_tokens[tokens] = found = (total_us + self._correction.constant_us) * 1e-6, lora.at
        return found

    def _dense_us(self, padded: int) -> tuple[float, float, float]:
        found = self._dense.get(padded)
        if found is None:
            rows = min(padded, self._setting.sample_rows)
            found = self._dense[padded] = (
                self._layer.dense_us(padded) * self._setting.model.num_layers,
                self._layer.head_us(rows),
                self._layer.exchanges.base_us(padded, rows),
            )
        return found
