"""Planning for vLLM: its settings, its memory and its costs, where the planner otherwise has those of our engine."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

from engine.adapter import DEFAULT_RANK, AdapterSpec
from engine.budget import MemoryPlan
from engine.config import ServingConfig
from engine.errors import UserError
from engine.model_shape import ModelShape
from planner.space import Infeasible, Space
from planner.trial import Trial
from planner.workload import WINDOW_REQUESTS, longest_request, too_long
from sim.result import SimResult
from sim.simulate import simulate
from sim.vllm_costs import VllmCosts
from sim.vllm_profile import VllmProfile
from sim.vllm_replica import VllmReplica
from sim.vllm_setup import VllmSetup, rank_step, vllm_costs
from traces import Trace

MAX_LORAS = (8, 16, 32, 64, 128)
UTILIZATIONS = (0.9,)
MAX_NUM_SEQS = (128, 256)


@dataclass(frozen=True, slots=True, kw_only=True)
class VllmSpace(Space):
    """What may be chosen: slots and the share of memory too. `base` has the rank; every adapter is padded to it."""

    max_loras: tuple[int, ...] = MAX_LORAS
    utilizations: tuple[float, ...] = UTILIZATIONS
    profile: VllmProfile = field(kw_only=True)

    def __post_init__(self) -> None:
        # Not super(): a dataclass with slots is another class than the one this method was written in.
        Space.__post_init__(self)
        if not self.max_loras or min(self.max_loras) < 1:
            raise UserError(
                f"max_loras={','.join(map(str, self.max_loras))} must be whole numbers of at least 1"
            )
        for share in self.utilizations or (0.0,):
            if not 0 < share <= 1:
                raise UserError(f"gpu_memory_utilization={share:g} must be in (0, 1]")


def vllm_space(
    profile: VllmProfile,
    trace: Trace,
    adapters: Mapping[str, AdapterSpec],
    *,
    gpus: int,
    tp: Sequence[int],
    max_num_seqs: Sequence[int] = MAX_NUM_SEQS,
    max_loras: Sequence[int] = MAX_LORAS,
    utilizations: Sequence[float] = UTILIZATIONS,
    context: int,
) -> VllmSpace:
    """Return the space of a trace: no more slots than adapters, and the least rank that holds them all."""
    count = len(adapters)
    slots = sorted({min(value, count) for value in max_loras}) if count else [1]
    rank = max((max(spec.module_ranks) for spec in adapters.values()), default=DEFAULT_RANK)
    base = ServingConfig(
        model=profile.model.name,
        gpu=profile.gpu,
        max_num_seqs=1,
        max_num_batched_tokens=profile.max_num_batched_tokens,
        max_model_len=context,
        max_adapters=slots[0],
        max_adapter_rank=rank_step(rank),
        page_tokens=profile.block_tokens,
        prefix_caching=False,
    )
    return VllmSpace(
        gpus=gpus,
        tp=tuple(tp),
        max_num_seqs=tuple(max_num_seqs),
        max_num_batched_tokens=(profile.max_num_batched_tokens,),
        base=base,
        max_loras=tuple(slots),
        utilizations=tuple(utilizations),
        policies={},
        routing={},
        profile=profile,
    )


def context_of(trace: Trace, model: ModelShape) -> int:
    """Return the `max_model_len` that a trace needs, in steps of 1,024."""
    return min(-(-longest_request(trace) // 1024) * 1024, model.max_position_embeddings)


@dataclass(frozen=True, slots=True)
class VllmEngine:
    """What the planner asks of an engine, answered for vLLM. It travels to worker processes."""

    profile: VllmProfile

    def price(self, config: ServingConfig) -> VllmCosts:
        """Return what steps cost under a configuration."""
        return vllm_costs(self.profile, config)

    def settings(
        self, space: Space, adapters: Mapping[str, AdapterSpec]
    ) -> tuple[list[ServingConfig], list[Infeasible]]:
        """Return every setting, with one replica, and those with which vLLM would not start."""
        assert isinstance(space, VllmSpace)
        possible: list[ServingConfig] = []
        impossible: list[Infeasible] = []
        tokens = space.max_num_batched_tokens[0]
        for tp, seqs, slots, share in itertools.product(
            space.degrees, sorted(set(space.max_num_seqs)), space.max_loras, space.utilizations
        ):
            try:
                space.profile.model.validate_tp(tp)
                config = space.base.with_changes(
                    tp=tp,
                    max_num_seqs=seqs,
                    max_num_batched_tokens=max(tokens, seqs),
                    max_adapters=slots,
                    gpu_memory_utilization=share,
                )
                VllmSetup(config=config, profile=self.profile, adapters=adapters).check()
            except UserError as error:
                impossible.append(Infeasible(tp, seqs, tokens, str(error).removeprefix("config: ")))
            else:
                possible.append(config)
        return possible, impossible

    def simulate(self, trace: Trace, config: ServingConfig, costs: Any, **options: Any) -> SimResult:
        """Simulate a configuration; what `planner.probe.Prober` calls."""
        setup = VllmSetup(config=config, profile=self.profile, adapters=options["adapters"])
        replica = partial(VllmReplica, scan_s=self.profile.scan_s)
        return simulate(trace, config, costs, plan=cast(Any, setup), replica=replica, **options)

    def memory(self, config: ServingConfig, adapters: Mapping[str, AdapterSpec]) -> MemoryPlan:
        """Return how one GPU's memory is divided; slots stand as `activations`, and are shown as adapters."""
        return VllmSetup(config=config, profile=self.profile, adapters=adapters).memory

    def step_error(self, config: ServingConfig) -> float:
        """Return how far a step's price may be off."""
        return self.profile.step_error

    def assumptions(self, trace: Trace, given: Mapping[str, AdapterSpec] | None, error: float) -> list[str]:
        """Return what the plan takes for granted."""
        profile, facts = self.profile, self.profile.provenance
        said = [
            f"Costs: {profile.source}, {profile.engine}, measured by {facts.get('measured_by', 'somebody')}.",
            "Attainment is the criterion: the share of all requests that meet every bound.",
            "Every adapter is in host memory (max_cpu_loras = all of them); a slot is filled from there, within a step.",
            f"A prediction's interval is the cost model's held-out error (±{error:.1%} a step) through the queue.",
            "Slots take memory and time whether they are used or not; every adapter is padded to max_lora_rank.",
            "Prefix caching is off. CUDA graphs are on.",
            f"Settings are compared with one replica on the busiest {WINDOW_REQUESTS:,} requests, shapes on the whole trace.",
        ]
        if trace.adapters and given is None:
            said.append("Adapters are dense LoRA on all seven linears.")
        unknown = sum(rank is None for rank in trace.adapters.values())
        if unknown and given is None:
            said.append(f"{unknown} adapters have no rank in the trace: rank {DEFAULT_RANK} is assumed.")
        return said

    def warnings(
        self, trace: Trace, config: ServingConfig, shown: Sequence[Trial], *, timed_out: bool, priced: bool
    ) -> list[str]:
        """Return what weakens the plan."""
        said = []
        if timed_out:
            said.append("Time was up before the search was done: this is the best so far.")
        refused = too_long(trace, config.max_model_len)
        if refused:
            said.append(f"{refused} requests are longer than the model can attend to: they count as missed.")
        degrees = sorted({trial.config.tp for trial in shown} - {self.profile.tp})
        if degrees:
            said.append(
                f"TP {', '.join(map(str, degrees))} is extrapolated: the profile is of TP {self.profile.tp}; weights, products and KV cache are "
                "shared out and all-reduces added."
            )
        if trace.columns.prefix_blocks is not None:
            said.append("The trace shares prompt prefixes: every prompt is computed in full here.")
        if not priced:
            said.append(f"No price of gpu {config.gpu!r} is known: --prices gives one.")
        return said


def vllm_flags(config: ServingConfig, adapters: Mapping[str, AdapterSpec]) -> list[str]:
    """Return the command that serves a configuration with vLLM (0.8.5 and later take these flags)."""
    flags = [
        "vllm", "serve", config.model,
        "--tensor-parallel-size", str(config.tp),
        "--max-model-len", str(config.max_model_len),
        "--max-num-seqs", str(config.max_num_seqs),
        "--max-num-batched-tokens", str(config.max_num_batched_tokens),
        "--gpu-memory-utilization", f"{config.gpu_memory_utilization:g}",
        "--no-enable-prefix-caching",
    ]  # fmt: skip
    if config.replicas > 1:
        flags += ["--data-parallel-size", str(config.replicas)]
    if adapters:
        flags += [
            "--enable-lora",
            "--max-loras", str(config.max_adapters),
            "--max-lora-rank", str(config.max_adapter_rank),
            "--max-cpu-loras", str(max(len(adapters), config.max_adapters or 1)),
        ]  # fmt: skip
        named = [f"{name}={spec.path}" for name, spec in adapters.items() if spec.path is not None]
        flags += ["--lora-modules", *named] if named else []
    return flags
