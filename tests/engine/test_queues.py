"""Waiting queues: exact orders, what holds whatever arrives, and what each policy is for, with the real scheduler."""

import math
from collections import Counter
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.queue_clustered import ClusteredQueue
from engine.queue_fair import FairQueue
from engine.queue_slo import SloQueue
from engine.queues import FcfsQueue, new_queue
from engine.requests import Request
from engine.residency import AdapterFootprint
from engine.scheduler import Scheduler, SchedulerLimits
from engine.sequence import Phase, Sequence

ADAPTERS = ("a", "b", "c", "d")
POLICIES = ("fcfs", "clustered", "fair", "slo")


@dataclass
class View:
    """What the queue is told of the scheduler."""

    running: set[str] = field(default_factory=set)
    resident: set[str] = field(default_factory=lambda: set(ADAPTERS))
    planned: dict[Sequence, int] = field(default_factory=dict)
    num_running: int = 0

    def is_resident(self, adapter):
        return adapter in self.resident

    def is_running(self, adapter):
        return adapter in self.running

    def running_adapters(self):
        return sorted(self.running)

    def planned_tokens(self, sequence):
        return self.planned.get(sequence, 0)


def waiting(number, adapter=None, prompt=10, output=10, arrival_s=0.0):
    request = Request(
        request_id=number, arrival_s=arrival_s, prompt_tokens=prompt, output_tokens=output, adapter=adapter
    )
    return Sequence(request, number, prompt)


def fill(queue, *adapters, prompt=10):
    """Push one request for each adapter, numbered from 0."""
    sequences = [waiting(number, adapter, prompt) for number, adapter in enumerate(adapters)]
    for sequence in sequences:
        queue.push(sequence)
    return sequences


def order(queue, view=None, limit=64, now_s=0.0):
    return [sequence.order for sequence in queue.window(limit, now_s, view or View())]


def make(policy):
    return new_queue(policy, ttft_slo_s=1.0, adapter_weights={"a": 2.0})


# ---- every policy ----


@pytest.mark.parametrize("policy", POLICIES)
def test_preempted_requests_go_first_the_last_preempted_before_all(policy):
    queue = make(policy)
    sequences = fill(queue, "a", "b", "a", "c")
    queue.window(64, 0.0, View())
    queue.drop([sequences[1], sequences[3]])
    queue.served(sequences[1], 0, 0)
    queue.push_front(sequences[1])
    queue.served(sequences[3], 0, 0)
    queue.push_front(sequences[3])
    assert order(queue) == [3, 1, 0, 2]


@pytest.mark.parametrize("policy", POLICIES)
def test_one_tenant_alone_is_served_in_order_of_arrival(policy):
    queue = make(policy)
    fill(queue, *["a"] * 100)
    assert order(queue, limit=64) == list(range(64))


def test_slo_needs_its_bound():
    with pytest.raises(ValueError, match="ttft_slo_s"):
        new_queue("slo")


operations = st.lists(
    st.tuples(
        st.sampled_from(["push", "push", "admit", "preempt", "end", "remove", "expire"]), st.integers(0, 9)
    ),
    max_size=80,
)


@settings(max_examples=150, deadline=None)
@given(policy=st.sampled_from(POLICIES), operations=operations)
def test_nobody_is_lost_or_doubled_and_a_shorter_window_is_the_start_of_a_longer(policy, operations):
    queue, view = make(policy), View(resident={"a", "b"})
    held: set[Sequence] = set()
    running: list[Sequence] = []
    for now, (operation, pick) in enumerate(operations):
        if operation == "push":
            sequence = waiting(now, [None, *ADAPTERS][pick % 5], prompt=1 + pick, arrival_s=now / 4)
            queue.push(sequence)
            held.add(sequence)
        elif operation == "admit":
            admitted = queue.window(64, now / 4, view)[: pick % 3]
            for sequence in admitted:
                queue.served(sequence, sequence.prefill_tokens, 0)
            queue.drop(admitted)
            held -= set(admitted)
            running += admitted
        elif operation in ("preempt", "end") and running:
            sequence = running.pop(pick % len(running))
            sequence.generated += pick
            queue.served(sequence, 0, sequence.generated)
            if operation == "preempt":
                sequence.preemptions += 1
                queue.push_front(sequence)
                held.add(sequence)
        elif operation == "remove" and held:
            sequence = min(held, key=lambda s: (s.order * 7 + pick) % 13)
            queue.remove(sequence)
            held.discard(sequence)
        elif operation == "expire":
            for sequence in queue.expired(now / 4):
                queue.remove(sequence)
                held.remove(sequence)
        view.running = {s.request.adapter for s in running if s.request.adapter is not None}
        assert len(queue) == len(held)
        assert Counter(queue) == Counter(held)
        long = queue.window(64, now / 4, view)
        assert Counter(long) == Counter(held)
        assert queue.window(3, now / 4, view) == long[:3]


# ---- clustered ----


def test_running_adapters_and_the_base_go_first_then_resident_ones_then_the_rest():
    queue = ClusteredQueue()
    fill(queue, "a", "b", "a", "c", None, "b", "d")
    assert order(queue, View(running={"b"}, resident={"b", "c"})) == [1, 4, 5, 3, 0, 2, 6]


def test_a_resident_adapters_requests_stay_together():
    queue = ClusteredQueue()
    fill(queue, "a", "c", "a", "c", "b")
    assert order(queue, View(resident={"a", "c"})) == [0, 2, 1, 3, 4]


def test_who_was_overtaken_too_often_goes_first():
    queue, view = ClusteredQueue(most_overtakes=2), View(running={"b"})
    sequences = fill(queue, "a", "b", "a", "b", "b")
    queue.drop([sequences[1]])
    assert order(queue, view) == [3, 4, 0, 2]
    queue.drop([sequences[3]])
    assert order(queue, view) == [0, 4, 2]  # 0 was overtaken twice, 2 once
    queue.drop([sequences[0]])
    queue.push(waiting(5, "b"))
    assert order(queue, view) == [4, 5, 2]
    queue.drop([sequences[4]])
    assert order(queue, view) == [2, 5]


@settings(max_examples=100, deadline=None)
@given(
    bound=st.integers(0, 12),
    at_once=st.integers(1, 4),
    adapters=st.lists(st.sampled_from([None, *ADAPTERS]), min_size=1, max_size=60),
)
def test_nobody_is_overtaken_more_often_than_the_bound_and_one_window(bound, at_once, adapters):
    """Two arrive for each `at_once` admitted; adapter a runs all the time."""
    queue, view = ClusteredQueue(most_overtakes=bound), View(running={"a"}, resident={"a", "b"})
    left, overtaken = iter(adapters), Counter()
    arrived = 0
    while True:
        for adapter in [name for name, _ in zip(left, range(2), strict=False)]:
            queue.push(waiting(arrived, adapter))
            arrived += 1
        admitted = queue.window(at_once, 0.0, view)
        if not admitted:
            break
        for first in admitted:
            overtaken.update(s for s in queue if s.order < first.order and s not in admitted)
        queue.drop(admitted)
    assert max(overtaken.values(), default=0) <= bound + at_once - 1


# ---- fair ----


def test_the_tenant_with_the_smallest_counter_is_next():
    queue = FairQueue()
    for number, (adapter, prompt) in enumerate(
        [("a", 30), ("a", 30), ("a", 30), ("b", 20), (None, 50), ("b", 20)]
    ):
        queue.push(waiting(number, adapter, prompt))
    # Counters as each is taken: a 0 → 30, b 0 → 20, base 0 → 50, b 20 → 40, a 30 → 60, a 60.
    assert order(queue) == [0, 3, 4, 5, 1, 2]


def test_a_tenant_of_twice_the_weight_gets_twice_as_much():
    queue = FairQueue({"a": 2.0})
    fill(queue, *["a"] * 6, *["b"] * 3)
    # a stands at 0, 5, 10, …; b at 0, 10, 20.
    assert order(queue) == [0, 6, 1, 2, 7, 3, 4, 8, 5]


def test_tokens_are_charged_when_planned_and_output_counts_twice():
    queue, view = FairQueue(), View()
    first, _, _, _ = fill(queue, "a", "a", "b", "b", prompt=10)
    queue.window(1, 0.0, view)
    queue.served(first, 10, 0)
    queue.drop([first])
    assert order(queue, view) == [2, 1, 3]  # b 0 → 10; a 10, and came first
    view.planned[first] = 1
    assert order(queue, view) == [2, 3, 1]  # a 12
    queue.served(first, 0, 20)
    other = waiting(4, "c")
    queue.push(other)
    assert order(queue, view) == [2, 4, 3, 1]  # a 50 in all, charged once


def test_a_tenant_that_comes_back_is_lifted_to_the_least_of_those_that_wait():
    queue, view = FairQueue(), View()
    sequences = fill(queue, "a", "a", "a", "b", prompt=10)
    queue.window(64, 0.0, view)
    for sequence in (sequences[3], sequences[0]):
        queue.served(sequence, 10, 0)
        queue.drop([sequence])
        queue.served(sequence, 0, 100)
    # a and b stand at 210; c has never had anything, and gets no credit for that.
    for number in range(4, 8):
        queue.push(waiting(number, "c"))
    assert order(queue, view) == [1, 4, 2, 5, 6, 7]


def test_the_first_after_an_empty_queue_is_lifted_to_whom_was_served_last():
    queue, view = FairQueue(), View()
    (first,) = fill(queue, "a")
    queue.window(64, 0.0, view)
    queue.served(first, 10, 0)
    queue.drop([first])
    queue.served(first, 0, 50)
    for number, adapter in enumerate(["b", "b", "a", "b"], start=1):
        queue.push(waiting(number, adapter))
    assert order(queue, view) == [1, 3, 2, 4]


def test_what_the_tenant_did_not_ask_for_costs_it_nothing():
    """Tokens found in the prefix cache are never served, and a preempted request is computed again for nothing."""
    queue, view = FairQueue(), View()
    first, *_ = fill(queue, "a", "a", "b", "b", prompt=100)
    queue.window(64, 0.0, view)
    queue.served(first, 10, 0)  # 90 cached
    queue.drop([first])
    first.generated, first.preemptions = 3, 1
    queue.served(first, 0, 3)
    queue.push_front(first)
    queue.window(64, 0.0, view)
    queue.served(first, 103, 0)
    queue.drop([first])
    view.planned[first] = 3
    queue.window(64, 0.0, view)
    assert queue._tenants["a"].counter == 16
    queue.served(first, 0, 5)
    assert queue._tenants["a"].counter == 20


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(
        st.tuples(st.integers(1, 50), st.integers(1, 30), st.integers(1, 50), st.integers(1, 30)),
        min_size=30,
        max_size=30,
    ),
    slots=st.integers(1, 5),
    weight=st.sampled_from([0.5, 1.0, 4.0]),
    head_start=st.integers(0, 20),
)
def test_two_tenants_that_both_wait_differ_by_at_most_a_constant(lengths, slots, weight, head_start):
    """`a` may be alone for a while; from when `b` waits, too, their services over their weights stay together."""
    queue, view = FairQueue({"a": weight}), View()
    weights = {"a": weight, "b": 1.0}
    number = 0
    for prompt, output, _, _ in lengths:
        queue.push(waiting(number, "a", prompt, output))
        number += 1
    service = dict.fromkeys(weights, 0)
    running: dict[Sequence, int] = {}
    bound = 2 * (50 + 2 * slots * 30) / min(weight, 1.0)
    for tick in range(400):
        if tick == head_start:
            service = dict.fromkeys(weights, 0)
            for _, _, prompt, output in lengths:
                queue.push(waiting(number, "b", prompt, output))
                number += 1
        for sequence in list(running):
            running[sequence] += 1
            view.planned[sequence] = running[sequence]
            service[sequence.request.adapter] += 2
            if running[sequence] == sequence.request.output_tokens:
                del running[sequence]
                queue.served(sequence, 0, sequence.request.output_tokens)
        admitted = queue.window(slots - len(running), 0.0, view)
        for sequence in admitted:
            service[sequence.request.adapter] += sequence.prefill_tokens
            queue.served(sequence, sequence.prefill_tokens, 0)
            running[sequence] = 0
        queue.drop(admitted)
        assert len(running) == slots or not len(queue), "it held somebody back for nothing"
        backlog = {sequence.request.adapter for sequence in queue}
        if tick >= head_start and backlog == set(weights):
            assert abs(service["a"] / weight - service["b"]) <= bound
        elif tick > head_start:
            break


def test_thousands_of_tenants_are_served_in_rounds():
    queue = FairQueue()
    fill(queue, *[f"t{number % 3000}" for number in range(9000)])
    served = []
    for _ in range(6000):
        (sequence,) = queue.window(1, 0.0, View())
        queue.served(sequence, 10, 0)
        queue.drop([sequence])
        served.append(sequence.order)
    assert served == list(range(6000))


# ---- slo ----


def test_before_it_has_learnt_a_rate_only_a_missed_deadline_counts():
    queue = SloQueue(1.0)
    for number in range(4):
        queue.push(waiting(number, arrival_s=float(number)))
    assert [s.order for s in queue.expired(2.5)] == [0, 1]
    assert [s.order for s in queue.expired(2.0)] == [0]


def congest(queue, tokens_a_plan, until, gap_s=0.1):
    """Plan every `gap_s` with somebody left behind, each plan with so many prompt tokens."""
    helper = waiting(-1)
    for plan in range(until + 1):
        queue.expired(plan * gap_s)
        queue.window(64, plan * gap_s, View())
        queue.served(helper, tokens_a_plan, 0)
    return queue


def test_whose_tokens_cannot_all_be_computed_in_time_is_turned_away_and_not_those_behind_who_can():
    queue = SloQueue(1.0)
    for number, prompt in enumerate([100, 100, 1500, 200, 100, 100, 1100]):
        queue.push(waiting(number, prompt=prompt, arrival_s=0.5))
    congest(queue, 100, until=5)
    # Five gaps of 0.1 s with 100 tokens each, forgotten by e^(-t / 2 s), and one prompt of the mean length. From 0.5 s on there is 1 s
    # less two steps of 0.1 s.
    gaps = sum(math.exp(-0.05 * age) for age in range(5))
    fit = 0.8 * (100 * gaps + 3200 / 7) / (0.1 * gaps)
    assert 600 < fit < 1700
    late = queue.expired(0.5)
    assert [s.order for s in late] == [2, 6]
    for sequence in late:
        queue.remove(sequence)
    assert queue.expired(0.5) == []


def test_a_plan_that_leaves_nobody_behind_ends_the_congestion_and_what_was_learnt():
    queue = SloQueue(1.0)
    for number in range(4):
        queue.push(waiting(number, prompt=500, arrival_s=0.5))
    congest(queue, 10, until=5)
    assert [s.order for s in queue.expired(0.5)] == [1, 2, 3]
    everybody = queue.window(64, 0.5, View())
    queue.drop(everybody)
    for number in range(4, 8):
        queue.push(waiting(number, prompt=500, arrival_s=0.6))
    assert queue.expired(0.6) == []


def test_waiting_for_a_load_alone_is_no_congestion():
    queue = SloQueue(1.0)
    for number in range(4):
        queue.push(waiting(number, "a", prompt=500))
    for plan in range(8):
        assert queue.expired(plan / 10) == []
        queue.window(64, plan / 10, View(resident=set()))


# ---- with the scheduler ----

LIMITS = {"max_num_seqs": 16, "max_num_batched_tokens": 64, "max_model_len": 256, "page_tokens": 16}
STEP_S = 0.01


def serve(arrivals, *, pages=2000, adapters=ADAPTERS, check_every=16, **limits):
    """Serve (arrival_s, prompt, output, adapter) rows; return (sequence, first token's instant) by row, refused sequences and adapters by step."""
    footprints = {name: AdapterFootprint(pages=2, weight_bytes=1, copy_bytes=1) for name in adapters}
    scheduler = Scheduler(SchedulerLimits(**{**LIMITS, **limits}), pages, footprints)
    sequences, first_token_s, refused, distinct = [], {}, [], []
    pending = iter(arrivals)
    row = next(pending, None)
    for number in range(20_000):
        now_s = number * STEP_S
        while row is not None and row[0] <= now_s:
            request = Request(
                request_id=len(sequences),
                arrival_s=row[0],
                prompt_tokens=row[1],
                output_tokens=row[2],
                adapter=row[3],
            )
            sequences.append(scheduler.add(request))
            row = next(pending, None)
        step = scheduler.schedule(now_s)
        for load in scheduler.take_loads():
            scheduler.load_finished(load.adapter, now_s)
        refused += [sequence for sequence, _ in scheduler.take_refused()]
        if number % check_every == 0:
            scheduler.check_integrity()
        if step is not None:
            distinct.append(step.shape.lora_adapters)
            first_token_s.update(
                {c.sequence: now_s + STEP_S for c in step.prefills if c.last and not c.sequence.preemptions}
            )
            scheduler.complete(step)
        elif row is None and not scheduler.num_unfinished:
            break
    assert scheduler.num_unfinished == 0
    return sequences, first_token_s, refused, distinct


def ttfts_s(sequences, first_token_s, adapter):
    return sorted(first_token_s[s] - s.request.arrival_s for s in sequences if s.request.adapter == adapter)


def hot_and_light(seconds=4.0, per_s=100):
    """Tenant `a` sends nine of ten requests, `b` one; 16 slots of 40 steps serve about 40 a second."""
    return [(n / per_s, 32, 40, "b" if n % 10 == 9 else "a") for n in range(int(seconds * per_s))]


def test_a_hot_tenant_cannot_starve_a_light_one_under_fair():
    waits = {}
    for policy in ("fcfs", "fair"):
        sequences, first_token_s, _, _ = serve(hot_and_light(), policy=policy)
        waits[policy] = ttfts_s(sequences, first_token_s, "b")
    assert waits["fcfs"][-1] > 4.0
    assert waits["fair"][-1] < 0.5


def test_weights_share_what_there_is():
    rows = [(n / 200, 32, 40, "ab"[n % 2]) for n in range(600)]
    sequences, first_token_s, _, _ = serve(rows, policy="fair", adapter_weights={"a": 3.0})
    by_four_s = Counter(s.request.adapter for s in sequences if first_token_s[s] < 4.0)
    assert by_four_s["a"] / by_four_s["b"] == pytest.approx(3.0, rel=0.15)


def test_slo_keeps_the_first_tokens_of_the_admitted_in_time_under_twice_the_load():
    rows = [(n / 80, 16 + 16 * (n % 3), 20 + 20 * (n % 3), None) for n in range(640)]
    sequences, first_token_s, refused, _ = serve(rows, policy="slo", ttft_slo_s=0.5)
    waits = ttfts_s([s for s in sequences if s in first_token_s], first_token_s, None)
    assert set(refused) == {s for s in sequences if s not in first_token_s}
    assert 0.3 < len(refused) / len(sequences) < 0.6
    assert waits[-1] <= 0.5
    assert all(s.phase is Phase.DONE for s in sequences)
    sequences, first_token_s, _, _ = serve(rows, policy="fcfs")
    late = ttfts_s(sequences, first_token_s, None)
    assert late[len(late) // 2] > 2.0


def test_slo_turns_nobody_away_while_there_is_room():
    rows = [(n / 20, 32, 40, ADAPTERS[n % 4]) for n in range(200)]
    assert serve(rows, policy="slo", ttft_slo_s=0.1)[2] == []


def test_clustered_lowers_the_distinct_adapters_of_a_step():
    adapters = [f"t{number}" for number in range(40)]
    rows = [(n / 100, 16, 20 + n % 7, adapters[(n * 17) % 40]) for n in range(800)]
    mean = {}
    for policy, cap in [("fcfs", None), ("clustered", None), ("clustered", 8), ("fcfs", 8)]:
        distinct = serve(rows, adapters=adapters, policy=policy, max_adapters_per_step=cap)[3]
        mean[policy, cap] = sum(distinct) / len(distinct)
        assert cap is None or max(distinct) <= cap
        if cap:
            mean["steps", policy] = len(distinct)
    assert mean["clustered", None] < 0.75 * mean["fcfs", None]
    assert mean["clustered", 8] < 0.6 * mean["fcfs", None]
    assert (
        mean["steps", "clustered"] < 0.75 * mean["steps", "fcfs"]
    )  # the cap costs less when it is filled well


rows_strategy = st.lists(
    st.tuples(st.integers(0, 30), st.integers(1, 60), st.integers(1, 30), st.sampled_from([None, *ADAPTERS])),
    min_size=1,
    max_size=40,
)


@settings(max_examples=60, deadline=None)
@given(
    rows=rows_strategy,
    policy=st.sampled_from(POLICIES),
    pages=st.integers(12, 60),
    cap=st.sampled_from([None, 1, 2]),
)
def test_every_request_ends_whatever_the_policy(rows, policy, pages, cap):
    arrivals = sorted(((step * STEP_S, *rest) for step, *rest in rows), key=lambda row: row[0])
    slo_s = 0.5 if policy == "slo" else None
    sequences, first_token_s, refused, _ = serve(
        arrivals,
        pages=pages,
        policy=policy,
        ttft_slo_s=slo_s,
        max_adapters_per_step=cap,
        max_num_seqs=4,
        check_every=1,
    )
    assert len(first_token_s.keys() | set(refused)) == len(rows)
    assert policy == "slo" or not refused
    assert all(s.phase is Phase.DONE for s in sequences)


def test_fcfs_is_the_order_of_arrival():
    queue = FcfsQueue()
    fill(queue, "a", None, "b", "a")
    assert order(queue, View(running={"b"})) == [0, 1, 2, 3]
