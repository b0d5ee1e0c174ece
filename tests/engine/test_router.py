"""The cost-aware router by hand-computed prices, and what it may not do."""

import time

import pytest

from engine.config import ServingConfig
from engine.errors import UserError
from engine.router import Router
from engine.router_costs import ReplicaLedger, RouterCosts

PRICES = {"prefill_token_s": 0.001, "step_s": 0.01, "row_s": 0.001, "adapter_s": 0.002, "load_s": 0.05}
COSTS = RouterCosts(**PRICES, chunk_tokens=1000, ttft_slo_s=10.0, tpot_slo_s=1.0)


def router(replicas=2, costs=COSTS, slots=256, places=None):
    return Router("cost_aware", replicas, places, costs=costs, slots=slots)


def test_an_idle_replica_costs_load_prompt_and_steps():
    ledger = ReplicaLedger(COSTS, slots=4)
    # batch = 0.001 + 0.002; prefill = 100 · (0.001 + 0.003 / 1000); step = 0.013; TTFT = 0.05 + prefill + step
    with_load, without = (ledger.price(name, 100, 10, 0.0) for name in ("a", None))
    assert with_load[1] == pytest.approx(0.05 + 0.1003 + 0.013 + 10 * 0.013)
    assert without[1] == pytest.approx(0.1001 + 0.011 + 10 * 0.011)
    assert not with_load[0] and not without[0]


def test_others_pay_for_prompt_row_and_a_new_adapter():
    ledger = ReplicaLedger(COSTS, slots=4)
    ledger.sent("a", 100, 0.0)
    same, other = (ledger.price(name, 100, 10, 5.0)[1] for name in ("a", "b"))
    # b: the load, an adapter more in its own prompt's chunks, in 11 steps of its own, and in 10 of the other's
    assert other - same == pytest.approx(0.05 + 100 * 0.002 / 1000 + 11 * 0.002 + 10 * 0.002)
    # at 5 s the prompt before is computed; at once it has to be waited for
    wait_s = 100 * 0.001
    assert ledger.price("a", 100, 10, 0.0)[1] - same == pytest.approx(wait_s)


def test_turns_for_a_slot_are_waited_for():
    ledger = ReplicaLedger(COSTS, slots=2)
    for _ in range(3):
        ledger.sent(None, 1, 0.0)
    free = ReplicaLedger(COSTS, slots=4)
    for _ in range(3):
        free.sent(None, 1, 0.0)
    waits_s = 2 * 10 * 0.012 / 2  # two before it in two slots, ten steps of two rows each
    full_ttft_s = waits_s + 0.001 + 0.002 * 1 / 1000 + 0.012
    assert ledger.price(None, 1, 10, 9.0)[1] == pytest.approx(
        full_ttft_s + 10 * 0.012 + 1 * (0.001 + 10 * 0.001)
    )
    assert free.price(None, 1, 10, 9.0)[1] < ledger.price(None, 1, 10, 9.0)[1]


def test_requests_of_one_adapter_stay_together_until_that_costs_more():
    found = router()
    assert found.route("a", 10, 10, 0.0) == 0
    assert found.route("a", 10, 10, 1.0) == 0  # company costs 0.02 s, the load 0.05
    assert found.route("b", 10, 10, 2.0) == 1
    crowd = [found.route("a", 2000, 100, 3.0) for _ in range(6)]
    assert set(crowd) == {0, 1}  # long prompts one behind the other are worse than a load


def test_a_promise_is_kept_where_it_can_be():
    costs = RouterCosts(**PRICES, chunk_tokens=1000, ttft_slo_s=0.3, tpot_slo_s=1.0)
    found = router(costs=costs)
    assert found.route("a", 200, 1, 0.0) == 0
    # There 0.2 s of prompts are ahead; its own 0.1 and the step break 0.3 s, so it goes where it has to be loaded.
    assert found.route("a", 100, 1, 0.0) == 1
    strict = RouterCosts(**PRICES, chunk_tokens=1000, ttft_slo_s=1e-6, tpot_slo_s=1.0)
    assert router(costs=strict).route("a", 200, 1, 0.0) == 0  # broken everywhere: the cheapest


def test_what_ended_is_forgotten_and_what_was_loaded_is_not():
    found = router()
    first = [found.route("a", 100, 10, 0.0), found.route("b", 100, 10, 0.0)]
    assert first == [0, 1]
    for replica, adapter in ((0, "a"), (1, "b")):
        found.finished(replica, 110, adapter)
    assert found.loads == [0, 0]
    assert found.route("b", 100, 10, 9.0) == 1
    found.finished(1, 110, "b")
    found.remove(1)
    found.restore(1)  # begun anew: nothing is on its GPU, so both must load b
    assert found.route("b", 100, 10, 99.0) == 0


def test_adapters_beyond_what_a_gpu_keeps_are_loaded_again():
    costs = RouterCosts(**PRICES, chunk_tokens=1000, resident_adapters=1)
    ledger = ReplicaLedger(costs, slots=4)
    for adapter in ("a", "b"):
        ledger.sent(adapter, 1, 0.0)
        ledger.ended(adapter)
    assert ledger.price("a", 1, 1, 9.0)[1] - ledger.price("b", 1, 1, 9.0)[1] == pytest.approx(0.05)


def test_placement_and_removal_bind_it():
    found = router(3, places={"a": (1,), "b": (0, 2)})
    assert [found.route("a", 10, 1, 0.0) for _ in range(5)] == [1] * 5
    assert {found.route("b", 900, 1, 0.0) for _ in range(9)} == {0, 2}
    found.remove(1)
    assert found.route("a", 10, 1, 0.0) in (0, 2)
    with pytest.raises(ValueError, match="was not removed"):
        found.restore(0)


def test_equal_requests_are_spread_evenly():
    found = router(4)
    chosen = [found.route(None, 50, 20, 0.0) for _ in range(40)]
    assert sorted(chosen.count(replica) for replica in range(4)) == [10] * 4


def test_a_decision_takes_time_by_replicas_alone():
    def seconds(routed):
        found = router(8)
        for number in range(routed):
            found.route(f"a{number % 500}", 50, 20, 0.0)
        started_s = time.process_time()
        for number in range(400):
            found.route(f"a{number % 500}", 50, 20, 0.0)
        return time.process_time() - started_s

    assert min(seconds(6_000) for _ in range(2)) < 3 * min(seconds(500) for _ in range(2))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"router": "cost_aware"}, "router='cost_aware' needs router_costs"),
        ({"router_costs": 3}, "router_costs=3 must be an object"),
        ({"router_costs": {**PRICES, "bogus": 1}}, "unknown key 'bogus'"),
        (
            {"router_costs": {**PRICES, "row_s": -1}},
            r"router_costs\['row_s'\]=-1 must be a number of at least 0",
        ),
        ({"router_costs": {**PRICES, "step_s": 0}}, r"router_costs\['step_s'\]=0 must be a number above 0"),
        ({"router_costs": {"step_s": 1.0}}, "router_costs lacks 'prefill_token_s'"),
    ],
)
def test_bad_costs_are_told_by_their_place(changes, message):
    with pytest.raises(UserError, match=message):
        ServingConfig.from_json(changes, source="c.json")


def test_a_configuration_carries_them():
    config = ServingConfig.from_json({"router": "cost_aware", "router_costs": PRICES, "replicas": 2})
    assert ServingConfig.from_json(config.to_json()) == config
    assert Router.of(config).route("a", 10, 1, 0.0) == 0
    with pytest.raises(ValueError, match="needs them"):
        Router("cost_aware", 2)
