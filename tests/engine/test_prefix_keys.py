"""Keys of tokens, keys of a trace's blocks and tokens made of blocks say the same about what two prompts share."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.prefix_keys import BlockKeys, keys_of_tokens, tokens_of_blocks

VOCAB = 1 << 24  # so that two tokens are equal by accident in one of millions of cases
BLOCK = 24  # tokens of a block here
ADAPTERS = st.sampled_from([None, "a", "b"])
PROMPTS = st.one_of(
    st.tuples(ADAPTERS, st.none(), st.integers(1, 100)),
    st.tuples(ADAPTERS, st.lists(st.integers(0, 1), max_size=5).map(tuple), st.integers(1, 100)),
)


def tokens_of(number, blocks, prompt_tokens, vocab=VOCAB, seed=0):
    return tokens_of_blocks(blocks, prompt_tokens, vocab, seed, number, BLOCK)


@settings(max_examples=300, deadline=None)
@given(st.lists(PROMPTS, min_size=2, max_size=6), st.sampled_from([1, 4, 8, 10, 24, 32]))
def test_prompts_of_blocks_share_the_pages_that_the_blocks_say(prompts, page_tokens):
    names = BlockKeys(page_tokens, BLOCK)
    by_block, by_token = [], []
    for number, (adapter, blocks, length) in enumerate(prompts):
        tokens = tokens_of(number, blocks, length)
        assert tokens.shape == (length,)
        by_block.append(names.keys(adapter, blocks or (), length))
        by_token.append(keys_of_tokens(adapter, tokens, page_tokens))
    assert [len(keys) for keys in by_token] == [length // page_tokens for *_, length in prompts]
    assert equal_pages(by_block) == equal_pages(by_token)


def equal_pages(prompts):
    """Which pages of which prompts have one key: for each, the first place where that key is."""
    first = {}
    return [
        [first.setdefault(key, (number, page)) for page, key in enumerate(keys)]
        for number, keys in enumerate(prompts)
    ]


def test_a_key_stands_for_everything_before_it_and_the_adapter():
    tokens = np.arange(40, dtype=np.int32)
    keys = keys_of_tokens("a", tokens, 16)
    assert len(keys) == 2
    assert keys_of_tokens("a", tokens[:32], 16) == keys
    assert keys_of_tokens("a", tokens.astype(np.int64), 16) == keys
    changed = tokens.copy()
    changed[0] += 1
    for other in (
        keys_of_tokens("a", changed, 16),
        keys_of_tokens(None, tokens, 16),
        keys_of_tokens("", tokens, 16),
    ):
        assert not set(keys) & set(other)
    assert not set(keys_of_tokens(None, tokens, 16)) & set(keys_of_tokens("", tokens, 16))
    swapped = np.concatenate([tokens[16:32], tokens[:16]])
    assert not set(keys) & set(keys_of_tokens("a", swapped, 16))


def test_the_same_block_after_another_start_is_another_page():
    names = BlockKeys(16)
    first, second, third = (names.keys(None, blocks, 1024) for blocks in ((0, 1), (0, 2), (2, 1)))
    assert first[:32] == second[:32]
    assert len({*first, *second, *third}) == 5 * 32  # (0), (0, 1), (0, 2), (2), (2, 1)
    assert names.keys(None, (0, 1), 700) == first[: 700 // 16]
    assert not set(names.keys("a", (0, 1), 1024)) & set(first)


def test_what_no_block_covers_is_the_requests_own():
    names = BlockKeys(16)
    one, two = names.keys("a", (7,), 600), names.keys("a", (7,), 600)
    assert one[:32] == two[:32]
    assert not set(one[32:]) & set(two[32:])
    assert np.array_equal(
        tokens_of_blocks((7,), 600, 1000, 0, 1)[:512], tokens_of_blocks((7,), 600, 1000, 0, 2)[:512]
    )
    assert tokens_of_blocks((7,), 600, VOCAB, 0, 1)[512] != tokens_of_blocks((7,), 600, VOCAB, 0, 2)[512]


def test_prompts_without_blocks_share_no_first_page():
    """Ids 0 … 4,098 had windows of one random run before, so that some began alike."""
    ids = [*range(5000), *map(str, range(5000))]
    keys = {keys_of_tokens(None, tokens_of(number, None, 16, vocab=256), 16)[0] for number in ids}
    assert len(keys) == len(ids)


@pytest.mark.parametrize("blocks", [None, (3, 4)])
def test_a_seed_gives_the_same_tokens_always_and_another_seed_others(blocks):
    tokens = tokens_of(5, blocks, 40, vocab=100)
    assert (tokens >= 0).all() and (tokens < 100).all()
    assert np.array_equal(tokens, tokens_of(5, blocks, 40, vocab=100))
    assert not np.array_equal(tokens, tokens_of(5, blocks, 40, vocab=100, seed=1))


def test_tokens_do_not_depend_on_the_machine():
    assert tokens_of_blocks((1,), 4, 128256, 0, 0).tolist() == [124118, 57719, 21271, 125332]
