"""Prefix caching on the whole engine, on a CPU: it changes no token, finds what it should, and the simulator finds the same."""

import json

import numpy as np
import pytest

from engine.__main__ import main
from engine.prefix_keys import keys_of_tokens
from engine.requests import Request
from sim.simulate import simulate
from sim.validate import recorded_run
from tests.engine.test_engine import World
from tests.engine.tiny import save_adapter, save_model, tiny_model
from tests.sim.constant import ConstantCosts
from traces.run_record import read_run

PAGE = 32


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return World("llama", tmp_path_factory.mktemp("llama"))


def prompts():
    """(adapter, prompt) with starts in common: under one adapter, under several, of whole prompts, and up to within a page."""
    rng = np.random.default_rng(5)
    system, other = rng.integers(0, 256, (2, 80)).tolist()
    tails = rng.integers(0, 256, (9, 30)).tolist()
    return [
        ("r8", system + tails[0]),
        ("r8", system + tails[1]),  # 64 of the 80 shared tokens are whole pages
        ("r64", system + tails[0]),  # another adapter: nothing
        (None, system[:64]),
        (None, system[:64]),  # the same prompt: its last page is computed again, for the logits
        (None, system + tails[2]),
        ("r16_qv", other + tails[3]),
        ("r8", other + tails[4]),
        ("r64", system[:40] + tails[5]),
        ("r8", system + tails[0]),
        ("r8", tails[6]),
        (None, system[:63] + tails[7]),
    ]


def expected_hits(asked):
    """Count by looking at tokens: a request finds the whole pages that an earlier one of its adapter starts with."""
    seen, hits = set(), []
    for adapter, prompt in asked:
        starts = [(adapter, tuple(prompt[:end])) for end in range(PAGE, len(prompt) + 1, PAGE)]
        hits.append(sum(end in seen for end in starts[: (len(prompt) - 1) // PAGE]) * PAGE)
        seen.update(starts)
    return hits


def serve(engine, asked, outputs=5):
    generations = []
    for number, (adapter, prompt) in enumerate(asked):
        tokens = np.array(prompt, dtype=np.int32)
        request = Request(
            request_id=number,
            arrival_s=0.0,
            prompt_tokens=len(prompt),
            output_tokens=outputs,
            adapter=adapter,
            page_keys=keys_of_tokens(adapter, tokens, PAGE),
        )
        generations.append(engine.add(request, tokens))
    engine.drain()
    return generations


@pytest.mark.parametrize("changes", [{}, {"max_num_seqs": 1}, {"max_num_batched_tokens": 9}])
def test_tokens_are_those_of_hugging_face_and_hits_are_exact(world, changes):
    asked = prompts()
    generations = serve(world.engine(**changes), asked)
    for (adapter, prompt), generation in zip(asked, generations, strict=True):
        assert generation.tokens == world.expected(adapter, prompt, 5)[0]
    assert [generation.sequence.cached_tokens for generation in generations] == expected_hits(asked)


def test_off_finds_nothing_and_makes_the_same_tokens(world):
    asked = prompts()
    on, off = (serve(world.engine(prefix_caching=wanted), asked) for wanted in (True, False))
    assert [generation.tokens for generation in on] == [generation.tokens for generation in off]
    assert not any(generation.sequence.cached_tokens for generation in off)


def test_counters_add_up_and_fewer_tokens_are_computed(world):
    asked = prompts()
    engine = world.engine()
    serve(engine, asked)
    hits, total = sum(expected_hits(asked)), sum(len(prompt) for _, prompt in asked)
    assert (engine.scheduler.prefix_hit_tokens, engine.scheduler.prefix_queried_tokens) == (hits, total)
    assert sum(step.shape.prefill_tokens for step in engine.steps) == total - hits


def test_a_pool_that_is_too_small_to_keep_all_changes_no_token(world):
    pages = world.engine().blueprint.footprints["r64"].pages
    asked = prompts() * 3
    engine = world.engine(num_pages=pages + 12, max_num_seqs=4)
    generations = serve(engine, asked)
    assert engine.scheduler.residency.evictions > 0
    assert 0 < engine.scheduler.prefix_hit_tokens < sum(expected_hits(asked))
    for (adapter, prompt), generation in zip(asked, generations, strict=True):
        assert generation.tokens == world.expected(adapter, prompt, 5)[0]


# ---- a trace's prefix_blocks, on the engine and in the simulator ----

# (adapter, prefix_blocks, prompt_tokens, tokens found when nothing is ever evicted); all come at once.
TRACE = [
    ("a", [0, 1], 1000, 0),
    ("a", [0, 2], 900, 512),
    ("b", [0, 1], 1000, 0),
    ("a", [0, 1], 1000, 992),  # 31 whole pages
    (None, [5], 512, 0),
    (None, [5], 512, 480),  # the last page is computed again
    ("a", [0, 1, 3], 1200, 992),  # its second block is full, the earlier ones' were not
    ("b", [2, 1], 700, 0),
    ("b", [0], 300, 288),
    (None, None, 600, 0),
    (None, None, 600, 0),
    (None, [5, 6], 520, 512),
]


@pytest.fixture(scope="module")
def replayed(tmp_path_factory):
    """Return what serves TRACE by the command under a configuration with changes, and returns where the record is."""
    folder = tmp_path_factory.mktemp("replay")
    model = tiny_model(max_position_embeddings=2048)
    save_model(model, folder / "model")
    for name in ("a", "b"):
        save_adapter(model, folder / name, rank=8, targets=("q_proj", "v_proj"))
    (folder / "adapters.jsonl").write_text(
        "".join(json.dumps({"name": name, "path": name}) + "\n" for name in ("a", "b"))
    )
    rows = [
        {
            "id": number,
            "arrival_s": 0.0,
            "prompt_tokens": prompt_tokens,
            "output_tokens": 3 + number % 3,
            "adapter": adapter,
            "prefix_blocks": blocks,
        }
        for number, (adapter, blocks, prompt_tokens, _) in enumerate(TRACE)
    ]

    def replay(name, adapters=True, **changes):
        config = {
            "model": str(folder / "model"),
            "backend": "reference",
            "dtype": "float32",
            "max_num_seqs": 4,
            "max_num_batched_tokens": 600,
            "max_model_len": 2048,
            "page_tokens": PAGE,
            "num_pages": 600,
        }
        (folder / "config.json").write_text(json.dumps(config | changes))
        asked = rows if adapters else [row | {"adapter": None} for row in rows]
        (folder / "trace.jsonl").write_text("".join(json.dumps(row) + "\n" for row in asked))
        flags = {"trace": "trace.jsonl", "config": "config.json", "adapters": "adapters.jsonl", "out": name}
        arguments = [part for key, file in flags.items() for part in (f"--{key}", str(folder / file))]
        assert main(["replay", *arguments]) == 0
        return folder / name

    return replay


def simulated(out, **changes):
    run = recorded_run(out)
    config = run.config.with_changes(**changes)
    return simulate(run.trace, config, ConstantCosts(step=0.01), adapters=run.adapters, record_steps=True)


def test_replay_and_simulation_find_what_the_traces_blocks_say(replayed):
    out = replayed("whole")
    record, result = read_run(out), simulated(out)
    found = [cached for *_, cached in TRACE]
    total = sum(prompt_tokens for _, _, prompt_tokens, _ in TRACE)
    assert record.requests["cached_tokens"].tolist() == found
    assert result.columns["cached_tokens"].tolist() == found
    assert record.run["totals"]["prefix_hit_rate"] == pytest.approx(sum(found) / total)
    assert result.metrics["prefix_hit_rate"] == pytest.approx(sum(found) / total)
    assert record.steps["prefill_tokens"].sum() == total - sum(found)


def test_replay_and_simulation_find_the_same_where_pages_run_out(replayed):
    """Only of the base model: when an adapter's load ends is the clock's to say."""
    out = replayed("small", adapters=False, num_pages=80)
    record, result = read_run(out), simulated(out)
    found = record.requests["cached_tokens"].tolist()
    assert found == result.columns["cached_tokens"].tolist()
    assert 0 < sum(found) < simulated(out, num_pages=600).columns["cached_tokens"].sum()
    steps = [
        (row.shape.decode_rows, row.shape.prefill_tokens, row.shape.prefill_pairs) for row in result.steps
    ]
    assert (
        record.steps[["decode_rows", "prefill_tokens", "prefill_pairs"]].apply(tuple, axis=1).tolist()
        == steps
    )


def test_off_finds_nothing(replayed):
    out = replayed("off", prefix_caching=False)
    record, result = read_run(out), simulated(out)
    assert record.requests["cached_tokens"].tolist() == [0] * len(TRACE)
    assert result.columns["cached_tokens"].tolist() == [0] * len(TRACE)
    assert record.run["totals"]["prefix_hit_rate"] == result.metrics["prefix_hit_rate"] == 0.0
