"""How much rate the search gives away against trying everything, on small spaces; writes the table of docs/planning.md.

    python -m docs.measured.regret [--spaces 20] [--write]

A space: a stretch of a workload, an SLO, GPUs, and a few values a dimension. Exhaustively, every configuration of it (settings × policies ×
routing, with all GPUs in replicas) gets its highest sustainable rate on the whole trace, to within 0.5 %; the search's choice gets the same.
Attainment is not monotone in the rate: with some hundred requests it crosses the bound several times within 4 %, and which crossing a search
ends at is chance. So where the two differ by more than a tie, both get the mean of what searches from STARTS end at.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.adapter import adapters_of_trace
from engine.blueprint import blueprint
from engine.config import ServingConfig
from engine.errors import UserError
from engine.model_shape import load_model_shape
from planner.bounds import bounds
from planner.jobs import RateJob, Runner
from planner.pricing import Pricing
from planner.probe import Prober
from planner.search import search
from planner.space import Space, choices, settings
from planner.trial import TIE, most_rate
from planner.variants import Variants
from planner.workers import Workers
from planner.workload import Workload, max_model_len
from sim.profile import Profile, find_profile, load_profile
from sim.simulate import simulate
from traces import Trace
from traces.assign import Assignment, assign
from traces.metrics import Slo
from traces.synth import S_LORA, Quantiles, Uniform, synthesize
from traces.synth import Workload as Arrivals

PAGE = Path(__file__).parent.parent / "planning.md"
BEGIN, END = "<!-- regret: begin -->", "<!-- regret: end -->"
TOLERANCE = 0.005
STARTS = (0.9, 0.93, 0.96, 0.99, 1.02, 1.05, 1.08)  # times the rate found

CONVERSATION = Arrivals(
    rate_rps=6.0,
    cv=1.1,
    prompt=Quantiles(tokens=(2, 220, 1015, 4074, 4085, 4122, 6000), mean=1195),
    output=Quantiles(tokens=(7, 50, 115, 421, 448, 598, 1000), mean=202),
)
SHORT = Arrivals(rate_rps=10.0, cv=1.0, prompt=S_LORA.prompt, output=S_LORA.output)
BURSTS = Arrivals(rate_rps=8.0, cv=4.0, prompt=Uniform(low=8, high=512), output=Uniform(low=8, high=512))
PROMPTS = Arrivals(rate_rps=4.0, cv=1.0, prompt=Uniform(low=500, high=4000), output=Uniform(low=4, high=60))


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A small space: what is served, what is promised, what may be chosen."""

    name: str
    arrivals: Arrivals
    adapters: int
    mix: tuple[int, ...]
    slo: Slo
    gpus: int
    options: dict[str, Any]
    seed: int = 1

    def trace(self, requests: int) -> Trace:
        """Return the requests."""
        how = Assignment(adapters=self.adapters, rank_mix=self.mix, seed=self.seed)
        return assign(synthesize(self.arrivals, requests, self.seed), how)


def cases() -> list[Case]:
    """Return twenty spaces: four workloads × five sets of choices."""
    workloads = {
        "conversation": (CONVERSATION, 50, (8, 16, 32, 64, 128)),
        "short": (SHORT, 200, (16,)),
        "bursts": (BURSTS, 32, (8, 64)),
        "prompts": (PROMPTS, 100, (16, 128)),
    }
    plain: dict[str, Any] = {"policies": {}, "routing": {}}
    sets: dict[str, tuple[int, Slo, dict[str, Any]]] = {
        "limits": (1, Slo(), {"tp": (1,), **plain}),
        "tp": (2, Slo(ttft_s=0.3), {"tp": (1, 2), "max_num_seqs": (64, 256), **plain}),
        "policies": (
            1,
            Slo(),
            {
                "tp": (1,),
                "max_num_seqs": (64, 256),
                "max_num_batched_tokens": (1024,),
                "policies": {"scheduler": ("fcfs", "clustered", "slo"), "max_adapters_per_step": (None, 16)},
                "routing": {},
            },
        ),
        "routing": (
            2,
            Slo(),
            {
                "tp": (1,),
                "max_num_seqs": (128,),
                "max_num_batched_tokens": (1024, 2048),
                "policies": {},
                "routing": {
                    "router": ("least_loaded", "round_robin", "adapter_affinity"),
                    "placement": ("everywhere", "partitioned"),
                },
            },
        ),
        "tight": (
            2,
            Slo(ttft_s=0.2, tpot_s=0.015),
            {
                "tp": (1, 2),
                "max_num_seqs": (32, 128),
                "max_num_batched_tokens": (512, 2048),
                "lora_sharding": ("replicated",),
                "policies": {"scheduler": ("fcfs", "slo")},
                "routing": {},
            },
        ),
    }
    return [
        Case(
            name=f"{workload}, {kind}",
            arrivals=arrivals,
            adapters=count,
            mix=mix,
            slo=slo,
            gpus=gpus,
            options=options,
        )
        for workload, (arrivals, count, mix) in workloads.items()
        for kind, (gpus, slo, options) in sets.items()
    ]


@dataclass(frozen=True, slots=True, kw_only=True)
class Regret:
    """What a search gave away: against what trying everything recommends by the same rules, and against the highest rate of all."""

    name: str
    configurations: int
    exhaustive_s: float
    search_s: float
    chosen_rps: float
    recommended_rps: float
    highest_rps: float

    @property
    def regret(self) -> float:
        """Relative to what trying everything recommends (ties within 1 % go to the plainer); never below 0."""
        return max(0.0, 1 - self.chosen_rps / self.recommended_rps)

    @property
    def below_highest(self) -> float:
        """Relative to the highest rate of all."""
        return max(0.0, 1 - self.chosen_rps / self.highest_rps)


def measure(case: Case, profile: Profile, requests: int) -> Regret:
    """Search a space, try all of it, and compare."""
    trace = case.trace(requests)
    base = ServingConfig(
        max_model_len=max_model_len(trace, load_model_shape("llama-3.1-8b")),
        page_tokens=profile.page_tokens,
        graph_max_tokens=profile.graph_max_tokens,
    )
    space = Space(gpus=case.gpus, base=base, **case.options)
    prober = Prober(
        workload=Workload.of(trace),
        slo=case.slo,
        adapters=adapters_of_trace(trace.adapters),
        price=Pricing(profile),
        simulate=simulate,
    )
    began_s = time.process_time()
    with Workers(Runner(prober), 1) as jobs:
        found = search(space, prober, jobs, show=0)
    searched_s = time.process_time() - began_s
    chosen = found.ranked[0].config
    began_s = time.process_time()
    trials = [_rate(prober, config) for config in everything(space, prober, case.slo)]
    ranked = most_rate([trial for trial in trials if trial is not None])
    known = {trial.config: trial.sustainable_rps for trial in ranked}
    exhaustive_s = time.process_time() - began_s
    best = ranked[0].config
    if known[chosen] < known[best] * (1 - TIE):
        known |= {config: _mean_rps(prober, config, known[config]) for config in (chosen, best)}
    return Regret(
        name=case.name,
        configurations=len(ranked),
        exhaustive_s=exhaustive_s,
        search_s=searched_s,
        chosen_rps=known[chosen],
        recommended_rps=known[best],
        highest_rps=max(trial.sustainable_rps for trial in ranked),
    )


def everything(space: Space, prober: Prober, slo: Slo) -> list[ServingConfig]:
    """Return every configuration of a space, with all GPUs in replicas."""
    variants = Variants.of(prober.workload.trace, slo)
    possible, _ = settings(space, prober.adapters)
    found = []
    for config in possible:
        whole = config.with_changes(replicas=space.most_replicas(config.tp))
        values = choices(space.policies, prober.adapters)
        routing = choices(space.routing, prober.adapters)
        values |= routing if whole.replicas > 1 else {name: given[:1] for name, given in routing.items()}
        for chosen in itertools.product(*values.values()):
            try:
                varied = variants.vary(whole, **dict(zip(values, chosen, strict=True)))
                blueprint(varied, prober.adapters)
            except UserError:
                continue
            found.append(varied)
    return list(dict.fromkeys(found))


def _mean_rps(prober: Prober, config: ServingConfig, near_rps: float) -> float:
    """Return the mean of the rates at which searches from several starts end."""
    found = [_rate(prober, config, start * near_rps, 0.02) for start in STARTS]
    return statistics.fmean(trial.sustainable_rps for trial in found)


def _rate(prober: Prober, config: ServingConfig, guess_rps: float | None = None, reach: float = 0.3) -> Any:
    limit = bounds(prober.workload.trace, config.with_changes(replicas=1), prober.price(config), prober.slo)
    if limit.reason(prober.slo) is not None:
        return None
    ceiling_rps = limit.rate_rps * config.replicas
    job = RateJob(
        configs=(config,),
        piece="trace",
        guess_rps=guess_rps or 0.6 * ceiling_rps,
        ceiling_rps=(ceiling_rps,),
        tolerance=TOLERANCE,
        reach=reach,
    )
    return job.run(prober)[0]


def table(rows: list[Regret]) -> list[str]:
    """Return the rows as lines of a page."""
    lines = [
        "| space | configurations | search's choice, req/s | recommended by trying all | highest of all | regret | below the highest "
        "| CPU s, search | all |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        lines.append(
            f"| {row.name} | {row.configurations} | {row.chosen_rps:.2f} | {row.recommended_rps:.2f} | {row.highest_rps:.2f} | "
            f"{row.regret:.1%} | {row.below_highest:.1%} | {row.search_s:.1f} | {row.exhaustive_s:.1f} |"
        )
    regrets = [row.regret for row in rows]
    below = [row.below_highest for row in rows]
    lines += [
        "",
        f"Regret over {len(rows)} spaces: median {statistics.median(regrets):.1%}, worst {max(regrets):.1%}; below the highest rate of all: "
        f"median {statistics.median(below):.1%}, worst {max(below):.1%}.",
    ]
    return lines


def main() -> None:
    """Measure, print, and with --write put the table into docs/planning.md."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--spaces", type=int, default=20)
    parser.add_argument("--first", type=int, default=0, help="leave out so many spaces")
    parser.add_argument("--requests", type=int, default=600)
    parser.add_argument("--write", action="store_true")
    given = parser.parse_args()
    profile = load_profile(find_profile(ServingConfig()))
    rows = []
    for case in cases()[given.first : given.first + given.spaces]:
        rows.append(measure(case, profile, given.requests))
        print(table(rows[-1:])[2], flush=True)
    lines = table(rows)
    print("\n".join(lines[-1:]))
    if given.write:
        page = PAGE.read_text(encoding="utf-8")
        before, rest = page.split(BEGIN)
        after = rest.split(END)[1]
        PAGE.write_text(f"{before}{BEGIN}\n" + "\n".join(lines) + f"\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
