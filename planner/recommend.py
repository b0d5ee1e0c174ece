"""From a trace and an SLO to a plan."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

from engine.adapter import AdapterSpec, adapters_of_trace
from engine.blueprint import blueprint
from engine.config import ServingConfig
from engine.errors import UserError
from planner import assumptions as said
from planner.intervals import Prediction, error_of, predictions, rate, step_error
from planner.jobs import Runner
from planner.plan import Choice, Objective, Plan
from planner.probe import Prober, Simulate
from planner.retraining import retrainings
from planner.search import Findings, Progress, search
from planner.space import Space
from planner.trial import Trial, fewest_gpus
from planner.workers import Workers, cores
from planner.workload import Workload
from sim.costs import costs_for
from sim.profile import Profile
from sim.simulate import simulate as run_simulation
from traces import Trace
from traces.metrics import Slo


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """What is asked.

    trace: at the rate to plan for. adapters: what the trace's adapters are; None: dense LoRA of its ranks. prices:
    US dollars per GPU-hour. show: alternatives beside the recommendation. Raises UserError for what cannot be
    planned: requests at one instant, adapters that are not given or that the engine cannot run.
    """

    trace: Trace
    space: Space
    slo: Slo
    profile: Profile
    adapters: Mapping[str, AdapterSpec] | None = None
    objective: Objective = "goodput"
    prices: Mapping[str, float]
    show: int = 5
    seed: int = 42

    def __post_init__(self) -> None:
        Workload.of(self.trace)
        for spec in self.specs.values():
            if spec.kind == "dynamic":
                raise UserError(f"adapter {spec.name!r}: kind {spec.kind!r} is not supported yet")

    @property
    def specs(self) -> dict[str, AdapterSpec]:
        """What the trace's adapters are."""
        return adapters_of_trace(self.trace.adapters, self.adapters)


def recommend(
    question: Question,
    *,
    workers: int | None = None,
    timeout_s: float | None = None,
    progress: Progress | None = None,
    simulate: Simulate = run_simulation,
) -> Plan:
    """Search the question's space and answer.

    workers: processes (None: all cores); the answer does not depend on it. timeout_s: after so long, the best so
    far. Raises RuntimeError where there is none yet.
    """
    prober = Prober(
        workload=Workload.of(question.trace),
        slo=question.slo,
        adapters=question.specs,
        price=partial(costs_for, question.profile),
        simulate=simulate,
        seed=question.seed,
    )
    with Workers(Runner(prober), workers or cores(), timeout_s) as jobs:
        findings = search(question.space, prober, jobs, show=question.show, progress=progress)
        if not findings.trials and jobs.timed_out:
            raise RuntimeError("time was up before any configuration was tried; give a longer --timeout-s")
    return _plan(question, prober, findings, progress)


def _plan(question: Question, prober: Prober, findings: Findings, progress: Progress | None) -> Plan:
    """Choose among the findings."""
    rate_rps, picked = findings.rate_rps, pick(question, findings)
    best, fewest, nearest = picked.best, picked.fewest, picked.nearest
    maker = Maker(question, prober, rate_rps)
    error = maker.step_error(question.space.base)
    retraining = []
    if best is not None and not findings.timed_out:
        if progress is not None:
            progress("other adapters", 0, 1)
        retraining = retrainings(prober, best, findings.trials)
    return Plan(
        objective=question.objective,
        gpus=question.space.gpus,
        rate_rps=rate_rps,
        requests=len(question.trace),
        recommended=maker.choice(best),
        fewest_gpus=maker.choice(fewest if best is not None else None),
        nearest=maker.choice(nearest),
        alternatives=tuple(choice for trial in picked.others if (choice := maker.choice(trial)) is not None),
        slo=question.slo,
        assumptions=tuple(said.assumptions(question.trace, question.adapters, question.profile, error)),
        warnings=tuple(
            said.warnings(
                question.trace,
                question.space.base,
                question.profile,
                picked.shown,
                timed_out=findings.timed_out,
                priced=question.space.base.gpu.lower() in question.prices,
            )
        ),
        retraining=tuple(retraining),
        trials=tuple(findings.trials.values()),
        impossible=tuple(findings.impossible),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Picked:
    """The trials that a plan shows: the best and the one of fewest GPUs, or the nearest miss; and some of the others."""

    best: Trial | None
    fewest: Trial | None
    nearest: Trial | None
    others: list[Trial]

    @property
    def shown(self) -> list[Trial]:
        """All of them."""
        return [trial for trial in (self.best, self.fewest, self.nearest, *self.others) if trial is not None]


def pick(question: Question, findings: Findings) -> Picked:
    """Choose among the findings."""
    ranked = findings.ranked
    able = [trial for trial in ranked if trial.meets(findings.rate_rps)]
    fewest = None if findings.fewest is None else findings.trials[findings.fewest]
    if question.objective == "min-gpus":
        able = fewest_gpus(able)
    best = next(iter(able), None)
    nearest = ranked[0] if best is None and ranked else None
    by_config = {trial.config: trial for trial in (*able, *ranked) if trial.at_rate is not None}
    for main in (best, nearest, fewest):
        if main is not None:
            by_config.pop(main.config, None)
    return Picked(best=best, fewest=fewest, nearest=nearest, others=list(by_config.values())[: question.show])


class Maker:
    """Makes choices of trials. Another engine's differs in how far its steps are off, and in what its memory holds."""

    def __init__(self, question: Question, prober: Prober, rate_rps: float) -> None:
        self._question = question
        self._prober = prober
        self._rate_rps = rate_rps

    def step_error(self, config: ServingConfig) -> float:
        """Return how far off the steps of a configuration are, relative."""
        return step_error(costs_for(self._question.profile, config).report)

    def choice(self, trial: Trial | None) -> Choice | None:
        """Return what is predicted of a trial's configuration."""
        if trial is None:
            return None
        if trial.at_rate is None:  # time was up
            trial = trial.with_probe(self._prober(trial.config, "window", 1.0, watch=True), "window")
        probe = trial.at_rate
        assert probe is not None
        price = self._question.prices.get(trial.config.gpu.lower())
        return Choice(
            config=trial.config,
            predicted=self._predicted(trial),
            sustainable_rps=trial.sustainable_rps,
            judged_on=trial.piece,
            predicted_on=trial.rate_piece or "window",
            memory_per_gpu_bytes=self.memory(trial),
            bottleneck=trial.bottleneck,
            cost_usd_per_hour=None if price is None else price * trial.config.gpus,
            meets_slo=probe.meets,
            misses=None if probe.meets else probe.binding,
        )

    def _predicted(self, trial: Trial) -> dict[str, Prediction]:
        probe = trial.at_rate
        assert probe is not None
        provenance = probe.provenance or "extrapolated"
        load = self._rate_rps / trial.sustainable_rps if trial.sustainable_rps > 0 else 1.0
        share = 1.0 if probe.extrapolated_share is None else probe.extrapolated_share
        error = error_of(self.step_error(trial.config), share)
        values = predictions(probe.metrics, provenance, error, load)
        return values | {"sustainable_rps": rate(trial.sustainable_rps, provenance, error)}

    def memory(self, trial: Trial) -> dict[str, int]:
        """Return what one GPU's memory holds at its fullest; it adds up to the whole."""
        memory = blueprint(trial.config, self._prober.adapters).memory
        probe = trial.at_best or trial.at_rate
        assert probe is not None
        adapters = round(probe.adapter_pages_max * memory.num_pages) * memory.page_bytes
        kv = min(
            round(probe.kv_pages_max * memory.num_pages) * memory.page_bytes, memory.pool_bytes - adapters
        )
        return {
            "total": memory.total_bytes,
            "weights": memory.weights_bytes,
            "activations": memory.activations_bytes,
            "runtime": memory.runtime_bytes,
            "adapters": adapters,
            "kv": kv,
            "free": memory.pool_bytes - adapters - kv,
            "unused": memory.unused_bytes,
        }
