"""The segmented gather matrix multiplication against its reference and against dense products; drift in place."""

from dataclasses import replace

import pytest
import torch

from kernels import sgmm, sgmm_panel, sgmm_ref, sgmm_stage
from kernels.sgmm_launch import CANDIDATES, LOW, PLAIN, TWO, TWO_WIDE, WIDE, SgmmTuning, sgmm_tuning
from kernels.sgmm_plan import SgmmWeight, plan_sgmm
from tests.kernels.gluon_emulation import Emulated
from tests.kernels.tolerances import assert_close, relative_error

SMALL = SgmmTuning(block_out=32, block_in=64, block_k=16, num_warps=4)
FLAT = replace(SMALL, flatten=True)
ODD = ((33, 47), (17, 70))  # (out, in): no multiple of a block, rows not of 16 bytes
EVEN = ((32, 64), (64, 128))


def weights_of(target, shapes, *, experts=4, rank=16, in_place=False, seed=0, scale=0.1):
    """Weights whose rows are strided, with NaN beside them; pools in which other ranks stand between the experts'."""
    device, dtype = target
    generator = torch.Generator().manual_seed(seed)

    def draw(*size, std=1.0):
        return (std * torch.randn(*size, generator=generator)).to(device, dtype)

    found = []
    for out, inp in shapes:
        target_ = torch.full((out, inp + 16), float("nan"), device=device, dtype=dtype)[:, :inp]
        source = draw(out, inp)
        if in_place:
            target_.copy_(source)
        up = draw(experts, 2 * rank * out, std=scale)[:, : rank * out].view(experts, rank, out)
        down = draw(experts, 3 * rank, inp, std=scale)[:, rank : 2 * rank]
        found.append(SgmmWeight(target=target_, source=target_ if in_place else source, up=up, down=down))
    return found


def dense(weight, source, route, gates):
    """W_0 + Σ g_i B_i A_i in fp32."""
    total = source.float()
    for expert, gate in zip(route.tolist(), gates.tolist(), strict=True):
        if expert >= 0:
            total = total + gate * weight.up[expert].float().T @ weight.down[expert].float()
    return total


def route_of(indices, device):
    return torch.tensor(indices, dtype=torch.int32, device=device)


def gates_of(values, device):
    return torch.tensor(values, dtype=torch.float32, device=device)


@pytest.mark.parametrize("shapes", [ODD, EVEN])
@pytest.mark.parametrize(("experts", "top_k", "rank"), [(4, 2, 16), (3, 1, 5), (5, 3, 24)])
def test_from_a_pristine_copy(target, shapes, experts, top_k, rank):
    device, _ = target
    weights = weights_of(target, shapes, experts=experts, rank=rank)
    plan = plan_sgmm(weights, top_k, in_place=False)
    route, gates = route_of([experts - 1, 0, 1][:top_k], device), gates_of([0.6, 0.3, 0.1][:top_k], device)
    sgmm.sgmm_(plan, route, gates, SMALL)
    for weight in weights:
        assert_close(weight.target, dense(weight, weight.source, route, gates), weight.target.dtype)
        beside = torch.as_strided(
            weight.target, (weight.target.shape[0], 16), weight.target.stride(), weight.target.shape[1]
        )
        assert beside.isnan().all()


@pytest.mark.parametrize("shapes", [ODD, pytest.param(EVEN, marks=pytest.mark.slow)])
def test_pristine_form_knows_no_past(target, shapes):
    """The same route gives the same bits, whatever was merged before."""
    device, _ = target
    weights = weights_of(target, shapes)
    plan = plan_sgmm(weights, 2, in_place=False)
    merge = sgmm.Sgmm(plan, SMALL)
    found = []
    for indices, gates in (([0, 1], [0.7, 0.2]), ([3, 2], [0.5, 0.4]), ([0, 1], [0.7, 0.2])):
        route = route_of(indices, device)
        sgmm_stage.stage_down_(plan, route, gates_of(gates, device))
        merge.merge_(route)
        found.append([weight.target.clone() for weight in weights])
    assert all(torch.equal(a, b) for a, b in zip(found[0], found[2], strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(found[0], found[1], strict=True))


@pytest.mark.parametrize("shapes", [ODD, pytest.param(EVEN, marks=pytest.mark.slow)])
def test_in_place_takes_the_last_token_out(target, shapes):
    device, dtype = target
    weights = weights_of(target, shapes, in_place=True)
    sources = [weight.target.clone() for weight in weights]
    plan = plan_sgmm(weights, 2, in_place=True)
    merge = sgmm.Sgmm(plan, FLAT)
    assert merge.flat == (shapes is EVEN)
    route = route_of([0, 0, 0, 0], device)
    steps = [([1, 3], [0.6, 0.3]), ([0, 3], [0.9, 0.05]), ([-1, -1], [0.0, 0.0])]
    for indices, gates in steps:
        route[2:] = route[:2].clone()
        route[:2] = route_of(indices, device)
        sgmm_stage.stage_down_(plan, route, gates_of(gates, device))
        merge.merge_(route)
        for weight, source in zip(weights, sources, strict=True):
            expected = dense(weight, source, route[:2], gates_of(gates, device))
            assert_close(weight.target, expected, dtype if dtype != torch.float32 else None)


@pytest.mark.parametrize("in_place", [False, True])
def test_one_weight_at_a_time(target, in_place):
    device, _ = target
    weights = weights_of(target, ODD, in_place=in_place)
    others = weights_of(target, ODD, in_place=in_place)
    route = route_of([2, 1] * (1 + in_place), device)
    gates = gates_of([0.8, 0.1], device)
    whole, single = plan_sgmm(weights, 2, in_place=in_place), plan_sgmm(others, 2, in_place=in_place)
    sgmm.sgmm_(whole, route, gates, SMALL)
    merge = sgmm.Sgmm(single, SMALL)
    for index in range(len(ODD)):
        sgmm_stage.stage_down_(single, route, gates, weight=index)
        merge.merge_(route, weight=index)
    for mine, theirs in zip(weights, others, strict=True):
        assert torch.equal(mine.target, theirs.target)


def test_an_ordinary_adapter_needs_no_stage(target):
    """Unequal ranks, one expert, the scale in B: the static merge."""
    device, _ = target
    weights = [
        *weights_of(target, ODD[:1], experts=1, rank=3),
        *weights_of(target, ODD[1:], experts=1, rank=20),
    ]
    plan = plan_sgmm(weights, 1, in_place=False, staged=False)
    route = route_of([0], device)
    sgmm.Sgmm(plan, SMALL).merge_(route)
    for weight in weights:
        expected = dense(weight, weight.source, route, gates_of([1.0], device))
        assert_close(weight.target, expected, weight.target.dtype)


@pytest.mark.parametrize("in_place", [False, True])
def test_reference_computes_the_same(target, in_place):
    device, dtype = target
    weights, others = (weights_of(target, EVEN, in_place=in_place) for _ in range(2))
    route, gates = route_of([2, 1] * (1 + in_place), device), gates_of([0.8, 0.1], device)
    plan, plan_ref = (plan_sgmm(each, 2, in_place=in_place) for each in (weights, others))
    for _ in range(2):
        sgmm_stage.stage_down_(plan, route, gates)
        sgmm.Sgmm(plan, FLAT).merge_(route)
        sgmm_ref.stage_down_(plan_ref, route, gates)
        sgmm_ref.merge_(plan_ref, route)
    assert_close(plan.stage, plan_ref.stage)
    assert torch.equal(plan.gates, plan_ref.gates) and plan.gates.any(dim=0).all()
    for mine, theirs in zip(weights, others, strict=True):
        assert_close(mine.target, theirs.target, dtype)


PANEL = SgmmTuning(block_out=64, block_in=64, block_k=32, num_warps=4, programs_per_sm=1, panel=True)
TALL = ((384, 64), (64, 192), (128, 128))  # (out, in): columns of tiles for runs


@pytest.mark.parametrize(("programs", "longest"), [(1, 128), (5, 3), (132, 2)])
def test_runs_cover_every_tile_once(programs, longest):
    """All weights' by the last list, each weight's by its own; the last list's long runs first."""
    weights = weights_of(("cpu", torch.float16), TALL)
    runs, starts = plan_sgmm(weights, 2, in_place=False).runs(64, 32, programs, longest)
    assert len(starts) == len(TALL) + 2
    for first, end, indices in [
        *((starts[index], starts[index + 1], [index]) for index in range(len(TALL))),
        (starts[-2], starts[-1], range(len(TALL))),
    ]:
        found = [
            (weight, row + 64 * turn, column)
            for weight, row, column, tiles in runs[first:end].tolist()
            for turn in range(tiles)
        ]
        wanted = [
            (index, row, column)
            for index in indices
            for row in range(0, TALL[index][0], 64)
            for column in range(0, TALL[index][1], 32)
        ]
        assert sorted(found) == wanted
    lengths = runs[starts[-2] :, 3].tolist()
    assert lengths == sorted(lengths, reverse=True) and max(lengths) <= longest
    assert starts[1] == (2 if programs == 1 else 4 if programs == 5 else 12)  # of 6 x 2 tiles


def emulate(monkeypatch, weights):
    """Run panels on the CPU."""
    monkeypatch.setattr(sgmm.Sgmm, "_takes_panel", lambda self, tuning: tuning.panel_fits(self.inner))
    monkeypatch.setattr(sgmm, "NUM_SMS", 2)
    memory = [t for w in weights for t in (w.target, w.source, w.up, w.down)]
    monkeypatch.setattr(sgmm, "sgmm_panel_kernel", Emulated(sgmm_panel, "sgmm_panel_kernel", memory))


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize(
    "tuning",
    [
        replace(PANEL, block_k=128, num_stages=2),
        PANEL,
        replace(PANEL, overlap=True),
        replace(PANEL, num_stages=5),
        replace(PANEL, num_stages=6, overlap=True, block_in=32, block_k=16),
        replace(PANEL, parts=2),
        replace(PANEL, parts=2, overlap=True, num_stages=6, block_k=16),
    ],
    ids=lambda tuning: tuning.name,
)
def test_a_panel_stays_while_weights_go_by(monkeypatch, tuning, in_place):
    """Emulated: as many runs as make each program take several, -1 in the route, all weights at once and one by one."""
    monkeypatch.setattr(sgmm, "LONGEST_RUN", 3)
    dtype = torch.bfloat16
    weights = weights_of(("cpu", dtype), TALL, in_place=in_place, seed=1)
    others = weights_of(("cpu", dtype), TALL, in_place=in_place, seed=1)
    sources = [weight.source.clone() for weight in weights]
    plan, single = (plan_sgmm(each, 2, in_place=in_place) for each in (weights, others))
    emulate(monkeypatch, weights + others)
    merge, merge_single = sgmm.Sgmm(plan, tuning), sgmm.Sgmm(single, tuning)
    assert merge.panel and merge.tuning is tuning
    route = route_of([0] * plan.segments, "cpu")
    for indices, values in (([1, 3], [0.6, 0.3]), ([0, -1], [0.9, 0.0])):
        if in_place:
            route[2:] = route[:2].clone()
        route[:2] = route_of(indices, "cpu")
        gates = gates_of(values, "cpu")
        for each in (plan, single):
            sgmm_ref.stage_down_(each, route, gates)
        merge.merge_(route)
        for index in range(len(TALL)):
            merge_single.merge_(route, weight=index)
        for weight, other, source in zip(weights, others, sources, strict=True):
            assert_close(weight.target, dense(weight, source, route[:2], gates), dtype)
            assert torch.equal(weight.target, other.target)


def test_a_panel_of_an_ordinary_adapter_is_not_gated(monkeypatch):
    dtype = torch.float16
    weights = weights_of(("cpu", dtype), TALL, experts=1, rank=32)
    emulate(monkeypatch, weights)
    route = route_of([0], "cpu")
    sgmm.Sgmm(plan_sgmm(weights, 1, in_place=False, staged=False), PANEL).merge_(route)
    for weight in weights:
        expected = dense(weight, weight.source, route, gates_of([1.0], "cpu"))
        assert_close(weight.target, expected, dtype)


@pytest.mark.parametrize("in_place", [False, True])
def test_only_a_panel_leaves_the_stage_alone(monkeypatch, in_place):
    """It gates DOWN itself: one by one or all at once, the gates are what it needs."""
    weights = weights_of(("cpu", torch.float16), TALL[:1], in_place=in_place)
    source = weights[0].source.clone()
    emulate(monkeypatch, weights)
    plan = plan_sgmm(weights, 2, in_place=in_place)
    monkeypatch.setattr(sgmm, "keep_gates_", lambda plan, gates, weight: sgmm_ref.keep_gates_(plan, gates))
    merge = sgmm.Sgmm(plan, PANEL)
    route = route_of([0] * plan.segments, "cpu")
    for indices, values in (([1, 3], [0.6, 0.3]), ([2, 1], [0.9, 0.2])):
        if in_place:
            route[2:] = route[:2].clone()
        route[:2], gates = route_of(indices, "cpu"), gates_of(values, "cpu")
        merge.stage_(route, gates)
        merge.merge_(route)
        assert_close(weights[0].target, dense(weights[0], source, route[:2], gates), torch.float16)
    assert not plan.stage.any()


def test_what_a_panel_cannot_do_is_done_without():
    """Blocks that do not fill, two ranks, four bytes, no Hopper: the plain kernel."""
    for shapes, dtype, ranks in ((ODD, torch.float16, (16, 16)), (EVEN, torch.float32, (16, 32))):
        weights = [
            weights_of(("cpu", dtype), [shape], rank=rank)[0]
            for shape, rank in zip(shapes, ranks, strict=True)
        ]
        merge = sgmm.Sgmm(plan_sgmm(weights, 2, in_place=False), PANEL)
        assert not merge.panel and merge.tuning is PLAIN


@pytest.mark.parametrize(
    ("inner", "tuning"),
    [
        *((inner, PLAIN) for inner in (1, 8, 16, 24, 40, 72)),
        *((inner, LOW) for inner in (32, 48, 64, 96)),
        *((inner, TWO_WIDE) for inner in (128, 160, 192, 256)),
        *((inner, TWO) for inner in (320, 384, 512)),
        *((inner, WIDE) for inner in (144, 1024)),
    ],
)
def test_the_tuning_in_use_fits(inner, tuning):
    assert sgmm_tuning(inner) is tuning
    assert not tuning.panel or tuning.panel_fits(inner)


@pytest.mark.parametrize(("width", "tuning"), [(512, TWO_WIDE), (384, TWO)])
def test_weights_that_wide_tiles_do_not_fill_get_narrow_ones(monkeypatch, width, tuning):
    weights = weights_of(("cpu", torch.float16), [(64, 256), (64, width)], rank=64)
    emulate(monkeypatch, weights)
    assert sgmm.Sgmm(plan_sgmm(weights, 2, in_place=False)).tuning is tuning


def test_tunings_have_names_of_their_own():
    assert len({tuning.name for tuning in CANDIDATES}) == len(CANDIDATES)


@pytest.mark.parametrize("tuning", [t for t in CANDIDATES if t.panel], ids=lambda tuning: tuning.name)
def test_every_panel_fits_a_form_it_is_for(tuning):
    assert any(tuning.panel_fits(inner) for inner in (128, 256, 512))
    assert tuning.num_stages > 1 + tuning.overlap
    assert not tuning.panel_fits(24 * 2) or tuning.panel_block_k(48) == 16


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="tunings are of compiled kernels: needs a GPU")
@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("tuning", CANDIDATES, ids=lambda tuning: tuning.name)
def test_every_tuning_on_a_gpu(tuning, in_place):
    weights = weights_of(("cuda", torch.bfloat16), [(512, 768), (1024, 256)], rank=128, in_place=in_place)
    sources = [weight.source.clone() for weight in weights]
    plan = plan_sgmm(weights, 2, in_place=in_place)
    merge = sgmm.Sgmm(plan, tuning)
    route, gates = route_of([3, 0] + [0, 0] * in_place, "cuda"), gates_of([0.8, 0.1], "cuda")
    sgmm_stage.stage_down_(plan, route, gates)
    graph = torch.cuda.CUDAGraph()
    merge.merge_(route)
    expected = [dense(w, s, route[:2], gates) for w, s in zip(weights, sources, strict=True)]
    for weight, want in zip(weights, expected, strict=True):
        assert relative_error(weight.target, want) < 1e-2
    with torch.cuda.graph(graph):
        merge.merge_(route)


def drift(steps, *, dtype=torch.bfloat16, size=128, rank=8, experts=8, update=0.1, seed=0):
    """Return ‖W_t − (W_0 + P_t)‖ / ‖W_0‖ after `steps` tokens in place, by the reference; `update`: ‖P‖ / ‖W_0‖ of a token, about."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(size, size, generator=generator).to(dtype)
    std = (update * 1.2 / (2 * rank) ** 0.5) ** 0.5
    up, down = (std * torch.randn(experts, rank, size, generator=generator) for _ in range(2))
    item = SgmmWeight(target=weight, source=weight, up=up.to(dtype), down=down.to(dtype))
    source, plan = weight.clone(), plan_sgmm([item], 2, in_place=True)
    route = torch.zeros(4, dtype=torch.int32)
    for _ in range(steps):
        route[2:] = route[:2].clone()
        route[:2] = torch.randperm(experts, generator=generator)[:2].int()
        gates = torch.softmax(torch.randn(2, generator=generator), 0).sort(descending=True).values
        sgmm_ref.stage_down_(plan, route, gates)
        sgmm_ref.merge_(plan, route)
    expected = dense(item, source, route[:2], gates)
    return ((weight.float() - expected).norm() / source.float().norm()).item()


def bound_of_drift(steps):
    """Each token rounds W once, by at most half a unit of 2⁻⁸ of it: independent roundings add as a random walk."""
    return 2**-8 / 3**0.5 * steps**0.5


@pytest.mark.parametrize("steps", [1, 100, 400])
def test_drift_in_place_stays_within_its_bound(steps):
    assert drift(steps) < bound_of_drift(steps)


@pytest.mark.slow
def test_drift_over_ten_thousand_tokens():
    assert 0.2 * bound_of_drift(10_000) < drift(10_000) < bound_of_drift(10_000)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: {"up": w.up[:, :, :-1]}, "weight 0: up must have shape"),
        (lambda w: {"down": w.down.double()}, "weight 0: down must be"),
        (lambda w: {"source": w.source.T.contiguous().T}, "weight 0: source must have contiguous rows"),
        (lambda w: {"source": w.target}, "weight 0: source must not be target"),
    ],
)
def test_a_weight_that_does_not_fit_is_named(target, change, message):
    weight = weights_of(target, ODD[:1])[0]
    with pytest.raises(ValueError, match=message):
        plan_sgmm([replace(weight, **change(weight))], 2, in_place=False)


def test_a_route_that_does_not_fit_is_named(target):
    device, _ = target
    plan = plan_sgmm(weights_of(target, ODD[:1]), 2, in_place=False)
    with pytest.raises(ValueError, match=r"^route must"):
        sgmm.Sgmm(plan, SMALL).merge_(route_of([0], device))
