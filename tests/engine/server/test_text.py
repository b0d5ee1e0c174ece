"""Tokens to text without broken characters, stop texts, and paths that must not reach clients."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.errors import UserError
from engine.server.detokenizer import Detokenizer
from engine.server.errors import ApiError, Scrubber
from engine.server.stopping import StopFilter
from engine.server.text import load_codec, stop_tokens
from tests.engine.server.world import byte_tokenizer


@pytest.fixture(scope="module")
def codec(world):
    return load_codec(world.model_folder, 256)


def pieces(codec, tokens, sizes):
    detokenizer, texts, start = codec.detokenizer(), [], 0
    for size in [*sizes, len(tokens)]:
        texts.append(detokenizer.push(tokens[start : start + size]))
        start += size
    return [*texts, detokenizer.flush()]


@settings(deadline=None, max_examples=60)
@given(text=st.text(max_size=40), sizes=st.lists(st.integers(1, 5), max_size=40))
def test_text_comes_back_whole_however_its_tokens_come(codec, text, sizes):
    parts = pieces(codec, codec.encode(text), sizes)
    assert "".join(parts) == text.rstrip("\ufffd")


def test_a_character_is_never_given_out_in_parts(codec):
    tokens = codec.encode("a€😀é")
    assert pieces(codec, tokens, [1] * len(tokens))[:-2] == ["a", "", "", "€", "", "", "", "😀", "", "é"]


def test_a_character_that_is_not_completed_is_left_out(codec):
    tokens = codec.encode("ab€")[:-1]
    assert "".join(pieces(codec, tokens, [1] * len(tokens))) == "ab"


def test_bytes_that_are_no_text_do_not_hold_up_what_follows(codec):
    bad = codec.encode("€")[1:2]
    detokenizer = codec.detokenizer()
    texts = [detokenizer.push(bad) for _ in range(40)]
    assert any(texts)
    assert detokenizer.push(codec.encode("ok")).endswith("ok")


def test_tokens_without_text_do_not_make_later_ones_dearer(codec):
    lengths = []
    eos = byte_tokenizer().eos_token_id

    def decode(tokens):
        lengths.append(len(tokens))
        return codec.decode(tokens)

    detokenizer = Detokenizer(decode)
    text = "".join(
        detokenizer.push([token]) for token in [*codec.encode("a"), *[eos] * 500, *codec.encode("b")]
    )
    assert (text, max(lengths)) == ("ab", 2)


@given(
    text=st.text("abc", max_size=30),
    stops=st.lists(st.text("abc", min_size=1, max_size=4), max_size=4),
    sizes=st.lists(st.integers(1, 4), max_size=30),
)
def test_text_ends_before_the_first_stop_text(text, stops, sizes):
    stop_filter, out, start = StopFilter(stops), "", 0
    for size in [*sizes, len(text)]:
        part = text[start : start + size]
        start += size
        out += stop_filter.push(part)
        if stop_filter.stopped:
            break
    out += stop_filter.flush()
    ends = [text.index(stop) for stop in stops if stop in text]
    if not ends:
        assert out == text
        return
    # A text that ends sooner may be found before one that begins earlier, as it would be token by token.
    assert stop_filter.stopped
    assert text.startswith(out)
    assert any(text.startswith(stop, len(out)) for stop in stops)


def test_the_first_of_several_stop_texts_in_one_piece_counts():
    stop_filter = StopFilter(["world", "lo"])
    assert stop_filter.push("hello world") == "hel"
    assert stop_filter.stopped


def test_stop_tokens_are_those_of_the_model_and_the_tokenizer(tmp_path):
    (tmp_path / "config.json").write_text('{"eos_token_id": 3}')
    assert stop_tokens(tmp_path, 9) == {3, 9}
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [4, 5]}')
    assert stop_tokens(tmp_path, None) == {4, 5}
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": null}')
    assert stop_tokens(tmp_path, None) == {3}


def test_a_folder_without_a_tokenizer_is_one_line(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="no tokenizer can be read"):
        load_codec(tmp_path, 256)


def test_a_model_without_a_chat_template_says_so(world):
    codec = load_codec(world.model_folder, 256)
    codec._tokenizer.chat_template = None
    with pytest.raises(ApiError, match="no chat template"):
        codec.encode_chat([{"role": "user", "content": "x"}], True)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("/srv/models/x/adapter_config.json: r (=0) must be", "adapter_config.json: r (=0) must be"),
        ("/my dir/adapters/a/b.safetensors: no such file", "a/b.safetensors: no such file"),
        ("in '/etc/passwd' and (/root/.ssh/id)", "in 'passwd' and (id)"),
        ("text/html or a/b is no path", "text/html or a/b is no path"),
        ("a line\nand /home/me", "a line and me"),
    ],
)
def test_paths_of_the_server_are_cut_to_their_last_part(text, shown):
    assert Scrubber([Path("/my dir/adapters")])(text) == shown
