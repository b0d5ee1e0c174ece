"""Everything torch-free that follows from a configuration, a model and adapters; the engine and the simulator are both built from it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from engine.adapter import AdapterSpec
from engine.budget import MemoryPlan, geometry_of, plan_memory
from engine.config import ServingConfig
from engine.errors import UserError
from engine.layout import AdapterLayout, PageGeometry, adapter_layout
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

    def layout(self, name: str) -> AdapterLayout:
        """Return the places of an adapter's rows on one GPU."""
        return _layout(self.config, self.model, self.geometry, self.adapters[name])

    def new_scheduler(self) -> Scheduler:
        """Return a fresh scheduler with an empty pool."""
        config = self.config
        limits = SchedulerLimits(
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens,
            max_model_len=config.max_model_len,
            page_tokens=config.page_tokens,
            max_adapters_per_step=config.max_adapters_per_step,
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
    if config.merge != "never":
        raise UserError(f"merge={config.merge!r} is not supported yet; use 'never'")
    geometry = geometry_of(config, model)
    memory = plan_memory(config, model)
    footprints = {name: _footprint(config, model, geometry, spec) for name, spec in adapters.items()}
    _check_host_memory(config, geometry, footprints)
    return Blueprint(
        config=config,
        model=model,
        geometry=geometry,
        memory=memory,
        adapters=dict(adapters),
        footprints=footprints,
    )


def _layout(
    config: ServingConfig, model: ModelShape, geometry: PageGeometry, spec: AdapterSpec
) -> AdapterLayout:
    if spec.kind != "lora":
        raise UserError(f"adapter {spec.name!r}: kind {spec.kind!r} is not supported yet")
    return adapter_layout(model, spec.module_ranks, geometry, tp=config.tp, sharding=config.lora_sharding)


def _footprint(
    config: ServingConfig, model: ModelShape, geometry: PageGeometry, spec: AdapterSpec
) -> AdapterFootprint:
    layout = _layout(config, model, geometry, spec)
    return AdapterFootprint(
        pages=layout.num_pages,
        weight_bytes=layout.payload_bytes,
        copy_bytes=layout.num_pages * geometry.page_bytes,
    )


def _check_host_memory(
    config: ServingConfig, geometry: PageGeometry, footprints: Mapping[str, AdapterFootprint]
) -> None:
    needed = sum(footprint.pages for footprint in footprints.values()) * geometry.page_bytes * config.tp
    if config.host_memory_bytes is not None and needed > config.host_memory_bytes:
        raise UserError(
            f"the adapters take {needed} bytes of host memory, host_memory_bytes={config.host_memory_bytes}"
        )
