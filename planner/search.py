"""The search: many settings on a short stretch of the trace, few on a longer one, the best on all of it.

1. Settings that cannot run, or cannot meet the SLO at any rate, are dropped by arithmetic (`planner.bounds`).
2. One replica of every setting and policy, on ever longer busiest stretches (`planner.narrow`).
3. *Shapes*: the best of each group of settings with as many replicas as there are GPUs for, on the busiest
   STRETCH_REQUESTS, begun from replicas × the rate of one; who comes close to the best is asked for a rate a tie higher.
4. *Routing*: every other router and placement of the best shape is asked the same.
5. *Trace*: the highest rate of the best, and of the second if it is close, on the whole trace.
6. *Fewest GPUs*: shapes in the order of their GPUs, from those that could just do it, on the whole trace at the
   rate that is asked for, until one meets the SLO.
   Whoever may still sustain more than the best, as far as is known by then, is looked at closer.
7. *Turning away*: only where nobody does it by serving every request, a scheduler that refuses who would be late.
8. What is to be shown is simulated once more at the rate that is asked for; what was not judged on the
   whole trace, only on the busiest WINDOW_REQUESTS.

Jobs of one stage are independent, and each stage follows from the answers of the last: so the outcome does not
depend on how many run at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from itertools import groupby
from math import ceil, log2
from typing import Any

from engine.adapter import AdapterSpec
from engine.config import ServingConfig
from planner.jobs import Challenge, Job, Jobs, ProbeJob, RateJob, RetrainJob
from planner.ledger import Findings, Ledger, Progress
from planner.narrow import Group, Narrowing, group_of
from planner.probe import Prober
from planner.retraining import Change, Retraining
from planner.space import Infeasible, Space, choices, serving_all, settings
from planner.trial import TIE, Trial, fewest_gpus, most_rate, order
from planner.variants import Variants
from planner.workload import Piece

__all__ = ["Findings", "Progress", "Search", "search"]

Shape = tuple[Trial, int]  # of one replica, and how many
Settings = Callable[[Space, Mapping[str, AdapterSpec]], tuple[list[ServingConfig], list[Infeasible]]]

STRETCH_TOLERANCE = 0.01
TRACE_TOLERANCE = 0.01
CLOSE = 0.06  # to the best on the stretch: judged on the whole trace too
COARSE_TOLERANCE = 0.05  # of a shape that is far behind
FAR_BEHIND = (
    0.7  # of the best estimate; several replicas share bursts and sustain more than the estimate says
)
FINALISTS = 4  # settings of a group, on the stretch; shapes, on the whole trace
TRACE_GUESS = (0.83, 0.06)  # of the estimate with one replica, and more with each doubling: they share bursts
LIKELY = 1.3  # shapes that an estimate gives so much of the rate asked for will do it
MOST_ROUNDS = 4
DOUBT = 0.75  # shapes that an estimate gives so much of the rate asked for may do it


def search(
    space: Space,
    prober: Prober,
    jobs: Jobs,
    *,
    show: int = 5,
    progress: Progress | None = None,
    settings: Settings = settings,
    front: bool = False,
) -> Findings:
    """Search a space.

    show: how many of the best are simulated at the rate that is asked for. settings: what makes the settings of the
    space; another engine has its own. front: find the best shape of every number of GPUs too. What cannot run is a
    finding too. After Ctrl-C: the findings so far, `interrupted`.
    """
    found = Search(space, prober, jobs, progress or (lambda stage, done, total: None), settings)
    try:
        found.run(show, front)
    except KeyboardInterrupt:
        found.findings.interrupted = True
    found.findings.timed_out = jobs.timed_out
    return found.findings


class Search:
    """The state of one search; its methods are the stages, in order."""

    def __init__(
        self, space: Space, prober: Prober, jobs: Jobs, progress: Progress, settings: Settings = settings
    ) -> None:
        self._space = space
        self._prober = prober
        self._make_settings = settings
        self._ledger = Ledger(prober, jobs, progress)
        self._variants = Variants.of(prober.workload.trace, prober.slo)
        self._groups: dict[Group, list[Trial]] = {}  # best first, one replica on the window
        self._routing: dict[str, Any] = {}  # what the best shape gained by

    @property
    def findings(self) -> Findings:
        """What was found so far."""
        return self._ledger.findings

    def run(self, show: int, front: bool = False) -> None:
        """Go through all stages."""
        self.narrow()
        self.shapes()
        self.routing()
        self.whole_trace()
        self.fewest_gpus()
        self.settle()
        self.turning_away()
        if front:
            self.front()
        self.at_rate(show)

    # ---- stages ----

    def narrow(self) -> None:
        """Find the best settings and policies of one replica."""
        adapters = self._prober.adapters
        possible, impossible = self._make_settings(self._space, adapters)
        self.findings.impossible += impossible
        policies = choices(serving_all(self._space.policies), adapters)
        plain = {name: values[0] for name, values in policies.items()}
        possible = [self._variants.vary(config, **plain) for config in possible]
        narrowing = Narrowing(self._ledger, self._variants, policies)
        self._groups = narrowing.best(self._ledger.able(possible), self._space.most_replicas)

    def shapes(self) -> None:
        """Compare the groups with all GPUs, and the settings of the best one, on a long stretch; try the first shapes for the fewest."""
        shapes = [
            (ranked[0], self._space.most_replicas(ranked[0].config.tp)) for ranked in self._groups.values()
        ]
        shapes.sort(key=_estimate_rps, reverse=True)
        if not shapes:
            return
        most_rps = _estimate_rps(shapes[0])
        near = [shape for shape in shapes if _estimate_rps(shape) > FAR_BEHIND * most_rps]
        work: list[Job] = [
            self._shape_job(shape, "stretch", COARSE_TOLERANCE if number else STRETCH_TOLERANCE)
            for number, shape in enumerate(near)
        ]
        far = [self._config(shape) for shape in shapes[len(near) :]]
        work += [
            self._ledger.rate_job(config, "window", _estimate_rps(shape), COARSE_TOLERANCE, 0.05)
            for config, shape in zip(far, shapes[len(near) :], strict=True)
            if not self._known_on("window", config)
        ]
        first = dict.fromkeys(self._config(shape) for shape in next(self._by_gpus(), []))
        self._ledger.run("shapes", [*work, *(ProbeJob(config=config) for config in first)])
        rivals = [
            self._config((trial, replicas))
            for first_, replicas in near
            for trial in self._groups[group_of(first_.config)][:FINALISTS]
        ]
        self._challenge("shapes", rivals)

    def routing(self) -> None:
        """Try the other routers and placements in front of the best shape."""
        best = self._leader()
        if best is None or best.config.replicas == 1:
            return
        values = choices(self._space.routing, self._prober.adapters)
        plain = best.config
        rivals = self._varied(plain, self._variants.others(plain, values))
        won = self._challenge("routing", rivals)
        if won is None:
            return
        pairs = self._varied(won.config, self._variants.others(won.config, values))
        won = (
            self._challenge("routing", [pair for pair in pairs if pair not in rivals and pair != plain])
            or won
        )
        self._routing = {name: getattr(won.config, name) for name in values}

    def whole_trace(self) -> None:
        """Find the highest rate of the best on all of the trace, and ask those that are as good for more."""
        ranked = [trial for trial in self._ranked_on("stretch") if trial.sustainable_rps > 0]
        if not ranked:
            return
        best = ranked[0]
        job = self._ledger.rate_job(best.config, "trace", best.sustainable_rps, TRACE_TOLERANCE, 0.04)
        self._ledger.rates("the whole trace", [job])
        least_rps = best.sustainable_rps * (1 - CLOSE)
        rivals = [trial.config for trial in ranked[1:FINALISTS] if trial.sustainable_rps >= least_rps]
        self._challenge("the whole trace", rivals, "trace")

    def settle(self) -> None:
        """Look closer at those who, as far as is known, may sustain more of the whole trace than the best."""
        best = self._leader("trace")
        if best is None:
            return
        open_ = [
            t
            for t in self._ranked_on("trace")
            if t.above_rps > best.sustainable_rps * (1 + TIE) and t is not best
        ]
        work = [
            self._ledger.rate_job(t.config, "trace", best.sustainable_rps, TRACE_TOLERANCE, 0.02)
            for t in open_
        ]
        self._ledger.rates("the whole trace", work)

    def turning_away(self) -> None:
        """Where nobody meets the SLO at the rate asked for by serving all, try who turns away requests, if the space has it."""
        tried = serving_all(self._space.policies).get("scheduler", ())
        for scheduler in self._space.policies.get("scheduler", ()):
            if scheduler not in tried and self.findings.fewest is None:
                self.fewest_gpus({"scheduler": scheduler})

    def fewest_gpus(self, change: Mapping[str, Any] | None = None) -> None:
        """Find the fewest GPUs that meet the SLO at the rate that is asked for. change: of every shape's policies."""
        for group in self._by_gpus():
            configs = [self._config(shape) for shape in group]
            if change:
                configs = [found for config in configs for found in self._varied(config, [change])]
            if self._routing:
                several = [config for config in configs if config.replicas > 1]
                configs += [found for config in several for found in self._varied(config, [self._routing])]
            probes = self._ledger.probes("fewest GPUs", configs)
            passing = [
                config
                for config, probe in zip(configs, probes, strict=True)
                if probe is not None and probe.meets
            ]
            if passing:
                self._rate_of_fewest(passing)
                return
            if self._ledger.timed_out:
                return

    def _rate_of_fewest(self, passing: list[ServingConfig]) -> None:
        """Find what they sustain, where that is not known, and choose."""
        unknown = [config for config in passing if self._ledger.judged(config) is None]
        work = []
        for config in unknown:
            one = self._single(config)
            guess_rps = config.replicas * one.sustainable_rps if one is not None else self.findings.rate_rps
            work.append(self._ledger.rate_job(config, "trace", guess_rps, COARSE_TOLERANCE, 0.05))
        self._ledger.rates("its highest rate", work)
        trials = [self.findings.trials[config] for config in passing]
        self.findings.fewest = fewest_gpus(trials)[0].config

    def front(self) -> None:
        """Judge the shape with the best estimate of every number of GPUs, on the whole trace and at the rate that is asked for."""
        best: dict[int, Shape] = {}
        for ranked in self._groups.values():
            trial = ranked[0]
            for replicas in range(1, self._space.most_replicas(trial.config.tp) + 1):
                shape = (trial, replicas)
                known = best.get(_gpus(shape))
                if known is None or _estimate_rps(shape) > _estimate_rps(known):
                    best[_gpus(shape)] = shape
        shapes = [best[gpus] for gpus in sorted(best)]
        work: list[Job] = [
            self._shape_job(shape, "trace", COARSE_TOLERANCE)
            for shape in shapes
            if self._ledger.judged(self._config(shape)) is None
        ]
        probes = [
            ProbeJob(config=self._config(shape))
            for shape in shapes
            if self._ledger.at_rate(self._config(shape)) is None
        ]
        self._ledger.run("the front", [*work, *probes])

    def at_rate(self, show: int) -> None:
        """Simulate what is to be shown at the rate that is asked for, and price retraining."""
        ranked = [*self.findings.ranked, *self._alternatives()][: show + 1]
        work: list[Job] = [self._show_job(trial) for trial in ranked if trial.at_rate is None]
        retrain = self._retrain_jobs()
        answers = self._ledger.run("at the trace's rate", [*work, *retrain])
        self.findings.retraining += [answer for answer in answers if isinstance(answer, Retraining)]

    # ---- jobs ----

    def _ranked_on(self, piece: Piece) -> list[Trial]:
        """Return the trials with all GPUs on a piece, best first."""
        trials = [trial for trial in self.findings.trials.values() if trial.piece == piece]
        return most_rate([t for t in trials if t.config.replicas == self._space.most_replicas(t.config.tp)])

    def _varied(self, config: ServingConfig, changes: Iterable[Mapping[str, Any]]) -> list[ServingConfig]:
        """Return what a configuration is with each of these changes, where it can be."""
        found = [self._ledger.varied(self._variants, config, change) for change in changes]
        return [varied for varied in found if varied is not None]

    def _known_on(self, piece: Piece, config: ServingConfig) -> bool:
        trial = self.findings.trials.get(config)
        return trial is not None and trial.piece == piece

    def _leader(self, piece: Piece = "stretch") -> Trial | None:
        best = next(iter(self._ranked_on(piece)), None)
        return best if best is not None and best.sustainable_rps > 0 else None

    def _challenge(self, stage: str, rivals: list[ServingConfig], piece: Piece = "stretch") -> Trial | None:
        """Ask rivals for more than the best can, as long as one of them does; return the new best, where there is one, with its highest rate."""
        new = None
        for _ in range(MOST_ROUNDS):
            best = self._leader(piece)
            if best is None or not rivals or self._ledger.timed_out:
                return new
            asked_rps = max(best.sustainable_rps * (1 + TIE), best.above_rps)
            work = [
                Challenge(config=config, piece=piece, rate_rps=asked_rps)
                for config in dict.fromkeys(rivals)
                if config != best.config and self._is_open(config, piece, asked_rps)
            ]
            answers = self._ledger.run(stage, work)
            won = [a[0] for a in answers if isinstance(a, list) and a[0].at_best is not None]
            if not won:
                return new
            first = min(won, key=lambda trial: (-_attained(trial), order(trial.config)))
            guess_rps = asked_rps * (1 + 2 * TIE)
            tolerance = STRETCH_TOLERANCE if piece == "stretch" else TRACE_TOLERANCE
            self._ledger.rates(
                stage, [self._ledger.rate_job(first.config, piece, guess_rps, tolerance, 0.04)]
            )
            new = self.findings.trials[first.config]
            rivals = [trial.config for trial in won if trial.config != first.config]
        return new

    def _is_open(self, config: ServingConfig, piece: Piece, rate_rps: float) -> bool:
        """Whether a configuration may sustain a rate, as far as is known."""
        known = self.findings.trials.get(config)
        return known is None or known.piece != piece or known.most_rps > rate_rps

    def _shape_job(self, shape: Shape, piece: Piece, tolerance: float) -> RateJob:
        guess_rps = (TRACE_GUESS[0] + TRACE_GUESS[1] * log2(shape[1])) * _estimate_rps(shape)
        return self._ledger.rate_job(self._config(shape), piece, guess_rps, tolerance, 0.05)

    def _show_job(self, trial: Trial) -> ProbeJob:
        return ProbeJob(config=trial.config, piece="trace" if trial.piece == "trace" else "window")

    def _retrain_jobs(self) -> list[RetrainJob]:
        """Half the rank for the best shape's setting, block-diagonal for the best with tensor parallelism a GPU."""
        best = next(iter(self.findings.ranked), None)
        if not self._prober.adapters or best is None or not best.sustainable_rps:
            return []
        wanted: list[tuple[Trial, Change]] = [(best, "half the rank")]
        parallel = [ranked[0] for ranked in self._groups.values() if ranked[0].config.tp > 1]
        if best.config.tp > 1:
            wanted.append((best, "block-diagonal, 8 blocks"))
        elif parallel:
            most = max(parallel, key=lambda trial: trial.sustainable_rps / trial.config.gpus)
            wanted.append((most, "block-diagonal, 8 blocks"))
        return [
            RetrainJob(
                config=replace(trial.config, replicas=1),
                change=change,
                guess_rps=trial.sustainable_rps / trial.config.replicas,
            )
            for trial, change in wanted
        ]

    # ---- shapes ----

    def _config(self, shape: Shape) -> ServingConfig:
        start = {
            name: values[0] for name, values in choices(self._space.routing, self._prober.adapters).items()
        }
        return self._variants.vary(replace(shape[0].config, replicas=shape[1]), **start)

    def _single(self, config: ServingConfig) -> Trial | None:
        """Return the trial with one replica of a shape's setting."""
        for ranked in self._groups.values():
            for trial in ranked:
                if self._config((trial, config.replicas)) == config:
                    return trial
        return None

    def _by_gpus(self) -> Iterator[list[Shape]]:
        """Yield shapes that could meet the SLO at the rate asked for, by equal GPUs, the fewest first."""
        shapes: list[Shape] = []
        for ranked in self._groups.values():
            trial, most = ranked[0], self._space.most_replicas(ranked[0].config.tp)
            least = max(1, ceil(DOUBT * self.findings.rate_rps / trial.sustainable_rps))
            shapes += [(trial, replicas) for replicas in range(least, most + 1)]
        shapes.sort(key=_gpus)
        for _, group in groupby(shapes, key=_gpus):
            yield list(group)

    def _alternatives(self) -> list[Trial]:
        """Return who was compared with all GPUs but not judged on the whole trace, best first."""
        found: dict[ServingConfig, Trial] = {}
        pieces: tuple[Piece, ...] = ("stretch", "window")
        for piece in pieces:
            for trial in self._ranked_on(piece):
                if trial.sustainable_rps > 0 and (
                    piece == "stretch" or trial.config.replicas > 1 or self._is_best(trial)
                ):
                    found.setdefault(trial.config, trial)
        return list(found.values())

    def _is_best(self, trial: Trial) -> bool:
        """Whether it is the best of its group: the others of one replica were only steps on the way."""
        return any(ranked[0].config == trial.config for ranked in self._groups.values())


def _attained(trial: Trial) -> float:
    return 0.0 if trial.at_best is None else trial.at_best.attainment


def _estimate_rps(shape: Shape) -> float:
    return shape[0].sustainable_rps * shape[1]


def _gpus(shape: Shape) -> int:
    return shape[0].config.tp * shape[1]
