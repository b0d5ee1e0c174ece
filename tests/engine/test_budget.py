"""The memory plan counts at least what the LoRA launches take."""

import pytest

from engine.budget import lora_bridge_bytes
from kernels.lora_launch import LAUNCH_BOUNDARIES, lora_launch_config
from kernels.lora_plan import NUM_GROUPS, bridge_width


@pytest.mark.parametrize("most_tokens", [1, 16, 256, 512, 1024, 2048, 8192])
def test_the_plan_covers_the_bridge_of_every_step(most_tokens):
    sizes = {most_tokens, *(size for size in LAUNCH_BOUNDARIES if size < most_tokens)}
    taken = max(
        size * lora_launch_config(size, group).max_splits * bridge_width(256) * 4
        for size in sizes
        for group in range(NUM_GROUPS)
    )
    assert taken <= lora_bridge_bytes(most_tokens) <= 2 * taken
