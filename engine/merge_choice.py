"""Whether a configuration may merge, and which adapter `merge='hot'` takes where none is named."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping

from engine.adapter import MAX_RANK, AdapterSpec
from engine.config import ServingConfig
from engine.errors import UserError
from engine.layout import ROW_ALIGN_BYTES
from engine.model_shape import ModelShape


def with_hot_adapter(config: ServingConfig, adapters: Iterable[str | None]) -> ServingConfig:
    """Return a configuration that names the adapter to be merged for good: that of most of these requests, the first by name among equals.

    One that names it, or merges none for good, stays as it is. Raises UserError where no request has an adapter.
    """
    if config.merge != "hot" or config.merge_adapter is not None:
        return config
    counts = Counter(name for name in adapters if name is not None)
    if not counts:
        raise UserError("merge='hot': the trace has no adapter")
    return config.with_changes(merge_adapter=min(counts, key=lambda name: (-counts[name], name)))


def max_rank_of(config: ServingConfig, adapters: Mapping[str, AdapterSpec]) -> int:
    """Return the largest rank that may be served; 0: no adapters at all."""
    if config.max_adapter_rank is not None:
        return config.max_adapter_rank
    return max((max(spec.module_ranks) for spec in adapters.values()), default=0)


def check_merge(
    config: ServingConfig, model: ModelShape, adapters: Mapping[str, AdapterSpec], hot: AdapterSpec | None
) -> None:
    """Raise UserError where adapters cannot be merged."""
    if config.tp > 1:
        raise UserError(f"merge={config.merge!r} needs tp=1, not {config.tp}: shards are not merged")
    if config.replicas > 1 and config.placement != "everywhere":
        raise UserError(
            f"merge={config.merge!r} needs placement='everywhere': each replica merges for itself"
        )
    for module, (out, inputs) in model.linear_shapes().items():
        if any(size * config.itemsize_bytes % ROW_ALIGN_BYTES for size in (out, inputs)):
            raise UserError(
                f"merge={config.merge!r}: rows of {module} [{out}, {inputs}] are no multiple of {ROW_ALIGN_BYTES} bytes"
            )
    if hot is not None and any(spec.kind == "dynamic" for spec in adapters.values()):
        raise UserError("merge='hot' and adapters of kind 'dynamic' are not served together")
    if hot is not None:
        most = max_rank_of(config, adapters) + max(hot.module_ranks)
        if most > MAX_RANK:
            raise UserError(
                f"merge_adapter={hot.name!r}: its rank and the largest one together are {most}, at most {MAX_RANK} are served"
            )
