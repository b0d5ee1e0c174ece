"""What is known of a configuration after it was tried."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import inf
from typing import Any

from engine.config import ServingConfig
from planner.probe import Probe
from planner.rate import RateRange
from planner.space import POLICIES, ROUTING, oddity, turns_away
from planner.workload import PIECES, Piece

TIE = 0.01  # rates within 1 % are equal


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """A configuration and the best that is known of it.

    sustainable_rps: the highest rate seen to meet the SLO on `piece`; 0 where none did. at_best: the simulation at
    that rate. above: one at which the SLO was missed. at_rate: the simulation at the rate that is asked for, of
    `rate_piece`. above_rps: the rate of `above`. capped: the rate stopped at what arithmetic allows, not at the SLO.
    """

    config: ServingConfig
    piece: Piece
    sustainable_rps: float
    at_best: Probe | None = None
    above: Probe | None = None
    at_rate: Probe | None = None
    rate_piece: Piece | None = None
    above_rps: float = 0.0
    capped: bool = False

    @classmethod
    def of(cls, config: ServingConfig, piece: Piece, rate_rps: float, found: RateRange) -> Trial:
        """Build from a search whose scale 1 was `rate_rps`."""
        return cls(
            config=config,
            piece=piece,
            sustainable_rps=found.scale * rate_rps,
            at_best=found.passed,
            above=found.failed,
            above_rps=0.0 if found.failed is None else found.failed.scale * rate_rps,
            capped=found.passed is not None and found.failed is None,
        )

    def with_probe(self, probe: Probe, piece: Piece) -> Trial:
        """Return it with the simulation of a piece at the rate that is asked for."""
        return replace(self, at_rate=probe, rate_piece=piece)

    def with_rate(self, found: Trial) -> Trial:
        """Return it with another's sustainable rate."""
        return replace(found, at_rate=self.at_rate, rate_piece=self.rate_piece)

    def improved_by(self, found: Trial) -> Trial:
        """Return what is known after another trial of the same configuration: a longer piece says more, and of one piece the higher rate.

        That a rate was too high takes nothing back that is known to hold on a piece at least as long.
        """
        if not found.sustainable_rps and self.sustainable_rps:
            return self
        longer = PIECES.index(found.piece) - PIECES.index(self.piece)
        if longer > 0 or (longer == 0 and found.sustainable_rps >= self.sustainable_rps):
            return self.with_rate(found)
        return self

    def meets(self, rate_rps: float) -> bool:
        """Whether it meets the SLO at the rate that is asked for, as far as is known."""
        if self.at_rate is not None and self.rate_piece == "trace":
            return self.at_rate.meets
        return self.sustainable_rps >= rate_rps

    @property
    def most_rps(self) -> float:
        """The rate below which what it sustains is known to lie; infinite where it was never seen to miss the SLO."""
        return inf if self.above is None else self.above_rps

    @property
    def bottleneck(self) -> str:
        """What bounds it at the highest rate that it sustains, else where it was seen to miss the SLO."""
        for probe in (self.at_best, self.at_rate, self.above):
            if probe is not None:
                return probe.bottleneck
        return "unknown"

    def to_json(self) -> dict[str, Any]:
        """Return one line of trials.jsonl."""
        probe = self.at_rate
        return {
            "tp": self.config.tp,
            "replicas": self.config.replicas,
            "gpus": self.config.gpus,
            "max_num_seqs": self.config.max_num_seqs,
            "max_num_batched_tokens": self.config.max_num_batched_tokens,
            "lora_sharding": self.config.lora_sharding,
            **{name: getattr(self.config, name) for name in (*POLICIES, *ROUTING)},
            "status": "judged" if self.piece == "trace" else "screened",
            "piece": self.piece,
            "sustainable_rps": self.sustainable_rps,
            "missed_at_rps": None if self.above is None else self.above_rps,
            "slo_attainment_at_rate": None if probe is None else probe.attainment,
            "bottleneck": self.bottleneck,
        }


def most_rate(trials: list[Trial]) -> list[Trial]:
    """Return them best first: by sustainable rate; the first tie (within TIE) to fewer GPUs, then to the plainer policies.

    Who turns requests away comes behind all that serve every one and sustain some rate.
    """
    ranked = sorted(trials, key=lambda trial: (_tier(trial), -trial.sustainable_rps, order(trial.config)))
    if not ranked:
        return []
    least_rps = ranked[0].sustainable_rps * (1 - TIE)
    tied = [t for t in ranked if t.sustainable_rps >= least_rps and _tier(t) == _tier(ranked[0])]
    best = min(
        tied,
        key=lambda trial: (
            trial.config.gpus,
            oddity(trial.config),
            -trial.sustainable_rps,
            order(trial.config),
        ),
    )
    return [best, *(trial for trial in ranked if trial is not best)]


def fewest_gpus(trials: list[Trial]) -> list[Trial]:
    """Return them best first: who serves all, by GPUs, then by sustainable rate."""
    return sorted(
        trials,
        key=lambda trial: (
            turns_away(trial.config),
            trial.config.gpus,
            -trial.sustainable_rps,
            order(trial.config),
        ),
    )


def _tier(trial: Trial) -> int:
    return 2 if not trial.sustainable_rps else int(turns_away(trial.config))


def order(config: ServingConfig) -> tuple[Any, ...]:
    """Return what decides between equals: the smaller, the plainer."""
    policies = tuple(str(getattr(config, name)) for name in (*POLICIES, *ROUTING))
    return (
        config.gpus,
        config.tp,
        config.max_num_seqs,
        config.max_num_batched_tokens,
        config.lora_sharding,
        oddity(config),
        policies,
        config.max_adapters or 0,
        config.gpu_memory_utilization,
    )
