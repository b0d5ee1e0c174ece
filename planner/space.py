"""Which configurations are tried.

A *setting* is how one replica runs: its TP degree and its limits on batch and chunk. A *shape* is a setting
times a number of replicas. Replicas are alike and share nothing, so settings are compared with one replica.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass

from engine.adapter import AdapterSpec
from engine.blueprint import blueprint
from engine.config import LoraSharding, ServingConfig
from engine.errors import UserError

TP_DEGREES = (1, 2, 4, 8)
MAX_NUM_SEQS = (64, 128, 256)
MAX_NUM_BATCHED_TOKENS = (512, 1024, 2048)
LORA_SHARDINGS: tuple[LoraSharding, ...] = ("block_diagonal", "replicated", "slora")


@dataclass(frozen=True, slots=True, kw_only=True)
class Space:
    """At most `gpus` GPUs; the values that may be chosen; `base` holds every other field.

    Raises UserError for an empty or impossible choice.
    """

    gpus: int
    tp: tuple[int, ...] = TP_DEGREES
    max_num_seqs: tuple[int, ...] = MAX_NUM_SEQS
    max_num_batched_tokens: tuple[int, ...] = MAX_NUM_BATCHED_TOKENS
    lora_sharding: tuple[LoraSharding, ...] = LORA_SHARDINGS
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
        if min(self.tp) > self.gpus:
            raise UserError(f"tp={min(self.tp)} needs more than the {self.gpus} GPUs given")

    @property
    def degrees(self) -> tuple[int, ...]:
        """The TP degrees for which there are GPUs, ascending."""
        return tuple(sorted({tp for tp in self.tp if tp <= self.gpus}))

    def most_replicas(self, tp: int) -> int:
        """Return how many replicas of `tp` GPUs there can be."""
        return self.gpus // tp


@dataclass(frozen=True, slots=True)
class Infeasible:
    """A setting that cannot run, and why. It holds for any number of replicas."""

    tp: int
    max_num_seqs: int
    max_num_batched_tokens: int
    reason: str
    lora_sharding: LoraSharding = "replicated"


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
