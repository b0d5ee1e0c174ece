"""Sampling through the whole engine on a CPU: seeds, top-p and greedy rows side by side, whatever the batch."""

import numpy as np
import pytest
import torch

from engine.blueprint import blueprint
from engine.config import ServingConfig
from engine.engine import Engine
from engine.model_shape import ModelShape
from engine.requests import Request
from engine.runner import Runner
from engine.sampling import GREEDY, Sampling
from engine.weights import random_weights
from kernels.sample_params import POSITION

SHAPE = ModelShape(
    name="tiny",
    hidden_size=64,
    intermediate_size=128,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    vocab_size=256,
    max_position_embeddings=512,
)
PROMPT = tuple(range(3, 20))
DRAWN = Sampling(temperature=1.0, top_p=0.9, seed=11)
OTHERS = [
    (tuple(range(index, 4 * index + 5)), 9, sampling)
    for index, sampling in enumerate(
        (GREEDY, Sampling(temperature=0.5, seed=11), Sampling(temperature=2.0, top_p=0.5, seed=-1), GREEDY)
    )
]


def new_engine(**changes):
    options = {
        "model": SHAPE.name,
        "backend": "reference",
        "dtype": "float32",
        "max_num_seqs": 8,
        "max_num_batched_tokens": 64,
        "max_model_len": 128,
        "page_tokens": 32,
        "num_pages": 100,
    }
    plan = blueprint(ServingConfig(**(options | changes)), {}, SHAPE)
    weights = random_weights(plan.model, torch.float32, torch.device("cpu"), 0)
    weights.lm_head.mul_(20)  # so that logits differ by more than noise makes up for
    return Engine(plan, Runner(plan, weights, torch.device("cpu")))


def serve(wanted, **changes):
    """Return the tokens of each (prompt, output tokens, sampling)."""
    engine = new_engine(**changes)
    generations = [
        engine.add(
            Request(request_id=number, arrival_s=0.0, prompt_tokens=len(prompt), output_tokens=output),
            np.array(prompt),
            sampling,
        )
        for number, (prompt, output, sampling) in enumerate(wanted)
    ]
    engine.drain()
    return [generation.tokens for generation in generations], engine


def drawn(sampling, **changes):
    return serve([(PROMPT, 30, sampling)], **changes)[0][0]


def test_the_same_seed_gives_the_same_tokens_and_another_gives_others():
    tokens = drawn(DRAWN)
    assert len(tokens) == 30
    assert tokens == drawn(DRAWN)
    assert tokens != drawn(Sampling(temperature=1.0, top_p=0.9, seed=12))
    assert tokens != drawn(GREEDY)


def test_positions_of_a_sequence_are_drawn_apart():
    assert len(set(drawn(Sampling(temperature=100.0)))) > 20  # of 256 tokens, all about as likely


@pytest.mark.parametrize(
    "sampling", [GREEDY, DRAWN, Sampling(temperature=0.7, seed=2**64 - 1)], ids=["greedy", "top_p", "plain"]
)
def test_what_else_is_in_the_batch_changes_nothing(sampling):
    alone = drawn(sampling)
    together, engine = serve([*OTHERS, (PROMPT, 30, sampling), *OTHERS])
    assert together[len(OTHERS)] == alone
    assert max(step.shape.decode_rows for step in engine.steps) > 5
    assert together == serve([*OTHERS, (PROMPT, 30, sampling), *OTHERS], max_num_seqs=1)[0]


def test_chunked_prefill_changes_nothing():
    wanted = [*OTHERS, (PROMPT, 30, DRAWN)]
    assert serve(wanted)[0] == serve(wanted, max_num_batched_tokens=9)[0]


def test_preemption_changes_nothing():
    wanted = [(PROMPT, 50, Sampling(temperature=1.0, seed=seed)) for seed in range(5)]
    tokens, engine = serve(wanted, num_pages=8)
    assert engine.scheduler.preemptions > 0
    assert tokens == serve(wanted)[0]


@pytest.mark.parametrize(
    "sampling", [Sampling(temperature=1.0, top_p=1e-9, seed=5), Sampling(temperature=1e-9, seed=5)]
)
def test_next_to_no_top_p_or_temperature_is_greedy(sampling):
    assert drawn(sampling) == drawn(GREEDY)


def test_params_tell_each_rows_position_and_nothing_of_padding():
    engine = new_engine()
    seen = []
    build = engine.runner.builder.build

    def recording_build(step, layout, views, tokens_of):
        sampled = build(step, layout, views, tokens_of)
        assert list(layout.regions)[-1] == "lora_items"  # used_size counts on it
        seen.append(views["sample_params"].copy())
        return sampled

    engine.runner.builder.build = recording_build
    engine.add(
        Request(request_id=0, arrival_s=0.0, prompt_tokens=17, output_tokens=3), np.array(PROMPT), DRAWN
    )
    engine.drain()
    assert [params[0, POSITION] for params in seen] == [17, 18, 19]
    assert all(params[0, 0] and not params[1:].any() for params in seen)
