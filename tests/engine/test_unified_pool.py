"""The unified pool under pressure: prefix caching, evictions both ways, adapters that come and go, requests that give up."""

from contextlib import suppress
from dataclasses import replace

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from engine.idle_order import GdsfOrder, LruOrder
from engine.pool import PagePool
from engine.prefix_cache import PrefixCache
from engine.requests import Request
from engine.residency import AdapterFootprint, AdapterState
from engine.scheduler import RefusedError, Scheduler, SchedulerLimits
from engine.sequence import Phase

PAGE = 4
LIMITS = SchedulerLimits(max_num_seqs=4, max_num_batched_tokens=16, max_model_len=64, page_tokens=PAGE)


def footprints(*pages):
    return {f"a{i}": AdapterFootprint(pages=p, weight_bytes=p, copy_bytes=p) for i, p in enumerate(pages)}


def request(number, prompt=8, output=2, adapter=None, text=None):
    """`text` names what the prompt says: two requests of one text and adapter share all their full pages."""
    keys = None if text is None else tuple((adapter, text, page) for page in range(prompt // PAGE))
    return Request(
        request_id=number,
        arrival_s=0.0,
        prompt_tokens=prompt,
        output_tokens=output,
        adapter=adapter,
        page_keys=keys,
    )


def run(scheduler):
    """Step until nothing is left, loads at once; return the prefill chunks as (id, start, length)."""
    chunks = []
    while scheduler.num_unfinished:
        for load in scheduler.take_loads():
            scheduler.load_finished(load.adapter, 0.0)
        step = scheduler.schedule(0.0)
        scheduler.check_integrity()
        if step is not None:
            chunks += [(c.sequence.request.request_id, c.start, c.length) for c in step.prefills]
            scheduler.complete(step)
            scheduler.check_integrity()
    return chunks


def serve(scheduler, *requests):
    for item in requests:
        scheduler.add(item)
    return run(scheduler)


# ---- prefix caching ----


def test_a_prompt_that_was_there_is_not_computed_again_but_for_its_last_token():
    scheduler = Scheduler(LIMITS, 32, {})
    assert serve(scheduler, request(1, prompt=10, text="x")) == [(1, 0, 10)]
    assert serve(scheduler, request(2, prompt=10, text="x")) == [(2, 8, 2)]
    assert serve(scheduler, request(3, prompt=8, text="x")) == [(3, 4, 4)]
    assert serve(scheduler, request(4, prompt=14, text="x")) == [(4, 8, 6)]
    assert (scheduler.prefix_hit_tokens, scheduler.prefix_queried_tokens) == (8 + 4 + 8, 10 + 10 + 8 + 14)


def test_running_requests_share_pages_in_the_very_step_that_writes_them():
    scheduler = Scheduler(LIMITS, 32, {})
    assert serve(scheduler, request(1, prompt=8, text="x"), request(2, prompt=8, text="x")) == [
        (1, 0, 8),
        (2, 4, 4),
    ]


def test_prompts_of_two_adapters_share_nothing():
    scheduler = Scheduler(LIMITS, 32, footprints(1, 1))
    serve(scheduler, request(1, adapter="a0", text="x"))
    assert serve(scheduler, request(2, adapter="a1", text="x")) == [(2, 0, 8)]


def test_switched_off_nothing_is_shared():
    scheduler = Scheduler(replace(LIMITS, prefix_caching=False), 32, {})
    serve(scheduler, request(1, text="x"))
    assert serve(scheduler, request(2, text="x")) == [(2, 0, 8)]


def test_a_preempted_request_finds_its_own_prompt_again():
    scheduler = Scheduler(LIMITS, 9, {})
    chunks = serve(
        scheduler, request(1, prompt=8, output=12, text="x"), request(2, prompt=8, output=12, text="y")
    )
    assert scheduler.preemptions == 1
    (again,) = [chunk for chunk in chunks[2:]]
    assert again[1] > 0, "its first page was still there"


def test_what_was_generated_can_be_found_by_the_next_turn():
    scheduler = Scheduler(LIMITS, 32, {})
    first = scheduler.add(request(1, prompt=8, output=5, text="x"))
    while scheduler.num_unfinished:
        step = scheduler.schedule(0.0)
        if step.finishing:
            scheduler.keep_output(first, [(None, "x", page) for page in range(3)])
        scheduler.complete(step)
    assert serve(scheduler, request(2, prompt=15, text="x")) == [(2, 12, 3)]


def test_cold_pages_go_oldest_first_and_a_prompt_from_its_end():
    pool = PagePool(4)
    cache = PrefixCache(pool)
    pages = pool.allocate(4)
    for number, page in enumerate(pages):
        cache.insert(number, page, None)
    pool.release(pages[:2])
    pool.release(pages[2:])
    assert pool.num_free == 4
    assert pool.allocate(1) == [pages[1]]
    assert pool.allocate(1) == [pages[0]]
    assert cache.match([2, 3], 9) == pages[2:]
    assert cache.match([0, 1], 9) == []


def test_pages_found_again_outlast_older_idle_adapters_and_yield_to_younger_ones():
    for warm_first, gone in ((True, "prompt"), (False, "adapter")):
        scheduler = Scheduler(LIMITS, 8, footprints(3))
        prompt = [request(1, prompt=8, output=1, text="x"), request(2, prompt=8, output=1, text="x")]
        adapter = [request(3, prompt=4, output=1, adapter="a0")]
        for item in [*prompt, *adapter] if warm_first else [*adapter, *prompt]:
            serve(scheduler, item)
        serve(
            scheduler, request(4, prompt=20, output=1)
        )  # 5 pages; 8 less 3 of the adapter less 1 found again leave 4
        resident = scheduler.residency.state("a0") is AdapterState.RESIDENT
        assert resident == (gone == "prompt")


def test_kv_of_an_adapter_that_left_goes_before_other_kv():
    scheduler = Scheduler(replace(LIMITS, max_adapters=1), 12, footprints(1, 1))
    serve(scheduler, request(1, prompt=8, output=1, adapter="a0", text="x"))
    serve(scheduler, request(2, prompt=8, output=1, adapter="a0", text="x"))  # found again: worth keeping
    serve(scheduler, request(3, prompt=8, output=1, text="y"))
    serve(scheduler, request(4, prompt=4, output=1, adapter="a1"))  # a0 leaves
    serve(
        scheduler, request(5, prompt=36, output=1)
    )  # 9 of the 11 pages: 7 are plain free, 2 more are wanted
    assert serve(scheduler, request(6, prompt=8, output=1, text="y")) == [(6, 4, 4)]
    assert serve(scheduler, request(7, prompt=8, output=1, adapter="a0", text="x")) == [(7, 0, 8)]


def test_warm_pages_take_a_small_share_of_the_pool_at_most():
    scheduler = Scheduler(LIMITS, 60, {})
    for text in range(20):
        for again in range(2):
            serve(scheduler, request(f"{text}, {again}", prompt=8, output=1, text=text))
    assert scheduler.pool.num_warm == 6


# ---- adapters ----


def test_least_popular_for_its_size_goes_first():
    lru, gdsf = LruOrder(), GdsfOrder()
    for order in (lru, gdsf):
        for name, pages, uses in (("hot", 8, 5), ("small", 1, 1), ("large", 40, 1)):
            for _ in range(uses):
                order.add(name, pages)
                if name in order and uses > 1:
                    order.remove(name)
            if name not in order:
                order.add(name, pages)
    assert list(lru.names()) == ["hot", "small", "large"]
    assert list(gdsf.names()) == ["large", "small", "hot"]
    assert list(gdsf.names()) == ["large", "small", "hot"], "looking changes nothing"


def test_past_popularity_fades():
    order = GdsfOrder()
    for _ in range(10):
        order.add("once", 10)
        order.remove("once")
    order.add("once", 10)
    for number in range(40):
        order.add(f"new{number}", 10)
        order.evicted(next(order.names()))
        if "once" not in order:
            return
    raise AssertionError("it stays for ever")


def test_a_split_pool_keeps_adapters_and_kv_apart():
    scheduler = Scheduler(replace(LIMITS, adapter_pool_pages=4), 12, footprints(2, 2, 2, 5))
    for number in range(3):
        serve(scheduler, request(number, prompt=4, output=1, adapter=f"a{number}"))
    assert scheduler.residency.evictions == 1  # 4 pages hold two of them
    serve(scheduler, request("long", prompt=28, output=4))
    assert scheduler.residency.evictions == 1
    with pytest.raises(RefusedError, match="5 pages needed for the adapter, adapters have 4"):
        scheduler.add(request("big", adapter="a3"))
    with pytest.raises(RefusedError, match="the pool has 8"):
        scheduler.add(request("longer", prompt=30, output=4))


def test_most_adapters_at_a_time():
    scheduler = Scheduler(replace(LIMITS, max_adapters=2), 32, footprints(1, 1, 1))
    serve(scheduler, *(request(number, adapter=f"a{number}") for number in range(3)))
    assert scheduler.residency.evictions >= 1


def test_an_adapter_that_cannot_be_read_fails_its_own_requests_alone():
    scheduler = Scheduler(LIMITS, 32, footprints(2, 2))
    bad = [scheduler.add(request(number, adapter="a0")) for number in range(2)]
    good = scheduler.add(request(2, adapter="a1"))
    scheduler.schedule(0.0)
    assert {load.adapter for load in scheduler.take_loads()} == {"a0", "a1"}
    assert scheduler.load_failed("a0") == bad
    scheduler.load_finished("a1", 0.0)
    scheduler.check_integrity()
    assert serve(scheduler) == [(2, 0, 8)]
    assert good.phase is Phase.DONE
    assert all(sequence.phase is Phase.DONE for sequence in bad)
    scheduler.add(request(3, adapter="a0"))  # it may be asked for again
    assert run(scheduler) == [(3, 0, 8)]


def test_an_adapter_is_unloaded_when_its_last_request_has_ended():
    scheduler = Scheduler(LIMITS, 32, footprints(2))
    running, waiting = scheduler.add(request(1, adapter="a0", output=9)), None
    scheduler.schedule(0.0)
    scheduler.load_finished(scheduler.take_loads()[0].adapter, 0.0)
    scheduler.complete(scheduler.schedule(0.0))
    waiting = scheduler.add(request(2, adapter="a0"))
    scheduler.unregister("a0")
    with pytest.raises(RefusedError, match="not registered"):
        scheduler.add(request(3, adapter="a0"))
    assert scheduler.is_registered("a0")
    run(scheduler)
    assert running.phase is waiting.phase is Phase.DONE
    assert not scheduler.is_registered("a0")
    assert scheduler.pool.num_used == 0
    scheduler.register("a0", AdapterFootprint(pages=5, weight_bytes=1, copy_bytes=1))
    assert serve(scheduler, request(4, adapter="a0")) == [(4, 0, 8)]


def test_a_replaced_adapter_does_not_find_the_kv_of_its_former_weights():
    scheduler = Scheduler(LIMITS, 32, footprints(2))
    serve(scheduler, request(1, adapter="a0", text="x"), request(2, adapter="a0", text="x"))
    scheduler.unregister("a0")
    scheduler.register("a0", AdapterFootprint(pages=2, weight_bytes=1, copy_bytes=1))
    assert serve(scheduler, request(3, adapter="a0", text="x")) == [(3, 0, 8)]
    assert scheduler.pool.num_kept == 2


# ---- giving up ----


def test_whoever_gives_up_keeps_its_pages_until_the_step_in_flight_is_done():
    scheduler = Scheduler(LIMITS, 32, {})
    sequence, other = scheduler.add(request(1, output=20)), scheduler.add(request(2, output=20))
    first = scheduler.schedule(0.0)
    second = scheduler.schedule(0.0)
    scheduler.complete(first)
    scheduler.abort(sequence)
    scheduler.check_integrity()
    assert len(sequence.pages) == 3
    third = scheduler.schedule(0.0)
    assert third.left == [sequence]
    assert third.shape.decode_rows == 1
    scheduler.complete(second)
    assert sequence.pages == []
    assert sequence.phase is Phase.DONE
    scheduler.abort(sequence)  # nothing more to do
    scheduler.complete(third)
    scheduler.abort(other)
    assert scheduler.num_unfinished == 0
    assert scheduler.pool.num_used == 0
    scheduler.check_integrity()


def test_a_waiting_request_gives_up():
    scheduler = Scheduler(LIMITS, 32, footprints(2))
    sequence = scheduler.add(request(1, adapter="a0"))
    scheduler.schedule(0.0)
    scheduler.abort(sequence)
    assert scheduler.num_unfinished == 0
    for load in scheduler.take_loads():
        scheduler.load_finished(load.adapter, 0.0)
    scheduler.check_integrity()


# ---- whatever happens ----


class Serving(RuleBasedStateMachine):
    """Requests with shared prompts, aborts, loads that end or fail, adapters that come and go, steps planned one ahead.

    `contents` says what the GPU would have in each page; what a request finds in the cache must be its own prompt.
    """

    @initialize(
        pages=st.integers(8, 30),
        eviction=st.sampled_from(["lru", "gdsf"]),
        fenced=st.booleans(),
        most=st.sampled_from([None, 1, 2]),
    )
    def start(self, pages, eviction, fenced, most):
        limits = replace(
            LIMITS,
            adapter_eviction=eviction,
            adapter_pool_pages=4 if fenced else None,
            max_adapters=most,
        )
        self.scheduler = Scheduler(limits, pages, footprints(1, 2, 3))
        self.contents = {}
        self.loads, self.sequences, self.planned, self.count = [], [], [], 0

    @rule(
        prompt=st.integers(1, 30),
        output=st.integers(1, 12),
        adapter=st.sampled_from([None, None, "a0", "a1", "a2", "b"]),
        text=st.sampled_from([None, "x", "y", "z"]),
    )
    def add(self, prompt, output, adapter, text):
        self.count += 1
        with suppress(RefusedError):
            self.sequences.append(self.scheduler.add(request(self.count, prompt, output, adapter, text)))

    @rule()
    def plan(self):
        if len(self.planned) == 2:
            self.complete()
        step = self.scheduler.schedule(0.0)
        for load in self.scheduler.take_loads():
            self.loads.append(load)
            self.contents.update(dict.fromkeys(load.pages, load.adapter))
            assert not any(set(load.pages) & touched for _, touched in self.planned), (
                "a step in flight has its pages"
            )
        if step is None:
            return
        working = [
            s for s in self.scheduler.running() if s.phase is not Phase.FINISHING or s in step.finishing
        ]
        self.planned.append((step, {page for s in working for page in s.pages}))
        for sequence, page in step.new_pages:
            self.contents[page] = sequence
        for chunk in step.prefills:
            self._write(chunk)

    def _write(self, chunk):
        sequence = chunk.sequence
        keys = sequence.request.page_keys or ()
        for number in range(chunk.start // PAGE, -(-(chunk.start + chunk.length) // PAGE)):
            whole = number < len(keys) and chunk.start + chunk.length >= (number + 1) * PAGE
            self.contents[sequence.pages[number]] = keys[number] if whole else sequence
        for number in range(sequence.cached_tokens // PAGE):
            assert self.contents[sequence.pages[number]] == keys[number], "found what is not its own prompt"

    @precondition(lambda self: self.planned)
    @rule()
    def complete(self):
        self.scheduler.complete(self.planned.pop(0)[0])

    @precondition(lambda self: self.sequences)
    @rule(data=st.data())
    def abort(self, data):
        self.scheduler.abort(data.draw(st.sampled_from(self.sequences)))

    @precondition(lambda self: self.loads)
    @rule(data=st.data(), fails=st.booleans())
    def load_ends(self, data, fails):
        load = self.loads.pop(data.draw(st.integers(0, len(self.loads) - 1)))
        if fails:
            self.scheduler.load_failed(load.adapter)
        else:
            self.scheduler.load_finished(load.adapter, 0.0)

    @rule()
    def come_or_go(self):
        if not self.scheduler.is_registered("b"):
            self.scheduler.register("b", AdapterFootprint(pages=2, weight_bytes=2, copy_bytes=2))
        else:
            with suppress(ValueError):  # it may be on its way out
                self.scheduler.unregister("b")

    @invariant()
    def accounts_agree(self):
        if hasattr(self, "scheduler"):
            self.scheduler.check_integrity()

    def teardown(self):
        if not hasattr(self, "scheduler"):
            return
        for _ in range(3000):
            if not self.scheduler.num_unfinished and not self.planned:
                break
            while self.loads:
                self.scheduler.load_finished(self.loads.pop().adapter, 0.0)
            self.plan()
            if self.planned:
                self.complete()
        assert self.scheduler.num_unfinished == 0, "somebody waits for ever"
        assert all(sequence.phase is Phase.DONE for sequence in self.sequences)
        assert self.scheduler.kv_pages == 0
        self.scheduler.check_integrity()


TestServing = Serving.TestCase
TestServing.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
