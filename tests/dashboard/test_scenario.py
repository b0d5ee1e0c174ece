"""A scenario and its link."""

import pytest

from engine.errors import UserError
from planner.default_config import default_config
from planner.scenario import Scenario
from planner.trace_input import sample


def test_the_default_has_an_empty_query() -> None:
    assert Scenario().to_query() == {}
    assert Scenario.from_query({}) == Scenario()


def test_a_link_restores_a_scenario() -> None:
    scenario = Scenario(
        source="synthetic", gpus=3, ttft_ms=412.5, gpu="h100", adapters=40, ranks="S2", objective="min-gpus"
    )
    query = scenario.to_query()
    assert query["ttft_ms"] == "412.5"
    assert Scenario.from_query(query | {"utm": "x"}) == scenario


def test_fields_of_a_synthetic_trace_are_left_out_of_others_links() -> None:
    assert Scenario(adapters=40, gpus=2).to_query() == {"gpus": "2"}


@pytest.mark.parametrize(
    ("query", "said"),
    [
        ({"gpus": "many"}, "gpus='many' must be a number"),
        ({"gpus": "0"}, r"gpus=0 must be in 1\.\.64"),
        ({"ttft_ms": "nan"}, "ttft_ms=nan must be"),
        ({"model": "/etc/passwd"}, "model='/etc/passwd' must be one of"),
        ({"gpu": "tpu"}, "gpu='tpu' must be one of"),
        ({"prompt_low": "9", "prompt_high": "9"}, "prompt_low=9 must be below"),
    ],
)
def test_a_bad_link_is_told_in_a_line(query, said) -> None:
    with pytest.raises(UserError, match=said):
        Scenario.from_query(query)


def test_defaults_take_as_few_gpus_a_replica_as_hold_the_model() -> None:
    trace = sample()
    assert default_config(Scenario(), trace).replicas == 8
    large = default_config(Scenario(model="llama-3.1-70b"), trace)
    assert (large.tp, large.replicas) == (2, 4)
    with pytest.raises(UserError, match="does not fit a10g"):
        default_config(Scenario(model="llama-3.1-70b", gpu="a10g", gpus=2), trace)


def test_the_promise_in_words() -> None:
    assert Scenario(e2e_ms=9000).promise == (
        "first token within 500 ms, later ones every 50 ms, all within 9000 ms, for 95 % of the requests"
    )
    assert Scenario(attainment_pct=90).slo.attainment == pytest.approx(0.9)
