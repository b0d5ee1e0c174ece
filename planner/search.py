"""The search: many settings on a short stretch of the trace, few on a longer one, the best on all of it.

1. Settings that cannot run, or cannot meet the SLO at any rate, are dropped by arithmetic (`planner.bounds`).
2. *Screen*: one replica of every setting, its highest rate on the busiest 300 requests.
3. *Window*: the best few of each TP degree, on the busiest 1,500.
4. *Trace*: the best setting of each TP degree with as many replicas as there are GPUs for, on the whole trace,
   begun from replicas × the rate of one.
5. *Fewest GPUs*: shapes in the order of their GPUs, from those that could just do it, on the whole trace at the
   rate that is asked for, until one meets the SLO.
6. What is to be shown is simulated once more at the rate that is asked for; what is far behind the best, only on
   the busiest 1,500 requests.

Jobs of one stage are independent, and each stage follows from the answers of the last: so the outcome does not
depend on how many run at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from math import ceil, log2

from engine.config import ServingConfig
from planner.bounds import bounds
from planner.jobs import Answer, Job, Jobs, ProbeJob, RateJob
from planner.probe import Probe, Prober
from planner.space import Infeasible, Space, settings
from planner.trial import Trial, fewest_gpus, most_rate
from planner.workload import Piece

Progress = Callable[[str, int, int], None]  # stage, jobs done, jobs of the stage
Shape = tuple[Trial, int]  # of one replica, and how many

SCREEN_TOLERANCE = 0.10
WINDOW_TOLERANCE = 0.03
TRACE_TOLERANCE = 0.01
COARSE_TOLERANCE = 0.05  # of a shape that is far behind
FAR_BEHIND = 0.85  # of the best estimate
KEPT_SETTINGS = 2  # a TP degree, after the screen
SCREEN_GUESS = 0.6  # of the ceiling
TRACE_GUESS = (0.83, 0.06)  # of the estimate with one replica, and more with each doubling: they share bursts
LIKELY = 1.3  # shapes that an estimate gives so much of the rate asked for will do it
DOUBT = 0.75  # shapes that an estimate gives so much of the rate asked for may do it


@dataclass(slots=True, kw_only=True)
class Findings:
    """What a search found. trials: the best that is known of each configuration tried.

    fewest: the shape with the fewest GPUs that meets the SLO at the rate that is asked for. impossible: settings
    that cannot run, or cannot meet the SLO at any rate.
    """

    rate_rps: float
    trials: dict[ServingConfig, Trial] = field(default_factory=dict)
    impossible: list[Infeasible] = field(default_factory=list)
    fewest: ServingConfig | None = None
    timed_out: bool = False

    @property
    def ranked(self) -> list[Trial]:
        """Trials with the best sustainable rate first: those on the whole trace, else (time was up) all."""
        trials = list(self.trials.values())
        return most_rate([trial for trial in trials if trial.piece == "trace"] or trials)


def search(
    space: Space, prober: Prober, jobs: Jobs, *, show: int = 5, progress: Progress | None = None
) -> Findings:
    """Search a space.

    show: how many of the best are simulated at the rate that is asked for. What cannot run is a finding too.
    """
    search = Search(space, prober, jobs, progress or (lambda stage, done, total: None))
    search.narrow()
    search.whole_trace()
    search.fewest_gpus()
    search.at_rate(show)
    search.findings.timed_out = jobs.timed_out
    return search.findings


class Search:
    """The state of one search; its methods are the stages, in order."""

    def __init__(self, space: Space, prober: Prober, jobs: Jobs, progress: Progress) -> None:
        self._space = space
        self._prober = prober
        self._jobs = jobs
        self._progress = progress
        self._ceiling_rps: dict[ServingConfig, float] = {}  # of one replica, by setting
        self._settings: dict[int, list[Trial]] = {}  # by TP degree, best first
        self.findings = Findings(rate_rps=prober.workload.rate_rps)

    # ---- stages ----

    def narrow(self) -> None:
        """Find each TP degree's best settings, with one replica."""
        possible, impossible = settings(self._space, self._prober.adapters)
        self.findings.impossible += impossible
        possible = [config for config in possible if self._within_bounds(config)]
        screened = self._rates("screening settings", self._screen_jobs(possible))
        kept = [trial for best in _by_tp(screened).values() for trial in best[:KEPT_SETTINGS]]
        work = [self._window_job(trial) for trial in kept if trial.sustainable_rps > 0]
        windowed = self._rates("the best settings", work)
        known = {trial.config: trial for trial in (*screened, *windowed)}
        self._settings = _by_tp([known[trial.config] for trial in kept])

    def whole_trace(self) -> None:
        """Find the highest rate of each TP degree with all GPUs, and try the first shapes for the fewest."""
        best = [ranked[0] for ranked in self._settings.values() if ranked[0].sustainable_rps > 0]
        shapes = [(trial, self._space.most_replicas(trial.config.tp)) for trial in best]
        shapes.sort(key=_estimate_rps, reverse=True)
        most_rps = _estimate_rps(shapes[0]) if shapes else 0.0
        work: list[Job] = [
            self._shape_job(
                shape, TRACE_TOLERANCE if _estimate_rps(shape) > FAR_BEHIND * most_rps else COARSE_TOLERANCE
            )
            for shape in shapes
        ]
        first = next(iter(self._groups()), [])
        work += [
            self._shape_job(shape, COARSE_TOLERANCE)
            for shape in first
            if shape not in shapes and _estimate_rps(shape) > LIKELY * self.findings.rate_rps
        ]
        shown = dict.fromkeys(_config(shape) for shape in (*first, *shapes[:1]))
        self._run("the whole trace", [*work, *(ProbeJob(config=config) for config in shown)])

    def fewest_gpus(self) -> None:
        """Find the fewest GPUs that meet the SLO at the rate that is asked for."""
        for group in self._groups():
            probes = self._probes("fewest GPUs", [_config(shape) for shape in group])
            passing = [
                shape for shape, probe in zip(group, probes, strict=True) if probe is not None and probe.meets
            ]
            if passing:
                unknown = [shape for shape in passing if not self._judged(_config(shape))]
                self._rates(
                    "its highest rate", [self._shape_job(shape, COARSE_TOLERANCE) for shape in unknown]
                )
                trials = [self.findings.trials[_config(shape)] for shape in passing]
                self.findings.fewest = fewest_gpus(trials)[0].config
                return
            if self._jobs.timed_out:
                return

    def at_rate(self, show: int) -> None:
        """Simulate what is to be shown at the rate that is asked for: the best on the whole trace."""
        ranked = self.findings.ranked[: show + 1]
        work = [self._show_job(trial) for trial in ranked if trial.at_rate is None]
        self._run("at the trace's rate", work)

    # ---- jobs ----

    def _screen_jobs(self, configs: list[ServingConfig]) -> list[RateJob]:
        """One job for the settings that differ in max_num_seqs only: their rates are close."""

        def alike(config: ServingConfig) -> tuple[int, int, str]:
            return config.tp, config.max_num_batched_tokens, config.lora_sharding

        jobs = []
        for _, group in groupby(sorted(configs, key=alike), key=alike):
            same = tuple(group)
            guess_rps = SCREEN_GUESS * self._ceiling_rps[same[0]]
            jobs.append(self._rate_job(same, "screen", guess_rps, SCREEN_TOLERANCE, 0.5))
        return jobs

    def _window_job(self, trial: Trial) -> RateJob:
        return self._rate_job((trial.config,), "window", trial.sustainable_rps, WINDOW_TOLERANCE, 0.1)

    def _shape_job(self, shape: Shape, tolerance: float) -> RateJob:
        """Begin from the same degree's rate on the whole trace, where it is known."""
        trial, replicas = shape
        most = self._space.most_replicas(trial.config.tp)
        full = self.findings.trials.get(_config((trial, most)))
        if full is not None and full.piece == "trace" and full.sustainable_rps > 0:
            guess_rps = full.sustainable_rps / most * replicas
        else:
            guess_rps = (TRACE_GUESS[0] + TRACE_GUESS[1] * log2(replicas)) * _estimate_rps(shape)
        return self._rate_job((_config(shape),), "trace", guess_rps, tolerance, 0.05)

    def _show_job(self, trial: Trial) -> ProbeJob:
        near = trial.sustainable_rps > FAR_BEHIND * self.findings.ranked[0].sustainable_rps
        return ProbeJob(config=trial.config, piece="trace" if near else "window")

    def _rate_job(
        self,
        configs: tuple[ServingConfig, ...],
        piece: Piece,
        guess_rps: float,
        tolerance: float,
        reach: float,
    ) -> RateJob:
        return RateJob(
            configs=configs,
            piece=piece,
            guess_rps=guess_rps,
            ceiling_rps=tuple(
                self._ceiling_rps[replace(config, replicas=1)] * config.replicas for config in configs
            ),
            tolerance=tolerance,
            reach=reach,
        )

    def _within_bounds(self, config: ServingConfig) -> bool:
        prober = self._prober
        limit = bounds(prober.workload.trace, config, prober.price(config), prober.slo)
        reason = limit.reason(prober.slo)
        if reason is not None:
            self.findings.impossible.append(
                Infeasible(
                    config.tp,
                    config.max_num_seqs,
                    config.max_num_batched_tokens,
                    reason,
                    config.lora_sharding,
                )
            )
        self._ceiling_rps[config] = limit.rate_rps
        return reason is None

    def _groups(self) -> list[list[Shape]]:
        """Return shapes that could meet the SLO at the rate asked for, by equal GPUs, the fewest first."""
        shapes: list[Shape] = []
        for tp, ranked in self._settings.items():
            trial, most = ranked[0], self._space.most_replicas(tp)
            if trial.sustainable_rps > 0:
                least = max(1, ceil(DOUBT * self.findings.rate_rps / trial.sustainable_rps))
                shapes += [(trial, replicas) for replicas in range(least, most + 1)]
        shapes.sort(key=_gpus)
        return [list(group) for _, group in groupby(shapes, key=_gpus)]

    def _judged(self, config: ServingConfig) -> bool:
        trial = self.findings.trials.get(config)
        return trial is not None and trial.piece == "trace"

    # ---- running them ----

    def _rates(self, stage: str, work: Sequence[RateJob]) -> list[Trial]:
        """Run rate jobs; those that time did not allow are missing."""
        answers = self._run(stage, work)
        return [trial for answer in answers if isinstance(answer, list) for trial in answer]

    def _probes(self, stage: str, configs: list[ServingConfig]) -> list[Probe | None]:
        """Return the simulations of the trace at the rate that is asked for, running those not there yet."""
        self._run(stage, [ProbeJob(config=config) for config in configs if self._at_rate(config) is None])
        return [self._at_rate(config) for config in configs]

    def _at_rate(self, config: ServingConfig) -> Probe | None:
        trial = self.findings.trials.get(config)
        return trial.at_rate if trial is not None and trial.rate_piece == "trace" else None

    def _run(self, stage: str, work: Sequence[Job]) -> list[Answer | None]:
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
            if isinstance(answer, Probe) and isinstance(job, ProbeJob):
                self._keep_probe(job, answer)
            elif isinstance(answer, list):
                for trial in answer:
                    known = self.findings.trials.get(trial.config)
                    self.findings.trials[trial.config] = trial if known is None else known.with_rate(trial)
        return answers

    def _keep_probe(self, job: ProbeJob, probe: Probe) -> None:
        known = self.findings.trials.get(job.config)
        if known is None:
            known = Trial(config=job.config, piece="screen", sustainable_rps=0.0)
        self.findings.trials[job.config] = known.with_probe(probe, job.piece)


def _by_tp(trials: list[Trial]) -> dict[int, list[Trial]]:
    """Return trials by TP degree, each best first."""
    degrees = sorted({trial.config.tp for trial in trials})
    return {tp: most_rate([trial for trial in trials if trial.config.tp == tp]) for tp in degrees}


def _config(shape: Shape) -> ServingConfig:
    return replace(shape[0].config, replicas=shape[1])


def _estimate_rps(shape: Shape) -> float:
    return shape[0].sustainable_rps * shape[1]


def _gpus(shape: Shape) -> int:
    return shape[0].config.tp * shape[1]
