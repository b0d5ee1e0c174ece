"""Settings that must stand before torch and Triton are imported by any test."""

import os

# One thread: tiny tensors on shared cores lose far more to threads than they gain.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

# Triton decides when its functions are defined whether they are interpreted, so this must come before the first import of kernels.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
