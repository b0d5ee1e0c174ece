"""What a search has found so far, and how its jobs are run and their answers kept."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from engine.blueprint import blueprint
from engine.config import ServingConfig
from engine.errors import UserError
from planner.bounds import bounds
from planner.jobs import Answer, Challenge, Job, Jobs, ProbeJob, RateJob
from planner.probe import Probe, Prober
from planner.retraining import Retraining
from planner.space import Infeasible
from planner.trial import Trial, most_rate
from planner.variants import Variants
from planner.workload import PIECES, Piece

Progress = Callable[[str, int, int], None]  # stage, jobs done, jobs of the stage


@dataclass(slots=True, kw_only=True)
class Findings:
    """What a search found. trials: the best that is known of each configuration tried.

    fewest: the shape with the fewest GPUs that meets the SLO at the rate that is asked for. impossible: settings
    that cannot run, or cannot meet the SLO at any rate. interrupted: by Ctrl-C.
    """

    rate_rps: float
    trials: dict[ServingConfig, Trial] = field(default_factory=dict)
    impossible: list[Infeasible] = field(default_factory=list)
    fewest: ServingConfig | None = None
    retraining: list[Retraining] = field(default_factory=list)
    timed_out: bool = False
    interrupted: bool = False

    @property
    def ranked(self) -> list[Trial]:
        """Trials with the best sustainable rate first: those on the whole trace, else (time was up) on the longest piece there is."""
        trials = list(self.trials.values())
        for piece in reversed(PIECES):
            found = [trial for trial in trials if trial.piece == piece]
            if found:
                return most_rate(found)
        return []

    @property
    def compared(self) -> list[Trial]:
        """All trials, those on the longest piece first, each best first."""
        found: list[Trial] = []
        for piece in reversed(PIECES):
            found += most_rate([trial for trial in self.trials.values() if trial.piece == piece])
        return found


class Ledger:
    """Runs jobs and keeps what they find. The order of what is kept is that of the jobs, whoever is done first."""

    def __init__(self, prober: Prober, jobs: Jobs, progress: Progress) -> None:
        self.prober = prober
        self.findings = Findings(rate_rps=prober.workload.rate_rps)
        self._jobs = jobs
        self._progress = progress
        self._ceilings_rps: dict[ServingConfig, float] = {}

    @property
    def timed_out(self) -> bool:
        """Whether time is up."""
        return self._jobs.timed_out

    # ---- bounds ----

    def able(self, configs: Iterable[ServingConfig]) -> list[ServingConfig]:
        """Return the configurations that may meet the SLO at some rate; note the others with the reason."""
        found = []
        for config in configs:
            limit = bounds(self.prober.workload.trace, config, self.prober.price(config), self.prober.slo)
            reason = limit.reason(self.prober.slo)
            self._ceilings_rps[_bare(config)] = limit.rate_rps
            if reason is None:
                found.append(config)
            else:
                self.rule_out(Infeasible.of(config, reason))
        return found

    def varied(
        self, variants: Variants, config: ServingConfig, changes: Mapping[str, Any]
    ) -> ServingConfig | None:
        """Return a configuration with these changes; note those that cannot be, with the reason, and return None."""
        try:
            found = variants.vary(config, **changes)
            blueprint(found, self.prober.adapters)
        except UserError as error:
            self.rule_out(Infeasible.of(config, str(error).removeprefix("config: "), changes))
            return None
        return found

    def rule_out(self, item: Infeasible) -> None:
        """Note what cannot run, once."""
        if item not in self.findings.impossible:
            self.findings.impossible.append(item)

    def ceiling_rps(self, config: ServingConfig) -> float:
        """Return the rate that arithmetic allows, of all replicas."""
        return self._ceilings_rps[_bare(config)] * config.replicas

    # ---- jobs ----

    def rate_job(
        self, config: ServingConfig, piece: Piece, guess_rps: float, tolerance: float, reach: float
    ) -> RateJob:
        """Return the job that finds a configuration's highest rate on a piece of the trace."""
        return RateJob(
            configs=(config,),
            piece=piece,
            guess_rps=guess_rps,
            ceiling_rps=(self.ceiling_rps(config),),
            tolerance=tolerance,
            reach=reach,
        )

    def rates(self, stage: str, work: Sequence[RateJob]) -> list[Trial]:
        """Run rate jobs; those that time did not allow are missing."""
        answers = self.run(stage, work)
        return [trial for answer in answers if isinstance(answer, list) for trial in answer]

    def challenges(self, stage: str, work: Sequence[Challenge]) -> list[Trial]:
        """Run challenges; those that time did not allow are missing."""
        answers = self.run(stage, work)
        return [trial for answer in answers if isinstance(answer, list) for trial in answer]

    def probes(self, stage: str, configs: list[ServingConfig]) -> list[Probe | None]:
        """Return the simulations of the trace at the rate that is asked for, running those not there yet."""
        self.run(stage, [ProbeJob(config=config) for config in configs if self.at_rate(config) is None])
        return [self.at_rate(config) for config in configs]

    def at_rate(self, config: ServingConfig) -> Probe | None:
        """Return the simulation of the trace at the rate that is asked for, where there is one."""
        trial = self.findings.trials.get(config)
        return trial.at_rate if trial is not None and trial.rate_piece == "trace" else None

    def judged(self, config: ServingConfig) -> Trial | None:
        """Return what is known of a configuration on the whole trace."""
        trial = self.findings.trials.get(config)
        return trial if trial is not None and trial.piece == "trace" else None

    def run(self, stage: str, work: Sequence[Job]) -> list[Answer | None]:
        """Run jobs and keep in the findings what they found."""
        done = 0

        def note() -> None:
            nonlocal done
            done += 1
            self._progress(stage, done, len(work))

        if work:
            self._progress(stage, 0, len(work))
        answers = self._jobs.run(work, note)
        for job, answer in zip(work, answers, strict=True):
            if isinstance(job, ProbeJob) and isinstance(answer, Probe):
                self._keep_probe(job, answer)
            elif isinstance(job, (RateJob, Challenge)) and isinstance(answer, list):
                for trial in answer:
                    known = self.findings.trials.get(trial.config)
                    self.findings.trials[trial.config] = trial if known is None else known.improved_by(trial)
        return answers

    def _keep_probe(self, job: ProbeJob, probe: Probe) -> None:
        known = self.findings.trials.get(job.config)
        if known is None:
            known = Trial(config=job.config, piece="screen", sustainable_rps=0.0)
        self.findings.trials[job.config] = known.with_probe(probe, job.piece)


def _bare(config: ServingConfig) -> ServingConfig:
    """Return what bounds depend on: one replica, whatever its policies."""
    return replace(
        config,
        replicas=1,
        scheduler="fcfs",
        ttft_slo_s=None,
        router="least_loaded",
        placement="everywhere",
        adapter_popularity={},
        max_adapters_per_step=None,
        merge="never",
        merge_adapter=None,
    )
