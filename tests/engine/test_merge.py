"""Adapters merged into the weights of a running engine: same tokens as Hugging Face + PEFT, whoever is merged."""

from dataclasses import replace

import pytest
import torch

from engine.adapter import AdapterSpec
from engine.blueprint import blueprint
from engine.config import ServingConfig
from engine.errors import UserError
from engine.expert_merge import group_weights
from engine.merge_choice import with_hot_adapter
from engine.model_shape import ModelShape
from tests.engine.test_engine import World, check, requests, serve

SPECS = {"a": AdapterSpec(name="a", rank=8), "b": AdapterSpec(name="b", rank=16)}
SHAPE = ModelShape(
    name="tiny", hidden_size=64, intermediate_size=128, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=16,
    vocab_size=256, max_position_embeddings=512,
)  # fmt: skip


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return World("llama", tmp_path_factory.mktemp("merge"))


def weights_of(engine):
    return [matrix.clone() for layer in engine.runner.model.weights.layers for matrix in group_weights(layer)]


@pytest.mark.parametrize("hot", ["r8", pytest.param("r16_qv", marks=pytest.mark.slow)])
def test_hot_serves_its_own_the_others_and_the_base(world, hot):
    engine = world.engine(merge="hot", merge_adapter=hot)
    plain = world.engine()
    check(world, engine, requests(count=10, output=4))
    changed = [not torch.equal(a, b) for a, b in zip(weights_of(engine), weights_of(plain), strict=True)]
    assert any(changed)
    steps = [step.shape for step in engine.steps]
    assert any(shape.lora_tokens < shape.tokens for shape in steps)  # its own rows need none
    assert all(engine.runner.merging.merged == hot for _ in steps)
    engine.runner.merging.static.unmerge_()
    assert all(torch.equal(a, b) for a, b in zip(weights_of(engine), weights_of(plain), strict=True))


@pytest.mark.slow
def test_hot_by_the_kernels(world):
    engine = world.engine(backend="triton", merge="hot", merge_adapter="r16_o", graph_max_tokens=0)
    check(world, engine, [(name, [1, 2], 2) for name in (None, "r3_mlp", "r16_o")])


@pytest.mark.slow
def test_hot_by_the_kernels_on_linears_of_both(world):
    engine = world.engine(backend="triton", merge="hot", merge_adapter="r8", graph_max_tokens=0)
    check(world, engine, [(name, [1, 2], 2) for name in (None, "r16_qv", "r3_mlp", "r8")])


def test_hot_outlives_a_failure_and_is_not_unregistered(world):
    engine = world.engine(merge="hot", merge_adapter="r8")
    with pytest.raises(ValueError, match="is merged into the weights"):
        engine.unregister("r8")
    engine.reset("failed")
    check(world, engine, requests(count=3, output=3))


def test_dynamic_switches_and_everybody_gets_their_own(world):
    engine = world.engine(merge="dynamic", merge_alpha=0.5, merge_beta=0.3)
    before = weights_of(engine)
    asked = requests(count=8, output=5)
    asked = [
        ("r8" if number % 3 else name, prompt, 3 * output)
        for number, (name, prompt, output) in enumerate(asked)
    ]
    check(world, engine, asked)
    policy = engine.scheduler.merging.policy
    assert policy.switches >= 2
    policy.check_integrity()
    engine.runner.merging.follow(None)
    assert all(torch.equal(a, b) for a, b in zip(weights_of(engine), before, strict=True))


def test_another_adapter_of_the_same_name_is_merged_anew(world):
    engine = world.engine(merge="dynamic", max_adapter_rank=64, max_adapters=5)
    check(world, engine, [("r8", [1, 2, 3], 3)])
    assert engine.runner.merging.merged == "r8"
    engine.unregister("r8")
    other = replace(world.specs["r3_mlp"], name="r8")
    engine.register("r8", engine.store.prepare(other))
    engine.logits.clear()
    generation = serve(engine, [("r8", [4, 5, 6], 4)])[0]
    assert generation.tokens == world.expected("r3_mlp", [4, 5, 6], 4)[0]
    assert engine.runner.merging.merged == "r8" and engine.scheduler.merging.policy.switches == 2


def test_a_bad_adapter_is_not_merged_and_served_all_the_same(world):
    engine = world.engine(merge="dynamic", merge_alpha=0.5)
    engine.runner.merging._fits = lambda name: False
    check(world, engine, [("r8", [1, 2, 3], 4)] * 3)
    assert engine.scheduler.merging.policy.switches == 0


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"merge": "hot"}, "merge='hot' needs merge_adapter"),
        ({"merge": "hot", "merge_adapter": "x"}, "merge_adapter='x' is not among the adapters given"),
        ({"merge": "dynamic", "tp": 2}, "merge='dynamic' needs tp=1, not 2"),
        ({"merge": "dynamic", "replicas": 2, "placement": "partitioned"}, "needs placement='everywhere'"),
        ({"merge": "hot", "merge_adapter": "b", "max_adapter_rank": 250}, "together are 266, at most 256"),
        ({"merge_alpha": 1.5}, r"merge_alpha=1.5 must be in \(0, 1\]"),
        ({"merge_beta": 0}, r"merge_beta=0 must be in \(0, 1\]"),
        ({"merge_adapter": ""}, "merge_adapter='' must be a name"),
    ],
)
def test_what_cannot_be_merged_is_said_in_one_line(changes, words):
    with pytest.raises(UserError, match=words):
        blueprint(
            ServingConfig(
                model="llama-3.1-8b", max_model_len=128, page_tokens=32, dtype="float32", **changes
            ),
            SPECS,
            SHAPE,
        )


def test_hot_is_the_most_frequent_adapter_unless_it_is_named():
    config = ServingConfig(merge="hot")
    assert with_hot_adapter(config, ["b", None, "a", None, None, "b", "a"]).merge_adapter == "a"
    assert with_hot_adapter(config, ["b", "a", "b"]).merge_adapter == "b"
    named = config.with_changes(merge_adapter="c")
    assert with_hot_adapter(named, ["a"]) is named
    assert with_hot_adapter(ServingConfig(), ["a"]).merge_adapter is None
    with pytest.raises(UserError, match="the trace has no adapter"):
        with_hot_adapter(config, [None])


def test_merging_is_paid_for_by_the_pool():
    config = ServingConfig(model="llama-3.1-8b")
    never = blueprint(config, SPECS).memory
    hot = blueprint(config.with_changes(merge="hot", merge_adapter="a"), SPECS).memory
    assert hot.merge_bytes > 13.9e9 and never.merge_bytes == 0
    assert 0 <= never.pool_bytes - hot.pool_bytes - hot.merge_bytes <= never.page_bytes
