"""What a PEFT adapter_config.json says: which linears have LoRA, of which rank and scale. No weights are
read.

Follows peft 0.21: names match as in ``check_target_module_exists``, patterns as in ``get_pattern_key``. What
would change the computation and is not plain LoRA is refused, fields that nobody here knows included.
"""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from engine.errors import UserError
from engine.json_files import read_json
from engine.model_shape import MODULES, ROW_PARALLEL

ATTENTION_MODULES = ("q_proj", "k_proj", "v_proj", "o_proj")

# Fields that do not change what inference computes, or that the parser reads.
_KNOWN = {
    *("task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"),
    *("inference_mode", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "target_modules"),
    *("exclude_modules", "lora_dropout", "bias", "init_lora_weights", "megatron_core", "loftq_config"),
    *("eva_config", "corda_config", "lora_ga_config", "qalora_group_size", "runtime_config"),
    *("ensure_weight_tying", "layers_pattern", "use_bdlora"),
}
# These leave the base's weights alone; pissa, olora, loftq, corda and lora_ga train against a changed base.
_HARMLESS_INITS = (True, False, None, "gaussian", "orthogonal", "eva")
MAX_CONFIG_BYTES = 2**20  # PEFT writes about one thousand
_REASONS = {
    "use_dora": "DoRA is not supported",
    "modules_to_save": "adapters that replace whole modules are not supported",
    "layers_to_transform": "adapters of some layers only are not supported",
    "fan_in_fan_out": "transposed base weights are not supported",
    "lora_bias": "a bias in LoRA is not supported",
    "trainable_token_indices": "adapters that change embeddings are not supported",
}


def module_path(layer: int, module: str) -> str:
    """Return the name that a linear has inside a Llama-like model: ``model.layers.3.mlp.up_proj``."""
    parent = "self_attn" if module in ATTENTION_MODULES else "mlp"
    return f"model.layers.{layer}.{parent}.{module}"


@dataclass(frozen=True, slots=True, kw_only=True)
class PeftConfig:
    """What decides ranks and scales in an adapter_config.json. ``source`` is the file, for errors.

    nblocks: blocks of block-diagonal LoRA, whose A has them in row-parallel linears (o, down) and whose B has them in the others; 1 is dense.
    """

    source: Path
    r: int
    lora_alpha: float
    use_rslora: bool
    target_modules: str | tuple[str, ...]
    exclude_modules: str | tuple[str, ...] | None
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    nblocks: int = 1

    def module_ranks(self, num_layers: int) -> dict[str, int]:
        """Return the rank of each target, in the order of MODULES. Raises UserError where layers differ."""
        return {module: rank for module, (rank, _) in self._modules(num_layers).items()}

    def module_scales(self, num_layers: int) -> dict[str, float]:
        """Return what each target's B·A is multiplied by: alpha / r, or alpha / √r with rslora."""
        return {
            module: alpha / (math.sqrt(rank) if self.use_rslora else rank)
            for module, (rank, alpha) in self._modules(num_layers).items()
        }

    def _modules(self, num_layers: int) -> dict[str, tuple[int, float]]:
        found = {}
        try:
            for module in MODULES:
                per_layer = {self._at(module_path(layer, module)) for layer in range(num_layers)}
                if len(per_layer) > 1:
                    raise UserError(
                        f"{module} differs between layers, which is not supported.", path=self.source
                    )
                value = per_layer.pop()
                if value is not None:
                    found[module] = value
        except re.error as error:
            raise UserError(f"a pattern is not a regular expression: {error}.", path=self.source) from None
        if not found:
            raise UserError(f"target_modules matches none of {', '.join(MODULES)}.", path=self.source)
        return found

    def _at(self, path: str) -> tuple[int, float] | None:
        """Return rank and alpha of one linear, None where it is not a target."""
        if not _matches(self.target_modules, path):
            return None
        if self.exclude_modules is not None and _matches(self.exclude_modules, path):
            return None
        rank = self.rank_pattern.get(_pattern_key(self.rank_pattern, path), self.r)
        return rank, self.alpha_pattern.get(_pattern_key(self.alpha_pattern, path), self.lora_alpha)


def read_peft_config(folder: Path) -> PeftConfig:
    """Read a PEFT folder's adapter_config.json. Raises UserError for anything but plain LoRA."""
    path = Path(folder) / "adapter_config.json"
    if not path.is_file():
        raise UserError("no adapter_config.json: not a PEFT adapter folder.", path=folder)
    if path.stat().st_size > MAX_CONFIG_BYTES:
        raise UserError(f"larger than {MAX_CONFIG_BYTES} bytes.", path=path)
    config = read_json(path)
    if not isinstance(config, dict):
        raise UserError("must be a JSON object.", path=path)
    _refuse_unsupported(config, path)
    found = PeftConfig(
        source=path,
        r=_rank(config.get("r", 8), "r", path),
        lora_alpha=_alpha(config.get("lora_alpha", 8), "lora_alpha", path),
        use_rslora=config.get("use_rslora") is True,
        target_modules=_targets(config, path),
        exclude_modules=_names(config, "exclude_modules", path),
        rank_pattern={
            key: _rank(value, f"rank_pattern[{key!r}]", path) for key, value in _pattern(config, "rank", path)
        },
        alpha_pattern={
            key: _alpha(value, f"alpha_pattern[{key!r}]", path)
            for key, value in _pattern(config, "alpha", path)
        },
    )
    if not config.get("use_bdlora"):
        return found
    return replace(found, nblocks=_blocks(config["use_bdlora"], found, path))


def _blocks(block_diagonal: object, config: PeftConfig, path: Path) -> int:
    """Return the number of blocks of a BD-LoRA adapter whose every target has its blocks where tensor parallelism cuts the base.

    PEFT matches its lists by substring of a linear's name, and its own docstring swaps the two: A has blocks in o and down, B in the others.
    """
    if not isinstance(block_diagonal, dict) or not isinstance(block_diagonal.get("nblocks"), int):
        raise UserError("use_bdlora must be an object with nblocks.", path=path)
    nblocks: int = block_diagonal["nblocks"]
    if not 1 <= nblocks <= 256:
        raise UserError(f"use_bdlora.nblocks (={nblocks}) must be in 1..256.", path=path)
    for module, rank in config.module_ranks(1).items():
        side, other = ("a", "b") if module in ROW_PARALLEL else ("b", "a")
        here, there = (
            any(
                pattern in module_path(0, module)
                for pattern in block_diagonal.get(f"target_modules_bd_{which}") or ()
            )
            for which in (side, other)
        )
        if there or not here:
            raise UserError(
                f"use_bdlora: {module} must be in target_modules_bd_{side} and not in target_modules_bd_{other}: "
                "its blocks must lie where tensor parallelism cuts the base.",
                path=path,
            )
        if rank % nblocks:
            raise UserError(
                f"use_bdlora.nblocks (={nblocks}) must divide the rank of {module} (={rank}).", path=path
            )
    return nblocks


def _refuse_unsupported(config: Mapping[str, Any], path: Path) -> None:
    if config.get("peft_type") != "LORA":
        raise UserError(f"peft_type (={config.get('peft_type')!r}) must be 'LORA'.", path=path)
    if config.get("bias", "none") != "none":
        raise UserError(f"bias (={config['bias']!r}) must be 'none'.", path=path)
    init = config.get("init_lora_weights", True)
    if init not in _HARMLESS_INITS:
        raise UserError(f"init_lora_weights (={init!r}) changes the base, which is not supported.", path=path)
    for field, value in config.items():
        if field not in _KNOWN and value not in (None, False, {}, []):
            reason = _REASONS.get(field, "not supported")
            shown = value if isinstance(value, str | int | float) else json.dumps(value)
            raise UserError(f"{field} (={shown}): {reason}.", path=path)


def _targets(config: Mapping[str, Any], path: Path) -> str | tuple[str, ...]:
    targets = _names(config, "target_modules", path)
    if not targets:
        raise UserError("target_modules is missing.", path=path)
    if targets == "all-linear":
        return MODULES
    if not isinstance(targets, str):
        for target in targets:
            if target.rpartition(".")[2] not in MODULES:
                raise UserError(
                    f"target_modules has {target!r}; only {', '.join(MODULES)} are supported.", path=path
                )
    return targets


def _names(config: Mapping[str, Any], field: str, path: Path) -> str | tuple[str, ...] | None:
    value = config.get(field)
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, list) and all(isinstance(name, str) for name in value):
        return tuple(value)
    raise UserError(f"{field} must be a string or a list of strings.", path=path)


def _pattern(config: Mapping[str, Any], what: str, path: Path) -> list[tuple[str, Any]]:
    value = config.get(f"{what}_pattern") or {}
    if not isinstance(value, dict):
        raise UserError(f"{what}_pattern must be an object.", path=path)
    return list(value.items())


def _rank(value: object, field: str, path: Path) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= 256:
        raise UserError(f"{field} (={value!r}) must be an integer in 1..256.", path=path)
    return value


def _alpha(value: object, field: str, path: Path) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
        raise UserError(f"{field} (={value!r}) must be a finite number.", path=path)
    return float(value)


def _matches(names: str | tuple[str, ...], path: str) -> bool:
    if isinstance(names, str):
        return re.fullmatch(names, path) is not None
    return any(path == name or path.endswith(f".{name}") for name in names)


def _pattern_key(pattern: Mapping[str, Any], path: str) -> str:
    return next((key for key in pattern if re.match(rf"(.*\.)?({key})$", path)), path)
