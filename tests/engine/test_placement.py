"""Which replicas serve which adapters: each somewhere, loads even, and the router keeps to it while replicas live."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.config import ServingConfig
from engine.errors import UserError
from engine.placement import place, places_of
from engine.router import Router

NAMES = [f"a{number}" for number in range(12)]
POPULARITY = {"a0": 50.0, "a1": 20.0} | dict.fromkeys(NAMES[2:], 3.0)


def test_everywhere_is_any_replica():
    assert place("everywhere", ["a", "b"], 3) == {"a": (0, 1, 2), "b": (0, 1, 2)}
    assert place("partitioned", ["a"], 1) == {"a": (0,)}


def test_partitioned_gives_each_one_replica_and_spreads_the_traffic():
    places = place("partitioned", NAMES, 4, POPULARITY)
    assert all(len(replicas) == 1 for replicas in places.values())
    traffic = [sum(POPULARITY[name] for name in NAMES if places[name] == (replica,)) for replica in range(4)]
    # a0 alone is half of all; the rest is spread evenly over the others.
    assert sorted(traffic) == [15.0, 15.0, 20.0, 50.0]


def test_hot_adapters_are_served_everywhere():
    places = place("hot_replicated", NAMES, 4, POPULARITY)
    # A replica's fair share of 100 is 25; what has more than a quarter of that is hot.
    assert {name for name, replicas in places.items() if len(replicas) == 4} == {"a0", "a1"}
    assert sorted(replicas for name, replicas in places.items() if name not in ("a0", "a1")) == sorted(
        [(0,)] * 3 + [(1,)] * 3 + [(2,)] * 2 + [(3,)] * 2
    )


def test_an_unknown_adapter_has_the_mean():
    places = place("partitioned", ["a", "b", "c"], 2, {"a": 4.0, "b": 2.0})
    assert places == {"a": (0,), "c": (1,), "b": (1,)}


@given(
    st.sampled_from(["everywhere", "partitioned", "hot_replicated"]),
    st.dictionaries(st.text(min_size=1, max_size=3), st.floats(0.01, 100), max_size=20),
    st.integers(1, 8),
)
def test_every_adapter_has_a_replica_and_greedy_stays_near_even(policy, popularity, replicas):
    places = place(policy, popularity, replicas, popularity)
    assert set(places) == set(popularity)
    assert all(found and set(found) <= set(range(replicas)) for found in places.values())
    if policy == "partitioned" and popularity:
        traffic = [
            sum(popularity[name] for name, found in places.items() if found == (replica,))
            for replica in range(replicas)
        ]
        mean = sum(popularity.values()) / replicas
        # What is placed last goes where the least is: no more than the mean, without it.
        assert max(traffic) <= mean + max(popularity.values()) + 1e-9


@pytest.mark.parametrize("policy", ["round_robin", "least_loaded", "adapter_affinity"])
def test_the_router_keeps_to_the_places_until_their_last_replica_is_gone(policy):
    router = Router(policy, 3, {"a": (1,), "b": (0, 2)})
    assert {router.route("a", 10) for _ in range(5)} == {1}
    assert {router.route("b", 10) for _ in range(6)} <= {0, 2}
    assert {router.route("other", 1) for _ in range(40)} <= {0, 1, 2}
    router.remove(1)
    assert router.route("a", 10) in (0, 2)


def test_configurations_say_where():
    assert places_of(ServingConfig(replicas=2), NAMES) is None
    assert places_of(ServingConfig(placement="partitioned"), NAMES) is None
    config = ServingConfig(replicas=2, placement="partitioned", adapter_popularity={"a0": 3.0, "a1": 1.0})
    assert places_of(config, ["a0", "a1"]) == {"a0": (0,), "a1": (1,)}
    assert ServingConfig.from_json(config.to_json()) == config
    with pytest.raises(UserError, match=r"adapter_popularity\['a'\]=0"):
        ServingConfig(adapter_popularity={"a": 0})
