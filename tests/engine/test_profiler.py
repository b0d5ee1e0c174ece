"""The profiler runs on a CPU with a tiny model, so that nothing but the numbers waits for the GPU."""

from engine.config import ServingConfig
from engine.model_shape import ModelShape
from engine.profiler import profile, step_grid
from engine.step import StepShape

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
