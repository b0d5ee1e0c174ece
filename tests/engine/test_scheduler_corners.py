"""Corners of scheduler, pool and engine that a review found wrong, each held by a test."""

from dataclasses import replace

import numpy as np
import pytest

from engine.idle_order import GdsfOrder
from engine.prefix_keys import keys_of_tokens
from engine.requests import Request
from engine.residency import AdapterFootprint, AdapterState
from engine.scheduler import Scheduler, SchedulerLimits
from engine.sequence import Phase
from engine.unified_pool import UnifiedPool
from tests.engine.test_engine import World

PAGE = 4
LIMITS = SchedulerLimits(max_num_seqs=4, max_num_batched_tokens=16, max_model_len=64, page_tokens=PAGE)


def footprint(pages):
    return AdapterFootprint(pages=pages, weight_bytes=pages, copy_bytes=pages)


def request(number, prompt=8, output=2, adapter=None, text=None):
    keys = None if text is None else tuple((adapter, text, page) for page in range(prompt // PAGE))
    return Request(
        request_id=number,
        arrival_s=0.0,
        prompt_tokens=prompt,
        output_tokens=output,
        adapter=adapter,
        page_keys=keys,
    )


def turn(scheduler):
    """One step, loads at once."""
    for load in scheduler.take_loads():
        scheduler.load_finished(load.adapter, 0.0)
    step = scheduler.schedule(0.0)
    scheduler.check_integrity()
    if step is not None:
        scheduler.complete(step)
    return step


def serve(scheduler, *requests):
    for item in requests:
        scheduler.add(item)
    while scheduler.num_unfinished:
        turn(scheduler)


# ---- a prefix hit on KV that was never computed ----


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return World("llama", tmp_path_factory.mktemp("llama"))


def test_a_stop_text_found_late_does_not_offer_pages_that_a_second_prefill_had_not_reached(world):
    """The server ends a request with reason `stop` some turns after its token; by then it may have been preempted and be in prefill again."""
    engine = world.engine(num_pages=5, max_num_batched_tokens=8, max_num_seqs=4)
    engine._cache_outputs = True
    rng = np.random.default_rng(1)

    def add(number, prompt, output):
        tokens = np.asarray(prompt, dtype=np.int32)
        keys = keys_of_tokens(None, tokens, 32)
        return engine.add(
            Request(
                request_id=number,
                arrival_s=0.0,
                prompt_tokens=len(tokens),
                output_tokens=output,
                page_keys=keys,
            ),
            tokens,
        )

    add("old", rng.integers(0, 256, 32), 50)
    victim = add("victim", rng.integers(0, 256, 60), 60)
    while not (victim.sequence.preemptions and victim.sequence.phase is Phase.PREFILL):
        engine.turn()
    computed = victim.sequence.prefilled  # at most: by the step in flight
    assert computed < 64 < victim.sequence.prefill_tokens
    engine.abort(victim, "stop")
    prompt = [*victim.prompt.tolist(), *victim.tokens[:10]]
    follower = add("follower", prompt, 5)
    engine.drain()
    assert follower.tokens == world.expected(None, prompt, 5)[0]
    assert follower.sequence.cached_tokens <= computed


# ---- GDSF ----


def test_gdsf_yields_each_name_once():
    """A void heap entry comes back to life when its adapter has that value again: 1.5 + 3 touches = 3 uses of 1.5."""
    order = GdsfOrder()
    order.add("a", 5)
    for _ in range(3):
        order.touch("a")
    for _ in range(2):
        order.remove("a")
        order.add("a", 5)
    assert list(order.names()) == ["a"]


def test_gdsf_counts_the_pages_of_idle_adapters_once():
    memory = UnifiedPool(14, {"a": footprint(5), "wanted": footprint(5), "b": footprint(10)}, eviction="gdsf")
    residency = memory.residency
    for name in ("a", "wanted"):
        memory.start_load(name, 0.0, spare=0, keep=())
        residency.finish_load(name, 0.0)
    for _ in range(3):
        residency.touch("a")
    for _ in range(2):
        residency.acquire("a")
        residency.release("a")
    memory.take(2)
    # Free are 2, of `a` 5, and `wanted` stays. Raises ValueError in a plan, which ends every request of the engine.
    assert memory.start_load("b", 0.0, spare=0, keep={"b", "wanted"}) is None


def test_gdsf_popularity_fades_as_the_pool_evicts():
    memory = UnifiedPool(
        20, {"once": footprint(10), **{f"n{i}": footprint(10) for i in range(100)}}, eviction="gdsf"
    )
    residency = memory.residency
    memory.start_load("once", 0.0, spare=0, keep=())
    residency.finish_load("once", 0.0)
    for _ in range(10):
        residency.acquire("once")
        residency.release("once")
    for number in range(100):
        memory.start_load(f"n{number}", 0.0, spare=0, keep=())
        residency.finish_load(f"n{number}", 0.0)
    assert residency.state("once") is AdapterState.ABSENT, "it was popular 100 loads ago, and stays for ever"


def test_gdsf_does_not_grow_without_bound():
    order = GdsfOrder()
    order.add("a", 7)
    order.add("b", 7)
    for _ in range(10_000):
        order.touch("b")
        next(order.names())
    assert len(order._heap) < 100


# ---- fair ----


def test_fair_charges_a_preempted_request_for_all_it_generated():
    scheduler = Scheduler(replace(LIMITS, policy="fair", max_num_seqs=2), 8, {})
    scheduler.add(request(1, prompt=8, output=20))
    scheduler.add(request(2, prompt=8, output=20))
    while scheduler.num_unfinished:
        turn(scheduler)
    assert scheduler.preemptions
    assert scheduler.queue._tenants[None].units == 2 * 8 + 2 * 2 * 20  # type: ignore[attr-defined]


# ---- prefix cache ----


def test_kv_of_an_adapter_that_left_goes_from_its_end_so_that_the_rest_can_still_be_found():
    scheduler = Scheduler(replace(LIMITS, max_adapters=1), 12, {"a0": footprint(1), "a1": footprint(1)})
    serve(scheduler, request(1, prompt=16, output=1, adapter="a0", text="x"))
    serve(scheduler, request(2, prompt=4, output=1, adapter="a1"))  # a0 leaves; 4 cold pages
    serve(scheduler, request(3, prompt=32, output=1))  # 8 of 11: one of the 4 goes
    keys = request(4, prompt=16, adapter="a0", text="x").page_keys
    assert len(scheduler.memory.prefixes.match(keys, 9)) == 3


def two_alike():
    """Three sequences that take a page in the same tick; one plain free page, one cold page, an idle adapter."""
    scheduler = Scheduler(replace(LIMITS, max_num_batched_tokens=64), 13, {"a0": footprint(5)})
    serve(scheduler, request(0, prompt=4, output=1, adapter="a0"))
    serve(scheduler, request(1, prompt=4, output=1, text="x"))  # one cold page
    for number in range(2, 5):
        scheduler.add(request(number, prompt=8, output=9))
    turn(scheduler)  # prefills take 6 pages
    assert scheduler.pool.num_kept == 1
    assert scheduler.pool.num_free == 2
    scheduler._admission.watermark_pages = 0
    return scheduler


def test_extended_steps_leave_what_single_steps_leave():
    fast, slow = two_alike(), two_alike()
    key = request(1, prompt=4, text="x").page_keys
    for scheduler in (fast, slow):
        scheduler.extendable()
    step = fast.schedule(0.0)  # this one takes the pages in one go …
    fast.complete(step)
    found = len(fast.memory.prefixes.match(key, 9))
    slow.extend(1)  # … and this one by one
    assert len(slow.memory.prefixes.match(key, 9)) == found


# ---- starvation ----


def test_the_first_waiting_request_does_not_lose_its_idle_adapter_before_those_behind_it():
    scheduler = Scheduler(
        replace(LIMITS, max_num_batched_tokens=64, max_adapters_per_step=1),
        20,
        {"x": footprint(2), "head": footprint(2), "behind": footprint(2)},
    )
    for number, name in enumerate(("behind", "head")):
        serve(scheduler, request(number, prompt=4, output=1, adapter=name))
    scheduler.add(request("x", prompt=16, output=48, adapter="x"))
    turn(scheduler)
    turn(scheduler)
    scheduler.add(request("head", prompt=8, adapter="head"))
    scheduler.add(request("behind", prompt=8, adapter="behind"))
    while scheduler.residency.evictions == 0:
        assert turn(scheduler) is not None
    assert scheduler.is_resident("head")


@pytest.mark.parametrize("policy", ["fcfs", "clustered"])
@pytest.mark.parametrize("changes", [{"max_adapters_per_step": 1}, {"max_num_seqs": 1}])
def test_the_first_waiting_request_is_not_starved_by_whom_it_lets_overtake_while_its_adapter_loads(
    policy, changes
):
    """An overtaker takes the last place under the cap, or the last slot; its KV then evicts the head's adapter, which is loaded anew, and so on."""
    limits = replace(LIMITS, policy=policy, max_num_batched_tokens=64, **changes)
    scheduler = Scheduler(limits, 19, {"x": footprint(4), "head": footprint(8)})
    if policy == "clustered":
        scheduler.queue._most_overtakes = 2  # type: ignore[attr-defined]
    head, count = None, 0
    ends = {}  # of loads
    for now in range(4000):
        if now == 20:
            head = scheduler.add(request("head", prompt=8, adapter="head"))
        while scheduler.num_waiting < 4:
            count += 1
            scheduler.add(request(count, prompt=8, output=40, adapter="x"))
        for adapter in [adapter for adapter, at in ends.items() if at <= now]:
            del ends[adapter]
            scheduler.load_finished(adapter, float(now))
        step = scheduler.schedule(float(now))
        ends.update({load.adapter: now + 3 for load in scheduler.take_loads()})
        if step is not None:
            scheduler.complete(step)
        if head is not None and head.admitted_s is not None:
            return
    raise AssertionError(f"not admitted in {now} turns and {scheduler.residency.loads} loads")


def test_loads_that_fail_again_and_again_do_not_keep_a_large_request_waiting():
    """The head is resident (the base model) and waits for pages; loads started behind it hold some of them at every plan."""
    scheduler = Scheduler(replace(LIMITS, max_model_len=80), 20, {f"bad{i}": footprint(4) for i in range(4)})
    small = scheduler.add(request("small", prompt=8, output=8))
    turn(scheduler)
    head = scheduler.add(request("head", prompt=70, output=2))  # 18 of 20 pages
    loading = {}
    for now in range(2000):
        name = f"bad{now % 4}"
        scheduler.add(request(now, prompt=4, adapter=name))
        for adapter in [adapter for adapter, ends in loading.items() if ends <= now]:
            del loading[adapter]
            scheduler.load_failed(adapter)
        step = scheduler.schedule(float(now))
        for load in scheduler.take_loads():
            loading[load.adapter] = now + 3
        if step is not None:
            scheduler.complete(step)
        if head.admitted_s is not None:
            return
    assert small.phase is Phase.DONE
    raise AssertionError("nothing runs, and the head was not admitted in 2000 turns")


# ---- adapters that come and go ----


def test_a_reset_while_an_adapter_is_leaving_does_not_bring_it_back(world):
    engine = world.engine()
    generation = engine.add(request(1, adapter="r8"), np.arange(8))
    engine.turn()
    engine.unregister("r8")
    assert "r8" in engine._leaving
    engine.reset("failed")
    assert generation.finish_reason == "error"
    assert "r8" not in engine.runner.store
    assert not engine.scheduler.is_registered("r8")


def test_a_name_taken_again_before_the_next_turn_is_not_forgotten_with_the_old_adapter(world):
    engine = world.engine()
    generation = engine.add(request(1, adapter="r8"), np.arange(8))
    engine.unregister("r8")
    engine.abort(generation)  # its last request: the scheduler forgets the adapter here
    engine.register("r8", engine.runner.store.prepare(world.specs["r8"]))
    engine.turn()
    assert not engine.busy
    engine.unregister("r8")
    engine.turn()


def test_a_load_that_raises_when_it_starts_leaves_no_pin_behind_a_reset(world, monkeypatch):
    engine = world.engine()
    store, loader = engine.runner.store, engine.runner.loader

    def fail(*_):
        raise RuntimeError("CUDA error")

    engine.add(request(1, adapter="r8"), np.arange(8))
    with monkeypatch.context() as patch:
        patch.setattr(loader, "_copy", fail)
        with pytest.raises(RuntimeError, match="CUDA error"):
            engine.turn()
    engine.reset("failed")
    assert not store.cache.is_pinned(store["r8"])


def test_the_watermark_of_a_split_pool_is_a_share_of_the_pages_that_kv_has():
    scheduler = Scheduler(replace(LIMITS, adapter_pool_pages=980, max_num_batched_tokens=64), 1000, {})
    scheduler.add(request(1, prompt=4, output=9))
    turn(scheduler)
    second = scheduler.add(request(2, prompt=48, output=1))  # 12 of the 18 pages left
    turn(scheduler)
    assert second.phase is not Phase.WAITING
