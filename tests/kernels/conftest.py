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
