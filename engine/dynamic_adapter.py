"""What a dynamic adapter is before its weights are read: N LoRA experts on each of its linears, of which a router gives every token k.

The folder's dynamic_adapter_config.json says it; docs/switch.md describes the format. What is not known here is refused.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from engine.errors import UserError
from engine.json_files import read_json
from engine.model_shape import GROUPS, MAX_RANK, MODULES, ModelShape

RouterStyle = Literal["switch", "layerwise"]
"""``switch``: one router, at the first adapted linear, whose gates all layers use (LoRA-Switch). ``layerwise``: one a layer, at that layer's
first adapted linear (as MoLA, MoRAL and PESC)."""

FORMAT = "loraplan-dynamic-adapter"
VERSION = 1
CONFIG_FILE = "dynamic_adapter_config.json"
WEIGHTS_FILE = "dynamic_adapter.safetensors"
MAX_CONFIG_BYTES = 2**20
MIN_EXPERTS, MAX_EXPERTS = 2, 32
MAX_TOP_K = 8
_KEYS = (
    *("format", "version", "num_experts", "top_k", "rank", "target_modules", "router", "renormalise"),
    "base_model",
)
_OPTIONAL = ("renormalise", "base_model")


@dataclass(frozen=True, slots=True, kw_only=True)
class DynamicAdapterSpec:
    """One dynamic adapter. All experts have the same rank on every target.

    renormalise: divide the k gates by their sum; the paper does not (kernels/route_top_k.py says who does). base_model: what it was trained
    for, to be shown.
    """

    name: str
    num_experts: int
    top_k: int
    rank: int
    target_modules: tuple[str, ...] = MODULES
    router: RouterStyle = "switch"
    renormalise: bool = False
    base_model: str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name:
            raise UserError(f"adapter name (={self.name!r}) must be a non-empty string.")
        _check_integer("num_experts", self.num_experts, MIN_EXPERTS, MAX_EXPERTS)
        _check_integer("top_k", self.top_k, 1, min(MAX_TOP_K, self.num_experts))
        _check_integer("rank", self.rank, 1, MAX_RANK)
        if not isinstance(self.target_modules, tuple) or not self.target_modules:
            raise UserError("target_modules must name at least one linear.")
        for module in self.target_modules:
            if module not in MODULES:
                raise UserError(f"target_modules has {module!r}; it must be one of {', '.join(MODULES)}.")
        if len(set(self.target_modules)) != len(self.target_modules):
            raise UserError("target_modules names a linear twice.")
        if self.router not in get_args(RouterStyle):
            raise UserError(f"router (={self.router!r}) must be one of {', '.join(get_args(RouterStyle))}.")
        if not isinstance(self.renormalise, bool):
            raise UserError(f"renormalise (={self.renormalise!r}) must be true or false.")
        if self.base_model is not None and not isinstance(self.base_model, str):
            raise UserError(f"base_model (={self.base_model!r}) must be a string.")

    @property
    def targets(self) -> tuple[str, ...]:
        """The targets in the order of MODULES."""
        return tuple(module for module in MODULES if module in self.target_modules)

    @property
    def first_group(self) -> int:
        """The group of linears whose input the router reads: 0 qkv, 1 o, 2 gate_up, 3 down."""
        return next(i for i, group in enumerate(GROUPS) if set(group) & set(self.target_modules))

    def num_routers(self, shape: ModelShape) -> int:
        """Return how many routers there are."""
        return 1 if self.router == "switch" else shape.num_layers

    def router_shape(self, shape: ModelShape) -> tuple[int, int]:
        """Return the shape of a router's weight, [experts, in]."""
        return self.num_experts, shape.linear_shapes()[self.targets[0]][1]

    def expert_bytes(self, shape: ModelShape, itemsize: int) -> int:
        """Return the bytes of one expert's factors on all layers."""
        linears = shape.linear_shapes()
        return shape.num_layers * self.rank * sum(sum(linears[module]) for module in self.targets) * itemsize


def read_dynamic_config(folder: str | Path, name: str | None = None) -> DynamicAdapterSpec:
    """Read a folder's dynamic_adapter_config.json. Raises UserError naming file and field where something is wrong or not known."""
    path = Path(folder) / CONFIG_FILE
    if not path.is_file():
        raise UserError(f"no {CONFIG_FILE}: not a dynamic adapter's folder.", path=folder)
    if path.stat().st_size > MAX_CONFIG_BYTES:
        raise UserError(f"larger than {MAX_CONFIG_BYTES} bytes.", path=path)
    config = read_json(path)
    try:
        return _spec_of(config, name or Path(folder).name)
    except UserError as error:
        raise UserError(error.reason, path=path) from None


def _spec_of(config: object, name: str) -> DynamicAdapterSpec:
    if not isinstance(config, dict):
        raise UserError("must be a JSON object.")
    for key in config:
        if key not in _KEYS:
            raise UserError(f"unknown key {_shown(key)!r}; known keys: {', '.join(_KEYS)}.")
    for key in _KEYS:
        if key not in config and key not in _OPTIONAL:
            raise UserError(f"{key} is missing.")
    if config["format"] != FORMAT:
        raise UserError(f"format (={config['format']!r}) must be {FORMAT!r}.")
    if config["version"] != VERSION or isinstance(config["version"], bool):
        raise UserError(f"version (={config['version']!r}) must be {VERSION}.")
    targets = config["target_modules"]
    if not isinstance(targets, list) or not all(isinstance(target, str) for target in targets):
        raise UserError("target_modules must be a list of strings.")
    return DynamicAdapterSpec(
        name=name,
        num_experts=config["num_experts"],
        top_k=config["top_k"],
        rank=config["rank"],
        target_modules=tuple(targets),
        router=config["router"],
        renormalise=config.get("renormalise", False),
        base_model=config.get("base_model"),
    )


def dynamic_config(spec: DynamicAdapterSpec) -> dict[str, Any]:
    """Return what dynamic_adapter_config.json holds of a spec."""
    return {
        "format": FORMAT,
        "version": VERSION,
        "num_experts": spec.num_experts,
        "top_k": spec.top_k,
        "rank": spec.rank,
        "target_modules": list(spec.targets),
        "router": spec.router,
        "renormalise": spec.renormalise,
        "base_model": spec.base_model,
    }


def _check_integer(name: str, value: object, low: int, high: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise UserError(f"{name} (={value!r}) must be an integer in {low}..{high}.")


def _shown(name: str) -> str:
    """Return a key that anybody may have written as part of one line."""
    return "".join(letter if letter.isprintable() else "?" for letter in name[:200])
