"""One configuration explained: what it sustains, what breaks first, whose SLO it misses, how many adapters it has room for."""

from __future__ import annotations

import sys
from dataclasses import asdict, dataclass
from math import isfinite
from typing import Any

from rich.console import Console

from engine.blueprint import blueprint
from engine.config import ServingConfig
from engine.errors import UserError
from planner import assumptions as said
from planner.bounds import bounds
from planner.headroom import AdapterRoom, adapter_room
from planner.jobs import RateJob
from planner.plan import Choice
from planner.pricing import Pricing
from planner.probe import Prober
from planner.recommend import Maker, Question
from planner.report import choice_lines
from planner.trial import Trial
from planner.workload import Workload
from sim.simulate import simulate

TOLERANCE = 0.01


@dataclass(frozen=True, slots=True, kw_only=True)
class Explanation:
    """What is known of one configuration on a trace."""

    choice: Choice
    rate_rps: float
    bound_rps: float
    room: tuple[AdapterRoom, ...]
    assumptions: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Return the JSON form."""
        return {
            **self.choice.to_json(),
            "trace_rate_rps": self.rate_rps,
            "arithmetic_bound_rps": self.bound_rps,
            "adapters_per_replica": [asdict(item) for item in self.room],
            "assumptions": list(self.assumptions),
        }


def explain(question: Question, config: ServingConfig) -> Explanation:
    """Find one configuration's highest rate by bisection, each try ended when the SLO is out of reach, and simulate it at the trace's own.

    Raises UserError where it cannot run.
    """
    blueprint(config, question.specs)
    prober = Prober(
        workload=Workload.of(question.trace),
        slo=question.slo,
        adapters=question.specs,
        price=Pricing(question.profile),
        simulate=simulate,
        seed=question.seed,
    )
    limit = bounds(question.trace, config.with_changes(replicas=1), prober.price(config), question.slo)
    reason = limit.reason(question.slo)
    if reason is not None:
        raise UserError(f"no rate meets the SLO: {reason}")
    ceiling_rps = limit.rate_rps * config.replicas
    job = RateJob(
        configs=(config,),
        piece="trace",
        guess_rps=0.6 * ceiling_rps,
        ceiling_rps=(ceiling_rps,),
        tolerance=TOLERANCE,
        reach=0.3,
    )
    trial = job.run(prober)[0]
    trial = trial.with_probe(prober(config, "trace", 1.0, watch=True), "trace")
    return _explanation(question, prober, trial, ceiling_rps)


def _explanation(question: Question, prober: Prober, trial: Trial, ceiling_rps: float) -> Explanation:
    maker = Maker(question, prober)
    choice = maker.choice(trial)
    assert choice is not None
    errors = maker.step_errors(trial.config)
    return Explanation(
        choice=choice,
        rate_rps=prober.workload.rate_rps,
        bound_rps=ceiling_rps,
        room=tuple(adapter_room(trial.config, trial.at_best)),
        assumptions=tuple(said.assumptions(question.trace, question.adapters, question.profile, errors)),
    )


def print_explanation(found: Explanation) -> None:
    """Print an explanation on standard output."""
    terminal = sys.stdout.isatty()
    console = Console(file=sys.stdout, highlight=False, no_color=not terminal, width=120)
    config = found.choice.config
    console.print(
        f"TP {config.tp} × {config.replicas} on {config.gpu}, at the trace's {found.rate_rps:.2f} req/s"
    )
    for line in choice_lines(found.choice):
        console.print(line, soft_wrap=True, markup=False)
    console.print(f"arithmetic allows at most {found.bound_rps:.1f} req/s")
    console.print(
        "\nadapters on all seven linears that one replica's GPUs hold, by rank: alone, beside the KV at the highest rate"
    )
    for item in found.room:
        console.print(f"  rank {item.rank:>3}: {item.alone:>6,}  {item.beside_kv:>6,}")
    misses = {name: share for name, share in found.choice.adapters_missing.items() if isfinite(share)}
    if not misses:
        console.print("\nevery adapter's requests meet the SLO's attainment at the trace's rate")
    for note in found.assumptions:
        console.print(f"  - {note}", soft_wrap=True, markup=False)
