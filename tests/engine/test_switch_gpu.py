"""On a GPU, in CUDA graphs and bf16: adapters merged into the weights of a running engine, and dynamic ones beside ordinary ones, against the
reference backend."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from engine.adapter import AdapterSpec
from engine.expert_merge import group_weights
from tests.engine import test_engine_gpu
from tests.engine.test_engine_gpu import LOGITS_TOLERANCE, SHAPES, Recorder, serve

pytestmark = pytest.mark.gpu


def weights_of(engine):
    return [matrix.clone() for layer in engine.runner.model.weights.layers for matrix in group_weights(layer)]


def check_alike(ours, our_engine, theirs, their_engine, worse_share=0.0):
    """Hold rows' logits against the other's, as far as both chose the same tokens. worse_share: of the rows, may differ by more."""
    compared, worse = 0, []
    for number, (one, other) in enumerate(zip(ours, theirs, strict=True)):
        rows = zip(our_engine.logits[number], their_engine.logits[number], strict=True)
        for index, (row, expected) in enumerate(rows):
            if one.tokens[:index] != other.tokens[:index]:
                break  # a near tie went the other way; from here the two are different texts
            error = float((row - expected).norm() / expected.norm())
            compared += 1
            if not error < LOGITS_TOLERANCE:
                worse.append(f"request {number}, token {index}: {error}")
    assert len(worse) <= worse_share * compared, worse
    total = sum(len(generation.tokens) for generation in ours)
    assert compared > 0.5 * total, f"only {compared} of {total} rows could be compared"


def save_peft(folder, spec, shape):
    """Write a random adapter as PEFT does, and return its spec."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(len(spec.name) + spec.rank)
    tensors = {}
    for layer in range(shape.num_layers):
        for module in spec.target_modules:
            outputs, inputs = shape.linear_shapes()[module]
            block = "mlp" if module in ("gate_proj", "up_proj", "down_proj") else "self_attn"
            for side, size in (("A", (spec.rank, inputs)), ("B", (outputs, spec.rank))):
                name = f"base_model.model.model.layers.{layer}.{block}.{module}.lora_{side}.weight"
                tensors[name] = (0.02 * torch.randn(size, generator=generator)).to(torch.bfloat16)
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "r": spec.rank,
        "lora_alpha": spec.rank,
        "target_modules": list(spec.target_modules),
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return replace(spec, path=folder)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Let the adapters lie on disk: what is drawn for one without a folder goes by its pages, and beside a merged one it has others."""
    folder = tmp_path_factory.mktemp("adapters")
    specs = {
        name: save_peft(folder / name, spec, SHAPES["gqa"]) for name, spec in test_engine_gpu.SPECS.items()
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(test_engine_gpu, "SPECS", specs)
        yield


@pytest.fixture(scope="module")
def plain(saved):
    engine = Recorder(SHAPES["gqa"], "reference", False, graph_max_tokens=0)
    return engine, serve(engine)


@pytest.mark.parametrize(
    "changes",
    [
        {"merge": "hot", "merge_adapter": "r64"},
        {"merge": "hot", "merge_adapter": "r5"},
        {"merge": "dynamic", "merge_alpha": 0.2, "merge_beta": 0.1},
    ],
    ids=["hot r64", "hot r5", "dynamic"],
)
def test_merged_in_graphs_equals_the_reference_that_merges_none(plain, changes):
    engine = Recorder(SHAPES["gqa"], "triton", True, **changes)
    ours = serve(engine)
    check_alike(ours, engine, plain[1], plain[0])
    merging = engine.runner.merging
    if changes["merge"] == "dynamic":
        assert engine.scheduler.merging.policy.switches >= 2
    else:
        assert merging.merged == changes["merge_adapter"]
    merging.static.unmerge_()
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(weights_of(engine), weights_of(plain[0]), strict=True))


@pytest.mark.parametrize("rank", [8, 64])
def test_dynamic_adapters_share_batches_with_ordinary_ones(monkeypatch, rank):
    specs = {
        "d8": AdapterSpec(name="d8", kind="dynamic", rank=rank),
        "r8": AdapterSpec(name="r8", rank=8),
        "d3": AdapterSpec(
            name="d3", kind="dynamic", rank=16, num_experts=3, top_k=1, target_modules=("o_proj", "down_proj")
        ),
    }
    monkeypatch.setattr(test_engine_gpu, "SPECS", specs)
    ours_engine = Recorder(SHAPES["gqa"], "triton", True)
    theirs_engine = Recorder(SHAPES["gqa"], "reference", False, graph_max_tokens=0)
    ours, theirs = serve(ours_engine), serve(theirs_engine)
    # A router whose logits are equal but for rounding may choose another expert.
    check_alike(ours, ours_engine, theirs, theirs_engine, worse_share=0.1)
    assert any(key.with_experts and key.with_lora for key in ours_engine.runner._graphs)
