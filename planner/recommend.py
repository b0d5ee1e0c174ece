"""From a trace and an SLO to a plan."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from engine.adapter import AdapterSpec, adapters_of_trace
from engine.blueprint import blueprint
from engine.config import ServingConfig
from planner import assumptions as said
from planner.cluster import ClusterWorkers
from planner.headroom import Resource, resources
from planner.jobs import Answer, Job, Jobs, Runner
from planner.journal import Journal
from planner.paced import Paced, PacedJob, StepErrors, predicted
from planner.plan import Choice, Objective, Plan, RunnerUp
from planner.pricing import Pricing
from planner.probe import Prober, Simulate
from planner.search import Findings, Progress, search
from planner.space import Space
from planner.trial import Trial, fewest_gpus
from planner.workers import Workers, cores
from planner.workload import Workload
from sim.costs import costs_for
from sim.intervals import Interval
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
        _ = self.specs  # raises UserError where one of the trace is not given

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
    journal: Journal | None = None,
    cluster: str | None = None,
) -> Plan:
    """Search the question's space and answer.

    workers: processes (None: all cores); the answer does not depend on it. timeout_s: after so long, the best so
    far. journal: where answers are kept, and those of an earlier try are. cluster: the address of a Dask cluster that
    runs the trials instead. After Ctrl-C: the best so far, `interrupted`. Raises RuntimeError where there is none yet.
    """
    prober = Prober(
        workload=Workload.of(question.trace),
        slo=question.slo,
        adapters=question.specs,
        price=Pricing(question.profile),
        simulate=simulate,
        seed=question.seed,
    )
    with _runner(prober, workers, timeout_s, cluster) as runner:
        jobs: Jobs = runner if journal is None else journal.over(runner)
        findings = search(
            question.space,
            prober,
            jobs,
            show=question.show,
            progress=progress,
            front=question.objective == "pareto",
        )
        paced = at_paces(question, findings, jobs, progress)
    if not findings.trials and findings.interrupted:
        raise KeyboardInterrupt
    if not findings.trials and findings.timed_out:
        raise RuntimeError("time was up before any configuration was tried; give a longer --timeout-s")
    return _plan(question, prober, findings, paced)


def at_paces(
    question: Question, findings: Findings, jobs: Jobs, progress: Progress | None = None
) -> dict[ServingConfig, Paced]:
    """Simulate what will be shown with faster and slower steps, as far as time, or Ctrl-C, allows."""
    if findings.interrupted:
        return {}
    configs = list(dict.fromkeys(trial.config for trial in pick(question, findings).shown))
    done = 0

    def note() -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress("intervals", done, len(configs))

    try:
        answers = jobs.run([PacedJob(config=config) for config in configs], note)
    except KeyboardInterrupt:
        findings.interrupted = True
        return {}
    found = zip(configs, answers, strict=True)
    return {config: answer for config, answer in found if isinstance(answer, Paced)}


def _runner(
    prober: Prober, workers: int | None, timeout_s: float | None, cluster: str | None
) -> Workers[Job, Answer] | ClusterWorkers[Job, Answer]:
    if cluster is not None:
        return ClusterWorkers(Runner(prober), cluster, timeout_s)
    return Workers(Runner(prober), workers or cores(), timeout_s)


def _plan(
    question: Question, prober: Prober, findings: Findings, paced: Mapping[ServingConfig, Paced]
) -> Plan:
    """Choose among the findings."""
    rate_rps, picked = findings.rate_rps, pick(question, findings)
    best, fewest, nearest = picked.best, picked.fewest, picked.nearest
    maker = Maker(question, prober, paced)
    errors = maker.step_errors(question.space.base)
    chosen = maker.choice(best)
    others = tuple(choice for trial in picked.others if (choice := maker.choice(trial)) is not None)
    return Plan(
        objective=question.objective,
        gpus=question.space.gpus,
        rate_rps=rate_rps,
        requests=len(question.trace),
        recommended=chosen,
        fewest_gpus=maker.choice(fewest if best is not None else None),
        nearest=maker.choice(nearest),
        alternatives=others,
        slo=question.slo,
        assumptions=tuple(said.assumptions(question.trace, question.adapters, question.profile, errors)),
        warnings=tuple(
            said.warnings(
                question.trace,
                question.space.base,
                question.profile,
                picked.shown,
                timed_out=findings.timed_out or findings.interrupted,
                priced=question.space.base.gpu.lower() in question.prices,
            )
        ),
        retraining=tuple(findings.retraining),
        trials=tuple(findings.trials.values()),
        impossible=tuple(findings.impossible),
        interrupted=findings.interrupted,
        runner_up=None if chosen is None else runner_up(chosen, others),
        front=tuple(choice for trial in picked.front if (choice := maker.choice(trial)) is not None),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Picked:
    """The trials that a plan shows: the best and the one of fewest GPUs, or the nearest miss; some of the others; and the Pareto front."""

    best: Trial | None
    fewest: Trial | None
    nearest: Trial | None
    others: list[Trial]
    front: list[Trial]

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
    by_config = {
        trial.config: trial for trial in (*able, *ranked, *findings.compared) if trial.at_rate is not None
    }
    for main in (best, nearest, fewest):
        if main is not None:
            by_config.pop(main.config, None)
    front = pareto_front(list(findings.trials.values())) if question.objective == "pareto" else []
    return Picked(
        best=best,
        fewest=fewest,
        nearest=nearest,
        others=list(by_config.values())[: question.show],
        front=front,
    )


def pareto_front(trials: list[Trial]) -> list[Trial]:
    """Return the trials with all traffic that no other beats in GPUs and in sustainable rate, by GPUs."""
    known = [trial for trial in trials if trial.piece == "trace" and trial.sustainable_rps > 0]
    front: list[Trial] = []
    for trial in sorted(known, key=lambda trial: (trial.config.gpus, -trial.sustainable_rps)):
        if not front or trial.sustainable_rps > front[-1].sustainable_rps:
            front.append(trial)
    return front


def runner_up(best: Choice, others: Sequence[Choice]) -> RunnerUp | None:
    """Return the best of the others, and what it would take to prefer it to the recommendation."""
    second = next(iter(others), None)
    if second is None:
        return None
    ours, theirs = best.predicted["sustainable_rps"], second.predicted["sustainable_rps"]
    takes = []
    if theirs.value < ours.value and theirs.value > 0:
        takes.append(
            f"steps {ours.value / theirs.value - 1:.1%} faster than predicted, or those of the recommendation slower"
        )
    overlap = theirs.high >= ours.low and ours.high >= theirs.low
    if overlap and best.judged_on == second.judged_on:
        takes.append("a measurement: the intervals of the two rates overlap")
    if second.judged_on != best.judged_on:
        takes.append(f"a look at the whole trace: its rate is of the {second.judged_on} alone")
    if second.config.gpus < best.config.gpus:
        takes.append(f"fewer GPUs: it takes {second.config.gpus}, not {best.config.gpus}")
    if second.config.gpus > best.config.gpus:
        takes.append(f"GPUs to spare: it takes {second.config.gpus}, not {best.config.gpus}")
    for name, label in (("ttft_p95_s", "TTFT"), ("tpot_p95_s", "TPOT")):
        mine, its = best.predicted[name].value, second.predicted[name].value
        if its < 0.95 * mine:
            takes.append(f"a tighter bound on {label}: its p95 is {its * 1e3:.3g} ms, not {mine * 1e3:.3g}")
    return RunnerUp(config=second.config, sustainable_rps=second.sustainable_rps, would_take=tuple(takes))


def _missing(by_adapter: Mapping[str, float], wanted: float) -> dict[str, float]:
    """Return who misses the attainment, the worst first."""
    missing = [(share, name) for name, share in by_adapter.items() if share < wanted]
    return {name: share for share, name in sorted(missing)}


class Maker:
    """Makes choices of trials. Another engine's differs in how far its steps are off, and in what its memory holds.

    paced: what is known already of configurations at several paces.
    """

    def __init__(
        self, question: Question, prober: Prober, paced: Mapping[ServingConfig, Paced] | None = None
    ) -> None:
        self._question = question
        self._prober = prober
        self._paced = paced or {}

    def step_errors(self, config: ServingConfig) -> StepErrors:
        """Return how far off the steps of a configuration are."""
        return StepErrors(report=costs_for(self._question.profile, config).report)

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
            resources=tuple(self.resources(trial)),
            adapters_missing=_missing(probe.by_adapter, self._question.slo.attainment),
            cost_usd_per_million_tokens=self._per_million(trial, price),
        )

    def resources(self, trial: Trial) -> list[Resource]:
        """Return what is used at the highest sustainable rate."""
        if trial.at_best is None:
            return []
        workload = self._prober.workload
        trace = workload.piece(trial.piece)
        return resources(trace, trial.config, self._prober.adapters, trial.at_best, trial.sustainable_rps)

    def _per_million(self, trial: Trial, price: float | None) -> float | None:
        columns = self._question.trace.columns
        tokens = float((columns.prompt_tokens + columns.output_tokens).mean())
        if price is None or not trial.sustainable_rps:
            return None
        return price * trial.config.gpus / 3600 / (trial.sustainable_rps * tokens) * 1e6

    def _predicted(self, trial: Trial) -> dict[str, Interval]:
        probe = trial.at_rate
        assert probe is not None
        paced = self._paced.get(trial.config) or PacedJob(config=trial.config).run(self._prober)
        return predicted(probe, paced, self.step_errors(trial.config), trial.sustainable_rps)

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
            "weights": memory.weights_bytes + memory.merge_bytes + memory.expert_bytes,
            "activations": memory.activations_bytes,
            "runtime": memory.runtime_bytes,
            "adapters": adapters,
            "kv": kv,
            "free": memory.pool_bytes - adapters - kv,
            "unused": memory.unused_bytes,
        }
