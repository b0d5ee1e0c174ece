"""What a step exchanges with the host."""

import pytest
import torch

from kernels import host_memory, host_memory_ref


def host(tensor, device):
    return tensor.pin_memory() if device == "cuda" else tensor


@pytest.mark.parametrize("size", [0, 1, 511, 512, 513, 5000])
def test_both_ways(target, size):
    device, _ = target
    numbers = torch.randint(-(2**31), 2**31 - 1, (size,), dtype=torch.int32)
    out = torch.zeros(size + 3, dtype=torch.int32, device=device)
    host_memory.fetch_from_host(host(numbers, device), out[:size])
    assert torch.equal(out.cpu(), torch.cat([numbers, torch.zeros(3, dtype=torch.int32)]))
    tokens = torch.randint(0, 2**62, (size,), device=device)
    back = host(torch.zeros(size, dtype=torch.int64), device)
    host_memory.send_to_host(tokens, back)
    if device == "cuda":
        torch.cuda.synchronize()
    assert torch.equal(back, tokens.cpu())


@pytest.mark.parametrize("count", [0, 1, 700])
def test_scatter_equals_its_reference(target, count):
    device, _ = target
    index = torch.randperm(4000)[:count].to(torch.int32)
    pairs = host(torch.stack([index, torch.arange(1, count + 1, dtype=torch.int32)]), device)
    out = torch.zeros(4000, dtype=torch.int32, device=device)
    expected = out.clone()
    host_memory_ref.scatter_from_host_(pairs, expected)
    assert torch.equal(host_memory.scatter_from_host_(pairs, out), expected)


def test_arguments_are_checked(target):
    device, _ = target
    out = torch.zeros(4, dtype=torch.int32, device=device)
    with pytest.raises(ValueError, match="source"):
        host_memory.fetch_from_host(host(torch.zeros(5, dtype=torch.int32), device), out)
    with pytest.raises(ValueError, match="pairs"):
        host_memory.scatter_from_host_(host(torch.zeros(3, 2, dtype=torch.int32), device), out)
    if device == "cuda":
        with pytest.raises(ValueError, match="pinned"):
            host_memory.fetch_from_host(torch.zeros(4, dtype=torch.int32), out)
