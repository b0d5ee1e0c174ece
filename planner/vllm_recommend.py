"""From a trace and an SLO to a plan for vLLM: the planner's own search over vLLM's settings, judged by vLLM's simulation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

from engine.config import ServingConfig
from planner.intervals import Prediction, error_of, predictions, rate
from planner.jobs import Jobs, RateJob, Runner
from planner.plan import Choice, Plan
from planner.probe import Prober
from planner.recommend import Question
from planner.search import KEPT_SETTINGS, SCREEN_GUESS, SCREEN_TOLERANCE, Findings, Progress, Search
from planner.trial import Trial, fewest_gpus, most_rate
from planner.vllm import VllmEngine, VllmSpace, vllm_flags
from planner.workers import Workers, cores
from planner.workload import Workload


@dataclass(frozen=True, slots=True)
class VllmPlan:
    """A plan and the commands that serve it."""

    plan: Plan
    exports: dict[str, str]

    def to_json(self) -> dict[str, Any]:
        """Return the plan's JSON form, and `exports`."""
        return self.plan.to_json() | {"engine": "vllm", "exports": self.exports}


class VllmSearch(Search):
    """The planner's search; settings are vLLM's."""

    def __init__(
        self, engine: VllmEngine, space: VllmSpace, prober: Prober, jobs: Jobs, progress: Progress
    ) -> None:
        super().__init__(space, prober, jobs, progress)
        self._engine = engine
        self._vllm_space = space

    def narrow(self) -> None:
        """Find each TP degree's best settings, with one replica."""
        possible, impossible = self._engine.settings(self._vllm_space, self._prober.adapters)
        self.findings.impossible += impossible
        possible = [config for config in possible if self._within_bounds(config)]
        screened = self._rates("screening settings", [self._screen_job(config) for config in possible])
        by_tp = {tp: most_rate(_of(screened, tp)) for tp in sorted({trial.config.tp for trial in screened})}
        kept = [trial for best in by_tp.values() for trial in best[:KEPT_SETTINGS]]
        work = [self._window_job(trial) for trial in kept if trial.sustainable_rps > 0]
        known = {trial.config: trial for trial in (*screened, *self._rates("the best settings", work))}
        again = [known[trial.config] for trial in kept]
        self._settings = {tp: most_rate(_of(again, tp)) for tp in by_tp}

    def _screen_job(self, config: ServingConfig) -> RateJob:
        guess_rps = SCREEN_GUESS * self._ceiling_rps[config]
        return self._rate_job((config,), "screen", guess_rps, SCREEN_TOLERANCE, 0.5)


def _of(trials: list[Trial], tp: int) -> list[Trial]:
    return [trial for trial in trials if trial.config.tp == tp]


def recommend_vllm(
    question: Question,
    engine: VllmEngine,
    *,
    workers: int | None = None,
    timeout_s: float | None = None,
    progress: Progress | None = None,
) -> VllmPlan:
    """Search and answer. question: its space is a VllmSpace; its profile is not looked at. Raises RuntimeError as `recommend`."""
    space = cast(VllmSpace, question.space)
    prober = Prober(
        workload=Workload.of(question.trace),
        slo=question.slo,
        adapters=question.specs,
        price=engine.price,
        simulate=engine.simulate,
        seed=question.seed,
    )
    tell = progress or (lambda stage, done, total: None)
    with Workers(Runner(prober), workers or cores(), timeout_s) as jobs:
        search = VllmSearch(engine, space, prober, jobs, tell)
        search.narrow()
        search.whole_trace()
        search.fewest_gpus()
        search.at_rate(question.show)
        search.findings.timed_out = jobs.timed_out
        if not search.findings.trials and jobs.timed_out:
            raise RuntimeError("time was up before any configuration was tried; give a longer --timeout-s")
    plan = _plan(question, engine, prober, search.findings)
    chosen = {"recommended": plan.recommended, "fewest_gpus": plan.fewest_gpus}
    exports = {
        name: " ".join(vllm_flags(choice.config, question.specs))
        for name, choice in chosen.items()
        if choice is not None
    }
    return VllmPlan(plan, exports)


def _plan(question: Question, engine: VllmEngine, prober: Prober, findings: Findings) -> Plan:
    """Choose among the findings, as `planner.recommend` does."""
    ranked, rate_rps = findings.ranked, findings.rate_rps
    able = [trial for trial in ranked if trial.meets(rate_rps)]
    fewest = None if findings.fewest is None else findings.trials[findings.fewest]
    if question.objective == "min-gpus":
        able = fewest_gpus(able)
    best = next(iter(able), None)
    nearest = ranked[0] if best is None and ranked else None
    main = [trial for trial in (best, fewest, nearest) if trial is not None]
    taken = {trial.config for trial in main}
    others = list(
        {t.config: t for t in (*able, *ranked) if t.at_rate is not None and t.config not in taken}.values()
    )[: question.show]
    maker = _Maker(question, engine, prober, rate_rps)
    base = question.space.base
    return Plan(
        objective=question.objective,
        gpus=question.space.gpus,
        rate_rps=rate_rps,
        requests=len(question.trace),
        recommended=maker.choice(best) if best else None,
        fewest_gpus=maker.choice(fewest) if best and fewest else None,
        nearest=maker.choice(nearest) if nearest else None,
        alternatives=tuple(maker.choice(trial) for trial in others),
        slo=question.slo,
        assumptions=tuple(engine.assumptions(question.trace, question.adapters, engine.step_error(base))),
        warnings=tuple(
            engine.warnings(
                question.trace,
                base,
                [*main, *others],
                timed_out=findings.timed_out,
                priced=base.gpu.lower() in question.prices,
            )
        ),
        retraining=(),
        trials=tuple(findings.trials.values()),
        impossible=tuple(findings.impossible),
    )


@dataclass(frozen=True, slots=True)
class _Maker:
    """Makes choices of trials."""

    question: Question
    engine: VllmEngine
    prober: Prober
    rate_rps: float

    def choice(self, trial: Trial) -> Choice:
        """Return what is predicted of a trial's configuration."""
        if trial.at_rate is None:  # time was up
            trial = trial.with_probe(self.prober(trial.config, "window", 1.0, watch=True), "window")
        probe = trial.at_rate
        assert probe is not None
        price = self.question.prices.get(trial.config.gpu.lower())
        return Choice(
            config=trial.config,
            predicted=self._predicted(trial),
            sustainable_rps=trial.sustainable_rps,
            judged_on=trial.piece,
            predicted_on=trial.rate_piece or "window",
            memory_per_gpu_bytes=self._memory(trial),
            bottleneck=trial.bottleneck,
            cost_usd_per_hour=None if price is None else price * trial.config.gpus,
            meets_slo=probe.meets,
            misses=None if probe.meets else probe.binding,
        )

    def _predicted(self, trial: Trial) -> dict[str, Prediction]:
        probe = trial.at_rate
        assert probe is not None
        provenance = probe.provenance or "extrapolated"
        load = self.rate_rps / trial.sustainable_rps if trial.sustainable_rps > 0 else 1.0
        share = 1.0 if probe.extrapolated_share is None else probe.extrapolated_share
        error = error_of(self.engine.step_error(trial.config), share)
        values = predictions(probe.metrics, provenance, error, load)
        return values | {"sustainable_rps": rate(trial.sustainable_rps, provenance, error)}

    def _memory(self, trial: Trial) -> dict[str, int]:
        memory = self.engine.memory(trial.config, self.prober.adapters)
        probe = trial.at_best or trial.at_rate
        assert probe is not None
        kv = round(probe.kv_pages_max * memory.num_pages) * memory.page_bytes
        return {
            "total": memory.total_bytes,
            "weights": memory.weights_bytes,
            "activations": 0,  # vLLM's log does not tell them from the runtime
            "runtime": memory.runtime_bytes,
            "adapters": memory.activations_bytes,  # all slots, used or not
            "kv": kv,
            "free": memory.pool_bytes - kv,
            "unused": memory.unused_bytes,
        }
