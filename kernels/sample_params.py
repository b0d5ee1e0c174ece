"""What the sampling kernels are told of each row: `params [samples, PARAM_COLUMNS] int32`, written on the host.

    (temperature as fp32 bits, top_p as fp32 bits, seed's low word, seed's high word, position of the token to draw)

Temperature 0 takes the largest logit; a row of zeros is such a row. top_p 1 keeps all tokens.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

TEMPERATURE, TOP_P, SEED_LOW, SEED_HIGH, POSITION = range(5)
PARAM_COLUMNS = 5

# Below it a temperature is 0: logits that differ by one bf16 step, 2^-8 of their size, already have odds of e^(10^2) or more to one from
# 1/4 up, and 1 / temperature still leaves logit / temperature far inside fp32.
LEAST_TEMPERATURE = 1e-5


def sample_params(temperature: float, top_p: float, seed: int) -> NDArray[np.int32]:
    """Return a row's parameters [PARAM_COLUMNS], at position 0. seed: 64 bits, signed or not."""
    row = np.zeros(PARAM_COLUMNS, dtype=np.int32)
    floats = row[[TEMPERATURE, TOP_P]].view(np.float32)
    floats[:] = (temperature if temperature >= LEAST_TEMPERATURE else 0.0, top_p)
    row[[TEMPERATURE, TOP_P]] = floats.view(np.int32)
    words = np.array([seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF], dtype=np.uint32)
    row[[SEED_LOW, SEED_HIGH]] = words.view(np.int32)
    return row
