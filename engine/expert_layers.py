"""Dynamic adapters in the engine's forward pass: unmerged, path (d) of docs/switch.md, in any batch beside ordinary LoRAs.

Each step has, for every dynamic adapter, a mask of its rows. A row of another adapter is routed nowhere: it has no gate but zero, and its experts are
not read. Experts are added after base product and LoRA; kernels follow each other in one stream, so nothing adds to a place at the same time.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from engine.adapter import AdapterSpec
from engine.blueprint import Blueprint
from engine.dynamic_adapter import DynamicAdapterSpec
from engine.dynamic_adapter_files import load_dynamic_adapter
from engine.errors import UserError
from engine.expert_pools import ExpertGroup, ExpertPools, expert_pools, random_expert_pools
from engine.expert_route import ExpertRoute
from engine.model_shape import ModelShape
from engine.switch_ops import SwitchOps, switch_ops_for
from kernels.expert_launch import ExpertLaunch, expert_launch, tile_tokens_of
from kernels.route_top_k import touched_slots


@dataclass(frozen=True, slots=True)
class _Steps:
    """What steps of one size need: the routes of each adapter, and the launches of each of its groups."""

    routes: tuple[ExpertRoute, ...]
    launches: Mapping[int, ExpertLaunch]  # by group


class ExpertLayers:
    """The experts of all dynamic adapters of one GPU, resident for good. `add_` may be captured.

    most_tokens: of a step. graph_tokens: of the largest one that is captured.
    """

    def __init__(
        self,
        pools: tuple[ExpertPools, ...],
        shape: ModelShape,
        ops: SwitchOps,
        *,
        most_tokens: int,
        graph_tokens: int,
    ) -> None:
        self.pools = pools
        self._ops = ops
        self._linears = shape.linear_shapes()
        self._device = pools[0].routers[0].device
        self._graph_tokens = graph_tokens
        self._sizes: dict[int, _Steps] = {}
        self._bridge = torch.zeros(bridge_elems(pools, most_tokens), device=self._device)

    @property
    def weight_bytes(self) -> int:
        """Bytes of all experts."""
        return sum(pool.weight_bytes for pool in self.pools)

    def add_(self, rows: torch.Tensor, layer: int, group: int, x: torch.Tensor, y: torch.Tensor) -> None:
        """Add to y, in place, what each row's experts make of x, for one group of linears. rows: int32 [adapters, T], not 0 where a row has it.

        Routes where a router stands: layers must be gone through in order.
        """
        steps = self._steps_of(len(x))
        for number, (pool, route) in enumerate(zip(self.pools, steps.routes, strict=True)):
            spec, experts = pool.spec, pool.layers[layer][group]
            routed = group == spec.first_group and (layer == 0 or spec.router == "layerwise")
            if routed:
                router = pool.routers[0 if spec.router == "switch" else layer]
                route.fill(x, router, active=rows[number])
            if experts is not None:
                self._add(experts, route, steps.launches[group], x, y, settled=not routed)

    def _add(
        self,
        experts: ExpertGroup,
        route: ExpertRoute,
        launch: ExpertLaunch,
        x: torch.Tensor,
        y: torch.Tensor,
        *,
        settled: bool,
    ) -> None:
        """Add one adapter's experts. settled: the route was written before the last ordinary kernel."""
        size = torch.Size((launch.parts(x.shape[1]), route.touched.shape[1], len(x), experts.a.shape[1]))
        bridge = self._bridge[: size.numel()].view(size)
        self._ops.expert_shrink(x, experts.a, route.touched, bridge, launch=launch, settled=settled)
        self._ops.expert_expand_(
            y,
            bridge,
            experts.b,
            route.dense,
            route.touched,
            rank=experts.rank,
            widths=experts.widths,
            targets=experts.targets,
            launch=launch,
            settled=settled,
        )

    def _steps_of(self, tokens: int) -> _Steps:
        """Return what is kept for steps of so many tokens: for good where a graph may read it, else until a step of another size."""
        if tokens in self._sizes:
            return self._sizes[tokens]
        steps = self._steps(tokens)
        if tokens > self._graph_tokens:
            self._sizes = {size: kept for size, kept in self._sizes.items() if size <= self._graph_tokens}
        self._sizes[tokens] = steps
        return steps

    def _steps(self, tokens: int) -> _Steps:
        launches: dict[int, ExpertLaunch] = {}
        for pool in self.pools:
            for group, experts in enumerate(pool.layers[0]):
                if experts is not None:
                    launches[group] = expert_launch(tokens, experts.a.shape[2], sum(experts.widths))
        routes = tuple(
            ExpertRoute(pool.spec, tokens, self._device, self._ops.route_top_k) for pool in self.pools
        )
        return _Steps(routes, launches)


def experts_of(
    blueprint: Blueprint, *, seed: int, dtype: torch.dtype, device: torch.device, most_tokens: int
) -> ExpertLayers | None:
    """Return the experts of a blueprint's dynamic adapters on a device; None where it has none. Raises UserError where one cannot be read."""
    if not blueprint.dynamic:
        return None
    config, shape = blueprint.config, blueprint.model
    pools = load_pools(blueprint.dynamic, shape, seed=seed, dtype=dtype, device=device)
    ops = switch_ops_for(config.backend)
    return ExpertLayers(pools, shape, ops, most_tokens=most_tokens, graph_tokens=config.graph_max_tokens)


def bridge_elems(pools: tuple[ExpertPools, ...], most_tokens: int) -> int:
    """Return the most elements of a bridge in steps of up to so many tokens: needs grow with tokens between the sizes at which launches change."""
    sizes = {most_tokens, *(min(size, most_tokens) for size in (1, 2, 16, 64))}
    most = 1
    for pool in pools:
        for experts in pool.layers[0]:
            for tokens in sizes if experts is not None else ():
                assert experts is not None
                launch = expert_launch(tokens, experts.a.shape[2], sum(experts.widths))
                slots = touched_slots(pool.spec.num_experts, pool.spec.top_k, tile_tokens_of(tokens))
                most = max(most, launch.parts(experts.a.shape[2]) * slots * tokens * experts.a.shape[1])
    return most


def load_pools(
    adapters: Mapping[str, AdapterSpec],
    shape: ModelShape,
    *,
    seed: int,
    dtype: torch.dtype,
    device: torch.device,
) -> tuple[ExpertPools, ...]:
    """Read every dynamic adapter to the device, in order; one without a folder is drawn at random. Raises UserError where one is not as said."""
    pools = []
    for number, (name, spec) in enumerate(adapters.items()):
        if spec.path is None:
            experts, top_k = spec.expert_counts
            drawn = DynamicAdapterSpec(
                name=name,
                num_experts=experts,
                top_k=top_k,
                rank=spec.rank,
                target_modules=spec.target_modules,
            )
            pools.append(random_expert_pools(drawn, shape, seed=seed + number, dtype=dtype, device=device))
            continue
        weights = load_dynamic_adapter(spec.path, shape, name)
        found = (weights.spec.num_experts, weights.spec.top_k), weights.spec.rank
        if found != (spec.expert_counts, spec.rank):
            raise UserError(f"is not what adapter {name!r} was said to be", path=spec.path)
        pools.append(expert_pools(weights, shape, dtype=dtype, device=device))
    return tuple(pools)
