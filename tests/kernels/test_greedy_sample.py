"""Greedy sampling against torch.argmax: ties, NaN, infinities, any number of parts."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import greedy_sample as sample
from kernels import greedy_sample_ref as sample_ref

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SLOTS = 9
# Around one part and several; short ones are cut by their own next power of two.
VOCABS = (1, 2, 7, 100, sample.BLOCK - 1, sample.BLOCK, sample.BLOCK + 1, 3 * sample.BLOCK + 5)


def run(logits, slots):
    """Return (tokens, last tokens) of the kernel, whose counters must be zero again."""
    last, arrivals = (
        torch.full((SLOTS,), -1, device=DEVICE),
        torch.zeros(16, dtype=torch.int32, device=DEVICE),
    )
    tokens = sample.greedy_sample(logits, slots, last, arrivals)
    assert not arrivals.any()
    return tokens, last


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 4),
    vocab=st.sampled_from(VOCABS),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    levels=st.integers(1, 4),
    specials=st.lists(
        st.tuples(st.integers(0, 3), st.floats(0, 1), st.sampled_from([float("nan"), float("inf"), -0.0])),
        max_size=4,
    ),
    floor=st.sampled_from([-5.0, 0.0, float("-inf")]),
    seed=st.integers(0, 2**31),
)
def test_is_torchs_argmax_at_the_first_of_ties(rows, vocab, dtype, levels, specials, floor, seed):
    generator = torch.Generator().manual_seed(seed)
    logits = floor + torch.randint(0, levels, (rows, vocab), generator=generator)
    for row, where, value in specials:
        logits[row % rows, int(where * (vocab - 1))] = value
    logits = logits.to(DEVICE, dtype)
    slots = torch.randperm(SLOTS, generator=generator)[:rows].to(DEVICE, torch.int32)
    tokens, last = run(logits, slots)
    first = torch.tensor([first_largest(row) for row in logits.float().cpu()])
    assert tokens.tolist() == first.tolist()
    assert torch.equal(tokens, torch.argmax(logits.cpu(), dim=-1).to(DEVICE))
    expected = torch.full((SLOTS,), -1)
    sample_ref.greedy_sample(logits.cpu(), slots.cpu(), expected, expected)
    assert last.tolist() == expected.tolist()


def first_largest(row):
    """The first NaN, else the first maximum: the definition, without argmax."""
    wanted = row.isnan() if row.isnan().any() else row == row.max()
    return int(wanted.nonzero()[0])


def test_rows_may_be_strided_and_out_given(target):
    device, dtype = target
    logits = torch.randn(3, 200, generator=torch.Generator().manual_seed(0)).to(device, dtype)[:, 17:150]
    slots = torch.tensor([4, 4, 0], dtype=torch.int32, device=device)
    out, last = torch.full((3,), -7, device=device), torch.zeros(SLOTS, dtype=torch.int64, device=device)
    arrivals = torch.zeros(3, dtype=torch.int32, device=device)
    for _ in range(2):  # the counters serve again
        assert sample.greedy_sample(logits, slots, last, arrivals, out=out) is out
        assert torch.equal(out, logits.argmax(dim=-1))
    assert last[0] == out[2] and last[4] in out[:2]
    assert not last[[1, 2, 3, 5, 6, 7, 8]].any()


def test_the_reference_writes_tokens_and_last_tokens():
    logits, last = torch.tensor([[0.0, 2.0, 2.0], [5.0, 1.0, 0.0]]), torch.full((4,), -1)
    slots, out = torch.tensor([3, 1], dtype=torch.int32), torch.zeros(2, dtype=torch.int64)
    assert sample_ref.greedy_sample(logits, slots, last, last, out=out) is out
    assert out.tolist() == [1, 0]
    assert last.tolist() == [-1, 0, -1, 1]


def test_no_rows_are_no_launch(target):
    device, dtype = target
    nothing = torch.zeros(0, dtype=torch.int32, device=device)
    last = torch.zeros(1, dtype=torch.int64, device=device)
    tokens = sample.greedy_sample(torch.zeros(0, 5, device=device, dtype=dtype), nothing, last, nothing)
    assert tokens.shape == (0,)


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"logits": torch.zeros(2, 0)}, "logits"),
        ({"logits": torch.zeros(3, 2).t()}, "logits"),
        ({"logits": torch.zeros(2, 3).long()}, "logits"),
        ({"sample_slots": torch.zeros(2).long()}, "sample_slots"),
        ({"last_token": torch.zeros(2).int()}, "last_token"),
        ({"arrivals": torch.zeros(1).int()}, "arrivals"),
        ({"out": torch.zeros(2).int()}, "out"),
    ],
)
def test_a_wrong_argument_is_named(changes, name):
    arguments = {
        "logits": torch.zeros(2, 3),
        "sample_slots": torch.zeros(2).int(),
        "last_token": torch.zeros(2).long(),
        "arrivals": torch.zeros(2).int(),
    } | changes
    with pytest.raises(ValueError, match=rf"^{name} must"):
        sample.greedy_sample(**arguments)
