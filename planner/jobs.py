"""Independent pieces of work: what the search hands to its workers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from engine.config import ServingConfig
from planner.paced import Paced, PacedJob
from planner.probe import Probe, Prober
from planner.rate import RateRange, highest_scale
from planner.retraining import Change, Retraining, priced
from planner.trial import Trial
from planner.workload import Piece


@dataclass(frozen=True, slots=True, kw_only=True)
class RateJob:
    """Find the highest rate of each of some configurations on a piece of the trace.

    Each begins where the last ended: they should be alike. guess_rps: where the first begins, and `reach` how far
    off it may be (relative). ceiling_rps: by configuration, what arithmetic allows.
    """

    configs: tuple[ServingConfig, ...]
    piece: Piece
    guess_rps: float
    ceiling_rps: tuple[float, ...]
    tolerance: float
    reach: float

    def run(self, prober: Prober) -> list[Trial]:
        """Return a trial of each."""
        own_rps = prober.workload.piece(self.piece).rate_rps
        trials: list[Trial] = []
        for config, ceiling_rps in zip(self.configs, self.ceiling_rps, strict=True):
            last_rps = trials[-1].sustainable_rps if trials else 0.0
            trials.append(self._search(prober, config, own_rps, ceiling_rps, last_rps))
        return trials

    def _search(
        self, prober: Prober, config: ServingConfig, own_rps: float, ceiling_rps: float, last_rps: float
    ) -> Trial:
        def probe(scale: float) -> Probe:
            return prober(config, self.piece, scale)

        found = highest_scale(
            probe,
            (last_rps or self.guess_rps) / own_rps,
            ceiling_rps / own_rps,
            tolerance=self.tolerance,
            reach=self.tolerance if last_rps else self.reach,
        )
        return Trial.of(config, self.piece, own_rps, found)


@dataclass(frozen=True, slots=True, kw_only=True)
class Challenge:
    """Ask whether a configuration meets the SLO on a piece of the trace at one rate: a lost challenge ends early."""

    config: ServingConfig
    piece: Piece
    rate_rps: float

    def run(self, prober: Prober) -> list[Trial]:
        """Return a trial that knows of this rate alone."""
        own_rps = prober.workload.piece(self.piece).rate_rps
        found = prober(self.config, self.piece, self.rate_rps / own_rps)
        known = RateRange(found if found.meets else None, None if found.meets else found, 1)
        return [Trial.of(self.config, self.piece, own_rps, known)]


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbeJob:
    """Simulate a configuration on a piece of the trace at the rate that is asked for."""

    config: ServingConfig
    piece: Piece = "trace"

    def run(self, prober: Prober) -> Probe:
        """Return what the simulator says."""
        return prober(self.config, self.piece, 1.0, watch=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class RetrainJob:
    """Find what one replica of a configuration would sustain with retrained adapters."""

    config: ServingConfig
    change: Change
    guess_rps: float

    def run(self, prober: Prober) -> Retraining | None:
        """Return what it would gain; None where the adapters cannot be retrained so."""
        return priced(prober, self.config, self.change, self.guess_rps)


Job = RateJob | Challenge | ProbeJob | RetrainJob | PacedJob
Answer = list[Trial] | Probe | Retraining | Paced | None


@dataclass(frozen=True, slots=True, eq=False)
class Runner:
    """Runs jobs; what a worker process holds."""

    prober: Prober

    def __call__(self, job: Job) -> Answer:
        return job.run(self.prober)


class Jobs(Protocol):
    """What runs jobs: `planner.workers.Workers`."""

    def run(
        self,
        jobs: Sequence[Job],
        on_done: Callable[[], None] = ...,
        on_answer: Callable[[int, Answer], None] = ...,
    ) -> list[Answer | None]:
        """Return the answers in order; None where time was up."""

    @property
    def timed_out(self) -> bool:
        """Whether time is up."""
