import dataclasses
import itertools
import json
from pathlib import Path

import pytest

from engine.errors import UserError
from engine.model_shape import MODEL_CATALOGUE, MODULES, RopeScaling, from_hf_config, load_model_shape
from tests.engine.tiny import tiny_config

LLAMA_31_8B_V4 = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 8.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "vocab_size": 128256,
}


def parse(config, name="m"):
    return from_hf_config(config, name=name, source="config.json")


def test_transformers_4_file_of_llama_31_is_the_catalogue_entry():
    assert parse(LLAMA_31_8B_V4, name="llama-3.1-8b") == load_model_shape("llama-3.1-8b")


@pytest.mark.parametrize("name", MODEL_CATALOGUE)
def test_catalogue_parameter_counts(name):
    billions = {
        "llama-3.1-8b": 8.03,
        "llama-3.1-70b": 70.55,
        "llama-3.2-1b": 1.24,
        "llama-3.2-3b": 3.21,
        "llama-2-7b": 6.74,
        "llama-2-13b": 13.02,
        "llama-2-70b": 68.98,
        "mistral-7b": 7.25,
        "qwen2.5-7b": 7.62,
    }
    assert load_model_shape(name).weight_bytes(itemsize=1) / 1e9 == pytest.approx(billions[name], abs=0.006)


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2"])
def test_transformers_5_config_as_dict_and_as_saved(family, tmp_path):
    config = tiny_config(family)
    config.save_pretrained(tmp_path)
    shape = parse(config.to_dict(), name=tmp_path.name)
    assert shape == load_model_shape(tmp_path) == load_model_shape(str(tmp_path / "config.json"))
    assert (shape.hidden_size, shape.intermediate_size, shape.num_layers) == (64, 128, 2)
    assert (shape.num_heads, shape.num_kv_heads, shape.head_dim, shape.vocab_size) == (4, 2, 16, 256)
    assert shape.qkv_bias == (family == "qwen2")
    assert shape.rope_theta == 10000.0 and shape.rope_scaling is None and shape.dtype == "float32"


def test_transformers_5_rope_parameters():
    rope = {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 128,
    }
    shape = parse(tiny_config(rope_parameters=rope).to_dict())
    assert shape.rope_theta == 500000.0
    assert shape.rope_scaling == RopeScaling(kind="llama3", factor=32.0, original_max_position_embeddings=128)
    linear = parse(
        tiny_config(rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}).to_dict()
    )
    assert linear.rope_scaling == RopeScaling(kind="linear", factor=2.0)


def test_sliding_window_limits_the_context():
    assert parse(tiny_config("mistral", sliding_window=100).to_dict()).max_position_embeddings == 100
    assert parse(tiny_config("mistral").to_dict()).max_position_embeddings == 512
    absent = tiny_config("mistral", max_position_embeddings=8192).to_dict()
    del absent["sliding_window"]
    assert parse(absent).max_position_embeddings == 4096


def test_llama_2_file_without_later_fields():
    config = {
        k: v
        for k, v in LLAMA_31_8B_V4.items()
        if k not in ("num_key_value_heads", "rope_theta", "rope_scaling")
    }
    shape = parse(config | {"rope_scaling": None})
    assert shape.num_kv_heads == 32 and shape.rope_theta == 10000.0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gpt2"}, "model_type"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "architectures"),
        ({"quantization_config": {"quant_method": "gptq"}}, "a quantised base is refused"),
        ({"attention_bias": True}, "attention_bias"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"num_hidden_layers": 2.5}, "num_hidden_layers"),
        ({"num_hidden_layers": True}, "num_hidden_layers"),
        ({"vocab_size": -1}, "vocab_size"),
        ({"num_attention_heads": 0}, "num_attention_heads"),
        ({"num_key_value_heads": 5}, "num_kv_heads"),
        ({"num_attention_heads": 33, "num_key_value_heads": 33}, "must divide hidden_size"),
        ({"rms_norm_eps": None}, "rms_norm_eps"),
        ({"rope_theta": float("nan")}, "rope_theta"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "rope_type"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_type"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 2.0}}, "low_freq_factor"),
        ({"rope_scaling": [1]}, "rope_scaling"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"torch_dtype": "int8"}, "dtype"),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings"),
        ({"head_dim": 127}, "head_dim"),
        ({"use_sliding_window": True}, "use_sliding_window"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
    ],
)
def test_refuses_what_it_cannot_run(changes, message):
    with pytest.raises(UserError, match=message) as refusal:
        parse(LLAMA_31_8B_V4 | changes)
    assert "\n" not in str(refusal.value)


def test_unknown_names_and_files(tmp_path):
    with pytest.raises(UserError, match=r"llama-3\.1-8b"):
        load_model_shape("llama-9")
    with pytest.raises(UserError, match=r"no config\.json"):
        load_model_shape(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match="not JSON"):
        load_model_shape(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps([1]))
    with pytest.raises(UserError, match="JSON object"):
        load_model_shape(Path(tmp_path))


def test_tensor_parallel_shapes():
    shape = load_model_shape("llama-3.1-8b")
    assert tuple(shape.linear_shapes()) == MODULES
    assert shape.linear_shapes()["down_proj"] == (4096, 14336)
    assert shape.linear_shapes(16)["k_proj"] == (128, 4096)  # 8 KV heads on 16 GPUs: each held by two
    assert [shape.kv_head_range(16, rank) for rank in (0, 1, 2, 15)] == [(0, 1), (0, 1), (1, 2), (7, 8)]
    assert [shape.kv_head_range(4, rank) for rank in (0, 3)] == [(0, 2), (6, 8)]
    assert shape.kv_bytes_per_token(2) == shape.kv_bytes_per_token() // 2 == 65536
    ranges = [shape.vocab_range(32, rank) for rank in range(32)]
    assert ranges[0][0] == 0 and ranges[-1][1] == shape.vocab_size
    assert all(left[1] == right[0] for left, right in itertools.pairwise(ranges))


@pytest.mark.parametrize(
    ("name", "tp", "message"),
    [
        ("llama-3.1-8b", 3, "must divide num_heads"),
        ("llama-3.1-8b", 0, "must be >= 1"),
        ("qwen2.5-7b", 8, "must divide num_heads"),
    ],
)
def test_tp_that_does_not_divide(name, tp, message):
    with pytest.raises(UserError, match=message):
        load_model_shape(name).validate_tp(tp)


def test_tp_that_neither_splits_nor_repeats_kv_heads():
    shape = dataclasses.replace(load_model_shape("llama-3.2-3b"), intermediate_size=12288)
    with pytest.raises(UserError, match="num_kv_heads"):
        shape.validate_tp(12)
