"""Dynamic adapters in the running engine, beside ordinary ones and the base: against Hugging Face with the experts added by hooks, in fp32."""

import json
from dataclasses import replace

import pytest
import torch

from engine.adapter import AdapterSpec, load_adapters
from engine.blueprint import blueprint
from engine.config import ServingConfig
from engine.dynamic_adapter import DynamicAdapterSpec
from engine.dynamic_adapter_files import random_dynamic_adapter, save_dynamic_adapter
from engine.errors import UserError
from engine.model_shape import MODULES, load_model_shape
from engine.requests import Request
from engine.runner import GraphKey
from engine.scheduler import RefusedError
from tests.engine.test_engine import World, check, requests
from tests.engine.tiny import tiny_model

DYNAMIC = {
    "switch": {"num_experts": 4, "top_k": 2, "rank": 8},
    "layerwise": {
        "num_experts": 3, "top_k": 1, "rank": 4, "target_modules": ("o_proj", "down_proj"), "router": "layerwise", "renormalise": True,
    },
}  # fmt: skip


class Hooked:
    """A Hugging Face model whose linears add a dynamic adapter's experts, as the formula says it."""

    def __init__(self, model, adapter):
        self.model, self.adapter, self.gates = model, adapter, None
        for layer, block in enumerate(model.model.layers):
            for module in adapter.spec.targets:
                linear = getattr(block.self_attn if module[0] in "qkvo" else block.mlp, module)
                linear.register_forward_hook(self.hook(layer, module))

    def hook(self, layer, module):
        spec = self.adapter.spec

        def add(_linear, inputs, output):
            x = inputs[0]
            if module == spec.targets[0] and (layer == 0 or spec.router == "layerwise"):
                p = torch.softmax(x @ self.adapter.routers[0 if spec.router == "switch" else layer].T, dim=-1)
                values, chosen = p.topk(spec.top_k)
                if spec.renormalise:
                    values = values / values.sum(dim=-1, keepdim=True)
                self.gates = torch.zeros_like(p).scatter(-1, chosen, values)
            a, b = self.adapter.tensors[layer, module]
            h = torch.einsum("bti,nri->btnr", x, a) * self.gates[..., None]
            return output + torch.einsum("btnr,nor->bto", h, b)

        return add

    def __call__(self, **options):
        return self.model(**options)


class DynamicWorld(World):
    def __init__(self, folder):
        super().__init__("llama", folder)
        shape = load_model_shape(str(self.folder))
        for seed, (name, options) in enumerate(DYNAMIC.items()):
            adapter = random_dynamic_adapter(
                DynamicAdapterSpec(name=name, **options), shape, seed=seed, dtype=torch.float32
            )
            tensors = {key: (a * 5, b * 5) for key, (a, b) in adapter.tensors.items()}
            adapter = replace(
                adapter, tensors=tensors, routers=tuple(router * 3 for router in adapter.routers)
            )
            save_dynamic_adapter(adapter, folder / name)
            self.models[name] = Hooked(tiny_model("llama", seed=3), adapter)
        lines = [{"name": name, "kind": "dynamic", "path": name} for name in DYNAMIC]
        lines += [{"name": name, "path": name} for name in ("r8", "r64", "r16_qv", "r3_mlp", "r16_o")]
        file = folder / "adapters.jsonl"
        file.write_text("".join(json.dumps(line) + "\n" for line in lines))
        self.specs = load_adapters(file)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return DynamicWorld(tmp_path_factory.mktemp("dynamic"))


def mixed(count=8, output=3):
    names = ["switch", None, "r8", "layerwise", "switch", "r64"]
    return [
        (names[number % len(names)], prompt, length)
        for number, (_, prompt, length) in enumerate(requests(count=count, output=output))
    ]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        pytest.param({"max_num_seqs": 1}, marks=pytest.mark.slow),
        pytest.param({"max_num_batched_tokens": 9}, marks=pytest.mark.slow),
    ],
    ids=["mixed", "alone", "chunked"],
)
def test_a_mixed_batch_equals_the_dense_computation(world, changes):
    engine = world.engine(**changes)
    check(world, engine, mixed())
    assert engine.scheduler.residency.loads <= 2  # r8 and r64: experts are there from the start


@pytest.mark.slow
def test_by_the_kernels(world):
    engine = world.engine(backend="triton", graph_max_tokens=0)
    check(world, engine, [(name, [1, 2], 2) for name in ("switch", "r3_mlp", None)])


def test_steps_without_one_run_as_ever(world):
    engine = world.engine()
    keys: list[GraphKey] = []
    original = engine.runner.run

    def run(key, layout):
        keys.append(key)
        return original(key, layout)

    engine.runner.run = run
    check(world, engine, [("r8", [1, 2, 3], 2), (None, [4, 5], 2)])
    assert keys and not any(key.with_experts for key in keys)
    check_again = [("switch", [1, 2, 3], 2)]
    engine.logits.clear()
    check(world, engine, check_again)
    assert any(key.with_experts for key in keys)


@pytest.mark.slow
def test_beside_dynamic_merging(world):
    engine = world.engine(merge="dynamic", merge_alpha=0.4, merge_beta=0.3)
    asked = [
        ("r8" if number % 2 else name, prompt[:20], 3 * length)
        for number, (name, prompt, length) in enumerate(mixed())
    ]
    check(world, engine, asked)
    assert engine.scheduler.merging.policy.switches >= 2


def test_preempted_ones_start_again(world):
    engine = world.engine(num_pages=5, max_num_seqs=4)
    check(world, engine, [("switch" if n % 2 else "layerwise", list(range(28 + n)), 8) for n in range(4)])
    assert engine.scheduler.preemptions > 0


def test_memory_and_footprints(world):
    plan = blueprint(world.engine().blueprint.config, world.specs)
    spec = plan.adapters["switch"]
    assert (spec.kind, spec.rank, spec.expert_counts, spec.module_ranks) == ("dynamic", 8, (4, 2), (0,) * 7)
    assert plan.footprints["switch"].pages == 0
    engine = world.engine()
    experts = engine.runner.model.experts
    assert plan.memory.expert_bytes >= experts.weight_bytes + 4 * experts._bridge.numel()
    # A row reads two of four experts; many read them all.
    footprint = plan.footprints["switch"]
    assert footprint.bytes_of(1) == pytest.approx(footprint.weight_bytes)
    assert footprint.bytes_of(100) == pytest.approx(2 * footprint.weight_bytes)


def test_one_without_a_folder_is_drawn_and_served(world):
    spec = AdapterSpec(name="drawn", kind="dynamic", rank=4, target_modules=("q_proj", "down_proj"))
    plan = blueprint(world.engine().blueprint.config, {"drawn": spec})
    assert plan.max_rank == 0 and spec.expert_counts == (8, 2)
    with pytest.raises(RefusedError, match="not registered"):
        plan.new_scheduler().add(requests_of("other"))
    with pytest.raises(ValueError, match="stays: it is merged into the weights, or dynamic"):
        plan.new_scheduler().unregister("drawn")


def requests_of(adapter):
    return Request(request_id=0, arrival_s=0.0, prompt_tokens=1, output_tokens=1, adapter=adapter)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ({"kind": "dynamic", "num_experts": 1}, "num_experts"),
        ({"kind": "dynamic", "top_k": 9}, "top_k"),
        ({"num_experts": 4}, "are of kind dynamic alone"),
        ({"kind": "dynamic", "path": "switch", "num_experts": 5}, "is not what"),
        ({"kind": "dynamic", "path": "switch", "target_modules": ["q_proj"]}, "is not what"),
        ({"kind": "dynamic", "path": "r8"}, "adapter_config|dynamic"),
    ],
)
def test_a_wrong_line_is_told(world, tmp_path, line, words):
    folder = world.folder.parent
    file = folder / "wrong.jsonl"
    file.write_text(json.dumps({"name": "x", **line}) + "\n")
    with pytest.raises(UserError, match=words):
        load_adapters(file)


def test_what_cannot_be_served_is_told():
    spec = AdapterSpec(name="d", kind="dynamic", rank=8)
    config = ServingConfig(model="llama-3.1-8b")
    with pytest.raises(UserError, match="kind 'dynamic' needs tp=1, not 2"):
        blueprint(config.with_changes(tp=2), {"d": spec})
    with pytest.raises(UserError, match="9 adapters of kind 'dynamic', at most 8"):
        blueprint(config, {str(n): replace(spec, name=str(n)) for n in range(9)})
    hot = config.with_changes(merge="hot", merge_adapter="a")
    with pytest.raises(UserError, match="not served together"):
        blueprint(hot, {"a": AdapterSpec(name="a"), "d": spec})
    memory = blueprint(config, {"d": replace(spec, rank=64)}).memory
    assert (
        memory.expert_bytes > 8 * 64 * 32 * 2 * 81920
    )  # eight experts of 7 linears: 2.7 GB, and partial sums
    assert set(MODULES) == set(spec.target_modules)
