"""The searches behind the pages, on a small profile: the knee of a rate curve, and cells of adapters × rank."""

import pytest

from engine.adapter import adapters_of_trace
from engine.config import ServingConfig
from engine.errors import UserError
from planner import adapter_grid, rate_curve, trust
from planner.adapter_grid import CellWork, GridAsked
from planner.pricing import Pricing
from planner.rate_curve import Asked
from planner.scenario import Scenario
from planner.task import plain_json
from planner.trace_input import made
from sim.profile import parse_profile
from tests.sim.synthetic import profile_json
from traces.metrics import Slo

TRACE = made(
    Scenario(source="synthetic", requests=240, rate_rps=2.0, adapters=6, ranks="S1", lengths="uniform")
)


@pytest.fixture(scope="module")
def profile():
    return parse_profile(profile_json(), "profile.json")


@pytest.fixture(scope="module")
def config(profile) -> ServingConfig:
    return ServingConfig(
        max_model_len=2048,
        max_num_seqs=32,
        page_tokens=profile.page_tokens,
        graph_max_tokens=profile.graph_max_tokens,
    )


def test_the_knee_lies_between_what_meets_and_what_misses(profile, config, monkeypatch) -> None:
    monkeypatch.setattr(rate_curve, "SHARES", (0.5, 1.0, 1.3))
    told = []
    asked = Asked(
        trace=TRACE,
        config=config,
        slo=Slo(ttft_s=0.3, tpot_s=0.03),
        profile=profile,
        adapters=adapters_of_trace(TRACE.adapters),
    )
    curve = rate_curve.rate_curve(asked, workers=1, tell=lambda *said: told.append(said))
    knee_rps = curve.knee.value
    assert knee_rps > 0 and curve.headroom == pytest.approx(knee_rps / TRACE.rate_rps - 1)
    rates = [point.rate_rps for point in curve.points]
    assert rates == sorted([0.5 * knee_rps, knee_rps, 1.3 * knee_rps, TRACE.rate_rps])
    by_load = {round(point.load, 3): point for point in curve.points}
    assert by_load[0.5].meets and by_load[1.0].meets and not by_load[1.3].meets
    for point in curve.to_json()["points"]:
        said = plain_json(point)["predicted"]["slo_attainment"]
        assert said["low"] <= said["value"] <= said["high"]
    assert told[0] == ("finding the highest rate", 0, 1) and told[-1] == ("simulating rates", 4, 4)


def test_a_promise_that_nothing_keeps_has_no_knee(profile, config) -> None:
    asked = Asked(
        trace=TRACE,
        config=config,
        slo=Slo(tpot_s=1e-6),
        profile=profile,
        adapters=adapters_of_trace(TRACE.adapters),
    )
    curve = rate_curve.rate_curve(asked, workers=1)
    assert (curve.knee.value, curve.headroom, len(curve.points)) == (0.0, -1.0, 1)


def test_cells_have_a_rate_or_a_reason(profile, config, monkeypatch) -> None:
    monkeypatch.setattr(adapter_grid, "RANKS", (8, 16))
    monkeypatch.setattr(adapter_grid, "COUNTS", (2,))
    asked = GridAsked(trace=TRACE, config=config, slo=Slo(ttft_s=0.3, tpot_s=0.03), profile=profile)
    cells = adapter_grid.adapter_grid(asked, workers=1)
    assert [(cell["adapters"], cell["rank"], cell["current"]) for cell in cells] == [
        (2, 8, False),
        (2, 16, False),
        (6, 8, True),
        (6, 16, False),
    ]
    assert all(cell["rps_per_gpu"] > 0 and cell["reason"] is None for cell in cells)
    shares = {(cell["adapters"], cell["rank"]): cell["pool_share"] for cell in cells}
    assert shares[6, 8] == pytest.approx(3 * shares[2, 8])


def test_a_cell_that_cannot_be_says_why(profile, config) -> None:
    def cell(slo: Slo, **changes):
        work = CellWork(
            window=TRACE,
            config=config.with_changes(**changes),
            slo=slo,
            pricing=Pricing(profile),
            zipf_s=0.9,
            seed=0,
            here=None,
        )
        return work((3, 8))

    assert cell(Slo(tpot_s=1e-6)).reason.startswith("a decode step of one sequence takes")
    assert "host_memory_bytes" in cell(Slo(), host_memory_bytes=1).reason


def test_a_scenario_is_placed_in_what_was_measured(profile, config) -> None:
    placed = trust.domain(TRACE, config, adapters_of_trace(TRACE.adapters), profile)
    assert sum(row["share"] for row in placed["shares"]) == pytest.approx(1.0)
    rows = {extent["size"]: extent for extent in placed["extents"]}
    decode = rows["requests that decode"]
    assert 0 < decode["p50"] <= decode["p95"] <= decode["most"] <= config.max_num_seqs
    assert decode["most_pct"] == pytest.approx(100 * decode["most"] / decode["measured"])
    with pytest.raises(UserError):
        trust.domain(TRACE, config.with_changes(page_tokens=32), {}, profile)
