"""A dynamic adapter's weights: read from its folder, written to one, or drawn at random.

Tensors of dynamic_adapter.safetensors, all of one dtype (docs/switch.md):

    layers.{l}.{module}.A   [experts, rank, in]         layers.{l}.{module}.B   [experts, out, rank], the scale multiplied in
    router.weight           [experts, in]  (switch)     layers.{l}.router.weight  (layerwise)
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

from engine.dynamic_adapter import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    DynamicAdapterSpec,
    dynamic_config,
    read_dynamic_config,
)
from engine.errors import UserError
from engine.model_shape import ModelShape
from engine.tensor_files import LoadedTensors, load_tensors

RANDOM_STD = 0.02


@dataclass(frozen=True, slots=True, kw_only=True)
class DynamicAdapterWeights:
    """One dynamic adapter's tensors on the CPU: (layer, module) to A [N, r, in] and B [N, out, r], and the routers' weights [N, in]."""

    spec: DynamicAdapterSpec
    tensors: dict[tuple[int, str], tuple[torch.Tensor, torch.Tensor]]
    routers: tuple[torch.Tensor, ...]


def tensor_shapes(spec: DynamicAdapterSpec, shape: ModelShape) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield the name and shape of every tensor of the file."""
    linears = shape.linear_shapes()
    for index in range(spec.num_routers(shape)):
        yield router_name(spec, index), spec.router_shape(shape)
    for layer in range(shape.num_layers):
        for module in spec.targets:
            out, inp = linears[module]
            yield factor_name(layer, module, "A"), (spec.num_experts, spec.rank, inp)
            yield factor_name(layer, module, "B"), (spec.num_experts, out, spec.rank)


def factor_name(layer: int, module: str, side: str) -> str:
    """Return the name of one linear's factors of all experts."""
    return f"layers.{layer}.{module}.{side}"


def router_name(spec: DynamicAdapterSpec, index: int) -> str:
    """Return the name of a router's weight."""
    return "router.weight" if spec.router == "switch" else f"layers.{index}.router.weight"


def load_dynamic_adapter(
    folder: str | Path, shape: ModelShape, name: str | None = None
) -> DynamicAdapterWeights:
    """Read a dynamic adapter for a model. Raises UserError naming file and tensor for what is missing, unexpected, misshapen or not finite."""
    folder = Path(folder)
    spec = read_dynamic_config(folder, name)
    path = folder / WEIGHTS_FILE
    if not path.is_file():
        raise UserError("no such file.", path=path)
    wanted = dict(tensor_shapes(spec, shape))
    elems = sum(torch.Size(size).numel() for size in wanted.values())
    file = load_tensors(path, elems * 8 + len(wanted) * 512 + 2**16)
    _check_names(file, wanted)
    read = {tensor: _read(file, tensor, size) for tensor, size in wanted.items()}
    if len({tensor.dtype for tensor in read.values()}) > 1:
        raise UserError("tensors must all have one dtype.", path=path)
    return DynamicAdapterWeights(
        spec=spec,
        tensors={
            (layer, module): (
                read[factor_name(layer, module, "A")],
                read[factor_name(layer, module, "B")],
            )
            for layer in range(shape.num_layers)
            for module in spec.targets
        },
        routers=tuple(read[router_name(spec, index)] for index in range(spec.num_routers(shape))),
    )


def _check_names(file: LoadedTensors, wanted: dict[str, tuple[int, ...]]) -> None:
    for name in sorted(file.keys):
        if name not in wanted:
            shown = "".join(letter if letter.isprintable() else "?" for letter in name[:200])
            raise UserError(
                f"tensor {shown} is unexpected: config or model has no such part.", path=file.path
            )
    for name in wanted:
        if name not in file.keys:
            raise UserError(f"tensor {name} is missing.", path=file.path)


def _read(file: LoadedTensors, name: str, wanted: tuple[int, ...]) -> torch.Tensor:
    found = file.shape(name)
    if found != wanted:
        raise UserError(f"tensor {name} has shape {list(found)}, {list(wanted)} is needed.", path=file.path)
    tensor = file.read(name)
    low, high = torch.aminmax(tensor)
    if not bool(torch.isfinite(low) & torch.isfinite(high)):
        raise UserError(f"tensor {name} holds values that are not finite.", path=file.path)
    return tensor


def save_dynamic_adapter(adapter: DynamicAdapterWeights, folder: str | Path) -> Path:
    """Write the two files to a folder that must not hold them yet; return it. Raises UserError where it does."""
    folder = Path(folder)
    for file in (CONFIG_FILE, WEIGHTS_FILE):
        if (folder / file).exists():
            raise UserError("is there already.", path=folder / file)
    tensors = {router_name(adapter.spec, index): router for index, router in enumerate(adapter.routers)}
    for (layer, module), (a, b) in adapter.tensors.items():
        tensors[factor_name(layer, module, "A")] = a
        tensors[factor_name(layer, module, "B")] = b
    try:
        folder.mkdir(parents=True, exist_ok=True)
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / WEIGHTS_FILE)
        # The configuration last: a folder without one is no adapter.
        text = json.dumps(dynamic_config(adapter.spec), indent=1) + "\n"
        (folder / CONFIG_FILE).write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot be written: {error.strerror}.", path=folder) from None
    return folder


def random_dynamic_adapter(
    spec: DynamicAdapterSpec,
    shape: ModelShape,
    *,
    seed: int,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
) -> DynamicAdapterWeights:
    """Draw factors N(0, 0.02²), and routers N(0, 1 / in), whose logits are then of order one."""
    generator = torch.Generator(device).manual_seed(seed)

    def draw(*size: int, std: float = RANDOM_STD) -> torch.Tensor:
        return torch.empty(size, dtype=dtype, device=device).normal_(0.0, std, generator=generator)

    linears = shape.linear_shapes()
    experts, inputs = spec.router_shape(shape)
    return DynamicAdapterWeights(
        spec=spec,
        tensors={
            (layer, module): (
                draw(spec.num_experts, spec.rank, linears[module][1]),
                draw(spec.num_experts, linears[module][0], spec.rank),
            )
            for layer in range(shape.num_layers)
            for module in spec.targets
        },
        routers=tuple(draw(experts, inputs, std=inputs**-0.5) for _ in range(spec.num_routers(shape))),
    )
