"""How many adapters of which rank one replica serves: its highest rate over a grid of both, and why there is none."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from engine.adapter import AdapterSpec, adapters_of_trace
from engine.blueprint import blueprint
from engine.config import ServingConfig
from engine.errors import UserError
from planner.adapter_point import RANKS, adapter_point
from planner.bounds import bounds
from planner.jobs import RateJob
from planner.pricing import Pricing
from planner.probe import Prober
from planner.workers import Workers, cores
from planner.workload import Workload
from sim.profile import Profile
from sim.simulate import simulate
from traces import Trace
from traces.assign import Assignment, assign
from traces.describe import describe
from traces.metrics import Slo

COUNTS = (10, 50, 200, 1000)
TOLERANCE = 0.05
USUAL_ZIPF = 0.9  # where the trace has too few adapters to tell

Tell = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One number of adapters of one rank. reason: why nothing can be served; else None. pool_share: of the GPU's
    pages that all of them together would take (above 1: they take turns)."""

    adapters: int
    rank: int
    rps_per_gpu: float
    pool_share: float | None
    reason: str | None
    current: bool

    def to_json(self) -> dict[str, Any]:
        """Return the JSON form."""
        return asdict(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class GridAsked:
    """One replica's configuration on a trace whose adapters are replaced."""

    trace: Trace
    config: ServingConfig
    slo: Slo
    profile: Profile
    seed: int = 42


def adapter_grid(
    asked: GridAsked, *, workers: int | None = None, tell: Tell | None = None
) -> list[dict[str, Any]]:
    """Find the highest rate of one replica in every cell, on the busiest requests of the trace with its adapters drawn anew.

    Popularity has the trace's own exponent. `current` marks the cell nearest to the trace's number of adapters and their mean rank by requests.
    """
    tell = tell or (lambda stage, done, total: None)
    config = asked.config.with_changes(replicas=1, lora_sharding=asked.config.lora_sharding)
    here = adapter_point(asked.trace)
    counts = sorted({*COUNTS, *([here[0]] if here else [])})
    zipf_s = describe(asked.trace).adapters.zipf_s
    cases = [(count, rank) for count in counts for rank in RANKS]
    work = CellWork(
        window=Workload.of(asked.trace).window,
        config=config,
        slo=asked.slo,
        pricing=Pricing(asked.profile),
        zipf_s=USUAL_ZIPF if zipf_s is None else min(3.0, zipf_s),
        seed=asked.seed,
        here=here,
    )
    done = 0

    def note() -> None:
        nonlocal done
        done += 1
        tell("simulating adapters × rank", done, len(cases))

    tell("simulating adapters × rank", 0, len(cases))
    with Workers(work, workers or cores()) as jobs:
        return [cell.to_json() for cell in jobs.run(cases, note) if cell is not None]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class CellWork:
    """Works out cells; what a worker process holds."""

    window: Trace
    config: ServingConfig
    slo: Slo
    pricing: Pricing
    zipf_s: float
    seed: int
    here: tuple[int, int] | None

    def __call__(self, case: tuple[int, int]) -> Cell:
        count, rank = case
        how = Assignment(adapters=count, zipf_s=self.zipf_s, rank_mix=(rank,))
        trace = assign(self.window, how)
        everyone = {f"a{index}": AdapterSpec(name=f"a{index}", rank=rank) for index in range(count)}
        try:
            plan = blueprint(self.config, everyone)
        except UserError as error:
            return self._cell(case, 0.0, None, str(error))
        pages = sum(footprint.pages for footprint in plan.footprints.values())
        share = pages / plan.memory.num_pages
        rps, reason = self._rate_rps(trace, adapters_of_trace(trace.adapters))
        return self._cell(case, rps, share, reason)

    def _cell(self, case: tuple[int, int], rps: float, share: float | None, reason: str | None) -> Cell:
        return Cell(
            adapters=case[0],
            rank=case[1],
            rps_per_gpu=rps / self.config.tp,
            pool_share=share,
            reason=reason,
            current=case == self.here,
        )

    def _rate_rps(self, trace: Trace, adapters: Mapping[str, AdapterSpec]) -> tuple[float, str | None]:
        prober = Prober(
            workload=replace(Workload.of(trace), window=trace),
            slo=self.slo,
            adapters=adapters,
            price=self.pricing,
            simulate=simulate,
            seed=self.seed,
        )
        limit = bounds(trace, self.config, prober.price(self.config), self.slo)
        reason = limit.reason(self.slo)
        if reason is not None:
            return 0.0, reason
        job = RateJob(
            configs=(self.config,),
            piece="window",
            guess_rps=0.5 * limit.rate_rps,
            ceiling_rps=(limit.rate_rps,),
            tolerance=TOLERANCE,
            reach=0.3,
        )
        trial = job.run(prober)[0]
        missed = None if trial.above is None else trial.above.binding
        return trial.sustainable_rps, None if trial.sustainable_rps else f"no rate meets the SLO: {missed}"
