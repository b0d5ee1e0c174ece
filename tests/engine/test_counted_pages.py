"""Pages taken by number decide as pages taken by name: the simulator's scheduler is the engine's."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.pool import PagePool
from engine.requests import Request
from engine.residency import AdapterFootprint
from engine.scheduler import RefusedError, Scheduler, SchedulerLimits

LIMITS = SchedulerLimits(max_num_seqs=4, max_num_batched_tokens=16, max_model_len=64, page_tokens=4)
FOOTPRINTS = {
    f"a{i}": AdapterFootprint(pages=2 + i, weight_bytes=100 * (i + 1), copy_bytes=100 * (i + 1))
    for i in range(4)
}

arrivals_strategy = st.lists(
    st.tuples(
        st.integers(1, 40),  # prompt
        st.integers(1, 20),  # output
        st.sampled_from([None, "a0", "a1", "a2", "a3"]),
        st.integers(0, 6),  # steps before the next one arrives
        st.sampled_from([None, "x", "y"]),  # how the prompt starts
    ),
    min_size=1,
    max_size=25,
)


def keys_of(adapter, text, prompt):
    return None if text is None else tuple((adapter, text, page) for page in range(prompt // 4))


def drive(scheduler, arrivals, aborted, *, fast_forward=False):
    """Plan step n + 1 before step n completes, loads taking two steps; yield all that was decided, by step."""
    pending, loads, sequences = list(arrivals), [], []
    clock = waits = 0
    running = None
    while pending or scheduler.num_unfinished:
        while pending and waits <= 0:
            prompt, output, adapter, waits, text = pending.pop(0)
            keys = keys_of(adapter, text, prompt)
            try:
                sequences.append(scheduler.add(Request(len(sequences), 0.0, prompt, output, adapter, keys)))
            except RefusedError as error:
                yield str(error)
        for due, name in [load for load in loads if load[0] <= clock]:
            scheduler.load_finished(name, float(clock))
            loads.remove((due, name))
        if clock in aborted and sequences:
            scheduler.abort(sequences[clock % len(sequences)])
        planned = scheduler.schedule(float(clock))
        started = [load.adapter for load in scheduler.take_loads()]
        loads += [(clock + 2, name) for name in started]
        scheduler.check_integrity()
        if running is not None:
            scheduler.complete(running)
        running = planned
        if planned is not None:
            chunks = [(c.sequence.order, c.start, c.length) for c in planned.prefills]
            yield planned.shape, chunks, [s.order for s in planned.finishing]
        yield (
            started,
            scheduler.pool.num_free,
            scheduler.pool.num_kept,
            scheduler.kv_pages,
            scheduler.preemptions,
            scheduler.residency.evictions,
            scheduler.prefix_hit_tokens,
            list(scheduler.residency.idle_names()),
        )
        steps = 1
        if fast_forward and planned is not None and not loads and not pending:
            further = scheduler.extendable()
            scheduler.extend(further)
            scheduler.check_integrity()
            steps += further
            yield further, scheduler.pool.num_free, scheduler.pool.num_kept, scheduler.residency.evictions
        clock += steps
        waits -= steps
        assert clock < 5000, "somebody starves"
    if running is not None:
        scheduler.complete(running)
    scheduler.check_integrity()


@settings(max_examples=150, deadline=None)
@given(
    arrivals=arrivals_strategy,
    pages=st.integers(6, 40),
    policy=st.sampled_from(["fcfs", "clustered", "fair"]),
    eviction=st.sampled_from(["lru", "gdsf"]),
    adapter_pool=st.sampled_from([None, None, 5]),
    aborted=st.sets(st.integers(0, 60), max_size=5),
    fast_forward=st.booleans(),
)
def test_pages_without_names_change_no_decision(
    arrivals, pages, policy, eviction, adapter_pool, aborted, fast_forward
):
    limits = replace(LIMITS, policy=policy, adapter_eviction=eviction, adapter_pool_pages=adapter_pool)
    named, counted = Scheduler(limits, pages, FOOTPRINTS), Scheduler(limits, pages, FOOTPRINTS)
    counted.count_pages()
    expected, found = (
        list(drive(scheduler, arrivals, aborted, fast_forward=fast_forward)) for scheduler in (named, counted)
    )
    assert found == expected


def test_only_pages_that_can_be_found_again_get_names():
    scheduler = Scheduler(LIMITS, 20, {})
    scheduler.count_pages()
    plain = scheduler.add(Request(0, 0.0, 7, 9))
    keyed = scheduler.add(Request(1, 0.0, 9, 9, None, ("k0", "k1")))
    scheduler.complete(scheduler.schedule(0.0))
    assert (plain.pages, plain.held_pages) == ([], 2)
    assert (len(keyed.pages), keyed.held_pages) == (2, 3)
    assert scheduler.pool.num_free == 15
    step = scheduler.schedule(0.0)
    assert step.new_pages == []
    with pytest.raises(ValueError, match="requests run"):
        scheduler.count_pages()


def test_pages_by_number_come_from_the_plain_ones_then_from_the_cold_ones():
    lost = []
    pool = PagePool(6, on_reuse=lost.append)
    kept = pool.allocate(3)
    for page in kept:
        pool.keep(page)
    pool.release(kept)
    pool.reserve(4)
    assert (lost, pool.num_free, pool.num_used) == ([kept[2]], 2, 4)
    pool.check_integrity([], nameless=4)
    names = pool.name(2)
    pool.check_integrity([names], nameless=2)
    pool.give_back(2)
    pool.release(names)
    assert (pool.num_free, pool.num_kept) == (6, 2)
    with pytest.raises(ValueError, match="7 pages wanted, 6 free"):
        pool.reserve(7)
    with pytest.raises(ValueError, match="0 are taken"):
        pool.give_back(1)
    pool.check_integrity([])
