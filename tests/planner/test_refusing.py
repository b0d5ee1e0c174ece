"""Who turns requests away is asked only where nobody meets the SLO by serving all."""

from typing import Any

import pytest

from engine.config import ServingConfig
from planner.search import Findings
from planner.space import POLICIES, serving_all, turns_away
from planner.trial import Trial, fewest_gpus, most_rate
from sim.result import SimResult
from tests.planner.fake import find, simulate
from traces import Trace

SLO = ServingConfig(scheduler="slo", ttft_slo_s=0.5)


def refusing(trace: Trace, config: ServingConfig, costs: Any, **more: Any) -> SimResult:
    """A fifth more with the scheduler that turns requests away."""
    return simulate(trace.scaled(1 / 1.2) if config.scheduler == "slo" else trace, config, costs, **more)


def plans(rate_rps: float, *schedulers: str) -> Findings:
    policies = {"scheduler": schedulers or ("fcfs", "slo")}
    return find(rate_rps, gpus=2, tp=(1,), simulate=refusing, policies=policies)


def test_the_higher_rate_of_who_refuses_wins_nothing_where_the_slo_is_met_without() -> None:
    found = plans(12.0)
    assert found.ranked[0].config.scheduler == "fcfs" and found.ranked[0].meets(12.0)
    assert found.ranked[0].sustainable_rps == pytest.approx(20.0, rel=0.02)
    assert found.fewest is not None and (found.fewest.scheduler, found.fewest.replicas) == ("fcfs", 2)
    assert not any(turns_away(config) for config in found.trials)  # and no time goes into it


def test_who_refuses_is_recommended_where_only_that_meets_the_slo() -> None:
    found = plans(22.0)  # 20 can be served
    assert found.fewest is not None and found.fewest.scheduler == "slo"
    assert found.trials[found.fewest].meets(22.0) and not found.ranked[0].meets(22.0)
    assert plans(30.0).fewest is None


def test_a_space_of_nothing_else_is_searched() -> None:
    found = plans(12.0, "slo")
    assert found.ranked[0].config.scheduler == "slo"
    assert found.ranked[0].sustainable_rps == pytest.approx(24.0, rel=0.02)
    assert serving_all({"scheduler": ("slo",)}) == {"scheduler": ("slo",)}
    assert "slo" not in serving_all(POLICIES)["scheduler"]


def test_ranking_puts_who_serves_all_first() -> None:
    all_served = Trial(config=ServingConfig(replicas=2), piece="trace", sustainable_rps=20.0)
    none = Trial(config=ServingConfig(replicas=3), piece="trace", sustainable_rps=0.0)
    refuses = Trial(config=SLO, piece="trace", sustainable_rps=24.0)
    assert most_rate([refuses, none, all_served]) == [all_served, refuses, none]
    assert most_rate([none, refuses]) == [refuses, none]
    assert fewest_gpus([refuses, all_served]) == [all_served, refuses]
