"""How one configuration fares as the request rate rises: the share of requests that meet the SLO, latencies, and where the knee is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from engine.adapter import AdapterSpec
from engine.config import ServingConfig
from planner.bounds import bounds
from planner.jobs import ProbeJob, RateJob, Runner
from planner.paced import Paced, PacedJob, StepErrors, predicted
from planner.pricing import Pricing
from planner.probe import Probe, Prober
from planner.workers import Workers, cores
from planner.workload import Workload
from sim.costs import costs_for
from sim.intervals import Interval
from sim.profile import Profile
from sim.simulate import simulate
from traces import Trace
from traces.metrics import Slo

SHARES = (0.25, 0.5, 0.7, 0.8, 0.9, 0.95, 1.0, 1.05, 1.1, 1.2)  # of the knee's rate
TOLERANCE = 0.01
FIRST_GUESS = 0.5  # of what arithmetic allows
SHOWN = ("slo_attainment", "ttft_p95_s", "tpot_p95_s", "throughput_rps")

Tell = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class RatePoint:
    """What is predicted at one rate. load: the rate over the highest sustainable one."""

    rate_rps: float
    load: float
    predicted: Mapping[str, Interval]
    meets: bool
    extrapolated_share: float

    def to_json(self) -> dict[str, Any]:
        """Return the JSON form."""
        return {
            "rate_rps": self.rate_rps,
            "load": self.load,
            "predicted": {name: self.predicted[name].to_json() for name in SHOWN},
            "meets": self.meets,
            "extrapolated_share": self.extrapolated_share,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class RateCurve:
    """Points by rising rate; the knee is the highest rate seen to meet the SLO (0: none does).

    headroom: how much the trace's rate could grow, relative; below 0 it is too high already.
    """

    trace_rps: float
    knee: Interval
    points: tuple[RatePoint, ...]

    @property
    def headroom(self) -> float:
        return self.knee.value / self.trace_rps - 1

    def to_json(self) -> dict[str, Any]:
        """Return the JSON form."""
        return {
            "trace_rps": self.trace_rps,
            "knee_rps": self.knee.to_json(),
            "headroom": self.headroom,
            "points": [point.to_json() for point in self.points],
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """One configuration on one trace under one SLO."""

    trace: Trace
    config: ServingConfig
    slo: Slo
    profile: Profile
    adapters: Mapping[str, AdapterSpec]
    seed: int = 42


def rate_curve(asked: Asked, *, workers: int | None = None, tell: Tell | None = None) -> RateCurve:
    """Find the knee, then simulate at SHARES of its rate and at the trace's own.

    The trace is repeated as in the search, so that a rate that cannot be sustained shows. Raises UserError where the configuration cannot run.
    """
    tell = tell or (lambda stage, done, total: None)
    workload = Workload.of(asked.trace)
    long = workload.long_piece("trace", asked.config.replicas)
    prober = Prober(
        workload=replace(workload, trace=long),
        slo=asked.slo,
        adapters=asked.adapters,
        price=Pricing(asked.profile),
        simulate=simulate,
        seed=asked.seed,
    )
    tell("finding the highest rate", 0, 1)
    knee_rps = _knee_rps(prober, asked.config)
    rates = sorted({*(share * knee_rps for share in SHARES if knee_rps), asked.trace.rate_rps})
    work = [ScaledProbe(config=asked.config, scale=rps / long.rate_rps) for rps in rates]
    done = 0

    def note() -> None:
        nonlocal done
        done += 1
        tell("simulating rates", done, len(work))

    tell("simulating rates", 0, len(work))
    paces = [PacedJob(config=asked.config, scale=item.scale) for item in work]
    with Workers(Runner(prober), workers or cores()) as jobs:
        probes = [probe for probe in jobs.run(work, note) if isinstance(probe, Probe)]
        paced = [item for item in jobs.run(paces) if isinstance(item, Paced)]
    return _curve(asked, rates, knee_rps, list(zip(probes, paced, strict=True)))


@dataclass(frozen=True, slots=True, kw_only=True)
class ScaledProbe(ProbeJob):
    """Simulate a configuration on the whole trace at so many times its rate."""

    scale: float

    def run(self, prober: Prober) -> Probe:
        """Return what the simulator says."""
        return prober(self.config, "trace", self.scale, watch=True)


def _knee_rps(prober: Prober, config: ServingConfig) -> float:
    one = bounds(prober.workload.trace, config, prober.price(config), prober.slo)
    ceiling_rps = one.rate_rps * config.replicas
    job = RateJob(
        configs=(config,),
        piece="trace",
        guess_rps=FIRST_GUESS * ceiling_rps,
        ceiling_rps=(ceiling_rps,),
        tolerance=TOLERANCE,
        reach=0.3,
    )
    return 0.0 if one.reason(prober.slo) is not None else job.run(prober)[0].sustainable_rps


def _curve(asked: Asked, rates: list[float], knee_rps: float, probes: list[tuple[Probe, Paced]]) -> RateCurve:
    errors = StepErrors(report=costs_for(asked.profile, asked.config).report)
    points = []
    for rps, (probe, paced) in zip(rates, probes, strict=True):
        points.append(
            RatePoint(
                rate_rps=rps,
                load=rps / knee_rps if knee_rps else 1.0,
                predicted=predicted(probe, paced, errors, knee_rps),
                meets=probe.meets,
                extrapolated_share=1.0 if probe.extrapolated_share is None else probe.extrapolated_share,
            )
        )
    below = [point for point in points if point.load <= 1] or points
    at_knee = max(below, key=lambda point: (point.extrapolated_share, point.load))
    return RateCurve(
        trace_rps=asked.trace.rate_rps, knee=at_knee.predicted["sustainable_rps"], points=tuple(points)
    )
