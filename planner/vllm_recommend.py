"""From a trace and an SLO to a plan for vLLM: the planner's own search over vLLM's settings, judged by vLLM's simulation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

from engine.config import ServingConfig
from planner.headroom import Resource
from planner.jobs import Runner
from planner.paced import Paced, StepErrors
from planner.plan import Plan
from planner.probe import Prober
from planner.recommend import Maker, Question, at_paces, pick
from planner.search import Findings, Progress, search
from planner.trial import Trial
from planner.vllm import VllmEngine, VllmSpace, vllm_flags
from planner.workers import Workers, cores
from planner.workload import Workload

NORMAL_90 = 1.645  # standard deviations within which nine of ten lie


@dataclass(frozen=True, slots=True)
class VllmPlan:
    """A plan and the commands that serve it."""

    plan: Plan
    exports: dict[str, str]

    def to_json(self) -> dict[str, Any]:
        """Return the plan's JSON form, and `exports`."""
        return self.plan.to_json() | {"engine": "vllm", "exports": self.exports}


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
    with Workers(Runner(prober), workers or cores(), timeout_s) as jobs:
        findings = search(
            space, prober, jobs, show=question.show, progress=progress, settings=engine.settings
        )
        if not findings.trials and jobs.timed_out:
            raise RuntimeError("time was up before any configuration was tried; give a longer --timeout-s")
        paced = at_paces(question, findings, jobs, progress)
    plan = _plan(question, engine, prober, findings, paced)
    chosen = {"recommended": plan.recommended, "fewest_gpus": plan.fewest_gpus}
    exports = {
        name: " ".join(vllm_flags(choice.config, question.specs))
        for name, choice in chosen.items()
        if choice is not None
    }
    return VllmPlan(plan, exports)


def _plan(
    question: Question,
    engine: VllmEngine,
    prober: Prober,
    findings: Findings,
    paced: Mapping[ServingConfig, Paced],
) -> Plan:
    picked = pick(question, findings)
    best, fewest, nearest = picked.best, picked.fewest, picked.nearest
    maker = _Maker(question, engine, prober, paced)
    base = question.space.base
    return Plan(
        objective=question.objective,
        gpus=question.space.gpus,
        rate_rps=findings.rate_rps,
        requests=len(question.trace),
        recommended=maker.choice(best),
        fewest_gpus=maker.choice(fewest if best is not None else None),
        nearest=maker.choice(nearest),
        alternatives=tuple(choice for trial in picked.others if (choice := maker.choice(trial)) is not None),
        slo=question.slo,
        assumptions=tuple(engine.assumptions(question.trace, question.adapters, engine.step_error(base))),
        warnings=tuple(
            engine.warnings(
                question.trace,
                base,
                picked.shown,
                timed_out=findings.timed_out,
                priced=base.gpu.lower() in question.prices,
            )
        ),
        retraining=(),  # vLLM pads every adapter to one rank: see --max-lora-rank
        trials=tuple(findings.trials.values()),
        impossible=tuple(findings.impossible),
    )


class _Maker(Maker):
    """Makes choices of trials with vLLM."""

    def __init__(
        self, question: Question, engine: VllmEngine, prober: Prober, paced: Mapping[ServingConfig, Paced]
    ) -> None:
        super().__init__(question, prober, paced)
        self._engine = engine

    def step_errors(self, config: ServingConfig) -> StepErrors:
        """As of Maker."""
        return StepErrors(report=None, sd=self._engine.step_error(config) / NORMAL_90)

    def resources(self, trial: Trial) -> list[Resource]:
        """As of Maker: what our engine's resources are is not told of vLLM."""
        return []

    def memory(self, trial: Trial) -> dict[str, int]:
        """As of Maker."""
        memory = self._engine.memory(trial.config, self._prober.adapters)
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
