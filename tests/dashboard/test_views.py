"""What pages draw, worked out from small cases by hand."""

import numpy as np
import pytest

from engine.budget import plan_memory
from engine.config import ServingConfig
from engine.errors import UserError
from engine.model_shape import load_model_shape
from engine.step import StepShape
from planner import chart_rows, trust
from planner.adapter_point import adapter_point
from planner.adapter_traffic import adapter_traffic
from planner.comparison import compare
from planner.memory_view import PARTS, choice_rows, fit_by_rank, memory_view
from planner.pareto import front
from planner.table import csv_text
from planner.timeline import busy_share, mean_over, timeline, watch
from planner.token_cost import token_cost, with_price
from planner.trace_preview import preview
from sim.observe import StepRow
from sim.simulate import simulate
from tests.planner.fake import even_trace
from tests.sim.constant import ConstantCosts
from traces import Trace, TraceRequest
from traces.metrics import Slo


def two_adapters() -> Trace:
    requests = [
        TraceRequest(
            id=i,
            arrival_s=0.5 * i,
            prompt_tokens=20,
            output_tokens=4,
            adapter=None if i == 11 else "hot" if i % 4 else "cold",
            rank=None if i == 11 else 16 if i % 4 else 64,
        )
        for i in range(12)
    ]
    return Trace(requests, "two")


def test_nothing_beats_what_is_on_the_front() -> None:
    points = [(1.0, 5.0), (2.0, 4.0), (1.5, 4.0), (2.0, 4.0), (0.5, 0.5)]
    assert front(points) == [True, True, False, True, False]


def test_tokens_cost_what_the_hour_costs_over_what_it_makes() -> None:
    trace = even_trace(2.0, count=10, prompt=300, output=100)
    cost = token_cost(trace, gpus=2, rate_rps=10.0, usd_per_gpu_hour=3.6)
    assert cost is not None
    assert cost.usd_per_hour == pytest.approx(7.2)
    assert cost.usd_per_million_output == pytest.approx(2.0)  # 10 × 100 × 3600 = 3.6 million an hour
    assert cost.usd_per_million_all == pytest.approx(0.5)
    assert token_cost(trace, 2, 0.0, 3.6) is None


def test_a_price_changes_costs_alone() -> None:
    choice = {"config": {"tp": 2, "replicas": 3}, "cost_usd_per_hour": None}
    plan = {"recommended": choice, "fewest_gpus": None, "nearest_miss": None, "alternatives": [choice]}
    priced = with_price(plan, 2.0)
    assert (
        priced["recommended"]["cost_usd_per_hour"] == priced["alternatives"][0]["cost_usd_per_hour"] == 12.0
    )
    assert choice["cost_usd_per_hour"] is None


def test_a_difference_within_the_intervals_is_unsure() -> None:
    def side(value, low, high):
        return {"predicted": {"ttft_p95_s": {"value": value, "low": low, "high": high}}}

    rows = [
        compare(side(0.1, 0.09, 0.11), side(*other))[0]
        for other in [(0.12, 0.1, 0.14), (0.2, 0.18, 0.22), (0.05, 0.04, 0.06), (None, None, None)]
    ]
    assert [row["better"] for row in rows] == ["unsure", "left", "right", "unsure"]
    assert rows[1]["left"] == pytest.approx(100) and rows[1]["change_pct"] == pytest.approx(100)


def test_memory_adds_up_and_counts_the_engines_pages() -> None:
    config = ServingConfig()
    view = memory_view(config, rank=16)
    memory = plan_memory(config, load_model_shape(config.model))
    assert (view.total_bytes, view.pool_bytes) == (memory.total_bytes, memory.pool_bytes)
    for count in {row["adapters"] for row in view.rows if row["fits"]}:
        assert sum(row["bytes"] for row in view.rows if row["adapters"] == count) == view.total_bytes
    assert {row["part"] for row in view.rows} == set(PARTS.values())
    assert not all(row["fits"] for row in view.rows)
    left = view.pool_bytes - view.fit * view.adapter_bytes
    assert 0 <= left - config.max_model_len * view.kv_token_bytes < view.adapter_bytes
    assert view.kv_tokens(0) == memory.num_pages * config.page_tokens
    fits = [row["fit"] for row in fit_by_rank(config, (8, 16, 32))]
    assert fits == sorted(fits, reverse=True) and fits[1] == view.fit


def test_memory_says_why_there_is_none() -> None:
    with pytest.raises(UserError, match="does not fit"):
        memory_view(ServingConfig(model="llama-3.1-70b"), rank=16)


def test_a_plans_memory_keeps_its_order() -> None:
    rows = choice_rows({"total": 10, "weights": 4, "kv": 2, "free": 3, "unused": 1})
    assert [(row["part"], row["share"]) for row in rows] == [
        ("base model weights", 0.4),
        ("KV cache in use", 0.2),
        ("free pages", 0.3),
        ("outside the share allowed", 0.1),
    ]


def test_means_over_spans_of_what_holds_until_the_next_look() -> None:
    edges_s = np.array([0.0, 1.0, 2.0, 3.0])
    assert mean_over(np.array([0.5, 1.5]), np.array([4.0, 2.0]), edges_s).tolist() == [2.0, 3.0, 2.0]


def test_busy_is_the_share_of_a_span_in_which_steps_ran() -> None:
    shape = StepShape(decode_rows=1)
    steps = (StepRow(0, 0.5, 1.0, shape), StepRow(1, 0.0, 3.0, shape), StepRow(0, 2.0, 0.25, shape))
    edges_s = np.array([0.0, 1.0, 2.0, 3.0])
    assert busy_share(steps, 0, edges_s).tolist() == [0.5, 0.5, 0.25]
    assert busy_share(steps, 2, edges_s).tolist() == [0.0, 0.0, 0.0]


def test_a_timeline_of_two_replicas() -> None:
    looks = [
        [(0.0, 1, 3, 10, 10, 1), (1.0, 2, 0, 20, 10, 3)],
        [(0.5, 4, 0, 0, 20, 5)],
    ]
    found = timeline(looks, (), np.array([0.0, 1.0, 2.0]), pages=100)
    assert found.running.tolist() == [3.0, 6.0]
    assert found.waiting.tolist() == [3.0, 0.0]
    assert found.kv_share.tolist() == [0.05, 0.1]
    assert found.adapter_share.tolist() == [0.1, 0.15]
    assert found.loads_per_s.sum() == 7.0  # those of instant 0 are there when the first span begins


def test_watching_a_run_changes_nothing_of_it() -> None:
    trace, config = two_adapters(), ServingConfig(replicas=2)
    result, seen = watch(trace, config, ConstantCosts(0.05), bins=10)
    assert result.metrics == pytest.approx(simulate(trace, config, ConstantCosts(0.05)).metrics, nan_ok=True)
    span_s = result.duration_s / 10
    seconds = sum(float(share.sum()) * span_s for share in seen.busy)
    assert seconds == pytest.approx(result.utilisation.step_share * 2 * result.duration_s, rel=1e-6)
    assert len(seen.to_json()["busy"]) == 2 and max(seen.adapter_share) > 0


def test_traffic_by_adapter_is_of_its_own_requests() -> None:
    result = simulate(two_adapters(), ServingConfig(), ConstantCosts(0.05))
    found = adapter_traffic(result, Slo(ttft_s=1e-6))
    hot, cold = found.rows
    assert (hot.adapter, hot.requests, hot.rank, hot.place) == ("hot", 8, 16, 1)
    assert (cold.adapter, cold.requests, cold.share) == ("cold", 3, 3 / 11)
    assert cold.cumulative_share == 1.0
    assert (found.missing, found.loads) == (2, 2)  # nobody meets such an SLO
    assert adapter_traffic(result, Slo(tpot_s=0.1)).missing == 0


def test_where_a_trace_lies() -> None:
    assert adapter_point(two_adapters()) == (2, 32)  # (8 × 16 + 3 × 64) / 11 = 29
    base = TraceRequest(id=0, arrival_s=0.0, prompt_tokens=5, output_tokens=5)
    assert adapter_point(Trace([base])) is None


def test_a_preview_counts_every_request() -> None:
    trace = two_adapters()
    seen = preview(trace)
    width_s = seen.arrivals[0]["end_s"] - seen.arrivals[0]["at_s"]
    assert sum(row["rps"] for row in seen.arrivals) * width_s == pytest.approx(len(trace))
    assert sum(row["requests"] for row in seen.lengths if row["kind"] == "prompt") == len(trace)
    assert [(row["adapter"], row["requests"]) for row in seen.adapters] == [("hot", 8), ("cold", 3)]


def test_bands_and_bias() -> None:
    rows = [{"measured": 10.0, "error_pct": 4.0}, {"measured": 20.0, "error_pct": -8.0}]
    assert [line["high10"] for line in trust.band_lines(rows)] == pytest.approx([8.8, 27.5])
    assert [row["share"] for row in trust.within(rows)] == [0.5, 1.0]
    bias = trust.bias_rows({"all": {}, "80to95": {"ttft_p50_s": {"bias_pct": 2.0}}})
    assert bias == [{"load_level": "80 to 95 %", "metric": "TTFT p50", "bias_pct": 2.0}]


def test_texts_of_numbers() -> None:
    assert chart_rows.interval({"value": 0.1234}, 1e3, "ms") == "123 ms"
    assert chart_rows.span({"low": 0.0101, "high": 0.0302}, 1e3) == "10.1 to 30.2"
    assert chart_rows.interval({"value": None}, 1e3, "ms") == "–"
    assert [chart_rows.short(value) for value in (99.93, 100.0, 1234.5, 0.01234)] == [
        "99.93",
        "100",
        "1,234",
        "0.0123",
    ]
    assert chart_rows.shape({"tp": 2, "replicas": 1}) == "1 replica of 2 GPUs"


def test_cells_without_a_rate_say_why() -> None:
    cell = {
        "adapters": 10,
        "rank": 8,
        "rps_per_gpu": 0.0,
        "pool_share": None,
        "reason": "too large",
        "current": True,
    }
    assert chart_rows.grid_rows([cell])[0] == {
        "adapters": 10,
        "rank": 8,
        "rps_per_gpu": 0.0,
        "text": "none",
        "light": True,
        "feasible": False,
        "current": True,
        "pool_pct": None,
        "why": "too large",
    }


def test_csv_has_every_column() -> None:
    assert csv_text([{"a": 1}, {"a": "x,y", "b": None}]) == 'a,b\n1,\n"x,y",\n'
