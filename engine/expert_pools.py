"""A dynamic adapter's experts on the device, laid out for the kernels: for each layer and group of linears one pool of A and one of B."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from engine.dynamic_adapter import DynamicAdapterSpec
from engine.dynamic_adapter_files import RANDOM_STD, DynamicAdapterWeights
from engine.model_shape import GROUPS, ModelShape
from kernels.sgmm_plan import SgmmWeight


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertGroup:
    """The experts of one group of linears of one layer.

    a: [N, rank · targets, in], the targets' A back to back. b: [N, rank · Σ widths of the targets], for each target its Bᵀ [rank, width].
    widths: `out` of all the group's linears; targets: which of them have experts.
    """

    a: torch.Tensor
    b: torch.Tensor
    rank: int
    widths: tuple[int, ...]
    targets: tuple[bool, ...]

    def factors(self) -> list[tuple[int, int, torch.Tensor, torch.Tensor]]:
        """Return (first row of the group's weight, width, A [N, rank, in], Bᵀ [N, rank, width]) of each target, views."""
        found, row, rows, elems = [], 0, 0, 0
        for width, is_target in zip(self.widths, self.targets, strict=True):
            if is_target:
                b = self.b[:, elems : elems + self.rank * width]
                b = b.as_strided((len(b), self.rank, width), (b.stride(0), width, 1))
                found.append((row, width, self.a[:, rows : rows + self.rank], b))
                rows, elems = rows + self.rank, elems + self.rank * width
            row += width
        return found

    def sgmm_weights(self, target: torch.Tensor, source: torch.Tensor) -> list[SgmmWeight]:
        """Return what the segmented product takes of each target, for the group's weight and its source [Σ widths, in]."""
        return [
            SgmmWeight(target=target[row : row + width], source=source[row : row + width], up=b, down=a)
            for row, width, a, b in self.factors()
        ]


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertPools:
    """All experts of one dynamic adapter on one device. layers: for each layer the four groups, None where none is a target."""

    spec: DynamicAdapterSpec
    layers: tuple[tuple[ExpertGroup | None, ...], ...]
    routers: tuple[torch.Tensor, ...]

    @property
    def weight_bytes(self) -> int:
        """Bytes of all factors."""
        groups = [group for layer in self.layers for group in layer if group is not None]
        return sum((group.a.numel() + group.b.numel()) * group.a.element_size() for group in groups)


def expert_pools(
    adapter: DynamicAdapterWeights, shape: ModelShape, *, dtype: torch.dtype, device: torch.device | str
) -> ExpertPools:
    """Lay an adapter's tensors out on a device."""
    layers = []
    for layer in range(shape.num_layers):
        groups: list[ExpertGroup | None] = []
        for names in GROUPS:
            pairs = [adapter.tensors[layer, name] for name in names if name in adapter.spec.targets]
            if not pairs:
                groups.append(None)
                continue
            a = torch.cat([a for a, _ in pairs], dim=1)
            b = torch.cat([b.transpose(1, 2).flatten(1) for _, b in pairs], dim=1)
            groups.append(_group(adapter.spec, shape, names, a.to(device, dtype), b.to(device, dtype)))
        layers.append(tuple(groups))
    routers = tuple(router.to(device, dtype) for router in adapter.routers)
    return ExpertPools(spec=adapter.spec, layers=tuple(layers), routers=routers)


def random_expert_pools(
    spec: DynamicAdapterSpec, shape: ModelShape, *, seed: int, dtype: torch.dtype, device: torch.device | str
) -> ExpertPools:
    """Draw an adapter on the device itself, for benchmarks: as `random_dynamic_adapter`, other numbers."""
    generator = torch.Generator(device).manual_seed(seed)

    def draw(*size: int, std: float = RANDOM_STD) -> torch.Tensor:
        return torch.empty(size, dtype=dtype, device=device).normal_(0.0, std, generator=generator)

    linears = shape.linear_shapes()
    layers = []
    for _ in range(shape.num_layers):
        groups: list[ExpertGroup | None] = []
        for names in GROUPS:
            mine = [name for name in names if name in spec.targets]
            a_size = spec.num_experts, spec.rank * len(mine), linears[names[0]][1]
            b_size = spec.num_experts, spec.rank * sum(linears[name][0] for name in mine)
            groups.append(_group(spec, shape, names, draw(*a_size), draw(*b_size)) if mine else None)
        layers.append(tuple(groups))
    experts, inputs = spec.router_shape(shape)
    routers = tuple(draw(experts, inputs, std=inputs**-0.5) for _ in range(spec.num_routers(shape)))
    return ExpertPools(spec=spec, layers=tuple(layers), routers=routers)


def _group(
    spec: DynamicAdapterSpec, shape: ModelShape, names: tuple[str, ...], a: torch.Tensor, b: torch.Tensor
) -> ExpertGroup:
    linears = shape.linear_shapes()
    return ExpertGroup(
        a=a,
        b=b,
        rank=spec.rank,
        widths=tuple(linears[name][0] for name in names),
        targets=tuple(name in spec.targets for name in names),
    )
