"""Pool, residency and scheduler: exact timelines, and properties that hold whatever arrives."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.pool import PagePool
from engine.requests import Request
from engine.residency import AdapterFootprint
from engine.scheduler import RefusedError, Scheduler, SchedulerLimits
from engine.sequence import Phase
from engine.step import Step

LIMITS = SchedulerLimits(max_num_seqs=4, max_num_batched_tokens=16, max_model_len=64, page_tokens=4)
FOOTPRINTS = {
    f"a{i}": AdapterFootprint(pages=2 + i, weight_bytes=100 * (i + 1), copy_bytes=100 * (i + 1))
    for i in range(4)
}


def request(number, prompt=5, output=3, adapter=None, arrival_s=0.0):
    return Request(
        request_id=number, arrival_s=arrival_s, prompt_tokens=prompt, output_tokens=output, adapter=adapter
    )


def timeline(step: Step):
    chunks = [(c.sequence.request.request_id, c.start, c.length) for c in step.prefills]
    ends = [s.request.request_id for s in step.finishing]
    return step.shape.decode_rows, chunks, ends


def run_alone(scheduler, most=1000):
    """Schedule and complete one step after the other, loads at once; return the timelines."""
    seen = []
    for _ in range(most):
        for load in scheduler.take_loads():
            scheduler.load_finished(load.adapter, 0.0)
        step = scheduler.schedule(0.0)
        scheduler.check_integrity()
        if step is None:
            if not scheduler.num_unfinished:
                return seen
            continue
        seen.append(timeline(step))
        scheduler.complete(step)
        scheduler.check_integrity()
    raise AssertionError(f"{scheduler.num_unfinished} requests unfinished after {most} steps")


def test_one_request_prefills_then_decodes():
    scheduler = Scheduler(LIMITS, 16, FOOTPRINTS)
    scheduler.add(request("r", prompt=5, output=3))
    assert run_alone(scheduler) == [(0, [("r", 0, 5)], []), (1, [], []), (1, [], ["r"])]


def test_a_long_prompt_is_chunked_and_mixed_with_decodes():
    scheduler = Scheduler(LIMITS, 16, FOOTPRINTS)
    scheduler.add(request("short", prompt=4, output=4))
    scheduler.add(request("long", prompt=30, output=1))
    assert run_alone(scheduler) == [
        (0, [("short", 0, 4), ("long", 0, 12)], []),
        (1, [("long", 12, 15)], []),
        (1, [("long", 27, 3)], ["long"]),
        (1, [], ["short"]),
    ]


def test_a_single_token_request_ends_with_its_prefill():
    scheduler = Scheduler(LIMITS, 16, FOOTPRINTS)
    scheduler.add(request("r", prompt=5, output=1))
    assert run_alone(scheduler) == [(0, [("r", 0, 5)], ["r"])]


def test_only_an_adapters_own_requests_wait_for_its_load():
    scheduler = Scheduler(LIMITS, 16, FOOTPRINTS)
    scheduler.add(request("lora", adapter="a0"))
    scheduler.add(request("base"))
    step = scheduler.schedule(0.0)
    assert timeline(step) == (0, [("base", 0, 5)], [])
    (load,) = scheduler.take_loads()
    assert (load.adapter, len(load.pages)) == ("a0", 2)
    scheduler.load_finished("a0", 0.5)
    step = scheduler.schedule(1.0)
    assert timeline(step) == (1, [("lora", 0, 5)], [])
    assert step.prefills[0].sequence.load_wait_s == 0.5
    assert (step.shape.lora_tokens, step.shape.lora_adapters, step.shape.lora_bytes) == (5, 1, 100)


def test_steps_planned_ahead_of_completion_keep_the_pages_of_what_ends():
    scheduler = Scheduler(LIMITS, 16, FOOTPRINTS)
    scheduler.add(request("r", prompt=4, output=2))
    first, second = scheduler.schedule(0.0), scheduler.schedule(0.0)
    assert timeline(second) == (1, [], ["r"])
    assert scheduler.schedule(0.0) is None
    assert scheduler.pool.num_used == 2
    scheduler.complete(first)
    scheduler.complete(second)
    assert scheduler.pool.num_used == 0


def test_out_of_pages_the_youngest_is_preempted_and_computed_again():
    scheduler = Scheduler(LIMITS, 7, FOOTPRINTS)
    old = scheduler.add(request("old", prompt=8, output=9))
    young = scheduler.add(request("young", prompt=8, output=9))
    run_alone(scheduler)
    assert (old.preemptions, young.preemptions) == (0, 1)
    assert old.phase is young.phase is Phase.DONE


def test_a_plan_that_preempts_admits_and_loads_nothing():
    """The step in flight may still write the victim's pages, so nobody else gets them before it has completed."""
    scheduler = Scheduler(LIMITS, 8, {"a": AdapterFootprint(pages=1, weight_bytes=1, copy_bytes=1)})
    for name in ("old", "young"):
        scheduler.add(request(name, prompt=12, output=8))
    running = scheduler.schedule(0.0)
    scheduler.add(request("lora", prompt=4, output=2, adapter="a"))
    scheduler.take_loads()
    while True:
        planned = scheduler.schedule(0.0)
        if scheduler.preemptions:
            break
        scheduler.complete(running)
        running = planned
        for load in scheduler.take_loads():
            scheduler.load_finished(load.adapter, 0.0)
    assert scheduler.take_loads() == [] and planned.prefills == []
    scheduler.complete(running)
    scheduler.check_integrity()


def test_idle_adapters_stay_and_the_least_recently_used_goes_first():
    scheduler = Scheduler(LIMITS, 12, FOOTPRINTS)
    for name in ("a0", "a1", "a2"):
        scheduler.add(request(name, adapter=name, prompt=4, output=1))
        run_alone(scheduler)
    assert list(scheduler.residency.idle_names()) == ["a0", "a1", "a2"]
    scheduler.add(request("a3", adapter="a3", prompt=4, output=1))
    run_alone(scheduler)
    assert list(scheduler.residency.idle_names()) == ["a2", "a3"]
    assert scheduler.residency.evictions == 2


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"prompt": 60, "output": 5}, "65 tokens exceed max_model_len=64"),
        ({"prompt": 30, "output": 20}, "13 pages needed for 50 tokens and the adapter, the pool has 12"),
        ({"adapter": "nobody"}, "adapter 'nobody' is not registered"),
    ],
)
def test_what_can_never_run_is_refused_with_the_reason(changes, reason):
    scheduler = Scheduler(LIMITS, 12, FOOTPRINTS)
    with pytest.raises(RefusedError, match=reason):
        scheduler.add(request("r", **changes))
    assert scheduler.num_unfinished == 0


def test_pool_refuses_a_double_release():
    pool = PagePool(4)
    pages = pool.allocate(2)
    pool.share(pages)
    pool.release(pages)
    pool.release(pages)
    with pytest.raises(ValueError, match="released twice"):
        pool.release(pages)
    with pytest.raises(ValueError, match="5 pages wanted, 4 free"):
        pool.allocate(5)


requests_strategy = st.lists(
    st.tuples(
        st.integers(1, 40),  # prompt
        st.integers(1, 20),  # output
        st.sampled_from([None, "a0", "a1", "a2", "a3"]),
        st.integers(0, 6),  # steps before the next one arrives
    ),
    min_size=1,
    max_size=25,
)


def drive(scheduler, arrivals, load_steps, *, fast_forward=False):
    """Run a pipelined loop (step n+1 planned before n completes) with loads of `load_steps` steps; return what happened, by step."""
    pending = list(arrivals)
    waits = 0
    sequences, refused, log = [], [], []
    loads: list[tuple[int, str]] = []
    clock = 0
    running = None
    idle = 0
    while pending or scheduler.num_unfinished:
        while pending and waits <= 0:
            prompt, output, adapter, gap = pending.pop(0)
            number = len(sequences) + len(refused)
            try:
                sequences.append(scheduler.add(request(number, prompt, output, adapter)))
            except RefusedError:
                refused.append(number)
            waits = gap
        for due, name in [item for item in loads if item[0] <= clock]:
            scheduler.load_finished(name, float(clock))
            loads.remove((due, name))
        planned = scheduler.schedule(float(clock))
        loads += [(clock + load_steps, load.adapter) for load in scheduler.take_loads()]
        scheduler.check_integrity()
        if running is not None:
            scheduler.complete(running)
        idle = 0 if planned or running or not scheduler.num_unfinished else idle + 1
        assert idle <= load_steps + 10, "nothing moves"
        running = planned
        steps = 1
        if planned is not None:
            log.append((clock, planned.shape.to_json(), timeline(planned)))
            if fast_forward and not pending and not loads:
                steps += scheduler.extendable()
                scheduler.extend(steps - 1)
                for ahead in range(1, steps):
                    rows, shape = planned.shape.decode_rows, planned.shape
                    moved = replace(
                        shape,
                        decode_kv_tokens=shape.decode_kv_tokens + rows * ahead,
                        decode_kv_max=shape.decode_kv_max + ahead,
                    )
                    log.append((clock + ahead, moved.to_json(), (rows, [], [])))
        clock += steps
        waits -= steps
        scheduler.check_integrity()
        assert clock < 5000, "somebody starves"
    if running is not None:
        scheduler.complete(running)
    return sequences, refused, log


@settings(max_examples=80, deadline=None)
@given(
    arrivals=requests_strategy,
    pages=st.integers(6, 40),
    load_steps=st.integers(1, 5),
    cap=st.sampled_from([None, 1, 2]),
)
def test_whatever_arrives_pages_are_conserved_and_every_request_ends(arrivals, pages, load_steps, cap):
    scheduler = Scheduler(replace(LIMITS, max_adapters_per_step=cap), pages, FOOTPRINTS)
    sequences, refused, _ = drive(scheduler, arrivals, load_steps)
    assert len(sequences) + len(refused) == len(arrivals)
    for sequence in sequences:
        assert sequence.phase is Phase.DONE
        assert scheduler.planned_tokens(sequence) == sequence.request.output_tokens
    assert scheduler.num_unfinished == 0
    assert scheduler.pool.num_used == scheduler.residency.pages_held
    scheduler.check_integrity()


@settings(max_examples=80, deadline=None)
@given(arrivals=requests_strategy, pages=st.integers(8, 40), load_steps=st.integers(1, 5))
def test_many_steps_at_once_are_the_same_as_one_by_one(arrivals, pages, load_steps):
    one = drive(Scheduler(LIMITS, pages, FOOTPRINTS), arrivals, load_steps)[2]
    many = drive(Scheduler(LIMITS, pages, FOOTPRINTS), arrivals, load_steps, fast_forward=True)[2]
    assert one == many


@settings(max_examples=50, deadline=None)
@given(arrivals=requests_strategy, load_steps=st.integers(1, 3))
def test_shapes_tell_what_the_sequences_hold(arrivals, load_steps):
    """StepShape's running sums equal a count over the sequences, one by one."""
    scheduler = Scheduler(LIMITS, 40, FOOTPRINTS)
    for number, (prompt, output, adapter, _) in enumerate(arrivals):
        scheduler.add(request(number, prompt, output, adapter))
    for _ in range(2000):
        for load in scheduler.take_loads():
            scheduler.load_finished(load.adapter, 0.0)
        before = {s: scheduler.planned_tokens(s) for s in scheduler.running() if s.phase is Phase.DECODE}
        step = scheduler.schedule(0.0)
        if step is None:
            if not scheduler.num_unfinished:
                break
            continue
        rows = [s for s in before if scheduler.planned_tokens(s) == before[s] + 1]
        assert step.shape.decode_rows == len(rows)
        kv = [s.request.prompt_tokens + before[s] for s in rows]
        assert step.shape.decode_kv_tokens == sum(kv)
        assert step.shape.decode_kv_max == max(kv, default=0)
        names = [s.request.adapter for s in rows] + [
            c.sequence.request.adapter for c in step.prefills for _ in range(c.length)
        ]
        names = [name for name in names if name is not None]
        weights = {name: FOOTPRINTS[name].weight_bytes for name in names}
        assert step.shape.lora_tokens == len(names)
        assert step.shape.lora_bytes == sum(weights.values())
        decoding = [s.request.adapter for s in rows]
        assert step.shape.lora_single_bytes == sum(
            w for name, w in weights.items() if decoding.count(name) == 1
        )
        assert step.shape.lora_token_bytes == sum(weights[name] for name in names)
        scheduler.complete(step)
    assert scheduler.num_unfinished == 0


@pytest.mark.parametrize("load_steps", [1, 5, 40])
def test_an_endless_stream_does_not_starve_a_long_prompt_whose_adapter_must_load(load_steps):
    """While the first waiting request's adapter loads, nobody overtakes it into the pages that its prompt will want."""
    limits = SchedulerLimits(max_num_seqs=64, max_num_batched_tokens=512, max_model_len=2000, page_tokens=16)
    scheduler = Scheduler(limits, 100, {"x": AdapterFootprint(pages=4, weight_bytes=4, copy_bytes=4)})
    later, loads, running, long = [], [], None, None
    for step in range(1500):
        if step == 200:
            long = scheduler.add(request("long", prompt=800, output=10, adapter="x"))
        if step % 4 == 0 and scheduler.num_waiting < 20:
            later.append(scheduler.add(request(step, prompt=16, output=160)))
        for due, name in [load for load in loads if load[0] <= step]:
            scheduler.load_finished(name, float(step))
            loads.remove((due, name))
        planned = scheduler.schedule(float(step))
        loads += [(step + load_steps, load.adapter) for load in scheduler.take_loads()]
        if running is not None:
            scheduler.complete(running)
        running = planned
        scheduler.check_integrity()
        if long is not None and long.phase is Phase.DONE:
            break
    assert long.phase is Phase.DONE
    assert not [s for s in later if s.order > long.order and s.phase is Phase.DONE]


def test_a_full_queue_of_loads_does_not_stop_requests_that_need_none():
    footprints = {f"x{i}": AdapterFootprint(pages=1, weight_bytes=1, copy_bytes=1) for i in range(20)}
    scheduler = Scheduler(replace(LIMITS, max_num_seqs=16), 200, footprints)
    for name in footprints:
        scheduler.add(request(name, adapter=name))
    scheduler.add(request("base"))
    step = scheduler.schedule(0.0)
    assert len(scheduler.take_loads()) == 8
    assert [chunk.sequence.request.request_id for chunk in step.prefills] == ["base"]


def test_a_prefetch_that_cannot_start_evicts_nobody():
    """Idle adapters that waiting requests want are not given up for one further back, nor others in vain."""
    footprints = {name: AdapterFootprint(pages=4, weight_bytes=1, copy_bytes=1) for name in ("held", "idle")}
    footprints["big"] = AdapterFootprint(pages=9, weight_bytes=1, copy_bytes=1)
    scheduler = Scheduler(LIMITS, 16, footprints)
    for name in ("held", "idle"):
        scheduler.add(request(name, adapter=name, prompt=4, output=1))
        run_alone(scheduler)
    scheduler.add(request("long", adapter="held", prompt=16, output=20))
    scheduler.schedule(0.0)
    scheduler.add(request("first", adapter="idle", prompt=28, output=4))
    scheduler.add(request("second", adapter="big", prompt=4, output=1))
    scheduler.schedule(0.0)
    assert scheduler.take_loads() == []
    assert scheduler.residency.evictions == 0
    scheduler.check_integrity()
