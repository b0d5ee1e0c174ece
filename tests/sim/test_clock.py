"""What happens at one instant happens in a fixed order; time passes at once where nobody else waits."""

import pytest

from sim.clock import ARRIVAL, TURN, Clock


def test_equal_instants_resolve_by_order_then_by_who_asked_first():
    clock, seen = Clock(), []
    for order, name in ((TURN, 1), (TURN, 2), (ARRIVAL, 3)):
        clock.call_at(5.0, order, seen.append, name)
    clock.call_at(4.0, TURN, seen.append, 4)
    clock.run()
    assert seen == [4, 3, 1, 2]
    assert clock.now == 5.0
    with pytest.raises(ValueError, match="before now"):
        clock.call_at(4.0, TURN, seen.append)


def test_time_passes_at_once_only_while_nothing_else_is_due():
    clock = Clock()
    assert clock.advance_to(3.0) and clock.now == 3.0
    clock.call_at(7.0, TURN, lambda _: None)
    assert clock.advance_to(6.5) and clock.now == 6.5
    assert not clock.advance_to(7.0) and clock.now == 6.5  # whoever asked first goes first


def test_calls_and_simpy_processes_share_one_time():
    clock, seen = Clock(), []

    def walk():
        for _ in range(3):
            yield clock.timeout(2.0)
            seen.append(("walk", clock.now))

    clock.process(walk())
    clock.call_at(3.0, TURN, lambda _: seen.append(("call", clock.now)))
    clock.run(until=5.0)
    assert seen == [("walk", 2.0), ("call", 3.0), ("walk", 4.0)]
    assert not clock.advance_to(6.0)
    clock.run()
    assert seen[-1] == ("walk", 6.0)
