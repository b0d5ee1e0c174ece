"""Tiny random Hugging Face models and PEFT adapters, saved as real ones are.

In fp32 every row of a factor is a multiple of 128 bytes, but for K and V at tp > 1. Norms and biases are
random too, so that a swapped or forgotten one shows.
"""

import copy
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from engine.model_shape import MODULES

FAMILIES: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "llama": (LlamaConfig, LlamaForCausalLM, {}),
    "mistral": (MistralConfig, MistralForCausalLM, {"sliding_window": None}),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {}),
}

TINY_SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 256,
    "max_position_embeddings": 512,
    "initializer_range": 0.15,  # large, so that logits differ by far more than rounding
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": None,
}


def tiny_config(family: str = "llama", **changes: Any) -> Any:
    """Return a transformers config: 2 layers, hidden 64, 4 heads of 16, 2 KV heads, width 128, 256 tokens."""
    config_class, _, own = FAMILIES[family]
    head_dim = {} if family == "qwen2" else {"head_dim": 16}
    return config_class(**(TINY_SIZES | head_dim | own | changes))


def tiny_model(family: str = "llama", seed: int = 0, **changes: Any) -> PreTrainedModel:
    """Return a random fp32 model in eval mode; ``changes`` are config fields."""
    torch.manual_seed(seed)
    model: PreTrainedModel = FAMILIES[family][1](tiny_config(family, **changes)).to(torch.float32).eval()
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
            elif name.endswith(".bias"):
                parameter.add_(0.5 * torch.randn(parameter.shape, generator=generator))
    return model


def save_model(model: PreTrainedModel, folder: Path, max_shard_size: str = "1GB") -> Path:
    """Write config.json and safetensors, in several files where ``max_shard_size`` is small."""
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    return folder


def save_adapter(
    model: PreTrainedModel,
    folder: Path,
    *,
    rank: int = 8,
    targets: tuple[str, ...] | list[str] | str = MODULES,
    seed: int = 0,
    **options: Any,
) -> PeftModel:
    """Write a PEFT adapter with random A and B; return a copy of ``model`` with it, in eval mode.

    ``options`` go to LoraConfig; alpha is 2·rank unless given, so the scale is not one.
    """
    config = LoraConfig(
        r=rank,
        lora_alpha=options.pop("lora_alpha", 2 * rank),
        target_modules=targets if isinstance(targets, str) else list(targets),
        task_type="CAUSAL_LM",
        **options,
    )
    peft_model = get_peft_model(copy.deepcopy(model), config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in peft_model.named_parameters():
            if "lora_A" in name or "lora_B" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    peft_model.save_pretrained(str(folder))
    return peft_model.eval()
