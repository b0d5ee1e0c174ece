import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.adapter import AdapterSpec, load_adapters
from engine.errors import UserError
from engine.layout import ROW_ALIGN_BYTES, adapter_layout, page_geometry
from engine.model_shape import MODULES, from_hf_config, load_model_shape
from engine.peft_adapter import load_peft_adapter, pack, pack_random, random_adapter, shard_adapter
from engine.peft_config import module_path
from engine.weights import shard_slices
from tests.engine.tiny import save_adapter, save_model, tiny_model


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(scope="module")
def shape(model):
    return from_hf_config(model.config.to_dict(), name="tiny", source="config.json")


def lora_modules(peft_model):
    """Yield ((layer, module), PEFT's own layer) of every target."""
    for name, layer in peft_model.named_modules():
        if hasattr(layer, "lora_A"):
            parts = name.split(".")
            yield (int(parts[parts.index("layers") + 1]), parts[-1]), layer


def assert_is_the_adapter(adapter, peft_model):
    found = dict(lora_modules(peft_model))
    assert set(found) == set(adapter.tensors)
    for (layer, module), theirs in found.items():
        a, b = adapter.tensors[layer, module]
        assert torch.equal(a, theirs.lora_A["default"].weight)
        assert torch.equal(b, theirs.lora_B["default"].weight)
        assert adapter.scales[MODULES.index(module)] == pytest.approx(theirs.scaling["default"], rel=1e-12)
        assert adapter.spec.module_ranks[MODULES.index(module)] == a.shape[0]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"rank": 1, "lora_alpha": 3},
        {"rank": 64, "use_rslora": True},
        {"rank": 16, "targets": ("q_proj", "v_proj")},
        {"targets": ("down_proj",)},
        {"targets": "all-linear"},
        {"targets": r".*\.(o_proj|gate_proj)"},
        {"targets": "all-linear", "exclude_modules": ["k_proj", "mlp.down_proj"]},
        {"rank_pattern": {"q_proj": 4, "mlp.up_proj": 12}, "alpha_pattern": {"q_proj": 5}},
        {"rank_pattern": {".*_proj": 3}, "use_rslora": True},
        {"init_lora_weights": "gaussian"},
    ],
)
def test_loads_what_peft_saved(options, model, shape, tmp_path):
    theirs = save_adapter(model, tmp_path / "mine", **options)
    adapter = load_peft_adapter(tmp_path / "mine", shape)
    assert adapter.spec.name == "mine"
    assert_is_the_adapter(adapter, theirs)


def test_regular_expression_over_layers_that_are_all(model, shape, tmp_path):
    theirs = save_adapter(model, tmp_path, targets=r"model\.layers\.[01]\.self_attn\.q_proj")
    assert_is_the_adapter(load_peft_adapter(tmp_path, shape), theirs)
    save_adapter(model, tmp_path / "some", targets=r"model\.layers\.1\.self_attn\.q_proj")
    with pytest.raises(UserError, match="q_proj differs between layers"):
        load_peft_adapter(tmp_path / "some", shape)


def test_adapters_file_takes_ranks_from_the_folder(model, tmp_path):
    save_adapter(model, tmp_path / "x", rank=16, targets=("q_proj", "v_proj"), rank_pattern={"v_proj": 4})
    path = tmp_path / "adapters.jsonl"
    path.write_text('{"name": "a", "path": "x"}\n')
    assert load_adapters(path)["a"].module_ranks == (16, 0, 4, 0, 0, 0, 0)
    for key, value in (("rank", 8), ("target_modules", ["q_proj"]), ("kind", "dynamic")):
        path.write_text(json.dumps({"name": "a", "path": "x", key: value}) + "\n")
        with pytest.raises(UserError, match=f":1: {key} .* is not what"):
            load_adapters(path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"bias": "lora_only"}, "bias"),
        ({"lora_bias": True}, "lora_bias"),
        ({"layers_to_transform": [0]}, "layers_to_transform"),
        ({"peft_type": "IA3"}, "peft_type"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out"),
        ({"use_bdlora": {"nblocks": 2}}, "must be in target_modules_bd_"),
        ({"use_bdlora": {"target_modules_bd_a": []}}, "must be an object with nblocks"),
        ({"use_bdlora": {"nblocks": 0}}, r"nblocks \(=0\) must be in 1..256"),
        (
            # as peft's own docstring has it: A and B swapped
            {
                "use_bdlora": {
                    "nblocks": 2,
                    "target_modules_bd_a": ["q_proj"],
                    "target_modules_bd_b": ["o_proj"],
                }
            },
            "q_proj must be in target_modules_bd_b and not in target_modules_bd_a",
        ),
        ({"use_qalora": True}, "use_qalora"),
        ({"trainable_token_indices": [1]}, "embeddings"),
        ({"target_parameters": ["x"]}, "target_parameters"),
        ({"a_field_of_tomorrow": {"x": 1}}, "a_field_of_tomorrow"),
        ({"init_lora_weights": "pissa"}, "changes the base"),
        ({"target_modules": ["q_proj", "lm_head"]}, "lm_head"),
        ({"target_modules": None}, "target_modules is missing"),
        ({"target_modules": "nothing"}, "matches none"),
        ({"target_modules": "("}, "not a regular expression"),
        ({"r": 0}, r"r \(=0\)"),
        ({"r": 257}, r"r \(=257\)"),
        ({"r": 8.0}, "r "),
        ({"lora_alpha": "big"}, "lora_alpha"),
        ({"lora_alpha": math.inf}, "lora_alpha"),
        ({"rank_pattern": {"q_proj": 0}}, "rank_pattern"),
        ({"rank_pattern": {"layers.0.self_attn.q_proj": 4}}, "q_proj differs between layers"),
        ({"r": 4}, r"has shape \[8, 64\], \[4, 64\] is needed"),
        ({"target_modules": ["q_proj"]}, "is unexpected"),
    ],
)
def test_refuses_other_methods(changes, message, model, shape, tmp_path):
    save_adapter(model, tmp_path, targets=("q_proj", "v_proj"))
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(UserError, match=message) as refusal:
        load_peft_adapter(tmp_path, shape)
    assert "\n" not in str(refusal.value) and "adapter_" in str(refusal.value)


Q0 = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(Q0.format("B")), r"layers\.0\.self_attn\.q_proj\.lora_B\.weight is missing"),
        (lambda t: t.update({Q0.format("A"): torch.zeros(8, 63)}), r"lora_A.* \[8, 63\], \[8, 64\]"),
        (lambda t: t.update({Q0.format("B"): torch.zeros(8, 64)}), r"lora_B.* \[8, 64\], \[64, 8\]"),
        (lambda t: t[Q0.format("A")].__setitem__((3, 5), math.nan), "not finite"),
        (lambda t: t[Q0.format("B")].__setitem__((3, 5), -math.inf), "not finite"),
        (lambda t: t.update({Q0.format("A"): torch.zeros(8, 64, dtype=torch.int32)}), "int32"),
        (lambda t: t.update({"base_model.model.lm_head.lora_A.weight": torch.zeros(8, 64)}), "is unexpected"),
        (lambda t: t.update({Q0.format("A").replace("0", "7"): torch.zeros(8, 64)}), "is unexpected"),
        (lambda t: t.update({Q0.format("magnitude"): torch.zeros(8)}), "is unexpected"),
        (lambda t: t.update({Q0.format("A").replace("0", "9" * 5000): torch.zeros(1)}), "is unexpected"),
        (lambda t: t.update({"two\nlines": torch.zeros(1)}), r"two\?lines is unexpected"),
        (
            lambda t: t.update(
                {Q0.format("A").replace("model.model.model", "model.model"): torch.zeros(8, 64)}
            ),
            "are of the same factor",
        ),
        (lambda t: t.update({"padding": torch.zeros(2**20)}), "at most"),
    ],
)
def test_refuses_bad_tensors(change, message, model, shape, tmp_path):
    save_adapter(model, tmp_path, targets=("q_proj", "v_proj"))
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    with pytest.raises(UserError, match=message) as refusal:
        load_peft_adapter(tmp_path, shape)
    assert str(path) in str(refusal.value)


def test_refuses_other_files(model, shape, tmp_path):
    with pytest.raises(UserError, match=r"no adapter_config\.json"):
        load_peft_adapter(tmp_path, shape)
    save_adapter(model, tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    whole = path.read_bytes()
    for size in (len(whole) - 1, 100, 4, 0):
        path.write_bytes(whole[:size])
        with pytest.raises(UserError, match="truncated or corrupt"):
            load_peft_adapter(tmp_path, shape)
    path.unlink()
    config = tmp_path / "adapter_config.json"
    small = config.read_bytes()
    config.write_bytes(small + b" " * 2**20)
    with pytest.raises(UserError, match=r"adapter_config\.json: larger than"):
        load_peft_adapter(tmp_path, shape)
    config.write_bytes(small)
    with pytest.raises(UserError, match="no weights"):
        load_peft_adapter(tmp_path, shape)
    (tmp_path / "adapter_model.bin").write_bytes(b"x")
    with pytest.raises(UserError, match="pickle"):
        load_peft_adapter(tmp_path, shape)


def test_refuses_an_adapter_of_another_model(shape, tmp_path):
    save_adapter(tiny_model(num_hidden_layers=3), tmp_path / "deep")
    with pytest.raises(UserError, match="is unexpected"):
        load_peft_adapter(tmp_path / "deep", shape)
    save_adapter(tiny_model(num_hidden_layers=1), tmp_path / "shallow")
    with pytest.raises(UserError, match=r"layers\.1\.self_attn\.q_proj\.lora_A\.weight is missing"):
        load_peft_adapter(tmp_path / "shallow", shape)


def unpack(image, layout, layer, module, side):
    """Read a factor back, row by row, through a table for pages 0, 1, 2, …"""
    flat = image.flatten()
    table = layout.table(range(layout.num_pages))[layout.rows(layer, module, side)]
    length = layout.lengths[module][side == "b"]
    starts = [int(unit) * ROW_ALIGN_BYTES // layout.geometry.itemsize for unit in table]
    return torch.stack([flat[start : start + length] for start in starts])


@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_rows_are_the_factors(tp, dtype, model, shape, tmp_path):
    save_adapter(
        model,
        tmp_path,
        rank=12,
        targets=("q_proj", "k_proj", "o_proj", "up_proj", "down_proj"),
        rank_pattern={"up_proj": 64},
        use_rslora=True,
    )
    adapter = load_peft_adapter(tmp_path, shape)
    geometry = page_geometry(shape, tp, 16 * tp, dtype.itemsize)
    layout = adapter_layout(shape, adapter.spec.module_ranks, geometry, tp=tp)
    assert layout.num_pages > 3
    for rank in range(tp):
        image = pack(shard_adapter(adapter, shape, tp, rank), layout, dtype)
        assert image.shape == (layout.num_pages, geometry.page_elems) and image.dtype == dtype
        assert not image.flatten()[: layout.table_bytes // dtype.itemsize].any()
        for (layer, module), (a, b) in adapter.tensors.items():
            index = MODULES.index(module)
            out, inp = shard_slices(shape, module, tp, rank)
            scaled = (b * adapter.scales[index]).T
            assert torch.equal(unpack(image, layout, layer, index, "a"), a[:, inp].to(dtype))
            assert torch.equal(unpack(image, layout, layer, index, "b"), scaled[:, out].to(dtype))


def test_pack_wants_what_the_layout_is_for(shape):
    adapter = random_adapter(AdapterSpec(name="a", rank=8), shape, seed=0, dtype=torch.float32)
    layout = adapter_layout(shape, (4,) * 7, page_geometry(shape, 1, 16, 4))
    with pytest.raises(ValueError, match=r"\[8, 64\], \[4, 64\] is needed"):
        pack(adapter, layout, torch.float32)
    with pytest.raises(ValueError, match="bytes"):
        pack(adapter, layout, torch.bfloat16)


def test_factors_beyond_the_dtype_are_refused(shape):
    adapter = random_adapter(AdapterSpec(name="big", rank=8), shape, seed=0, dtype=torch.float32)
    layout = adapter_layout(shape, (8,) * 7, page_geometry(shape, 1, 16, 2))
    adapter.tensors[0, "q_proj"][1][0, 0] = 1e6
    with pytest.raises(UserError, match=r"adapter big: .* overflow torch\.float16"):
        pack(adapter, layout, torch.float16)


def test_random_adapters_are_seeded(shape):
    spec = AdapterSpec(name="a", rank=4, target_modules=("q_proj", "down_proj"))
    one, same, other = (random_adapter(spec, shape, seed=seed, dtype=torch.float32) for seed in (1, 1, 2))
    assert set(one.tensors) == {(layer, module) for layer in (0, 1) for module in spec.target_modules}
    assert one.scales == (1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0)
    for key, (a, b) in one.tensors.items():
        out, inp = shape.linear_shapes()[key[1]]
        assert a.shape == (4, inp) and b.shape == (out, 4)
        assert torch.equal(a, same.tensors[key][0]) and not torch.equal(b, other.tensors[key][1])
    with pytest.raises(UserError, match="not supported yet"):
        random_adapter(AdapterSpec(name="b", kind="dynamic"), shape, seed=0, dtype=torch.float32)


def test_pack_random_fills_every_row(shape):
    layout = adapter_layout(shape, (16,) * 7, page_geometry(shape, 1, 16, 4))
    image = pack_random(layout, torch.Generator().manual_seed(3), torch.float32)
    for module in range(7):
        row = unpack(image, layout, 1, module, "b")
        assert 0.01 < row.std() < 0.03
    again = torch.empty_like(image)
    assert pack_random(layout, torch.Generator().manual_seed(3), torch.float32, out=again) is again
    assert torch.equal(image, again)
    with pytest.raises(ValueError, match="needed"):
        pack_random(layout, torch.Generator(), torch.float32, out=again[:1])


def test_packed_adapter_of_a_loaded_model_computes_what_peft_does(model, tmp_path):
    """The whole path once: folder to pages to y = x·Aᵀ·Bᵀ."""
    shape = load_model_shape(save_model(model, tmp_path / "base"))
    theirs = dict(lora_modules(save_adapter(model, tmp_path / "a", rank=8)))
    adapter = load_peft_adapter(tmp_path / "a", shape)
    layout = adapter_layout(shape, adapter.spec.module_ranks, page_geometry(shape, 1, 16, 4))
    image = pack(adapter, layout, torch.float32)
    for (layer, module), lora in theirs.items():
        index = MODULES.index(module)
        x = torch.randn(5, layout.lengths[index][0])
        ours = x @ unpack(image, layout, layer, index, "a").T @ unpack(image, layout, layer, index, "b")
        expected = lora(x) - lora.base_layer(x)
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)
        assert module_path(layer, module).endswith(module)
