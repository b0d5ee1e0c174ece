"""The dynamic adapter's folder: written, read, refused; and made out of PEFT LoRAs."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.__main__ import main
from engine.combine_experts import RouterSource, combine
from engine.dynamic_adapter import CONFIG_FILE, WEIGHTS_FILE, DynamicAdapterSpec, read_dynamic_config
from engine.dynamic_adapter_files import load_dynamic_adapter, random_dynamic_adapter, save_dynamic_adapter
from engine.errors import UserError
from engine.model_shape import MODULES, from_hf_config
from tests.engine.tiny import save_adapter, save_model, tiny_model


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(scope="module")
def shape(model):
    return from_hf_config(model.config.to_dict(), name="tiny", source="config.json")


def spec(**changes):
    return DynamicAdapterSpec(**({"name": "d", "num_experts": 3, "top_k": 2, "rank": 4} | changes))


def written(tmp_path, shape, **changes):
    adapter = random_dynamic_adapter(spec(**changes), shape, seed=0, dtype=torch.float32)
    return adapter, save_dynamic_adapter(adapter, tmp_path / "d")


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"router": "layerwise", "renormalise": True},
        {"target_modules": ("down_proj", "o_proj"), "base_model": "x"},
    ],
)
def test_reads_what_it_wrote(changes, shape, tmp_path):
    adapter, folder = written(tmp_path, shape, **changes)
    found = load_dynamic_adapter(folder, shape)
    assert found.spec == spec(**(changes | {"target_modules": adapter.spec.targets}))
    assert len(found.routers) == (2 if changes.get("router") else 1)
    assert all(torch.equal(a, b) for a, b in zip(found.routers, adapter.routers, strict=True))
    assert found.tensors.keys() == adapter.tensors.keys()
    for key, factors in adapter.tensors.items():
        assert all(torch.equal(a, b) for a, b in zip(found.tensors[key], factors, strict=True))
    with pytest.raises(UserError, match="is there already"):
        save_dynamic_adapter(adapter, folder)


def test_the_router_stands_at_the_first_adapted_linear(shape):
    assert spec().router_shape(shape) == (3, 64)
    down = spec(target_modules=("down_proj",))
    assert down.router_shape(shape) == (3, 128) and down.first_group == 3
    assert spec(target_modules=("up_proj", "o_proj")).first_group == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "x"}, "format"),
        ({"version": 2}, r"version \(=2\)"),
        ({"num_experts": 33}, r"num_experts \(=33\) must be an integer in 2\.\.32"),
        ({"num_experts": 1}, "num_experts"),
        ({"top_k": 4}, r"top_k \(=4\) must be an integer in 1\.\.3"),
        ({"top_k": True}, "top_k"),
        ({"rank": 0}, "rank"),
        ({"rank": 4.0}, "rank"),
        ({"target_modules": []}, "target_modules"),
        ({"target_modules": "q_proj"}, "target_modules must be a list"),
        ({"target_modules": ["lm_head"]}, "lm_head"),
        ({"target_modules": ["q_proj", "q_proj"]}, "twice"),
        ({"router": "dense"}, "router"),
        ({"renormalise": 1}, "renormalise"),
        ({"base_model": 7}, "base_model"),
        ({"tomorrow\n": 1}, r"unknown key 'tomorrow\?'"),
        ({"rank": None}, "rank"),
    ],
)
def test_refuses_a_config_that_it_does_not_know(changes, message, shape, tmp_path):
    _, folder = written(tmp_path, shape)
    path = folder / CONFIG_FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(UserError, match=message) as refusal:
        read_dynamic_config(folder)
    assert "\n" not in str(refusal.value) and str(path) in str(refusal.value)


@pytest.mark.parametrize("key", ["format", "num_experts", "router", "target_modules"])
def test_names_a_missing_key(key, shape, tmp_path):
    _, folder = written(tmp_path, shape)
    config = json.loads((folder / CONFIG_FILE).read_text())
    del config[key]
    (folder / CONFIG_FILE).write_text(json.dumps(config))
    with pytest.raises(UserError, match=f"{key} is missing"):
        read_dynamic_config(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("router.weight"), r"router\.weight is missing"),
        (lambda t: t.update({"layers.0.router.weight": torch.zeros(3, 64)}), "is unexpected"),
        (lambda t: t.update({"layers.1.o_proj.A": torch.zeros(3, 4, 63)}), r"\[3, 4, 63\], \[3, 4, 64\]"),
        (lambda t: t["layers.1.o_proj.B"].fill_(float("nan")), r"layers\.1\.o_proj\.B .* not finite"),
        (lambda t: t["router.weight"].fill_(float("inf")), "not finite"),
        (lambda t: t.update({"layers.0.q_proj.A": t["layers.0.q_proj.A"].half()}), "one dtype"),
        (lambda t: t.update({"layers.0.q_proj.A": t["layers.0.q_proj.A"].int()}), "int32"),
        (lambda t: t.update({"x": torch.zeros(10**6)}), "can be of use"),
    ],
)
def test_refuses_wrong_tensors(change, message, shape, tmp_path):
    _, folder = written(tmp_path, shape)
    tensors = load_file(folder / WEIGHTS_FILE)
    change(tensors)
    save_file(tensors, folder / WEIGHTS_FILE)
    with pytest.raises(UserError, match=message) as refusal:
        load_dynamic_adapter(folder, shape)
    assert "\n" not in str(refusal.value) and WEIGHTS_FILE in str(refusal.value)


def test_refuses_a_truncated_file_and_no_folder(shape, tmp_path):
    _, folder = written(tmp_path, shape)
    data = (folder / WEIGHTS_FILE).read_bytes()
    (folder / WEIGHTS_FILE).write_bytes(data[:-8])
    with pytest.raises(UserError, match="not a whole safetensors file"):
        load_dynamic_adapter(folder, shape)
    with pytest.raises(UserError, match="not a dynamic adapter"):
        load_dynamic_adapter(tmp_path, shape)


def loras(model, tmp_path, count=3, **options):
    for index in range(count):
        save_adapter(model, tmp_path / f"e{index}", rank=4, lora_alpha=3 + index, seed=index, **options)
    return [tmp_path / f"e{index}" for index in range(count)]


def test_experts_are_the_loras_with_their_scales(model, shape, tmp_path):
    folders = loras(model, tmp_path)
    adapter = combine(folders, RouterSource(seed=5), shape, name="d")
    for index, folder in enumerate(folders):
        stored = load_file(folder / "adapter_model.safetensors")
        prefix = "base_model.model.model.layers.1.mlp.up_proj.lora_"
        a, b = adapter.tensors[1, "up_proj"]
        assert torch.equal(a[index], stored[f"{prefix}A.weight"])
        torch.testing.assert_close(b[index], stored[f"{prefix}B.weight"] * ((3 + index) / 4))
    assert adapter.routers[0].shape == (3, 64)


def test_command_makes_a_folder(model, shape, tmp_path, capsys):
    save_model(model, tmp_path / "model")
    folders = loras(model, tmp_path)
    save_file({f"layers.{i}.router.weight": torch.randn(3, 64) for i in range(2)}, tmp_path / "r.safetensors")
    base = ["make-dynamic", "--model", str(tmp_path / "model"), "--out", str(tmp_path / "out")]
    base += [part for folder in folders for part in ("--lora", str(folder))]
    assert main([*base, "--router", str(tmp_path / "r.safetensors"), "--style", "layerwise"]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "out")
    adapter = load_dynamic_adapter(tmp_path / "out", shape)
    assert adapter.spec.router == "layerwise" and adapter.spec.targets == MODULES
    for more, message in (
        (["--random-router", "1"], "is there already"),
        ([], "one of --router and --random-router"),
        (["--router", str(tmp_path / "r.safetensors")], "is unexpected; a switch router has router.weight"),
        (["--random-router", "1", "--style", "dense"], "--style 'dense'"),
        (["--random-router", "1", "--top-k", "9"], "top_k"),
    ):
        assert main([*base, *more]) == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 8}, r"r \(=8\) must be that of"),
        ({"targets": ("q_proj",)}, "target_modules"),
        ({"rank_pattern": {"q_proj": 2}}, "rank_pattern"),
    ],
)
def test_refuses_experts_that_differ(options, message, model, shape, tmp_path):
    folders = loras(model, tmp_path, count=1)
    save_adapter(model, tmp_path / "other", **({"rank": 4} | options))
    with pytest.raises(UserError, match=message) as refusal:
        combine([*folders, tmp_path / "other"], RouterSource(seed=0), shape, name="d")
    assert "other" in str(refusal.value) and "\n" not in str(refusal.value)
