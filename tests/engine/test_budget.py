"""The memory plan counts at least what the LoRA launches take."""

import pytest

from engine.budget import activation_bytes
from engine.config import ServingConfig
from engine.model_shape import load_model_shape
from kernels.lora_launch import LAUNCH_BOUNDARIES, lora_launch_config
from kernels.lora_plan import bridge_width

BRIDGE_OF_A_PLANE_ROW = bridge_width(256) * 4  # the largest rank, fp32


@pytest.mark.parametrize("most_tokens", [16, 256, 512, 1024, 2048, 8192])
def test_the_plan_covers_the_bridge_of_every_step(most_tokens):
    shape = load_model_shape("llama-3.1-8b")
    config = ServingConfig(max_num_batched_tokens=most_tokens, max_num_seqs=min(most_tokens, 256))
    sizes = {most_tokens, *(size for size in LAUNCH_BOUNDARIES if size < most_tokens)}
    bridge = max(
        size * lora_launch_config(size, group).max_splits * BRIDGE_OF_A_PLANE_ROW
        for size in sizes
        for group in range(4)
    )
    rows = most_tokens * (2 * shape.hidden_size + 3 * shape.intermediate_size) * config.itemsize_bytes
    logits = min(config.max_num_seqs, most_tokens) * shape.vocab_size * (config.itemsize_bytes + 4)
    assert activation_bytes(config, shape) >= bridge + rows + logits
