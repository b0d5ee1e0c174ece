"""Which runs are recorded for the validation, by visit to a GPU machine and engine start: docs/measured/record_runs.py makes them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

QKVO = ["q_proj", "k_proj", "v_proj", "o_proj"]
START_S, DRAIN_S = 60.0, 8.0  # of an engine and of a run, for the budget of a visit


@dataclass(frozen=True, slots=True, kw_only=True)
class Traffic:
    """What is asked. like: None is S-LoRA's lengths; else a source of `traces.like`, or a file's name (a real slice)."""

    adapters: int
    ranks: tuple[int, ...] = (16,)
    like: str | None = None
    real: str | None = None
    zipf_s: float | None = None  # None: all adapters alike


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One replay: traffic at a share of capacity, or at rate_rps, for so many seconds. again: the same trace as the run without it.

    drawn_as: runs of one such name and rate have the same trace. requests: so many, all at once.
    """

    name: str
    traffic: Traffic
    load: float
    seconds: float = 24.0
    again: bool = False
    rate_rps: float | None = None
    drawn_as: str | None = None
    requests: int | None = None

    @property
    def folder(self) -> str:
        return f"{self.name}-again" if self.again else self.name


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Runs of one engine start."""

    name: str
    runs: tuple[Run, ...]
    config: Mapping[str, Any] = field(default_factory=dict)
    adapter: Mapping[str, Any] = field(default_factory=dict)  # beside name and rank

    @property
    def seconds(self) -> float:
        """About how long it takes on the machine."""
        return START_S + sum(run.seconds + DRAIN_S for run in self.runs)


def levels(name: str, traffic: Traffic, *percents: int, **more: Any) -> tuple[Run, ...]:
    """Return a run at each share of capacity, in percent."""
    return tuple(
        Run(name=f"{name}-{percent}", traffic=traffic, load=percent / 100, **more) for percent in percents
    )


ONE, SOME, MANY = (Traffic(adapters=count) for count in (1, 32, 200))
S1 = Traffic(adapters=2000, ranks=(8,))
WIDE = Traffic(adapters=100, ranks=(8, 16, 32, 64, 128), zipf_s=0.92)
CONV, CODE, MOONCAKE = (replace(WIDE, like=like) for like in ("azure-conv", "azure-code", "mooncake"))
TP_MODES = ("replicated", "block_diagonal", "slora", "slora_published")
SKEWED = replace(SOME, zipf_s=2.0)  # one adapter has 62 %
BASE = Traffic(adapters=0)
FRESH = Traffic(adapters=64, ranks=(8, 16, 64), zipf_s=1.0)


def order(config: str, traffic: Traffic = SKEWED) -> tuple[Run, ...]:
    """Return the runs that order configurations: one trace at a rate that all can serve, and a flood."""
    return (
        Run(name=f"order-{config}", traffic=traffic, load=0.0, seconds=20.0, rate_rps=40.0, drawn_as="order"),
        Run(name=f"flood-{config}", traffic=traffic, load=2.0, seconds=1.0, drawn_as="flood", requests=300),
    )


def tp_group(mode: str, *percents: int, tp: int = 2) -> Group:
    """Return runs of one way to cut adapters over GPUs, with 32 of them."""
    bd = mode == "block_diagonal"
    return Group(
        name=f"tp{tp}-{mode}",
        runs=(*levels(f"tp{tp}-{mode}", SOME, *percents, seconds=22.0), *order(f"tp{tp}-{mode}")),
        config={"tp": tp, "lora_sharding": mode},
        adapter={"kind": "bd_lora", "nblocks": tp} if bd else {},
    )


def many_gpus(gpus: int) -> tuple[Group, ...]:
    """Return the runs on more than two GPUs: every mode and the base model alone over all of them, and as many replicas of one."""
    replicas = f"replicas{gpus}"
    return (
        *(tp_group(mode, tp=gpus) for mode in TP_MODES),
        Group(name=f"tp{gpus}-base", runs=order(f"tp{gpus}-base", BASE), config={"tp": gpus}),
        Group(
            name=replicas,
            runs=(*levels(replicas, SOME, 85), *order(replicas)),
            config={"replicas": gpus},
        ),
    )


VISITS: dict[int, tuple[Group, ...]] = {
    1: (
        Group(
            name="r16",
            runs=(
                *levels("r16x1", ONE, 30, 85),
                *levels("r16x32", SOME, 60, 85, 110),
                *levels("r16x200", MANY, 30, 60, 85, 110),
                *order("tp1"),
            ),
        ),
        Group(name="s1", runs=levels("s1x2000", S1, 60, 85, 110), adapter={"target_modules": QKVO}),
    ),
    2: (
        Group(
            name="wide",
            runs=(
                *levels("wide", WIDE, 60, 85),
                *levels("wide", WIDE, 60, again=True),
                *levels("conv", CONV, 60, 85),
                *levels("conv", CONV, 60, again=True),
                *levels("code", CODE, 30, seconds=40.0),  # comes at five times that in its bursts
                *levels("mooncake", MOONCAKE, 60, 85, seconds=32.0),
            ),
        ),
        Group(
            name="r16-again",
            runs=(
                *levels("r16x32", SOME, 60, again=True),
                *levels("r16x200", MANY, 30, 85, again=True),
            ),
        ),
    ),
    3: (
        tp_group("block_diagonal", 60, 85),
        tp_group("slora", 85),
        tp_group("replicated"),
        tp_group("slora_published"),
    ),
    4: (
        Group(
            name="replicas2",
            runs=(*levels("replicas2", SOME, 85, 110), *order("replicas2")),
            config={"replicas": 2},
        ),
        Group(
            name="replicas2-affinity",
            runs=levels("replicas2-affinity", MANY, 60),
            config={"replicas": 2, "router": "adapter_affinity"},
        ),
    ),
    5: (
        Group(
            name="real",
            runs=tuple(
                Run(
                    name=f"real-{name}-{percent}",
                    traffic=Traffic(adapters=0, real=file),
                    load=percent / 100,
                    seconds=40.0,
                )
                for name, file, percent in (
                    ("conv", "azure2023_conv.R1_zipf0.92_N100.jsonl.gz", 60),
                    ("code", "azure2023_code.R3_servegen_mlarge_overlay.jsonl.gz", 30),
                    ("mooncake", "mooncake_conversation.R2_prefix_sticky_zipf0.92_N100.jsonl.gz", 60),
                )
            ),
        ),
    ),
    6: (Group(name="merge-hot", runs=order("merge-hot"), config={"merge": "hot", "merge_adapter": "a0000"}),),
    7: many_gpus(4),
    8: many_gpus(8),
    # After the model had learnt from the residuals of the others: traffic like none of them.
    9: (
        Group(
            name="fresh",
            runs=(
                *levels("fresh", FRESH, 50, 80, seconds=20.0),
                *levels("fresh-conv", replace(FRESH, like="azure-conv"), 70, seconds=24.0),
            ),
        ),
    ),
}
