"""Up to which size the GPUs of a replica exchange by kernels that read each other's memory; torch-free, as the simulator prices by the same rule."""

# Bytes of hidden states [rows, H] of a step, which each GPU reads whole from every other. Two GPUs: faster than NCCL at all sizes measured (16 MiB:
# 60 us against 92 with the norm, two H200s, 2026-11-22). With more, every GPU reads N - 1 times as much; those bounds are a guess until measured.
MOST_PEER_BYTES = {2: 16 << 20, 4: 4 << 20, 8: 1 << 20}
