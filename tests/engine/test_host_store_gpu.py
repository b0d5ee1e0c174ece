"""On a GPU: pinned slabs, draws on the device and copies that overlap give the same bytes as one load at a time from unbounded memory."""

import json
import time

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from engine.adapter import AdapterSpec, spec_of_peft
from engine.blueprint import blueprint
from engine.config import ServingConfig
from engine.load_bench import bench_loads
from engine.model_shape import MODULES, ModelShape
from engine.peft_adapter import random_adapter
from engine.peft_config import module_path
from engine.runner import Runner
from engine.step import Load
from engine.weights import random_weights

pytestmark = pytest.mark.gpu

WAIT_S = 60.0
SHAPE = ModelShape(
    name="gqa",
    hidden_size=512,
    intermediate_size=1408,
    num_layers=4,
    num_heads=8,
    num_kv_heads=2,
    head_dim=128,
    vocab_size=4096,
    max_position_embeddings=4096,
)


def save_random(folder, seed):
    """Write a PEFT folder of rank 16 on all linears, in bf16."""
    weights = random_adapter(AdapterSpec(name="x", rank=16), SHAPE, seed, torch.bfloat16)
    tensors = {}
    for (layer, module), factors in weights.tensors.items():
        for side, factor in zip("AB", factors, strict=True):
            name = f"base_model.model.{module_path(layer, module)}.lora_{side}.weight"
            tensors[name] = factor.contiguous()
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 16, "lora_alpha": 32, "target_modules": list(MODULES)}
    (folder / "adapter_config.json").write_text(json.dumps(config))


@pytest.fixture(scope="module")
def specs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters")
    found = {}
    for number in range(6):
        save_random(folder / f"f{number}", number)
        found[f"f{number}"] = spec_of_peft(f"f{number}", folder / f"f{number}", SHAPE.num_layers)
        found[f"r{number}"] = AdapterSpec(name=f"r{number}", rank=4 * number + 4)
    return found


def make_runner(specs, **changes):
    options = {
        "model": "gqa",
        "max_num_seqs": 16,
        "max_num_batched_tokens": 256,
        "graph_max_tokens": 64,
        "max_model_len": 2048,
        "page_tokens": 16,
        "num_pages": 2000,
    }
    plan = blueprint(ServingConfig(**(options | changes)), specs, SHAPE)
    weights = random_weights(SHAPE, torch.bfloat16, "cuda", seed=5)
    runner = Runner(plan, weights, torch.device("cuda", 0), seed=1)
    assert list(runner.store.register_all()) == list(specs)
    runner.store.check_integrity()
    return runner


def settle(runner):
    """Wait for all loads; return the names that finished."""
    finished = []
    until = time.monotonic() + WAIT_S
    while runner.loader.num_loading:
        finished += runner.loader.finished()
        assert runner.loader.failed() == []
        assert time.monotonic() < until
        time.sleep(1e-4)  # lets the threads that read have the interpreter
    finished += runner.loader.finished()
    runner.store.check_integrity()
    return finished


@pytest.mark.parametrize("share", [None, 1.0, 2.5], ids=["all", "one", "some"])
def test_repeated_loads_under_eviction_give_the_right_bytes(specs, share):
    free = make_runner(specs)
    images = {name: free.store.image(name) for name in specs}
    sizes = {name: footprint.copy_bytes for name, footprint in free.blueprint.footprints.items()}
    bound = None if share is None else int(share * max(sizes.values()))
    runner = make_runner(specs, host_memory_bytes=bound)
    assert bound is None or runner.store.pinned_bytes <= bound
    assert all(run.is_pinned() for name in specs for run in runner.store.runs(runner.store[name]))
    rng = np.random.default_rng(0)
    for _ in range(12):
        names = rng.permutation(list(specs)).tolist()[:8]
        pages = iter(rng.permutation(2000).tolist() if rng.random() < 0.5 else range(2000))
        loads = []
        for slot, name in enumerate(names):
            count = runner.blueprint.footprints[name].pages
            loads.append(Load(name, slot, tuple(next(pages) for _ in range(count)), sizes[name]))
        for load in loads:
            runner.loader.start(load)
        assert sorted(settle(runner)) == sorted(names)
        for load in loads:
            wanted = images[load.adapter].clone()
            table = torch.from_numpy(runner.store[load.adapter].layout.table(load.pages))
            wanted[0].view(torch.int32)[: len(table)] = table
            found = runner.buffers.pool[list(load.pages)].cpu()
            # As bits: a random table may look like NaN.
            assert torch.equal(found.view(torch.int16), wanted.view(torch.int16)), load
    assert bool(runner.store.cache.evictions) == (bound is not None)


def test_an_adapter_is_loaded_again_at_once_into_other_pages(specs):
    runner = make_runner(specs)
    count = runner.blueprint.footprints["f0"].pages
    loads = [Load("f0", slot, tuple(range(slot * 100, slot * 100 + count)), 1) for slot in range(5)]
    for load in loads:
        runner.loader.start(load)  # each waits for the one before: there is one row table in host memory
    assert settle(runner) == ["f0"] * 5
    for load in loads:
        table = torch.from_numpy(runner.store["f0"].layout.table(load.pages))
        found = runner.buffers.pool[load.pages[0]].cpu().view(torch.int32)[: len(table)]
        assert torch.equal(found, table)


def test_adapters_are_prepared_while_serving(specs):
    runner = make_runner({"r0": specs["r0"]}, max_adapters=4, max_adapter_rank=32)
    for name in ("f1", "r3"):
        runner.store.put(name, runner.store.prepare(specs[name]))
        count = runner.store[name].layout.num_pages
        runner.loader.start(Load(name, 1, tuple(range(count)), 1))
        assert settle(runner) == [name]
    runner.loader.reset()
    runner.store.remove("f1")
    runner.store.check_integrity()


def test_the_benchmark_runs_on_captured_graphs(specs):
    runner = make_runner(specs)
    list(runner.capture())
    rows = bench_loads(runner, loads=6, steps=20)
    assert rows[0]["gb_per_s"] > 1 and rows[3]["gb_per_s"] > 1
