import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.errors import UserError
from engine.model_shape import load_model_shape
from engine.weights import load_weights, random_weights
from tests.engine.tiny import save_model, tiny_model


def assert_is_the_model(weights, model):
    state = model.state_dict()
    assert torch.equal(weights.embed, state["model.embed_tokens.weight"])
    assert torch.equal(weights.lm_head, state["lm_head.weight"])
    assert torch.equal(weights.norm, state["model.norm.weight"])
    for index, layer in enumerate(weights.layers):
        prefix = f"model.layers.{index}."

        def stack(*names, prefix=prefix):
            return torch.cat([state[prefix + name] for name in names])

        qkv = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
        assert torch.equal(layer.qkv, stack(*(f"{name}.weight" for name in qkv)))
        if layer.qkv_bias is not None:
            assert torch.equal(layer.qkv_bias, stack(*(f"{name}.bias" for name in qkv)))
        assert torch.equal(layer.o, stack("self_attn.o_proj.weight"))
        assert torch.equal(layer.gate_up, stack("mlp.gate_proj.weight", "mlp.up_proj.weight"))
        assert torch.equal(layer.down, stack("mlp.down_proj.weight"))
        assert torch.equal(layer.input_norm, stack("input_layernorm.weight"))
        assert torch.equal(layer.post_norm, stack("post_attention_layernorm.weight"))


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2"])
@pytest.mark.parametrize("max_shard_size", ["1GB", "100KB"])
def test_loads_what_transformers_saved(family, max_shard_size, tmp_path):
    model = tiny_model(family)
    save_model(model, tmp_path, max_shard_size)
    assert (tmp_path / "model.safetensors.index.json").is_file() == (max_shard_size == "100KB")
    weights = load_weights(tmp_path, load_model_shape(tmp_path), torch.float32, "cpu")
    assert_is_the_model(weights, model)
    assert (weights.layers[0].qkv_bias is not None) == (family == "qwen2")


def test_tied_head_is_the_embedding(tmp_path):
    model = tiny_model(tie_word_embeddings=True)
    weights = load_weights(save_model(model, tmp_path), load_model_shape(tmp_path), torch.bfloat16, "cpu")
    assert weights.lm_head is weights.embed
    assert torch.equal(weights.embed, model.state_dict()["lm_head.weight"].bfloat16())


@pytest.mark.parametrize("tp", [2, 4])
def test_ranks_hold_the_model_between_them(tp, tmp_path):
    model = tiny_model("qwen2", vocab_size=255)
    shape = load_model_shape(save_model(model, tmp_path))
    ranks = [load_weights(tmp_path, shape, torch.float32, "cpu", tp, rank) for rank in range(tp)]
    state = model.state_dict()
    assert torch.equal(torch.cat([rank.embed for rank in ranks]), state["model.embed_tokens.weight"])
    assert torch.equal(torch.cat([rank.lm_head for rank in ranks]), state["lm_head.weight"])
    attention, mlp = "model.layers.1.self_attn.", "model.layers.1.mlp."
    layers = [rank.layers[1] for rank in ranks]
    assert torch.equal(torch.cat([layer.o for layer in layers], 1), state[attention + "o_proj.weight"])
    assert torch.equal(torch.cat([layer.down for layer in layers], 1), state[mlp + "down_proj.weight"])
    halves = [layer.gate_up.chunk(2) for layer in layers]
    for index, name in enumerate(("gate_proj", "up_proj")):
        assert torch.equal(torch.cat([half[index] for half in halves]), state[f"{mlp}{name}.weight"])
    kv_rows = shape.kv_heads_per_rank(tp) * 16
    splits = [layer.qkv.split([64 // tp, kv_rows, kv_rows]) for layer in layers]
    wholes = [layer.qkv_bias for layer in layers if layer.qkv_bias is not None]
    biases = [bias.split([64 // tp, kv_rows, kv_rows]) for bias in wholes]
    for index, name in enumerate(("q_proj", "k_proj", "v_proj")):
        # At tp 4 each of the two KV heads is held twice, by neighbours.
        once = slice(None) if index == 0 else slice(None, None, tp // 2)
        assert torch.equal(torch.cat([s[index] for s in splits][once]), state[f"{attention}{name}.weight"])
        assert torch.equal(torch.cat([b[index] for b in biases][once]), state[f"{attention}{name}.bias"])


def broken(tmp_path, change, **save):
    save_model(tiny_model(), tmp_path, **save)
    change(tmp_path)
    with pytest.raises(UserError) as refusal:
        load_weights(tmp_path, load_model_shape(tmp_path), torch.float32, "cpu")
    assert "\n" not in str(refusal.value)
    return str(refusal.value)


def rewrite(change):
    def apply(folder):
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors")

    return apply


def truncate(folder):
    path = sorted(folder.glob("*.safetensors"))[-1]
    path.write_bytes(path.read_bytes()[:-100])


def test_faults_name_file_and_tensor(tmp_path):
    name = "model.layers.1.mlp.up_proj.weight"

    def misshapen(tensors):
        tensors[name] = tensors[name][:, :32].contiguous()

    message = broken(tmp_path / "a", rewrite(misshapen))
    assert (
        "model.safetensors" in message
        and name in message
        and "[128, 32]" in message
        and "[128, 64]" in message
    )
    message = broken(tmp_path / "b", rewrite(lambda tensors: tensors.pop(name)))
    assert f"tensor {name} is missing" in message
    message = broken(
        tmp_path / "c", rewrite(lambda tensors: tensors.update({name: tensors[name].to(torch.int8)}))
    )
    assert name in message and "int8" in message
    message = broken(tmp_path / "d", truncate)
    assert "model.safetensors" in message and "truncated" in message
    assert "truncated" in broken(tmp_path / "e", truncate, max_shard_size="100KB")
    message = broken(tmp_path / "f", lambda folder: (folder / "model.safetensors").unlink())
    assert "pickled weights are not read" in message


def test_faults_of_the_index(tmp_path):
    def edit(change):
        def apply(folder):
            path = folder / "model.safetensors.index.json"
            index = json.loads(path.read_text())
            change(index)
            path.write_text(json.dumps(index))

        return apply

    shards = {"max_shard_size": "100KB"}
    message = broken(
        tmp_path / "a", edit(lambda index: index["weight_map"].pop("model.norm.weight")), **shards
    )
    assert "index.json: tensor model.norm.weight is missing" in message
    assert "weight_map is missing" in broken(tmp_path / "b", edit(lambda index: index.clear()), **shards)
    away = edit(lambda index: index["weight_map"].update({"model.norm.weight": "../x.safetensors"}))
    assert "must be a file name" in broken(tmp_path / "c", away, **shards)
    gone = edit(lambda index: index["weight_map"].update({"model.norm.weight": "x.safetensors"}))
    assert "x.safetensors: no such file" in broken(tmp_path / "d", gone, **shards)


def test_random_weights_have_the_loaded_shapes_and_a_seed(tmp_path):
    shape = load_model_shape(save_model(tiny_model("qwen2", tie_word_embeddings=True), tmp_path))
    for tp in (1, 2):
        loaded = load_weights(tmp_path, shape, torch.bfloat16, "cpu", tp)
        drawn = random_weights(shape, torch.bfloat16, "cpu", seed=1, tp=tp)
        assert drawn.lm_head is drawn.embed and drawn.embed.shape == loaded.embed.shape
        for field in ("qkv", "qkv_bias", "o", "gate_up", "down", "input_norm", "post_norm"):
            one, other = getattr(drawn.layers[1], field), getattr(loaded.layers[1], field)
            assert one.shape == other.shape and one.dtype == torch.bfloat16
    again = random_weights(shape, torch.bfloat16, "cpu", seed=1)
    other = random_weights(shape, torch.bfloat16, "cpu", seed=2)
    first = random_weights(shape, torch.bfloat16, "cpu", seed=1)
    assert torch.equal(again.layers[0].qkv, first.layers[0].qkv)
    assert not torch.equal(again.layers[0].qkv, other.layers[0].qkv)
