"""Which configurations are tried.

A *setting* is how one replica runs: its TP degree, how adapters are cut over its GPUs, and its limits on batch and
chunk. A *policy* is what it does with who waits; *routing* is what stands in front of several replicas. A *shape* is a
setting times a number of replicas. Replicas are alike and share nothing, so settings and policies are compared with one
replica.

A dimension is one line in `POLICIES` or `ROUTING`: a field of the serving configuration and its values, the plainest
first, which wins ties.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from engine.adapter import AdapterSpec
from engine.blueprint import blueprint
from engine.config import LoraSharding, ServingConfig
from engine.errors import UserError

TP_DEGREES = (1, 2, 4, 8)
MAX_NUM_SEQS = (64, 128, 256)
MAX_NUM_BATCHED_TOKENS = (512, 1024, 2048)
LORA_SHARDINGS: tuple[LoraSharding, ...] = ("block_diagonal", "replicated", "slora")

Values = Mapping[str, tuple[Any, ...]]

POLICIES: Values = {
    "scheduler": ("fcfs", "clustered", "fair", "slo"),
    "max_adapters_per_step": (None, 32, 8),
    "merge": ("never", "hot", "dynamic"),
}
ROUTING: Values = {
    "router": ("least_loaded", "round_robin", "adapter_affinity"),
    "placement": ("everywhere", "partitioned", "hot_replicated"),
}
REFUSING = {"scheduler": ("slo",)}  # policies that serve some by giving others nothing
_OF_ADAPTERS = ("max_adapters_per_step", "merge", "placement")  # nothing to choose where there are none


@dataclass(frozen=True, slots=True, kw_only=True)
class Space:
    """At most `gpus` GPUs; the values that may be chosen; `base` holds every other field.

    policies, routing: by field, values to try, the one that wins ties first. Raises UserError for an empty or
    impossible choice.
    """

    gpus: int
    tp: tuple[int, ...] = TP_DEGREES
    max_num_seqs: tuple[int, ...] = MAX_NUM_SEQS
    max_num_batched_tokens: tuple[int, ...] = MAX_NUM_BATCHED_TOKENS
    lora_sharding: tuple[LoraSharding, ...] = LORA_SHARDINGS
    policies: Values = field(default_factory=lambda: POLICIES)
    routing: Values = field(default_factory=lambda: ROUTING)
    base: ServingConfig = ServingConfig()  # noqa: RUF009 - frozen

    def __post_init__(self) -> None:
        if self.gpus < 1:
            raise UserError(f"gpus={self.gpus} must be at least 1")
        for name in ("tp", "max_num_seqs", "max_num_batched_tokens"):
            values = getattr(self, name)
            if not values or min(values) < 1:
                raise UserError(f"{name}={','.join(map(str, values))} must be whole numbers of at least 1")
        if not self.lora_sharding:
            raise UserError("lora_sharding must name at least one way")
        for name, given in (*self.policies.items(), *self.routing.items()):
            if not given:
                raise UserError(f"{name} must have at least one value")
        if min(self.tp) > self.gpus:
            raise UserError(f"tp={min(self.tp)} needs more than the {self.gpus} GPUs given")

    @property
    def degrees(self) -> tuple[int, ...]:
        """The TP degrees for which there are GPUs, ascending."""
        return tuple(sorted({tp for tp in self.tp if tp <= self.gpus}))

    def most_replicas(self, tp: int) -> int:
        """Return how many replicas of `tp` GPUs there can be."""
        return self.gpus // tp

    def to_json(self) -> dict[str, Any]:
        """Return the JSON form: what is chosen among."""
        return {
            "gpus": self.gpus,
            "tp": list(self.degrees),
            "max_num_seqs": list(self.max_num_seqs),
            "max_num_batched_tokens": list(self.max_num_batched_tokens),
            "lora_sharding": list(self.lora_sharding),
            **{name: list(values) for name, values in (*self.policies.items(), *self.routing.items())},
            "base": self.base.to_json(),
        }


@dataclass(frozen=True, slots=True)
class Infeasible:
    """A setting that cannot run, and why. It holds for any number of replicas."""

    tp: int
    max_num_seqs: int
    max_num_batched_tokens: int
    reason: str
    lora_sharding: LoraSharding = "replicated"
    changes: tuple[tuple[str, Any], ...] = ()  # the policy it was tried with

    @classmethod
    def of(cls, config: ServingConfig, reason: str, changes: Mapping[str, Any] | None = None) -> Infeasible:
        """Build from a configuration."""
        return cls(
            config.tp,
            config.max_num_seqs,
            config.max_num_batched_tokens,
            reason,
            config.lora_sharding,
            tuple((changes or {}).items()),
        )

    def to_json(self) -> dict[str, Any]:
        """Return one line of trials.jsonl."""
        return {
            "tp": self.tp,
            "max_num_seqs": self.max_num_seqs,
            "max_num_batched_tokens": self.max_num_batched_tokens,
            "lora_sharding": self.lora_sharding,
            **dict(self.changes),
            "status": "infeasible",
            "reason": self.reason,
        }


def settings(
    space: Space, adapters: Mapping[str, AdapterSpec]
) -> tuple[list[ServingConfig], list[Infeasible]]:
    """Return every setting, with one replica, and those that cannot run, with the reason."""
    possible: list[ServingConfig] = []
    impossible: list[Infeasible] = []
    choices = itertools.product(
        [(tp, way) for tp in space.degrees for way in shardings(space, tp, adapters)],
        sorted(set(space.max_num_seqs)),
        sorted(set(space.max_num_batched_tokens)),
    )
    for (tp, way), seqs, tokens in choices:
        try:
            config = space.base.with_changes(
                tp=tp, replicas=1, max_num_seqs=seqs, max_num_batched_tokens=tokens, lora_sharding=way
            )
            blueprint(config, adapters)
        except UserError as error:
            impossible.append(Infeasible(tp, seqs, tokens, str(error).removeprefix("config: "), way))
        else:
            possible.append(config)
    return possible, impossible


def shardings(space: Space, tp: int, adapters: Mapping[str, AdapterSpec]) -> tuple[LoraSharding, ...]:
    """Return the ways to cut adapters over `tp` GPUs that differ for these adapters.

    On one GPU there is nothing to cut. Dense adapters run `replicated` under `block_diagonal` too, and block-diagonal ones are cut at their
    blocks under `replicated` wherever that is exact: so of these two the first of the space is tried that all adapters can run.
    """
    if tp == 1 or not adapters:
        return (space.base.lora_sharding if tp == 1 else space.lora_sharding[0],)
    ways = [way for way in LORA_SHARDINGS if way in space.lora_sharding]
    local = [way for way in ways if way not in ("slora", "slora_published")]
    if len(local) > 1:
        blocks = {spec.nblocks for spec in adapters.values() if spec.kind == "bd_lora"}
        exact = bool(blocks) and all(nblocks % tp == 0 for nblocks in blocks)
        ways.remove("replicated" if exact else "block_diagonal")
    return tuple(ways)


def choices(values: Values, adapters: Mapping[str, AdapterSpec]) -> dict[str, tuple[Any, ...]]:
    """Return the values that can differ for these adapters: no bound above their number, nothing of adapters where there are none."""
    kept: dict[str, tuple[Any, ...]] = {}
    for name, given in values.items():
        wanted = tuple(dict.fromkeys(given))
        if name == "max_adapters_per_step":
            wanted = tuple(value for value in wanted if value is None or value < len(adapters)) or wanted[:1]
        if name in _OF_ADAPTERS and len(adapters) == 0:
            wanted = wanted[:1]
        kept[name] = wanted
    return kept


def serving_all(values: Values) -> dict[str, tuple[Any, ...]]:
    """Return the values without those that turn requests away, where there are others."""
    return {
        name: tuple(value for value in given if value not in REFUSING.get(name, ())) or tuple(given)
        for name, given in values.items()
    }


def turns_away(config: ServingConfig) -> bool:
    """Whether a configuration turns away requests that would be late."""
    return any(getattr(config, name) in values for name, values in REFUSING.items())


def oddity(config: ServingConfig) -> int:
    """Return how many policies and routings of a configuration are not the plainest: between equals, the plainer is taken."""
    return sum(getattr(config, name) != values[0] for name, values in (POLICIES | ROUTING).items())  # type: ignore[operator]
