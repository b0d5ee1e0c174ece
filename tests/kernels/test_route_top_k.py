"""The router against its reference: ties, padding to powers of two, tiles, tokens that are not routed."""

import pytest
import torch

from kernels import route_top_k as route
from kernels import route_top_k_ref as route_ref


def outputs(tokens, experts, top_k, tile, device):
    """Poisoned outputs."""
    slots = route.touched_slots(experts, top_k, tile)
    whole = {"dtype": torch.int32, "device": device}
    return (
        torch.full((tokens, top_k), -7, **whole),
        torch.full((tokens, top_k), float("nan"), device=device),
        torch.full((tokens, experts), float("nan"), device=device),
        torch.full((-(-tokens // tile), slots), -7, **whole),
    )


def run(logits, top_k, tile, **options):
    both = []
    for kernel in (route.route_top_k, route_ref.route_top_k):
        found = outputs(logits.shape[0], logits.shape[1], top_k, tile, logits.device)
        kernel(logits, *found, tile_tokens=tile, **options)
        both.append(found)
    return both


@pytest.mark.parametrize("renormalise", [False, True])
@pytest.mark.parametrize(
    ("tokens", "experts", "top_k", "tile"),
    [
        (1, 8, 2, 1),
        (5, 2, 2, 1),
        (16, 8, 2, 16),
        (33, 32, 4, 16),
        (40, 5, 1, 32),
        (1, 3, 3, 16),
        (0, 4, 2, 1),
    ],
)
def test_routes_as_the_reference_does(target, tokens, experts, top_k, tile, renormalise):
    device, dtype = target
    generator = torch.Generator().manual_seed(tokens)
    logits = (3 * torch.randn(tokens, experts, generator=generator)).to(device, dtype)
    active = (torch.rand(tokens, generator=generator) < 0.7).int().to(device)
    for mask in (None, active):
        found, expected = run(logits, top_k, tile, renormalise=renormalise, active=mask)
        assert torch.equal(found[0], expected[0])
        assert torch.equal(found[3], expected[3])
        for mine, theirs in ((found[1], expected[1]), (found[2], expected[2])):
            torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-7)
    if renormalise and tokens:
        torch.testing.assert_close(found[1][active > 0].sum(1), torch.ones(int(active.sum()), device=device))


def test_ties_go_to_the_lowest_index(target):
    device, dtype = target
    logits = torch.tensor([[1.0, 2.0, 2.0, 2.0], [0.0, 0.0, 0.0, 0.0], [3.0, 1.0, 3.0, 1.0]]).to(
        device, dtype
    )
    (indices, gates, _, touched), _ = run(logits, 2, 16)
    assert indices.tolist() == [[1, 2], [0, 1], [0, 2]]
    assert touched.tolist() == [[0, 1, 2, -1]]
    assert (gates[:, 0] == gates[:, 1]).all()


def test_no_logits_lead_outside(target):
    device, dtype = target
    logits = torch.full((2, 5), float("nan")).to(device, dtype)
    logits[1] = float("-inf")
    (indices, *_), _ = run(logits, 2, 1)
    assert ((indices >= 0) & (indices < 5)).all()


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (lambda a: a | {"logits": torch.zeros(3, 33)}, "logits"),
        (lambda a: a | {"indices": torch.zeros(3, 9, dtype=torch.int32)}, "indices"),
        (lambda a: a | {"gates": torch.zeros(3, 1)}, "gates"),
        (lambda a: a | {"touched": torch.zeros(3, 1, dtype=torch.int32)}, "touched"),
        (lambda a: a | {"tile_tokens": 8}, "tile_tokens"),
    ],
)
def test_a_wrong_argument_is_named(change, name):
    arguments = dict(zip(("indices", "gates", "dense", "touched"), outputs(3, 8, 2, 1, "cpu"), strict=True))
    with pytest.raises(ValueError, match=rf"^{name}"):
        route.route_top_k(**change({"logits": torch.zeros(3, 8), **arguments}))
