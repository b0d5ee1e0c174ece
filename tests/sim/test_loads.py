"""The load queue's timeline, to the instant: the link alone, and with a bounded host store in front of the disk."""

import math

import pytest

from engine.host_cache import HostCache
from engine.residency import AdapterFootprint
from engine.step import Load
from sim.loads import LoadQueue, disk_s
from sim.simulate import simulate
from tests.sim.constant import ConstantCosts, small_plan, trace_of


def load(name, num_bytes=10):
    return Load(name, 0, (0,), num_bytes)


def queue(capacity=None, filled=(), *, copy=1.0, disk=5.0):
    """A load takes `copy` seconds a 10 bytes over the link, `disk` from the disk."""
    host = None
    if capacity is not None:
        host = HostCache(capacity)
        for name in filled:
            assert host.fill(name, 10)
    return LoadQueue(lambda n: copy * n / 10, host, disk_s=lambda n: disk * n / 10)


def ends(loads, until=1000.0):
    """Return (name, instant) of every load that ends, asking only at the instants that the queue names."""
    found = []
    while loads.next_end_s < until:
        at_s = loads.next_end_s
        names = loads.ended(at_s)
        assert names, "the queue named an instant at which nothing ends"
        found += [(name, at_s) for name in names]
        if loads._host is not None:
            loads._host.check_integrity()
    return found


def test_without_a_bound_loads_follow_each_other_on_the_link():
    loads = queue()
    loads.add([load("a"), load("b", 20)], 1.0)
    loads.add([load("c")], 2.5)
    assert ends(loads) == [("a", 2.0), ("b", 4.0), ("c", 5.0)]
    assert loads.busy_s == 4.0 and loads.next_end_s == math.inf


def test_what_is_in_host_memory_takes_the_link_alone():
    loads = queue(20, ["a", "b"])
    loads.add([load("b"), load("a")], 0.0)
    assert ends(loads) == [("b", 1.0), ("a", 2.0)]
    assert loads.disk_reads == 0


def test_what_is_on_disk_is_read_first_and_the_next_time_it_is_there():
    loads = queue(20)
    loads.add([load("a")], 1.0)
    assert ends(loads) == [("a", 7.0)]
    loads.add([load("a")], 10.0)
    assert ends(loads) == [("a", 11.0)]
    assert (loads.disk_reads, loads.disk_busy_s, loads.busy_s) == (1, 5.0, 2.0)


def test_reads_follow_each_other_and_run_beside_copies():
    loads = queue(100, ["h1", "h2"])
    loads.add([load("d1"), load("h1"), load("d2"), load("h2")], 0.0)
    # The link: h1 0–1, h2 1–2, d1 5–6 when it is read, d2 10–11.
    assert ends(loads) == [("h1", 1.0), ("h2", 2.0), ("d1", 6.0), ("d2", 11.0)]


def test_a_later_load_that_is_there_goes_before_one_that_is_being_read():
    loads = queue(100, ["h"], copy=2.0)
    loads.add([load("d")], 0.0)
    assert loads.next_end_s == 7.0
    loads.add([load("h")], 4.0)  # takes the link 4–6, so d has to wait a second
    assert ends(loads) == [("h", 6.0), ("d", 8.0)]


def test_a_copy_that_has_begun_is_not_interrupted():
    loads = queue(100, ["h"], copy=2.0)
    loads.add([load("d")], 0.0)
    loads.add([load("h")], 5.5)  # d's copy runs 5–7
    assert ends(loads) == [("d", 7.0), ("h", 9.0)]


def test_the_least_recently_loaded_goes_first():
    loads = queue(20, ["a", "b"])
    loads.add([load("a")], 0.0)
    assert ends(loads) == [("a", 1.0)]
    loads.add([load("c")], 2.0)  # b goes
    assert ends(loads) == [("c", 8.0)]
    loads.add([load("a"), load("b")], 10.0)
    assert ends(loads) == [("a", 11.0), ("b", 16.0)]


def test_a_read_waits_for_room_until_a_copy_ends():
    loads = queue(20, ["a", "b"])
    loads.add([load("a"), load("b"), load("c")], 0.0)
    # a's copy ends at 1 and makes room; c is read 1–6 and copied 6–7.
    assert ends(loads) == [("a", 1.0), ("b", 2.0), ("c", 7.0)]


def test_nobody_overtakes_a_load_that_waits_for_room():
    loads = queue(20, ["a"])
    loads.add([load("a"), load("big", 20)], 0.0)
    loads.add([load("a2")], 0.5)
    # big is read 1–11, copied 11–13; then a2 has room: read 13–18, copied 18–19.
    assert ends(loads) == [("a", 1.0), ("big", 13.0), ("a2", 19.0)]


def test_room_made_in_the_past_is_used_from_then_on():
    loads = queue(10)
    loads.add([load("a"), load("b")], 0.0)
    assert loads.ended(100.0) == ["a", "b"]
    loads.add([load("b")], 100.0)
    assert ends(loads) == [("b", 101.0)]


FOOTPRINTS = {name: AdapterFootprint(pages=1, weight_bytes=10, copy_bytes=10) for name in ("a0", "a1", "a2")}
TRACE = trace_of((0.0, 4, 1, "a0"), (100.0, 4, 1, "a1"), (200.0, 4, 1, "a2"), (300.0, 4, 1, "a0"))


@pytest.mark.parametrize("fast_forward", [True, False])
def test_a_simulation_reads_from_disk_what_the_bound_leaves_out(fast_forward):
    # One adapter's pages beside the KV: each request evicts the adapter before it from the GPU.
    costs = ConstantCosts(step=1.0, byte=0.1)
    read_s = disk_s(10)
    found = {}
    for bound in (None, 20, 10):
        plan = small_plan(pages=3, footprints=FOOTPRINTS, host_memory_bytes=bound, prefix_caching=False)
        result = simulate(TRACE, plan.config, costs, plan=plan, fast_forward=fast_forward)
        found[bound] = [
            round((end - start - 2.0) / read_s)
            for start, end in zip(
                result.columns["arrival_s"].tolist(), result.columns["finish_s"].tolist(), strict=True
            )
        ]
    # At the start the first fill host memory: a0 and a1 of 20 bytes, a0 of 10.
    assert found == {None: [0, 0, 0, 0], 20: [0, 0, 1, 1], 10: [0, 1, 1, 1]}
