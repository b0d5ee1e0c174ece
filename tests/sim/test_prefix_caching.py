"""A trace's `prefix_blocks` in the simulator: what is found, and what it saves."""

from dataclasses import replace

import numpy as np
import pytest

from engine.residency import AdapterFootprint
from sim.simulate import simulate
from tests.sim.constant import ConstantCosts, small_plan
from traces import Trace, TraceRequest, load
from traces.columns import BASE_MODEL

FOOTPRINTS = {name: AdapterFootprint(pages=1, weight_bytes=1, copy_bytes=1) for name in ("a0", "a1")}


def shared(*rows):
    """A trace of (arrival_s, prompt, output, prefix_blocks[, adapter]) rows."""
    return Trace(
        TraceRequest(
            id=number,
            arrival_s=row[0],
            prompt_tokens=row[1],
            output_tokens=row[2],
            prefix_blocks=row[3],
            adapter=row[4] if len(row) > 4 else None,
        )
        for number, row in enumerate(rows)
    )


def run(trace, costs=None, **changes):
    plan = small_plan(footprints=FOOTPRINTS, **changes)
    return simulate(trace, plan.config, costs or ConstantCosts(), plan=plan)


def test_what_is_found_is_not_computed():
    # 60 tokens take four steps of at most 16; of the second prompt 48 are there, and 12 take one step.
    trace = shared((0.0, 60, 1, (7,)), (10.0, 60, 1, (7,)))
    result = run(trace)
    assert result.columns["first_token_s"].tolist() == [4.0, 11.0]
    assert result.columns["cached_tokens"].tolist() == [0, 48]
    assert result.metrics["prefix_hit_rate"] == 48 / 120
    off = run(trace, prefix_caching=False)
    assert off.columns["first_token_s"].tolist() == [4.0, 14.0]
    assert off.metrics["prefix_hit_rate"] == 0.0


def test_adapters_do_not_share():
    rows = [
        (0.0, 60, 1, (7,), "a0"),
        (10.0, 60, 1, (7,), "a1"),
        (20.0, 60, 1, (7,)),
        (30.0, 60, 1, (7,), "a0"),
    ]
    assert run(shared(*rows)).columns["cached_tokens"].tolist() == [0, 0, 0, 48]


def test_requests_without_blocks_share_nothing():
    rows = [(0.0, 60, 1, None), (10.0, 60, 1, None), (20.0, 60, 1, (7,)), (30.0, 60, 1, None)]
    assert run(shared(*rows)).columns["cached_tokens"].tolist() == [0, 0, 0, 0]
    assert run(shared(*rows[:2])).metrics["prefix_hit_rate"] == 0.0


def test_replicas_do_not_share():
    rows = [(10.0 * number, 60, 1, (7,)) for number in range(4)]
    result = run(shared(*rows), replicas=2, router="round_robin")
    assert result.columns["cached_tokens"].tolist() == [0, 0, 48, 48]


@pytest.mark.parametrize("prefix_caching", [True, False])
def test_fast_forward_changes_nothing(prefix_caching):
    rng = np.random.default_rng(2)
    arrivals = np.sort(rng.uniform(0, 300, 200)).round(2)
    trace = shared(
        *(
            (
                at,
                int(rng.integers(1, 50)),
                int(rng.integers(1, 14)),
                (int(rng.integers(5)),),
                f"a{rng.integers(2)}",
            )
            for at in arrivals.tolist()
        )
    )
    plan = small_plan(20, FOOTPRINTS, prefix_caching=prefix_caching)
    fast, slow = (
        simulate(trace, plan.config, ConstantCosts(load=2.5), plan=plan, fast_forward=wanted)
        for wanted in (True, False)
    )
    for name in ("first_token_s", "finish_s", "cached_tokens"):
        assert fast.columns[name].tolist() == slow.columns[name].tolist()
    assert (fast.columns["cached_tokens"].sum() > 0) == prefix_caching


@pytest.mark.parametrize("one_adapter", [True, False])
def test_an_endless_cache_finds_mooncakes_blocks(shared_traces, one_adapter):
    """On the 40 minutes that are kept 35.1 % of all blocks repeat (36.6 % of the whole file); here those are counted that are full."""
    trace = load(shared_traces / "ready" / "mooncake_conversation.R2_prefix_sticky_zipf0.92_N100.jsonl.gz")
    columns = replace(
        trace.columns, output_tokens=np.ones(len(trace), dtype=np.int64)
    )  # as good, and sooner done
    if one_adapter:
        base = np.full(len(trace), BASE_MODEL)
        columns = replace(columns, adapter_index=base, adapter_names=(), adapter_ranks=())
    trace = Trace.from_columns(columns)
    footprints = {name: FOOTPRINTS["a0"] for name in trace.adapters}
    # A page is a block, so that all fit; a step takes any prompt whole.
    plan = small_plan(
        250_000, footprints, page_tokens=512, max_model_len=131_072, max_num_batched_tokens=131_072
    )
    result = simulate(trace, plan.config, ConstantCosts(step=0.01), plan=plan)
    expected = full_blocks_seen_before(
        columns.adapter_index.tolist(), columns.prefix_blocks, columns.prompt_tokens.tolist()
    )
    assert result.columns["cached_tokens"].tolist() == [512 * blocks for blocks in expected]
    repeated = {True: 0.351, False: 0.350}[one_adapter]
    assert result.metrics["prefix_hit_rate"] == pytest.approx(repeated, abs=0.01)


def full_blocks_seen_before(adapters, blocks, prompt_tokens):
    """Count for each request the blocks at its start, but for the one with its last token, that one before it had at its start."""
    seen, counts = set(), []
    for adapter, chain, tokens in zip(adapters, blocks, prompt_tokens, strict=True):
        starts = [(adapter, chain[:end]) for end in range(1, tokens // 512 + 1)]
        known = [start in seen for start in starts[: (tokens - 1) // 512]]
        counts.append(known.index(False) if False in known else len(known))
        seen.update(starts)
    return counts
