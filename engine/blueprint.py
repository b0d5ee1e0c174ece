"""Everything torch-free that follows from a configuration, a model and adapters; the engine and the simulator are both built from it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from engine.adapter import AdapterSpec
from engine.budget import MemoryPlan, geometry_of, plan_memory
from engine.config import ServingConfig
from engine.errors import UserError
from engine.expert_budget import check_dynamic, dynamic_bytes, expert_footprint
from engine.host_cache import HostCache
from engine.layout import AdapterLayout, PageGeometry, Sharding, adapter_layout, adapter_sharding
from engine.merge_choice import check_merge, max_rank_of
from engine.model_shape import ModelShape, load_model_shape
from engine.residency import AdapterFootprint
from engine.scheduler import Scheduler, SchedulerLimits


@dataclass(frozen=True, slots=True, kw_only=True)
class Blueprint:
    """One replica, ready to be built: shapes, memory, and what each adapter takes on one of its GPUs."""

    config: ServingConfig
    model: ModelShape
    geometry: PageGeometry
    memory: MemoryPlan
    adapters: Mapping[str, AdapterSpec]
    footprints: Mapping[str, AdapterFootprint]

    @property
    def hot(self) -> AdapterSpec | None:
        """The adapter that is merged into the weights for good."""
        return _hot(self.config, self.adapters)

    @property
    def row_rank(self) -> int:
        """Largest rank of one row's LoRA work: where an adapter is merged for good, of another one and it together; 0: there is none."""
        return self.max_rank + (0 if self.hot is None else max(self.hot.module_ranks))

    @property
    def max_adapters(self) -> int:
        """Most adapters on the GPU at a time: the tables that are indexed by slot have so many rows."""
        if self.config.max_adapters is None:
            return len(self.adapters)
        return self.config.max_adapters + len(self.dynamic)

    @property
    def dynamic(self) -> dict[str, AdapterSpec]:
        """The dynamic adapters, in order: on the GPU from the start, outside the pool."""
        return {name: spec for name, spec in self.adapters.items() if spec.kind == "dynamic"}

    @property
    def max_rank(self) -> int:
        """Largest rank that may be served; 0: no adapters at all."""
        return max_rank_of(self.config, self.adapters)

    @property
    def host_capacity_bytes(self) -> int | None:
        """The bound of the adapters in host memory, as far as they are one GPU's; None is no bound."""
        bound = self.config.host_memory_bytes
        return None if bound is None else bound // self.config.tp

    def layout(self, name: str) -> AdapterLayout:
        """Return the places of an adapter's rows on one GPU."""
        return self.layout_of(self.adapters[name])

    def layout_of(self, spec: AdapterSpec) -> AdapterLayout:
        """Return the places of the rows that an adapter like this has on one GPU."""
        return _layout(self.config, self.model, self.geometry, spec, self.hot)

    def sharding_of(self, spec: AdapterSpec) -> Sharding:
        """Return how an adapter like this is cut over the GPUs."""
        return _sharding(self.config, self.model, spec)

    def footprint(self, spec: AdapterSpec) -> AdapterFootprint:
        """Return what an adapter takes on one GPU."""
        return _footprint(self.config, self.model, self.geometry, spec, self.hot)

    def check_adapter(self, spec: AdapterSpec) -> None:
        """Raise UserError where an adapter can never be served beside those of the blueprint."""
        if self.max_adapters < 1:
            raise UserError(f"adapter {spec.name!r}: there is no room for adapters; set max_adapters")
        if max(spec.module_ranks) > self.max_rank:
            raise UserError(
                f"adapter {spec.name!r}: rank {max(spec.module_ranks)} exceeds {self.max_rank}, the largest that is served; "
                "set max_adapter_rank"
            )
        pages, most = self.footprint(spec).pages, self.config.adapter_pool_pages or self.memory.num_pages
        if pages > most:
            raise UserError(f"adapter {spec.name!r} takes {pages} pages, the pool has {most}")
        _check_host_memory(self.config, {spec.name: self.footprint(spec)})

    def new_host_cache(self) -> HostCache[str]:
        """Return which adapters are in host memory when serving starts: in their order, as far as it holds them."""
        cache: HostCache[str] = HostCache(self.host_capacity_bytes)
        for name, footprint in self.footprints.items():
            if footprint.pages:
                cache.fill(name, footprint.copy_bytes)
        return cache

    def new_scheduler(self) -> Scheduler:
        """Return a fresh scheduler with an empty pool."""
        config = self.config
        limits = SchedulerLimits(
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens,
            max_model_len=config.max_model_len,
            page_tokens=config.page_tokens,
            max_adapters_per_step=config.max_adapters_per_step,
            max_adapters=self.max_adapters,
            policy=config.scheduler,
            ttft_slo_s=config.ttft_slo_s,
            adapter_weights=config.adapter_weights,
            adapter_eviction=config.adapter_eviction,
            adapter_pool_pages=config.adapter_pool_pages,
            prefix_caching=config.prefix_caching,
            hot_adapter=None if self.hot is None else self.hot.name,
            fixed_adapters=tuple(self.dynamic),
            merge_thresholds=(config.merge_alpha, config.merge_beta) if config.merge == "dynamic" else None,
        )
        return Scheduler(limits, self.memory.num_pages, self.footprints)


def blueprint(
    config: ServingConfig, adapters: Mapping[str, AdapterSpec], model: ModelShape | None = None
) -> Blueprint:
    """Resolve a configuration. Raises UserError when it cannot work, naming what stands in the way."""
    model = model or load_model_shape(config.model)
    if config.max_model_len > model.max_position_embeddings:
        raise UserError(
            f"max_model_len={config.max_model_len} exceeds what {model.name} can attend to: {model.max_position_embeddings} tokens"
        )
    model.validate_tp(config.tp)
    hot = _hot(config, adapters)
    geometry = geometry_of(config, model)
    check_dynamic(config, adapters)
    if config.merge != "never":
        check_merge(config, model, adapters, hot)
    memory = plan_memory(config, model, max_rank_of(config, adapters), dynamic_bytes(config, model, adapters))
    footprints = {name: _footprint(config, model, geometry, spec, hot) for name, spec in adapters.items()}
    _check_host_memory(config, footprints)
    _check_ranks(config, adapters)
    return Blueprint(
        config=config,
        model=model,
        geometry=geometry,
        memory=memory,
        adapters=dict(adapters),
        footprints=footprints,
    )


def _hot(config: ServingConfig, adapters: Mapping[str, AdapterSpec]) -> AdapterSpec | None:
    """Return the adapter that is merged for good. Raises UserError where there is none by that name."""
    if config.merge != "hot":
        return None
    if config.merge_adapter is None:
        raise UserError("merge='hot' needs merge_adapter: the adapter to be merged")
    if config.merge_adapter not in adapters:
        raise UserError(f"merge_adapter={config.merge_adapter!r} is not among the adapters given")
    return adapters[config.merge_adapter]


def _layout(
    config: ServingConfig,
    model: ModelShape,
    geometry: PageGeometry,
    spec: AdapterSpec,
    hot: AdapterSpec | None,
) -> AdapterLayout:
    if spec.kind == "dynamic":
        raise UserError(f"adapter {spec.name!r}: a dynamic adapter must be there from the start")
    sharding = _sharding(config, model, spec)
    reserved = 0 if hot is None or hot.name == spec.name else 2 * sum(hot.module_ranks)
    return adapter_layout(
        model, spec.module_ranks, geometry, tp=config.tp, sharding=sharding, reserved_rows=reserved
    )


def _sharding(config: ServingConfig, model: ModelShape, spec: AdapterSpec) -> Sharding:
    try:
        sharding = adapter_sharding(config.lora_sharding, spec.nblocks, config.tp)
    except UserError as error:
        raise UserError(f"adapter {spec.name!r}: {error}") from None
    if sharding == "block_diagonal" and config.tp > model.num_kv_heads:
        raise UserError(
            f"adapter {spec.name!r}: block-diagonal factors cannot be cut where KV heads are held by several GPUs: "
            f"tp={config.tp}, {model.num_kv_heads} KV heads"
        )
    return sharding


def _footprint(
    config: ServingConfig,
    model: ModelShape,
    geometry: PageGeometry,
    spec: AdapterSpec,
    hot: AdapterSpec | None,
) -> AdapterFootprint:
    if spec.kind == "dynamic":
        return expert_footprint(config, model, spec)
    layout = _layout(config, model, geometry, spec, hot)
    # A row of another adapter is multiplied by the merged one's factors too.
    merged = (
        0
        if not layout.reserved_rows or hot is None
        else _layout(config, model, geometry, hot, hot).payload_bytes
    )
    return AdapterFootprint(
        pages=layout.num_pages,
        weight_bytes=layout.payload_bytes + merged,
        copy_bytes=layout.num_pages * geometry.page_bytes,
    )


def _check_host_memory(config: ServingConfig, footprints: Mapping[str, AdapterFootprint]) -> None:
    """Raise UserError where one adapter alone is more than host memory may hold: none can be loaded without passing through it."""
    bound = config.host_memory_bytes
    for name, footprint in footprints.items():
        needed = footprint.copy_bytes * config.tp
        if bound is not None and needed > bound:
            raise UserError(
                f"adapter {name!r} takes {needed} bytes of host memory, host_memory_bytes={bound}"
            )


def _check_ranks(config: ServingConfig, adapters: Mapping[str, AdapterSpec]) -> None:
    most = config.max_adapter_rank
    for name, spec in adapters.items():
        if most is not None and max(spec.module_ranks) > most:
            raise UserError(
                f"adapter {name!r}: rank {max(spec.module_ranks)} exceeds max_adapter_rank={most}"
            )
