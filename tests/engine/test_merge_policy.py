"""When to merge: dLoRA's rule step by step, and that it holds under the scheduler, whatever arrives."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.merge_policy import CREDIT_LIMIT, MergePolicy
from engine.residency import AdapterFootprint
from engine.scheduler import Scheduler
from tests.engine.test_scheduler import FOOTPRINTS, LIMITS, request, run_alone

DYNAMIC = replace(LIMITS, merge_thresholds=(0.6, 0.4))


def policy_with(counts, alpha=1.0, beta=15 / 27):
    policy = MergePolicy(alpha, beta)
    for name, count in counts.items():
        for _ in range(count):
            policy.came(name)
    return policy


def yes(_name):
    return True


def test_one_adapter_alone_is_merged_and_others_are_not_forgotten():
    policy = policy_with({"a": 2})
    assert policy.decide(0.0, yes)
    policy.came("b")
    for step in range(CREDIT_LIMIT):
        assert policy.quiet_steps() == CREDIT_LIMIT - step
        assert not policy.decide(1.0, yes)
        policy.ran(2)
    assert policy.decide(2.0, yes)
    policy.ended("b")
    policy.came("b")  # another one: who ended has no credits left
    policy.ended("b")
    assert policy.decide(3.0, yes) and policy.merged == "a"
    assert policy.switches == 3


def test_credits_are_spent_before_anything_is_merged_again():
    policy = policy_with({"a": 9, None: 1}, alpha=0.5)
    assert policy.decide(0.0, yes)
    for _ in range(CREDIT_LIMIT):
        policy.ran(1)
    assert policy.decide(1.0, yes) and policy.merged is None
    for step in range(CREDIT_LIMIT):
        assert policy.quiet_steps() == CREDIT_LIMIT - step
        assert not policy.decide(1.0, yes)
        policy.ran(10)
        policy.check_integrity()
    assert policy.decide(2.0, yes) and policy.merged == "a"


def test_below_beta_it_is_taken_out():
    policy = policy_with({"a": 3})
    policy.decide(0.0, yes)
    for _ in range(2):
        policy.came("b")
    assert not policy.decide(0.0, yes)  # 3 of 5 is more than 15/27
    policy.came("b")
    assert policy.decide(0.0, yes) and policy.merged is None


def test_thresholds_follow_what_was_had():
    policy = policy_with({"a": 4}, alpha=1.0, beta=0.5)
    policy.decide(0.0, yes)  # merged; nothing to compare with
    policy.ran(100)
    for _ in range(5):
        policy.came("b")
    policy.decide(1.0, yes)  # unmerged after 100 tokens a second
    assert (policy.alpha, policy.beta) == (0.95, 0.5)  # better than nothing
    policy.ran(500)
    for _ in range(5):
        policy.ended("b")
    policy.decide(2.0, yes)  # merged after 500 a second: leaving it was right
    assert policy.beta == pytest.approx(0.55)
    policy.ran(100)
    for _ in range(4):
        policy.came("b")
    policy.decide(3.0, yes)
    assert policy.merged is None and policy.alpha == 1.0  # 0.95 · 1.1, at most 1


def test_what_may_not_be_merged_is_asked_again_only_when_something_changed():
    asked = []
    policy = policy_with({"a": 1})

    def no(name):
        asked.append(name)
        return False

    assert not policy.decide(0.0, no) and not policy.decide(0.0, no)
    assert asked == ["a"]
    policy.look_again()
    assert not policy.decide(0.0, no) and asked == ["a", "a"]


def test_while_one_is_merged_the_others_wait_with_what_they_hold():
    scheduler = Scheduler(DYNAMIC, 32, FOOTPRINTS)
    for number in range(2):
        scheduler.add(request(f"a{number}", output=6, adapter="a0"))
    scheduler.add(request("base", output=6))
    steps = []
    while scheduler.num_unfinished:
        for load in scheduler.take_loads():
            scheduler.load_finished(load.adapter, 0.0)
        step = scheduler.schedule(float(len(steps)))
        if step is None:
            continue
        steps.append((step.merged, step.shape.decode_rows, step.shape.lora_tokens))
        scheduler.complete(step)
        scheduler.check_integrity()
    # The base's prompt comes first, while a0 is loaded; then a0 is 2/3 of all: merged until it ends.
    assert steps[0] == (None, 0, 0)
    merged = [step for step in steps if step[0] == "a0"]
    assert len(merged) == 6 and all(rows <= 2 and lora == 0 for _, rows, lora in merged)
    assert [step[:2] for step in steps[-4:]] == [(None, 1)] * 4


@settings(max_examples=30, deadline=None)
@given(
    requests=st.lists(
        st.tuples(st.integers(1, 30), st.integers(1, 20), st.sampled_from([None, "a0", "a0", "a0", "a1"])),
        min_size=1,
        max_size=12,
    ),
    pages=st.integers(20, 40),
    alpha=st.sampled_from([0.3, 0.6, 1.0]),
)
def test_everybody_is_served_and_no_page_is_lost(requests, pages, alpha):
    limits = replace(LIMITS, merge_thresholds=(alpha, 0.2))
    footprints = {name: AdapterFootprint(pages=2, weight_bytes=1, copy_bytes=1) for name in FOOTPRINTS}
    scheduler = Scheduler(limits, pages, footprints)
    for number, (prompt, output, adapter) in enumerate(requests):
        scheduler.add(request(number, prompt=prompt, output=output, adapter=adapter))
    run_alone(scheduler, most=3000)
    assert scheduler.pool.num_used == scheduler.residency.pages_held
    scheduler.merging.policy.check_integrity()
