"""One simulated run over time: how many run and wait, what the pages hold, what is loaded, how busy each GPU is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from engine.adapter import AdapterSpec, adapters_of_trace
from engine.blueprint import blueprint
from engine.config import ServingConfig
from engine.scheduler import Scheduler
from sim.observe import StepRow
from sim.replica import Replica, StepTimes
from sim.result import SimResult
from sim.simulate import simulate
from traces import Trace
from traces.metrics import Slo

Floats = NDArray[np.float64]
BINS = 180
LOOKED = ("running", "waiting", "kv_pages", "adapter_pages")


class Watched(Protocol):
    """What a replica tells its observer when it plans."""

    def planned(self, scheduler: Scheduler, now_s: float) -> None: ...


class Watcher:
    """Stands before a replica's observer and writes down, at each plan, what the scheduler holds; all else goes on to the observer."""

    def __init__(self, observer: Watched, looks: list[tuple[float, ...]]) -> None:
        self._observer = observer
        self._looks = looks

    def __getattr__(self, name: str) -> Any:
        return getattr(self._observer, name)

    def planned(self, scheduler: Scheduler, now_s: float) -> None:
        """Look at queue and memory after a plan."""
        memory, residency = scheduler.memory, scheduler.residency
        self._looks.append(
            (
                now_s,
                scheduler.num_running,
                scheduler.num_waiting,
                memory.kv_pages,
                residency.pages_held,
                residency.loads,
            )
        )
        self._observer.planned(scheduler, now_s)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Timeline:
    """Means over equal spans of time, each by the middle of its span; pages and busy shares are of 0..1.

    running, waiting, loads: over all replicas, loads per second. kv_share, adapter_share: of the replicas' pages. busy: by replica, the share of
    the span in which a step ran.
    """

    at_s: Floats
    span_s: float
    running: Floats
    waiting: Floats
    kv_share: Floats
    adapter_share: Floats
    loads_per_s: Floats
    busy: tuple[Floats, ...]

    def to_json(self) -> dict[str, Any]:
        """Return the JSON form."""
        names = ("at_s", "running", "waiting", "kv_share", "adapter_share", "loads_per_s")
        rounded = {name: np.round(getattr(self, name), 5).tolist() for name in names}
        return rounded | {"span_s": self.span_s, "busy": [np.round(share, 5).tolist() for share in self.busy]}


def watch(
    trace: Trace,
    config: ServingConfig,
    costs: StepTimes,
    *,
    adapters: Mapping[str, AdapterSpec] | None = None,
    slo: Slo | None = None,
    bins: int = BINS,
) -> tuple[SimResult, Timeline]:
    """Simulate a run and return its result and its timeline. Raises UserError where the configuration cannot work."""
    plan = blueprint(config, adapters_of_trace(trace.adapters, adapters))
    looks: list[list[tuple[float, ...]]] = []

    def replica(
        clock: Any, scheduler: Any, costs: Any, observer: Any, on_end: Any, **options: Any
    ) -> Replica:
        looks.append([])
        return Replica(clock, scheduler, costs, Watcher(observer, looks[-1]), on_end, **options)  # type: ignore[arg-type]

    result = simulate(
        trace,
        config,
        costs,
        adapters=adapters,
        slo=slo,
        plan=plan,
        record_steps=True,
        replica=replica,
    )
    start_s = float(trace.columns.arrival_s[0])
    edges_s = np.linspace(start_s, start_s + max(result.duration_s, 1e-6), bins + 1)
    return result, timeline(looks, result.steps or (), edges_s, plan.memory.num_pages)


def timeline(
    looks: list[list[tuple[float, ...]]], steps: tuple[StepRow, ...], edges_s: Floats, pages: int
) -> Timeline:
    """Sum up what was seen of each replica over spans of time. looks: by replica (instant, running, waiting, KV pages, adapters' pages, loads so
    far), in order of time.
    """
    span_s = float(edges_s[1] - edges_s[0])
    replicas = len(looks)
    held = np.zeros((len(LOOKED), len(edges_s) - 1))
    loads = np.zeros(len(edges_s) - 1)
    for mine in looks:
        if not mine:
            continue
        seen = np.array(mine)
        held += np.array([mean_over(seen[:, 0], seen[:, 1 + column], edges_s) for column in range(4)])
        loads += np.diff(_last_at(seen[:, 0], seen[:, 5], edges_s))
    return Timeline(
        at_s=(edges_s[:-1] + edges_s[1:]) / 2 - edges_s[0],
        span_s=span_s,
        running=held[0],
        waiting=held[1],
        kv_share=held[2] / (pages * replicas),
        adapter_share=held[3] / (pages * replicas),
        loads_per_s=loads / span_s,
        busy=tuple(busy_share(steps, replica, edges_s) for replica in range(replicas)),
    )


def mean_over(at_s: Floats, values: Floats, edges_s: Floats) -> Floats:
    """Return the mean over each span of what holds from its instant until the next one (0 before the first)."""
    instants_s = np.concatenate((at_s, [max(float(at_s[-1]), float(edges_s[-1]))]))
    sums = np.concatenate(([0.0], np.cumsum(values * np.diff(instants_s))))
    means: Floats = np.diff(np.interp(edges_s, instants_s, sums)) / np.diff(edges_s)
    return means


def busy_share(steps: tuple[StepRow, ...], replica: int, edges_s: Floats) -> Floats:
    """Return the share of each span in which one replica ran steps."""
    mine = [(step.start_s, step.duration_s) for step in steps if step.replica == replica]
    if not mine:
        return np.zeros(len(edges_s) - 1)
    start_s, duration_s = np.array(mine).T
    ends_s = start_s + duration_s
    instants_s = np.column_stack((start_s, np.maximum(start_s, ends_s))).ravel()
    ran_s = np.cumsum(duration_s)
    sums = np.column_stack((ran_s - duration_s, ran_s)).ravel()
    share: Floats = np.diff(np.interp(edges_s, instants_s, sums)) / np.diff(edges_s)
    return np.clip(share, 0.0, 1.0)


def _last_at(at_s: Floats, values: Floats, edges_s: Floats) -> Floats:
    """Return the last value at or before each instant; 0 before the first."""
    place = np.searchsorted(at_s, edges_s, side="right") - 1
    last: Floats = np.where(place >= 0, values[np.maximum(place, 0)], 0.0)
    return last
