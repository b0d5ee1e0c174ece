"""The profiler runs on a CPU with a tiny model, so that nothing but the numbers waits for the GPU."""

from dataclasses import replace

import pytest
import torch

from engine.adapter import AdapterSpec
from engine.batch import batch_layout
from engine.blueprint import blueprint
from engine.config import ServingConfig
from engine.model_shape import ModelShape
from engine.profiler import profile, step_grid
from engine.requests import Request
from engine.runner import Runner
from engine.step import StepShape
from engine.step_profile import MadeUpStep, made_up_shape
from engine.weights import random_weights

SHAPE = ModelShape(
    name="tiny",
    hidden_size=64,
    intermediate_size=128,
    num_layers=1,
    num_heads=8,
    num_kv_heads=8,
    head_dim=16,
    vocab_size=256,
    max_position_embeddings=8192,
)
CONFIG = ServingConfig(
    model="tiny",
    backend="reference",
    dtype="float32",
    max_num_seqs=8,
    max_num_batched_tokens=64,
    graph_max_tokens=32,
    max_model_len=2048,
    num_pages=4000,
)


def test_a_profile_holds_what_the_cost_model_reads():
    data = profile(CONFIG, quick=True, progress=lambda _: None, shape=SHAPE)
    assert set(data["operators"]) == {
        "matmul",
        "elementwise",
        "attention_decode",
        "attention_prefill",
        "lora",
        "sample",
        "transfer",
    }
    assert all(row["us"] > 0 for rows in data["operators"].values() for row in rows)
    shapes = [StepShape.from_json(row["shape"]) for row in data["steps"]]
    assert any(shape.prefill_tokens and shape.decode_rows and shape.lora_adapters > 1 for shape in shapes)
    assert all(shape.lora_tokens <= shape.tokens <= CONFIG.max_num_batched_tokens for shape in shapes)
    assert {row["rows"] for row in data["host"]} >= {1, 8}


def test_the_grid_is_the_same_for_a_seed_and_covers_its_axes():
    config = ServingConfig()
    grid = list(step_grid(config, count=100, seed=1))
    assert grid == list(step_grid(config, count=100, seed=1))
    rows = {len(step.decodes) for step in grid}
    assert min(rows) == 0 and max(rows) == config.max_num_seqs
    assert any(len({name for _, name in step.decodes if name}) > 100 for step in grid)
    assert max(sum(length for _, length, _ in step.chunks) for step in grid) > 700


def test_made_up_steps_have_the_shapes_that_the_scheduler_gives():
    """Costs are fitted to made-up steps and asked for the scheduler's, so both must count alike."""
    config = ServingConfig(max_num_batched_tokens=300)
    plan = blueprint(
        config, {name: AdapterSpec(name=name, rank=rank) for name, rank in (("a", 16), ("b", 8), ("c", 64))}
    )
    scheduler = plan.new_scheduler()
    wanted = [("a", 40), ("a", 30), ("b", 20), (None, 25)]
    for number, (name, prompt) in enumerate(wanted):
        scheduler.add(
            Request(request_id=number, arrival_s=0.0, prompt_tokens=prompt, output_tokens=50, adapter=name)
        )
    for _ in range(8):
        for load in scheduler.take_loads():
            scheduler.load_finished(load.adapter, 0.0)
        step = scheduler.schedule(0.0)
        if step is not None:
            scheduler.complete(step)
    scheduler.add(Request(request_id=9, arrival_s=0.0, prompt_tokens=500, output_tokens=5, adapter="c"))
    scheduler.complete(scheduler.schedule(0.0))
    scheduler.load_finished(scheduler.take_loads()[0].adapter, 0.0)
    tokens_so_far = {s.request.request_id: scheduler.planned_tokens(s) for s in scheduler.running()}
    step = scheduler.schedule(0.0)
    decodes = tuple(
        (prompt + tokens_so_far[number] - 1, name) for number, (name, prompt) in enumerate(wanted)
    )
    made = made_up_shape(MadeUpStep(decodes=decodes, chunks=((0, 296, "c"),)), plan.footprints)
    # A made-up chunk ends its prompt and samples a token; this one does not.
    assert replace(made, sample_rows=4) == step.shape
    assert step.shape.lora_single_bytes == plan.footprints["b"].weight_bytes


@pytest.mark.parametrize(("most", "graphs"), [(64, 32), (100, 0), (300, 64), (1100, 512), (1100, 0)])
def test_the_runners_buffers_hold_every_step_that_can_come(most, graphs):
    changes = {"max_num_batched_tokens": most, "graph_max_tokens": graphs, "num_pages": 200}
    plan = blueprint(CONFIG.with_changes(**changes), {"a": AdapterSpec(name="a", rank=64)}, SHAPE)
    runner = Runner(plan, random_weights(SHAPE, torch.float32, "cpu", 0), torch.device("cpu"))
    sizes = {runner.layout(tokens).size for tokens in range(1, most + 1)}
    assert max(sizes) <= runner.device_metadata.numel()
    assert batch_layout(most, runner.layout(most).limits).size <= runner.device_metadata.numel()
