"""What other adapters would gain: the same ones at half the rank, or as block-diagonal factors, which tensor parallelism cuts without exchanges.

Both ask for new training, so nothing of it is recommended; the highest rate is found as for any other setting.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from engine.adapter import MAX_RANK, AdapterSpec
from engine.blueprint import blueprint
from engine.config import ServingConfig
from engine.errors import UserError
from planner.bounds import bounds
from planner.probe import Probe, Prober
from planner.rate import highest_scale
from planner.workload import Workload
from traces import Trace

TOLERANCE = 0.02
MOST_TP = 8  # blocks are made for as many GPUs as most hosts have, and run on fewer too

Change = Literal["half the rank", "block-diagonal, 8 blocks"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Retraining:
    """What one replica of a configuration sustains with the adapters as they are, and with retrained ones."""

    change: str
    config: ServingConfig
    now_rps: float
    then_rps: float

    @property
    def gain(self) -> float:
        """The rate it would gain, relative."""
        return self.then_rps / self.now_rps - 1 if self.now_rps else 0.0

    def to_json(self) -> dict[str, Any]:
        """Return the JSON form."""
        return {
            "change": self.change,
            "config": self.config.to_json(),
            "sustainable_rps_a_replica": {"now": self.now_rps, "retrained": self.then_rps},
        }


def halved(spec: AdapterSpec) -> AdapterSpec:
    """Return an adapter of half the rank."""
    overrides = tuple((module, max(spec.nblocks, rank // 2)) for module, rank in spec.rank_overrides)
    return replace(spec, rank=max(spec.nblocks, spec.rank // 2), rank_overrides=overrides, path=None)


def block_diagonal(spec: AdapterSpec) -> AdapterSpec:
    """Return an adapter whose factors are in eight blocks, its ranks rounded up to a multiple of them."""

    def rounded(rank: int) -> int:
        return min(MAX_RANK, -(-rank // MOST_TP) * MOST_TP)

    overrides = tuple((module, rounded(rank)) for module, rank in spec.rank_overrides)
    return replace(
        spec,
        kind="bd_lora",
        nblocks=MOST_TP,
        rank=rounded(spec.rank),
        rank_overrides=overrides,
        path=None,
    )


CHANGES: Mapping[Change, Callable[[AdapterSpec], AdapterSpec]] = {
    "half the rank": halved,
    "block-diagonal, 8 blocks": block_diagonal,
}


def priced(prober: Prober, config: ServingConfig, change: Change, guess_rps: float) -> Retraining | None:
    """Find what one replica sustains on the busiest requests, now and with retrained adapters.

    Nothing where that changes no adapter, or where the configuration cannot run them.
    """
    config = config.with_changes(replicas=1, adapter_popularity={}, placement="everywhere")
    then = {name: CHANGES[change](spec) for name, spec in prober.adapters.items()}
    if then == dict(prober.adapters):
        return None
    changed = config
    if config.tp > 1 and any(spec.kind == "bd_lora" for spec in then.values()):
        changed = config.with_changes(lora_sharding="block_diagonal")
    try:
        blueprint(changed, then)
    except UserError:
        return None
    now_rps = _rate_rps(prober, config, guess_rps)
    retrained = replace(prober, adapters=then, workload=_with_ranks(prober.workload, then))
    then_rps = _rate_rps(retrained, changed, now_rps or guess_rps)
    return Retraining(change=change, config=changed, now_rps=now_rps, then_rps=then_rps)


def _with_ranks(workload: Workload, adapters: Mapping[str, AdapterSpec]) -> Workload:
    """Return the workload with the ranks of these adapters: a trace may say what they are."""

    def ranked(trace: Trace) -> Trace:
        ranks = tuple(adapters[name].rank for name in trace.columns.adapter_names)
        return Trace.from_columns(replace(trace.columns, adapter_ranks=ranks), trace.name)

    return replace(workload, window=ranked(workload.window), trace=ranked(workload.trace))


def _rate_rps(prober: Prober, config: ServingConfig, guess_rps: float) -> float:
    own_rps = prober.workload.piece("window").rate_rps
    ceiling_rps = bounds(prober.workload.trace, config, prober.price(config), prober.slo).rate_rps

    def probe(scale: float) -> Probe:
        return prober(config, "window", scale)

    guess = (guess_rps or ceiling_rps / 2) / own_rps
    found = highest_scale(probe, guess, ceiling_rps / own_rps, tolerance=TOLERANCE, reach=0.05)
    return found.scale * own_rps
