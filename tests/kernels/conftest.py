"""Where the kernel tests run: on the GPU when there is one, else in Triton's interpreter on the CPU.

The choice must be made before Triton is imported, hence here.
"""

import os

import pytest
import torch

if torch.cuda.is_available():
    if os.environ.get("TRITON_INTERPRET", "0") != "0":
        raise RuntimeError(
            "unset TRITON_INTERPRET: this machine has a GPU, on which kernels are tested as compiled"
        )
else:
    os.environ["TRITON_INTERPRET"] = "1"

if torch.cuda.is_available():
    TARGETS = [
        pytest.param(("cuda", dtype), id=f"cuda-{name}", marks=pytest.mark.gpu)
        for name, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16), ("fp32", torch.float32))
    ]
else:  # The interpreter's bf16 tl.dot is wrong (Triton 3.6), so bf16 is tested on the GPU only.
    TARGETS = [
        pytest.param(("cpu", dtype), id=f"interpreter-{name}")
        for name, dtype in (("fp16", torch.float16), ("fp32", torch.float32))
    ]


@pytest.fixture(params=TARGETS)
def target(request):
    """(device, dtype) that a kernel is tested on."""
    return request.param


# The interpreter takes seconds for each of these: one of its two types by default, the stricter one; the other is a slow test.
HEAVY = {
    "test_large_tiles_beside_small_ones",
    "test_a_row_that_is_not_finite_touches_no_other_row",
    "test_a_mixed_batch",
    "test_parts_of_the_input",
    "test_a_whole_step_of_8192_tokens",
    "test_the_engine_launch_configuration",
    "test_from_a_pristine_copy",
    "test_one_weight_at_a_time",
    "test_in_place_takes_the_last_token_out",
    "test_pristine_form_knows_no_past",
    "test_experts",
    "test_packed_and_collected_is_h",
    "test_decode",
    "test_prefill",
    "test_routes_as_the_reference_does",
}


def pytest_collection_modifyitems(items):
    for item in items:
        if "interpreter-fp16" in item.name and getattr(item, "originalname", "") in HEAVY:
            item.add_marker(pytest.mark.slow)
