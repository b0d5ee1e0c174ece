"""A dynamic adapter out of PEFT LoRAs of the same base, one an expert, and a router."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from engine.dynamic_adapter import DynamicAdapterSpec, RouterStyle
from engine.dynamic_adapter_files import DynamicAdapterWeights, router_name
from engine.errors import UserError
from engine.model_shape import MODULES, ModelShape
from engine.peft_adapter import AdapterWeights, load_peft_adapter
from engine.tensor_files import load_tensors


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterSource:
    """Where the routers come from: a safetensors file, or a seed."""

    file: Path | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        if (self.file is None) == (self.seed is None):
            raise UserError("one of --router and --random-router must be given.")


def combine(
    folders: Sequence[Path],
    source: RouterSource,
    shape: ModelShape,
    *,
    name: str,
    top_k: int = 2,
    router: RouterStyle = "switch",
    renormalise: bool = False,
) -> DynamicAdapterWeights:
    """Return the dynamic adapter whose expert i is the LoRA in folder i, its scale multiplied into B in fp32 and rounded once.

    Raises UserError naming folder and field where the LoRAs differ in targets, rank or dtype, or a router does not fit.
    """
    experts = [load_peft_adapter(folder, shape) for folder in folders]
    if not experts:
        raise UserError("--lora must be given at least twice.")
    for folder, expert in zip(folders, experts, strict=True):
        _check_alike(folder, expert, folders[0], experts[0])
    first = experts[0]
    spec = DynamicAdapterSpec(
        name=name,
        num_experts=len(experts),
        top_k=top_k,
        rank=first.spec.rank,
        target_modules=first.spec.target_modules,
        router=router,
        renormalise=renormalise,
        base_model=shape.name,
    )
    tensors = {
        key: (
            torch.stack([expert.tensors[key][0] for expert in experts]),
            torch.stack([_scaled(expert, key) for expert in experts]),
        )
        for key in first.tensors
    }
    dtype = _dtype_of(first)
    return DynamicAdapterWeights(spec=spec, tensors=tensors, routers=_routers(spec, source, shape, dtype))


def _scaled(expert: AdapterWeights, key: tuple[int, str]) -> torch.Tensor:
    b = expert.tensors[key][1]
    scaled = (b.float() * expert.scales[MODULES.index(key[1])]).to(b.dtype)
    if not bool(torch.isfinite(scaled).all()):
        raise UserError(f"adapter {expert.spec.name}: weights times alpha / r overflow {b.dtype}.")
    return scaled


def _dtype_of(expert: AdapterWeights) -> torch.dtype:
    return next(iter(expert.tensors.values()))[0].dtype


def _check_alike(folder: Path, expert: AdapterWeights, first_folder: Path, first: AdapterWeights) -> None:
    """Raise UserError unless an expert has the first one's shape."""
    if expert.spec.kind != "lora":
        raise UserError(f"kind {expert.spec.kind!r} cannot be an expert.", path=folder)
    ranks = {rank for rank in expert.spec.module_ranks if rank}
    if len(ranks) > 1:
        raise UserError(f"rank_pattern: an expert has one rank, not {sorted(ranks)}.", path=folder)
    if expert.spec.rank != first.spec.rank:
        raise UserError(
            f"r (={expert.spec.rank}) must be that of {first_folder}: {first.spec.rank}.", path=folder
        )
    if set(expert.spec.target_modules) != set(first.spec.target_modules):
        raise UserError(
            f"target_modules (={expert.spec.target_modules}) must be those of {first_folder}: {first.spec.target_modules}.",
            path=folder,
        )
    if _dtype_of(expert) != _dtype_of(first):
        raise UserError(f"dtype {_dtype_of(expert)} must be that of {first_folder}.", path=folder)


def _routers(
    spec: DynamicAdapterSpec, source: RouterSource, shape: ModelShape, dtype: torch.dtype
) -> tuple[torch.Tensor, ...]:
    count, size = spec.num_routers(shape), spec.router_shape(shape)
    if source.file is None:
        generator = torch.Generator().manual_seed(source.seed or 0)
        return tuple(
            torch.empty(size).normal_(0.0, size[1] ** -0.5, generator=generator).to(dtype)
            for _ in range(count)
        )
    names = [router_name(spec, index) for index in range(count)]
    file = load_tensors(source.file, count * (size[0] * size[1] * 8 + 512) + 2**16)
    if unexpected := sorted(file.keys - set(names)):
        raise UserError(
            f"tensor {unexpected[0][:200]!r} is unexpected; a {spec.router} router has {names[0]}.",
            path=file.path,
        )
    routers = []
    for name in names:
        if name not in file.keys:
            raise UserError(f"tensor {name} is missing.", path=file.path)
        if file.shape(name) != size:
            raise UserError(
                f"tensor {name} has shape {list(file.shape(name))}, {list(size)} is needed.", path=file.path
            )
        router = file.read(name).to(dtype)
        if not bool(torch.isfinite(router).all()):
            raise UserError(f"tensor {name} holds values that are not finite.", path=file.path)
        routers.append(router)
    return tuple(routers)
