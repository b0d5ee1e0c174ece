"""Reference of kernels/sample.py."""

import torch

from kernels.sample_params import POSITION, SEED_HIGH, SEED_LOW, TEMPERATURE

WORD = 0xFFFFFFFF  # 32-bit words live in int64 tensors, whose products wrap around without harm to the low 32 bits


def sample(
    logits: torch.Tensor,
    sample_slots: torch.Tensor,
    params: torch.Tensor,
    thresholds: torch.Tensor,
    last_token: torch.Tensor,
    arrivals: torch.Tensor,
    *,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """The first largest score of each row, NaN the largest of all; `arrivals` is the kernel's own."""
    tokens = torch.argmax(scores(logits, params, thresholds), dim=-1)
    last_token.index_copy_(0, sample_slots.long(), tokens)
    return tokens if out is None else out.copy_(tokens)


def scores(logits: torch.Tensor, params: torch.Tensor, thresholds: torch.Tensor) -> torch.Tensor:
    """logits − temperature · log E in fp32, −∞ below the threshold; the logits themselves where the temperature is 0."""
    scores = logits.float()
    temperature = params[:, TEMPERATURE].contiguous().view(torch.float32)
    drawn = torch.nonzero(temperature).squeeze(1)
    if len(drawn):  # a row without temperature costs nothing
        noise = exponentials(params[drawn], logits.shape[1]).log()
        noisy = scores[drawn] - temperature[drawn, None] * noise
        below = scores[drawn] < thresholds[drawn, None]
        scores = scores.index_copy(0, drawn, noisy.masked_fill(below, float("-inf")))
    return scores


def exponentials(params: torch.Tensor, vocab: int) -> torch.Tensor:
    """E [rows, vocab]: −log(1 − u) in fp32, where u = (bits // 2 + 1/2) / 2**31; below 1/32 as a series, which is exact where 1 − u is not."""
    half = random_bits(params, vocab) >> 1
    is_small = half < 2**26
    part = (torch.where(is_small, half, 0x7FFFFFFF - half).float() + 0.5) * 2.0**-31
    series = part * (1 + part * (1 / 2 + part * (1 / 3 + part * (1 / 4))))
    return torch.where(is_small, series, -part.log())


def random_bits(params: torch.Tensor, vocab: int) -> torch.Tensor:
    """32 bits for each row and token [rows, vocab] int64: a hash of seed, position and token."""
    words = params.long() & WORD
    low, high, position = words[:, SEED_LOW], words[:, SEED_HIGH], words[:, POSITION]
    key = mix(position, mix(low, high))
    other_key = mix(position, mix(high ^ 0x9E3779B9, low))
    return mix(torch.arange(vocab, device=params.device) ^ key[:, None], other_key[:, None])


def mix(x: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """Hash 32 bits with a key of 32: triple32 of C. Wellons' hash prospector, the key added after its first multiplication."""
    x = x ^ (x >> 17)
    x = (x * 0xED5AD4BB + key) & WORD
    x = x ^ (x >> 11)
    x = (x * 0xAC4C1B51) & WORD
    x = x ^ (x >> 15)
    x = (x * 0x31848BAB) & WORD
    return x ^ (x >> 14)
