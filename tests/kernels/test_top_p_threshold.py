"""The smallest logit of a nucleus: the kernel against a sort, and against the definition."""

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from kernels import top_p_threshold, top_p_threshold_ref
from kernels.sample_params import PARAM_COLUMNS, sample_params

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
VOCABS = (1, 2, 7, 100, top_p_threshold.BLOCK - 1, top_p_threshold.BLOCK, 2 * top_p_threshold.BLOCK + 5)
INF = float("inf")
ROUNDING = 1e-5  # of a sum in fp32, relative


def params_of(rows):
    """Parameters [rows, 5] of (temperature, top_p)."""
    return torch.stack(
        [torch.from_numpy(sample_params(temperature, top_p, 0)) for temperature, top_p in rows]
    )


def run(logits, params):
    return top_p_threshold.top_p_threshold(logits.to(DEVICE), params.to(DEVICE)).cpu()


def check(logits, rows):
    """Hold each threshold to the definition, up to the rounding of a sum, and to the sort where that cannot matter."""
    params = params_of(rows)
    thresholds = run(logits, params)
    expected = top_p_threshold_ref.top_p_threshold(logits, params)
    for row, (temperature, top_p), threshold, wanted in zip(logits, rows, thresholds, expected, strict=True):
        if temperature == 0 or top_p == 1:
            assert threshold == wanted == -INF
            continue
        values = row.double()
        assert threshold in values
        if not values.max().isfinite():
            assert threshold == wanted == values.max()
            continue
        probabilities = ((values - values.max()) / temperature).softmax(0)
        kept = probabilities[values >= threshold].sum()
        assert kept >= top_p - ROUNDING
        smaller = probabilities[values > threshold].sum()
        assert smaller < top_p + ROUNDING or threshold == values.max()
        if smaller < top_p - ROUNDING and kept > top_p + ROUNDING:  # else rounding decides between neighbours
            assert threshold == wanted


@settings(max_examples=40, deadline=None)
@example(rows=[(30.0, 0.93)], vocab=100, dtype=torch.float32, kind="tiny", specials=[], seed=2)
@given(
    rows=st.lists(
        st.tuples(
            st.sampled_from([0.0, 1e-5, 0.01, 0.7, 1.0, 30.0]),
            st.one_of(st.sampled_from([1.0, 0.9, 0.5, 1e-9, 1 - 2**-24]), st.floats(1e-6, 1 - 1e-6)),
        ),
        min_size=1,
        max_size=3,
    ),
    vocab=st.sampled_from(VOCABS),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    kind=st.sampled_from(["normal", "levels", "equal", "negative", "huge", "tiny"]),
    specials=st.lists(st.tuples(st.floats(0, 1), st.sampled_from([INF, -INF, -0.0])), max_size=3),
    seed=st.integers(0, 2**31),
)
def test_is_the_smallest_logit_of_the_nucleus(rows, vocab, dtype, kind, specials, seed):
    generator = torch.Generator().manual_seed(seed)
    shape = (len(rows), vocab)
    logits = {
        "normal": lambda: 3 * torch.randn(shape, generator=generator),
        "levels": lambda: torch.randint(-2, 3, shape, generator=generator).float(),
        "equal": lambda: torch.full(shape, 1.5),
        "negative": lambda: -torch.rand(shape, generator=generator) - 4,
        "huge": lambda: 3e4 * torch.randn(shape, generator=generator),
        "tiny": lambda: 1e-6 * torch.randn(shape, generator=generator),
    }[kind]()
    for where, value in specials:
        logits[seed % len(rows), int(where * (vocab - 1))] = value
    check(logits.to(dtype), rows)


def test_a_row_without_a_finite_logit_ends_the_search():
    logits = torch.full((1, 100), -INF)
    assert run(logits, params_of([(1.0, 0.5)])) == -INF


def test_nan_ends_the_search_too():
    logits = torch.randn(4, 100, generator=torch.Generator().manual_seed(0))
    logits[0, 3], logits[1, 0], logits[2, :], logits[3, 50:] = (float("nan"),) * 4
    assert run(logits, params_of([(1.0, 0.5)] * 4)).shape == (4,)


def test_all_tokens_as_likely_as_the_last_are_kept():
    logits = torch.tensor([[1.0, 3.0, 2.0, 2.0, 2.0, 0.0]])
    params = params_of([(1.0, 0.75)])  # the largest alone has 0.4, one of the next three makes 0.55 already
    assert run(logits, params) == top_p_threshold_ref.top_p_threshold(logits, params) == 2.0


def test_rows_may_be_strided_and_out_given(target):
    device, dtype = target
    logits = torch.randn(3, 200, generator=torch.Generator().manual_seed(0)).to(device, dtype)[:, 17:150]
    params = params_of([(1.0, 0.9), (1.0, 1.0), (0.5, 0.3)]).to(device)
    out = torch.empty(3, device=device)
    assert top_p_threshold.top_p_threshold(logits, params, out=out) is out
    assert torch.equal(out, top_p_threshold_ref.top_p_threshold(logits, params))


def test_no_rows_are_no_launch(target):
    device, dtype = target
    params = torch.zeros(0, PARAM_COLUMNS, dtype=torch.int32, device=device)
    assert top_p_threshold.top_p_threshold(torch.zeros(0, 5, device=device, dtype=dtype), params).shape == (
        0,
    )


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"logits": torch.zeros(2, 0)}, "logits"),
        ({"logits": torch.zeros(2, 3).long()}, "logits"),
        ({"params": torch.zeros(2, 4).int()}, "params"),
        ({"params": torch.zeros(2, 5)}, "params"),
        ({"out": torch.zeros(3)}, "out"),
    ],
)
def test_a_wrong_argument_is_named(changes, name):
    arguments = {"logits": torch.zeros(2, 3), "params": torch.zeros(2, 5).int()} | changes
    with pytest.raises(ValueError, match=rf"^{name} must"):
        top_p_threshold.top_p_threshold(**arguments)
