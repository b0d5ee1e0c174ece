"""vLLM's scheduling, alone: who is passed over, when prompts are cut, who is preempted, how often slots are loaded."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.requests import Request
from engine.scheduler import RefusedError
from engine.vllm_scheduler import VllmLimits, VllmScheduler
from engine.vllm_slots import VllmSlots, set_order

NAMES = [f"a{index}" for index in range(12)]


def scheduler(blocks=100, **changes):
    limits = {"max_num_seqs": 8, "max_num_batched_tokens": 64, "max_model_len": 512, "max_loras": 2}
    return VllmScheduler(VllmLimits(**(limits | changes)), blocks, dict.fromkeys(NAMES, 1))


def request(number, prompt=10, output=5, adapter=None):
    return Request(
        request_id=number, arrival_s=0.0, prompt_tokens=prompt, output_tokens=output, adapter=adapter
    )


def run_step(engine):
    """Plan and complete a step; return (requests that prefill, decode rows), None where nothing runs."""
    step = engine.schedule(0.0)
    if step is None:
        return None
    told = [chunk.sequence.request.request_id for chunk in step.prefills], step.shape.decode_rows
    engine.complete(step)
    engine.check_integrity()
    return told


def test_a_request_whose_adapter_finds_no_slot_is_passed_over():
    engine = scheduler(max_loras=1)
    for number, name in enumerate(["a0", "a1", "a1", "a0", None]):
        engine.add(request(number, adapter=name, output=2))
    assert run_step(engine) == ([0, 3, 4], 0)
    assert engine.num_waiting == 2
    assert run_step(engine) == ([], 3)
    assert run_step(engine) == ([1, 2], 0), "when the last of a0 has ended, its slot is free"


def test_the_walk_past_waiting_requests_is_counted():
    engine = scheduler(max_loras=1)
    for number in range(20):
        engine.add(request(number, adapter="a0" if number == 0 else "a1", output=9))
    engine.complete(engine.schedule(0.0))
    assert engine.skipped == 19


def test_prompts_are_cut_at_the_budget_and_decodes_go_first():
    engine = scheduler(max_num_batched_tokens=16)
    engine.add(request(0, prompt=10, output=9))
    engine.add(request(1, prompt=20, output=9))
    step = engine.schedule(0.0)
    assert [chunk.length for chunk in step.prefills] == [10, 6]
    engine.complete(step)
    step = engine.schedule(0.0)
    assert (step.shape.decode_rows, [chunk.length for chunk in step.prefills]) == (1, [14])


def test_v0_runs_whole_prompts_alone():
    engine = scheduler(chunked=False, max_num_batched_tokens=512)
    engine.add(request(0, prompt=10, output=3))
    assert run_step(engine) == ([0], 0)
    engine.add(request(1, prompt=60, output=3))
    assert run_step(engine) == ([1], 0), "prompts before decodes"
    assert run_step(engine) == ([], 2)


def test_out_of_blocks_the_youngest_computes_again_and_nobody_overtakes():
    engine = scheduler(blocks=4)
    engine.add(request(0, prompt=30, output=20))
    engine.add(request(1, prompt=30, output=20))
    engine.add(request(2, prompt=5, output=2))
    assert run_step(engine) == ([0, 1], 0)
    while engine.preemptions == 0:
        assert run_step(engine) is not None
    assert engine.num_waiting == 2
    ended = []
    while engine.num_unfinished:
        step = engine.schedule(0.0)
        ended += [sequence.request.request_id for sequence in step.finishing]
        engine.complete(step)
        engine.check_integrity()
    assert ended == [0, 1, 2] or ended == [0, 2, 1]


def test_what_can_never_run_is_refused():
    engine = scheduler(blocks=4, max_open=1)
    for bad in (request(0, prompt=100), request(1, prompt=600), request(2, adapter="other")):
        with pytest.raises(RefusedError):
            engine.add(bad)
    engine.add(request(3))
    with pytest.raises(RefusedError, match="open"):
        engine.add(request(4))


def test_a_slot_is_loaded_once_while_slots_are_free():
    slots = VllmSlots(3)
    assert slots.enter(["a", "b"], ["a", "b"], 0) == 2
    assert slots.enter(["a", "b", "c"], ["c"], 1) == 1
    slots.left("c", 1)
    assert slots.enter(["a", "b", "c"], ["c"], 2) == 0


def test_a_new_adapter_may_evict_some_that_its_own_step_needs():
    """With all slots in use the LRU is asked in a fixed order, and everyone between the new one and the one that left is loaded again."""
    names = sorted((f"a{index}" for index in range(4)), key=set_order)
    first, second, third, fourth = names
    slots = VllmSlots(3)
    slots.enter([second, third, fourth], [second, third, fourth], 0)
    slots.left(fourth, 0)
    assert slots.enter([first, second, third], [first], 1) == 3
    slots = VllmSlots(3)
    slots.enter([first, second, third], [first, second, third], 0)
    slots.left(first, 0)
    assert slots.enter([second, third, fourth], [fourth], 1) == 1


@given(
    st.lists(
        st.tuples(st.integers(1, 60), st.integers(1, 30), st.sampled_from([None, *NAMES])),
        min_size=1,
        max_size=40,
    ),
    st.integers(8, 40),
    st.booleans(),
    st.integers(1, 4),
)
def test_every_request_ends_and_blocks_are_conserved(asked, blocks, chunked, slots):
    tokens = 64 if chunked else 512
    engine = scheduler(blocks=blocks, max_loras=slots, chunked=chunked, max_num_batched_tokens=tokens)
    taken = 0
    for number, (prompt, output, adapter) in enumerate(asked):
        try:
            engine.add(request(number, prompt, output, adapter))
            taken += 1
        except RefusedError:
            continue
    ended = steps = 0
    while engine.num_unfinished:
        step = engine.schedule(0.0)
        assert step is not None, "somebody waits for nothing"
        if engine.extendable() and steps % 2:
            engine.extend(engine.extendable())
        ended += len(step.finishing)
        engine.complete(step)
        engine.check_integrity()
        steps += 1
        assert steps < 100_000
    assert ended == taken
