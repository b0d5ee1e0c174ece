"""Sampling: greedy rows against torch.argmax, draws against the reference and, over many of them, against softmax."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import sample, sample_ref, top_p_threshold_ref
from kernels.sample_params import LEAST_TEMPERATURE, PARAM_COLUMNS, POSITION, sample_params

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SLOTS = 9
# Around one part and several; short ones are cut by their own next power of two.
VOCABS = (1, 2, 7, 100, sample.BLOCK - 1, sample.BLOCK, sample.BLOCK + 1, 3 * sample.BLOCK + 5)
NAN, INF = float("nan"), float("inf")
SEEDS = st.one_of(st.integers(0, 3), st.integers(-(2**63), 2**64 - 1))
SAMPLINGS = st.tuples(
    st.sampled_from([0.0, 0.0, 0.01, 0.7, 1.0, 100.0]), st.sampled_from([1.0, 1.0, 0.9, 0.1, 1e-9]), SEEDS
)


def params_of(rows):
    """Parameters [rows, 5] of (temperature, top_p, seed, position)."""
    params = torch.zeros(len(rows), PARAM_COLUMNS, dtype=torch.int32)
    for index, (temperature, top_p, seed, position) in enumerate(rows):
        params[index] = torch.from_numpy(sample_params(temperature, top_p, seed))
        params[index, POSITION] = position
    return params


def greedy(rows):
    return torch.zeros(rows, PARAM_COLUMNS, dtype=torch.int32), torch.zeros(rows)


def run(logits, slots, params, thresholds):
    """Return (tokens, last tokens) of the kernel, whose counters must be zero again."""
    last, arrivals = (
        torch.full((SLOTS,), -1, device=DEVICE),
        torch.zeros(16, dtype=torch.int32, device=DEVICE),
    )
    tokens = sample.sample(
        logits.to(DEVICE), slots.to(DEVICE), params.to(DEVICE), thresholds.to(DEVICE), last, arrivals
    )
    assert not arrivals.any()
    return tokens.cpu(), last.cpu()


def draws(logits, rows):
    """Return the reference's tokens of the same logits for each of `rows`, parameters."""
    params = params_of(rows)
    logits = logits.expand(len(rows), -1)
    thresholds = top_p_threshold_ref.top_p_threshold(logits, params)
    slots, last = torch.arange(len(rows), dtype=torch.int32), torch.zeros(len(rows), dtype=torch.int64)
    return sample_ref.sample(logits, slots, params, thresholds, last, last)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 4),
    vocab=st.sampled_from(VOCABS),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    levels=st.integers(1, 4),
    specials=st.lists(
        st.tuples(st.integers(0, 3), st.floats(0, 1), st.sampled_from([NAN, INF, -0.0, -INF])), max_size=4
    ),
    floor=st.sampled_from([-5.0, 0.0, -INF]),
    samplings=st.lists(st.tuples(SAMPLINGS, st.integers(0, 2**31 - 1)), min_size=4, max_size=4),
    seed=st.integers(0, 2**31),
)
def test_any_mix_of_rows_equals_the_reference(rows, vocab, dtype, levels, specials, floor, samplings, seed):
    generator = torch.Generator().manual_seed(seed)
    logits = floor + torch.randint(0, levels, (rows, vocab), generator=generator)
    for row, where, value in specials:
        logits[row % rows, int(where * (vocab - 1))] = value
    logits = logits.to(dtype)
    slots = torch.randperm(SLOTS, generator=generator)[:rows].int()
    params = params_of([(*sampling, position) for sampling, position in samplings[:rows]])
    thresholds = top_p_threshold_ref.top_p_threshold(logits, params)
    tokens, last = run(logits, slots, params, thresholds)
    expected = torch.full((SLOTS,), -1)
    assert torch.equal(tokens, sample_ref.sample(logits, slots, params, thresholds, expected, expected))
    assert torch.equal(last, expected)
    for row, (sampling, _) in enumerate(samplings[:rows]):
        if sampling[0] == 0 or logits[row].isnan().any():
            assert tokens[row] == first_largest(logits[row].float())


def first_largest(row):
    """The first NaN, else the first maximum: the definition, without argmax."""
    wanted = row.isnan() if row.isnan().any() else row == row.max()
    return int(wanted.nonzero()[0])


def test_scores_that_differ_everywhere_equal_the_reference(target):
    _, dtype = target
    logits = (3 * torch.randn(4, 2 * sample.BLOCK + 77, generator=torch.Generator().manual_seed(0))).to(dtype)
    params = params_of([(1.0, 0.9, 5, 7), (0.0, 0.5, 5, 7), (0.3, 1.0, -1, 2**31 - 1), (2.0, 0.99, 2**63, 0)])
    thresholds = top_p_threshold_ref.top_p_threshold(logits, params)
    tokens, _ = run(logits, torch.arange(4, dtype=torch.int32), params, thresholds)
    assert torch.equal(tokens, sample_ref.scores(logits, params, thresholds).argmax(dim=1))
    assert torch.all(logits[torch.arange(4), tokens].float() >= thresholds)


def test_rows_may_be_strided_and_out_given(target):
    device, dtype = target
    logits = torch.randn(3, 200, generator=torch.Generator().manual_seed(0)).to(device, dtype)[:, 17:150]
    slots = torch.tensor([4, 4, 0], dtype=torch.int32, device=device)
    out, last = torch.full((3,), -7, device=device), torch.zeros(SLOTS, dtype=torch.int64, device=device)
    arrivals = torch.zeros(3, dtype=torch.int32, device=device)
    params, thresholds = (tensor.to(device) for tensor in greedy(3))
    for _ in range(2):  # the counters serve again
        assert sample.sample(logits, slots, params, thresholds, last, arrivals, out=out) is out
        assert torch.equal(out, logits.argmax(dim=-1))
    assert last[0] == out[2] and last[4] in out[:2]
    assert not last[[1, 2, 3, 5, 6, 7, 8]].any()


def test_the_reference_writes_tokens_and_last_tokens():
    logits, last = torch.tensor([[0.0, 2.0, 2.0], [5.0, 1.0, 0.0]]), torch.full((4,), -1)
    slots, out = torch.tensor([3, 1], dtype=torch.int32), torch.zeros(2, dtype=torch.int64)
    params, thresholds = greedy(2)
    assert sample_ref.sample(logits, slots, params, thresholds, last, last, out=out) is out
    assert out.tolist() == [1, 0]
    assert last.tolist() == [-1, 0, -1, 1]


def test_no_rows_are_no_launch(target):
    device, dtype = target
    nothing = torch.zeros(0, dtype=torch.int32, device=device)
    last = torch.zeros(1, dtype=torch.int64, device=device)
    params, thresholds = (tensor.to(device) for tensor in greedy(0))
    logits = torch.zeros(0, 5, device=device, dtype=dtype)
    assert sample.sample(logits, nothing, params, thresholds, last, nothing).shape == (0,)


# ---- draws ----


def chi_square_excess(counts, probabilities):
    """Return by how many standard deviations Pearson's statistic is above its mean."""
    expected = probabilities * counts.sum()
    freedom = int((probabilities > 0).sum()) - 1
    assert counts[probabilities == 0].sum() == 0
    kept = probabilities > 0
    statistic = ((counts[kept] - expected[kept]) ** 2 / expected[kept]).sum()
    return (statistic - freedom) / math.sqrt(2 * freedom)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("varied", ["position", "seed", "high word of the seed"])
def test_draws_are_distributed_as_softmax(temperature, varied):
    logits = torch.linspace(-2, 2, 40)[torch.randperm(40, generator=torch.Generator().manual_seed(1))]
    count = 20_000
    rows = {
        "position": [(temperature, 1.0, 12, index) for index in range(count)],
        "seed": [(temperature, 1.0, index, 12) for index in range(count)],
        "high word of the seed": [(temperature, 1.0, index << 32, 12) for index in range(count)],
    }[varied]
    counts = np.bincount(draws(logits, rows).numpy(), minlength=40)
    assert abs(chi_square_excess(counts, (logits.double() / temperature).softmax(0).numpy())) < 4


def test_draws_at_neighbouring_positions_and_seeds_are_independent():
    logits = torch.linspace(-1, 1, 8)
    probabilities = logits.double().softmax(0).numpy()
    pairs = np.outer(probabilities, probabilities).ravel()
    by_position = draws(logits, [(1.0, 1.0, 3, index) for index in range(20_000)]).numpy()
    by_seed = draws(logits, [(1.0, 1.0, index, 3) for index in range(20_000)]).numpy()
    for first, second in (
        (by_position[:-1], by_position[1:]),
        (by_seed[:-1], by_seed[1:]),
        (by_position, by_seed),
    ):
        counts = np.bincount(first * 8 + second, minlength=64)
        assert abs(chi_square_excess(counts, pairs)) < 4


def test_a_flat_row_of_many_tokens_is_drawn_evenly():
    tokens = torch.cat([draws(torch.zeros(20_000), [(1.0, 1.0, i, j) for j in range(50)]) for i in range(40)])
    counts = np.bincount(tokens.numpy() // 400, minlength=50)
    assert abs(chi_square_excess(counts, np.full(50, 1 / 50))) < 4
    assert 1880 < len(tokens.unique()) < 1930  # 20,000 · (1 − (1 − 1/20,000)^2,000) = 1,903


def test_exponentials_are_exponential_at_both_ends():
    values = sample_ref.exponentials(params_of([(1.0, 1.0, seed, 0) for seed in range(8)]), 100_000).double()
    assert values.min() > 0 and values.isfinite().all()
    edges = torch.tensor(
        [0, 1e-5, 1e-4, 1e-3, 0.01, 0.03125, 0.1, 0.5, 1, 2, 4, 8, 10, math.inf], dtype=torch.float64
    )
    counts = torch.bucketize(values.ravel(), edges).bincount(minlength=len(edges))[1:].numpy()
    probabilities = (-edges[:-1]).exp() - (-edges[1:]).exp()
    assert abs(chi_square_excess(counts, probabilities.numpy())) < 4


def test_no_bits_give_zero_or_infinity(monkeypatch):
    bits = torch.tensor([[0, 1, 2**27 - 2, 2**27, 2**31, 2**32 - 2, 2**32 - 1]])
    monkeypatch.setattr(sample_ref, "random_bits", lambda params, vocab: bits)
    values = sample_ref.exponentials(params_of([(1.0, 1.0, 0, 0)]), 7).double()
    exact = -torch.log1p(-((bits // 2).double() + 0.5) / 2**31)
    assert torch.allclose(values, exact, rtol=2e-6, atol=0)


def test_hashes_are_one_to_one_and_change_half_of_their_bits():
    words = torch.arange(2**16)
    key = torch.tensor(77)
    assert len(sample_ref.mix(words, key).unique()) == len(words)
    for bit in range(32):
        for flipped in (
            sample_ref.mix(words ^ (1 << bit), key),
            sample_ref.mix(words, key ^ (1 << bit)),
        ):
            changed = flipped ^ sample_ref.mix(words, key)
            for other in range(32):
                assert abs((changed >> other & 1).double().mean() - 0.5) < 0.1


@pytest.mark.parametrize("top_p", [0.05, 0.5, 0.9, 0.999])
def test_draws_stay_in_the_nucleus(top_p):
    logits = torch.randn(300, generator=torch.Generator().manual_seed(2)) * 3
    order = logits.argsort(descending=True)
    mass = logits.double().softmax(0)[order].cumsum(0)
    nucleus = order[: int((mass < top_p).sum()) + 1]
    tokens = draws(logits, [(1.0, top_p, 4, index) for index in range(10_000)])
    probabilities = torch.zeros(300, dtype=torch.float64)
    probabilities[nucleus] = logits.double()[nucleus].softmax(0)
    counts = np.bincount(tokens.numpy(), minlength=300)
    likely = probabilities > 1e-3 if len(nucleus) > 1 else probabilities > 0
    assert set(tokens.tolist()) <= set(nucleus.tolist())
    assert np.allclose(counts[likely] / 10_000, probabilities[likely], atol=0.02)


def test_a_draw_depends_on_its_row_alone():
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(8, 333, generator=generator)
    rows = [(1.0, 0.9 if index % 2 else 1.0, index, 10 + index) for index in range(8)]
    slots = torch.arange(8, dtype=torch.int32)
    params = params_of(rows)
    thresholds = top_p_threshold_ref.top_p_threshold(logits, params)
    together, _ = run(logits, slots, params, thresholds)
    order = torch.randperm(8, generator=generator)
    mixed, _ = run(logits[order], slots, params[order], thresholds[order])
    assert torch.equal(mixed, together[order])
    for row in range(8):
        alone, _ = run(logits[row : row + 1], slots[:1], params[row : row + 1], thresholds[row : row + 1])
        assert alone[0] == together[row]


def test_params_hold_floats_and_a_seeds_words():
    row = sample_params(0.7, 0.25, -2)
    assert row[:2].view(np.float32).tolist() == [np.float32(0.7), 0.25]
    assert row[2:].tolist() == [-2, -1, 0]
    assert sample_params(1.0, 1.0, 2**64 - 2)[2:].tolist() == [-2, -1, 0]
    assert sample_params(LEAST_TEMPERATURE / 2, 1.0, 0)[0] == 0


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"logits": torch.zeros(2, 0)}, "logits"),
        ({"logits": torch.zeros(3, 2).t()}, "logits"),
        ({"logits": torch.zeros(2, 3).long()}, "logits"),
        ({"sample_slots": torch.zeros(2).long()}, "sample_slots"),
        ({"params": torch.zeros(2, 4).int()}, "params"),
        ({"thresholds": torch.zeros(2).half()}, "thresholds"),
        ({"last_token": torch.zeros(2).int()}, "last_token"),
        ({"arrivals": torch.zeros(1).int()}, "arrivals"),
        ({"out": torch.zeros(2).int()}, "out"),
    ],
)
def test_a_wrong_argument_is_named(changes, name):
    arguments = {
        "logits": torch.zeros(2, 3),
        "sample_slots": torch.zeros(2).int(),
        "params": torch.zeros(2, 5).int(),
        "thresholds": torch.zeros(2),
        "last_token": torch.zeros(2).long(),
        "arrivals": torch.zeros(2).int(),
    } | changes
    with pytest.raises(ValueError, match=rf"^{name} must"):
        sample.sample(**arguments)
