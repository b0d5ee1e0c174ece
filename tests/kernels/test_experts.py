"""Shrink and expand of unmerged experts against their references and against the dense sum over experts."""

from dataclasses import replace

import pytest
import torch

from kernels import expert_expand, expert_expand_ref, expert_shrink, expert_shrink_ref, route_top_k_ref
from kernels.expert_launch import expert_launch, tile_tokens_of
from kernels.route_top_k import touched_slots
from tests.kernels.tolerances import assert_close

WIDTHS = (70, 33, 33)


class Case:
    """One group of linears with experts, a batch and its route."""

    def __init__(
        self, target, *, tokens, experts, top_k, rank, width=200, targets=(True, True, True), seed=0
    ):
        self.device, self.dtype = target
        self.rank, self.targets = rank, targets
        self.widths = WIDTHS[: len(targets)]
        self.generator = torch.Generator().manual_seed(seed)
        adapted = [w for w, is_one in zip(self.widths, targets, strict=True) if is_one]
        self.x = self.draw(tokens, width)
        self.y = self.draw(tokens, sum(self.widths))
        self.a = self.draw(experts, rank * len(adapted) + 3, width)[:, : rank * len(adapted)]
        self.b = self.draw(experts, rank * sum(adapted) + 8)[:, : rank * sum(adapted)]
        tile = tile_tokens_of(tokens)
        self.launch = replace(
            expert_launch(tokens, width, 16), shrink_part=128 if tile == 1 else 256, shrink_rows=32
        )
        whole = {"dtype": torch.int32, "device": self.device}
        self.indices = torch.empty(tokens, top_k, **whole)
        self.gates = torch.empty(tokens, top_k, device=self.device)
        self.dense = torch.empty(tokens, experts, device=self.device)
        self.touched = torch.empty(-(-tokens // tile), touched_slots(experts, top_k, tile), **whole)
        active = (torch.rand(tokens, generator=self.generator) < 0.8).int().to(self.device)
        active[0] = 1
        route_top_k_ref.route_top_k(
            self.draw(tokens, experts), self.indices, self.gates, self.dense, self.touched,
            tile_tokens=tile, active=active,
        )  # fmt: skip

    def draw(self, *size):
        return (torch.randn(*size, generator=self.generator) * 0.3).to(self.device, self.dtype)

    def bridge(self):
        shape = (self.launch.parts(self.x.shape[1]), self.touched.shape[1], len(self.x), self.a.shape[1])
        return torch.full(shape, float("nan"), device=self.device)

    def run(self, shrink, expand):
        y = self.y.clone()
        bridge = shrink(self.x, self.a, self.touched, self.bridge(), launch=self.launch)
        expand(
            y, bridge, self.b, self.dense, self.touched,
            rank=self.rank, widths=self.widths, targets=self.targets, launch=self.launch,
        )  # fmt: skip
        return y

    def dense_sum(self):
        y, first, b_first, a_first = self.y.float().clone(), 0, 0, 0
        for width, is_target in zip(self.widths, self.targets, strict=True):
            if is_target:
                for expert in range(len(self.a)):
                    a = self.a[expert, a_first : a_first + self.rank].float()
                    b = self.b[expert, b_first : b_first + self.rank * width].view(self.rank, width).float()
                    y[:, first : first + width] += self.dense[:, expert, None] * (self.x.float() @ a.T @ b)
                a_first, b_first = a_first + self.rank, b_first + self.rank * width
            first += width
        return y


@pytest.mark.parametrize("targets", [(True, True, True), (False, True, False), (True, False), (True,)])
@pytest.mark.parametrize(
    ("tokens", "experts", "top_k", "rank"),
    [
        (1, 8, 2, 5),
        (2, 4, 3, 20),
        (7, 3, 2, 17),
        pytest.param(2, 4, 3, 64, marks=pytest.mark.slow),  # in the interpreter
        (35, 4, 2, 18),
        pytest.param(35, 8, 2, 70, marks=pytest.mark.slow),
    ],
)
def test_experts(target, tokens, experts, top_k, rank, targets):
    case = Case(target, tokens=tokens, experts=experts, top_k=top_k, rank=rank, targets=targets)
    expected = case.dense_sum()
    found = case.run(expert_shrink.expert_shrink, expert_expand.expert_expand_)
    assert_close(found, expected, case.dtype)
    assert_close(case.run(expert_shrink_ref.expert_shrink, expert_expand_ref.expert_expand_), found)
    unrouted = case.indices[:, 0] < 0
    assert torch.equal(found[unrouted], case.y[unrouted])
    first = 0
    for width, is_target in zip(case.widths, targets, strict=True):
        if not is_target:
            assert torch.equal(found[:, first : first + width], case.y[:, first : first + width])
        first += width


@pytest.mark.parametrize("kernel", [expert_expand.expert_expand_, expert_expand_ref.expert_expand_])
def test_what_experts_make_of_a_token_without_them_stays_out(target, kernel):
    case = Case(target, tokens=7, experts=3, top_k=1, rank=5)
    unrouted = case.indices[:, 0] < 0
    assert unrouted.any()

    def shrink(*arguments, launch):
        bridge = expert_shrink_ref.expert_shrink(*arguments, launch=launch)
        bridge[:, :, unrouted] = float("inf")
        return bridge

    found = case.run(shrink, kernel)
    assert torch.equal(found[unrouted], case.y[unrouted])
    assert torch.isfinite(found).all()


def test_no_tokens(target):
    case = Case(target, tokens=1, experts=2, top_k=1, rank=4)
    case.x, case.y, case.touched = case.x[:0], case.y[:0], case.touched[:0]
    case.dense = case.dense[:0]
    assert case.run(expert_shrink.expert_shrink, expert_expand.expert_expand_).shape == (0, sum(WIDTHS))


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (lambda c: setattr(c, "touched", c.touched.long()), "touched"),
        (lambda c: setattr(c, "b", c.b[:, :-1]), "b"),
        (lambda c: setattr(c, "dense", c.dense[:, :-1].contiguous()), "dense"),
        (lambda c: setattr(c, "targets", (False, False, False)), "targets"),
    ],
)
def test_a_wrong_argument_is_named(target, change, name):
    case = Case(target, tokens=1, experts=4, top_k=2, rank=4)
    change(case)
    with pytest.raises(ValueError, match=rf"^{name}"):
        case.run(expert_shrink.expert_shrink, expert_expand.expert_expand_)
