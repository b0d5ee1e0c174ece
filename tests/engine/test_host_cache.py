"""Which adapters are in host memory: hand-made cases, and what holds whatever is done."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.host_cache import HostCache


def test_the_least_recently_loaded_is_replaced():
    cache = HostCache(30)
    for name in "abc":
        assert cache.admit(name, 10) == []
    cache.pin("a")
    cache.unpin("a")
    assert cache.admit("d", 20) == ["b", "c"]
    assert [cache.where(name) for name in "abcd"] == ["host", "disk", "disk", "host"]


def test_what_is_pinned_stays_until_its_last_pin():
    cache = HostCache(20)
    cache.admit("a", 10)
    cache.pin("a")
    cache.pin("a")
    assert cache.admit("b", 20) is None
    cache.unpin("a")
    assert cache.admit("b", 20) is None
    with pytest.raises(ValueError, match="pinned"):
        cache.remove("a")
    cache.unpin("a")
    assert cache.admit("b", 20) == ["a"]


def test_filling_replaces_nobody_and_goes_on_with_smaller_ones():
    cache = HostCache(25)
    assert [cache.fill(name, size) for name, size in (("a", 20), ("b", 10), ("c", 5))] == [True, False, True]
    assert cache.evictions == 0


def test_misuse_is_told():
    cache = HostCache(10)
    cache.admit("a", 10)
    with pytest.raises(ValueError, match="already"):
        cache.admit("a", 10)
    with pytest.raises(ValueError, match="not pinned"):
        cache.unpin("a")
    with pytest.raises(ValueError, match="11 bytes"):
        cache.admit("b", 11)


ACTIONS = st.lists(
    st.tuples(st.sampled_from(["fill", "admit", "pin", "unpin", "remove"]), st.integers(0, 7)), max_size=80
)


@given(ACTIONS, st.one_of(st.none(), st.integers(8, 40)))
def test_whatever_is_done_the_bound_holds_and_nobody_pinned_leaves(actions, capacity):
    cache = HostCache(capacity)
    pins = [0] * 8
    order = []  # of those that are there, the least recently loaded first
    for action, key in actions:
        there = cache.where(key) == "host"
        assert there == (key in order)
        if action in ("fill", "admit") and not there:
            free = capacity is None or cache.used_bytes + key + 1 <= capacity
            evicted = (
                cache.admit(key, key + 1) if action == "admit" else [] if cache.fill(key, key + 1) else None
            )
            if action == "fill":
                assert (evicted is not None) == free
            if evicted is None:
                assert action == "fill" or sum(k + 1 for k in order if pins[k]) + key + 1 > capacity
                continue
            assert bool(evicted) == (not free)
            idle = [k for k in order if not pins[k]]
            assert evicted == idle[: len(evicted)]
            order = [k for k in order if k not in evicted] + [key]
        elif action == "pin" and there:
            cache.pin(key)
            pins[key] += 1
            order = [k for k in order if k != key] + [key]
        elif action == "unpin" and pins[key]:
            cache.unpin(key)
            pins[key] -= 1
        elif action == "remove" and there and not pins[key]:
            cache.remove(key)
            order.remove(key)
        cache.check_integrity()
        assert cache.used_bytes == sum(k + 1 for k in order)
