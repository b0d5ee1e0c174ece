"""The profile of a vLLM server: what its steps cost, what memory its slots take, and where all that comes from. A file that `calibrate` writes."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engine.errors import UserError
from engine.json_files import read_json
from engine.model_shape import ModelShape, load_model_shape
from sim.vllm_steps import TERMS

KIND = "vllm"
SCHEMA_VERSION = 1
VLLM_PROFILES = Path(__file__).parent / "profiles"
GIB = 2**30


@dataclass(frozen=True, slots=True, kw_only=True)
class VllmMemory:
    """One GPU's memory under vLLM.

    base_bytes: weights, activations and runtime, all that is neither a slot nor KV cache. A slot takes slot_bytes plus slot_bytes_per_rank times
    `max_lora_rank`, whatever adapter it holds.
    """

    gpu_bytes: float
    weights_bytes: float
    base_bytes: float
    slot_bytes: float
    slot_bytes_per_rank: float

    def slots_bytes(self, max_loras: int, max_lora_rank: int) -> float:
        """Return what all slots take."""
        return max_loras * (self.slot_bytes + self.slot_bytes_per_rank * max_lora_rank)

    def kv_bytes(self, max_loras: int, max_lora_rank: int, utilization: float) -> float:
        """Return what is left for KV cache; below 0 where nothing is."""
        return self.gpu_bytes * utilization - self.base_bytes - self.slots_bytes(max_loras, max_lora_rank)


@dataclass(frozen=True, slots=True, kw_only=True)
class VllmProfile:
    """A fitted vLLM server.

    seconds: by term of a step (`sim.vllm_steps.TERMS`). load_s: an adapter from host memory into a slot. scan_s: the walk past one waiting
    request. client_s: between the engine and the client, each way together. chunked: V1's chunked prefill; else V0, whole prompts first.
    largest: what was measured, by fact: beyond it a step is extrapolated. errors: of the fit, as shares. tp: GPUs that were measured.
    """

    source: str
    engine: str
    model: ModelShape
    gpu: str
    tp: int
    memory: VllmMemory
    seconds: Mapping[str, float]
    load_s: float
    scan_s: float
    client_s: float
    chunked: bool = True
    max_graph_tokens: int = 512
    max_num_batched_tokens: int = 2048
    block_tokens: int = 16
    largest: Mapping[str, float] = field(default_factory=dict)
    errors: Mapping[str, float] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)

    @property
    def kv_bytes_per_token(self) -> int:
        return self.model.kv_bytes_per_token(self.tp)

    @property
    def step_error(self) -> float:
        """How far a step's price may be off: the held-out error."""
        return float(self.errors.get("held_out_p90", 0.15))

    def to_json(self) -> dict[str, Any]:
        """Return the JSON form."""
        memory = self.memory
        return {
            "kind": KIND,
            "schema_version": SCHEMA_VERSION,
            "engine": self.engine,
            "model": self.model.name,
            "gpu": self.gpu,
            "tp": self.tp,
            "chunked": self.chunked,
            "max_graph_tokens": self.max_graph_tokens,
            "max_num_batched_tokens": self.max_num_batched_tokens,
            "block_tokens": self.block_tokens,
            "memory": {name: round(getattr(memory, name)) for name in VllmMemory.__slots__},
            "seconds": {name: _rounded(self.seconds.get(name, 0.0)) for name in TERMS},
            "load_s": _rounded(self.load_s),
            "scan_s": _rounded(self.scan_s),
            "client_s": _rounded(self.client_s),
            "largest": dict(self.largest),
            "errors": {name: _rounded(value) for name, value in self.errors.items()},
            "provenance": dict(self.provenance),
        }

    def save(self, path: Path) -> None:
        """Write the file. Raises UserError where it cannot be written."""
        try:
            path.write_text(json.dumps(self.to_json(), indent=1, allow_nan=False) + "\n", encoding="utf-8")
        except OSError as error:
            raise UserError(f"{path}: cannot be written: {error.strerror}") from None


def is_vllm_profile(data: Any) -> bool:
    """Whether a JSON value is such a profile, and not one of our engine."""
    return isinstance(data, dict) and data.get("kind") == KIND


def load_vllm_profile(path: str | Path) -> VllmProfile:
    """Read a profile. Raises UserError naming the file and the place in it."""
    return parse_vllm_profile(read_json(Path(path)), str(path))


def find_vllm_profile(model: str, gpu: str | None = None) -> Path:
    """Return the shipped profile of a model. Raises UserError where there is none."""
    name = f"vllm-*.{model.lower()}.{gpu.lower() if gpu else '*'}.json"
    found = sorted(VLLM_PROFILES.glob(name)) if "/" not in model else []
    if not found:
        raise UserError(f"no vLLM profile of {model!r} in {VLLM_PROFILES}; give one with --profile")
    return found[0]


def parse_vllm_profile(data: Any, source: str) -> VllmProfile:
    """Check a profile's JSON form. Raises UserError naming the place."""
    if not is_vllm_profile(data):
        raise UserError(f"{source}: is not a vLLM profile: kind must be {KIND!r}")
    if data.get("schema_version") != SCHEMA_VERSION:
        raise UserError(f"{source}: schema_version={data.get('schema_version')!r} must be {SCHEMA_VERSION}")
    memory, seconds = _object(data, "memory", source), _object(data, "seconds", source)
    if not isinstance(data.get("chunked"), bool):
        raise UserError(f"{source}: chunked={data.get('chunked')!r} must be true or false")
    for name in ("engine", "model", "gpu"):
        if not isinstance(data.get(name), str) or not data[name]:
            raise UserError(f"{source}: {name}={data.get(name)!r} must be a name")
    unknown = sorted(set(seconds) - set(TERMS))
    if unknown:
        raise UserError(f"{source}: seconds: unknown term {unknown[0]!r}; known: {', '.join(TERMS)}")
    return VllmProfile(
        source=source,
        engine=data["engine"],
        model=load_model_shape(data["model"]),
        gpu=data["gpu"],
        tp=_count(data, "tp", source),
        memory=VllmMemory(**{n: _number(memory, n, f"{source}: memory") for n in VllmMemory.__slots__}),
        seconds={name: _number(seconds, name, f"{source}: seconds") for name in TERMS},
        load_s=_number(data, "load_s", source),
        scan_s=_number(data, "scan_s", source),
        client_s=_number(data, "client_s", source),
        chunked=data["chunked"],
        max_graph_tokens=_count(data, "max_graph_tokens", source, least=0),
        max_num_batched_tokens=_count(data, "max_num_batched_tokens", source),
        block_tokens=_count(data, "block_tokens", source),
        largest=_object(data, "largest", source),
        errors=_object(data, "errors", source),
        provenance=_object(data, "provenance", source),
    )


def _object(data: Mapping[str, Any], name: str, source: str) -> dict[str, Any]:
    value = data.get(name)
    if not isinstance(value, dict):
        raise UserError(f"{source}: {name} must be an object")
    return value


def _number(data: Mapping[str, Any], name: str, place: str) -> float:
    value = data.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
        raise UserError(f"{place}: {name}={value!r} must be a number of at least 0")
    return float(value)


def _count(data: Mapping[str, Any], name: str, source: str, least: int = 1) -> int:
    value = data.get(name)
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise UserError(f"{source}: {name}={value!r} must be a whole number of at least {least}")
    return value


def _rounded(value: float) -> float:
    return float(f"{value:.6g}")
