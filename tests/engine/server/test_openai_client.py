"""The official client against a real server: answers are those of transformers and PEFT."""

import openai
import pytest

BASE = "tiny-base"


def complete(client, model=BASE, prompt="Hello", **options):
    return client.completions.create(
        model=model, prompt=prompt, **({"max_tokens": 12, "temperature": 0} | options)
    )


@pytest.mark.parametrize("model", [BASE, "red", "blue"])
def test_a_completion_is_the_models_own(world, client, model):
    answer = complete(client, model)
    assert answer.choices[0].text == world.text(model, "Hello", 12)
    assert (answer.model, answer.object, answer.choices[0].finish_reason) == (
        model,
        "text_completion",
        "length",
    )
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (
        5,
        12,
        17,
    )


def test_tokens_are_as_good_as_text_and_prompts_may_be_many(world, client):
    ids = world.tokenizer.encode("Hello")
    assert complete(client, prompt=ids).choices[0].text == world.text(BASE, ids, 12)
    answer = complete(client, "red", prompt=["one", "two", "three"])
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert [c.text for c in answer.choices] == [world.text("red", p, 12) for p in ("one", "two", "three")]
    assert answer.usage.completion_tokens == 36
    assert len(complete(client, prompt=[ids, ids]).choices) == 2


@pytest.mark.parametrize("model", [BASE, "blue"])
def test_a_stream_says_the_same_in_pieces(world, client, model):
    chunks = list(complete(client, model, stream=True, stream_options={"include_usage": True}))
    *pieces, last = chunks
    assert "".join(chunk.choices[0].text for chunk in pieces) == world.text(model, "Hello", 12)
    assert [chunk.choices[0].finish_reason for chunk in pieces][-1] == "length"
    assert all(chunk.usage is None for chunk in pieces)
    assert (last.choices, last.usage.completion_tokens) == ([], 12)


def test_several_prompts_stream_side_by_side(world, client):
    texts = {0: "", 1: ""}
    for chunk in complete(client, prompt=["one", "two"], stream=True):
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == {0: world.text(BASE, "one", 12), 1: world.text(BASE, "two", 12)}


MESSAGES = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}]
RENDERED = "<|system|>Be kind.<|end|><|user|>Hi<|end|><|assistant|>"


@pytest.mark.parametrize("model", [BASE, "red"])
def test_a_chat_goes_through_the_models_template(world, client, model):
    answer = client.chat.completions.create(model=model, messages=MESSAGES, max_tokens=10, temperature=0)
    message = answer.choices[0].message
    assert (message.role, message.content) == ("assistant", world.text(model, RENDERED, 10))
    assert answer.usage.prompt_tokens == len(world.tokenizer.encode(RENDERED))
    parts = [{"role": "system", "content": [{"type": "text", "text": "Be kind."}]}, MESSAGES[1]]
    again = client.chat.completions.create(
        model=model, messages=parts, max_completion_tokens=10, temperature=0
    )
    assert again.choices[0].message.content == message.content


def test_a_chat_streams(world, client):
    chunks = list(
        client.chat.completions.create(
            model="red", messages=MESSAGES, max_tokens=10, temperature=0, stream=True
        )
    )
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == world.text(
        "red", RENDERED, 10
    )
    assert chunks[-1].choices[0].finish_reason == "length"


def test_a_chat_without_a_bound_fills_the_context(client):
    answer = client.chat.completions.create(model=BASE, messages=MESSAGES, temperature=0)
    assert answer.usage.total_tokens == 256


def test_a_stop_text_ends_across_borders_of_tokens(world, client, shared):
    whole = world.text(BASE, "Hello", 40)
    stop = whole[6:9]
    before = whole[: whole.index(stop)]
    for stops in (stop, ["never there", stop]):
        choice = complete(client, max_tokens=40, stop=stops).choices[0]
        assert (choice.text, choice.finish_reason) == (before, "stop")
        chunks = list(complete(client, max_tokens=40, stop=stops, stream=True))
        assert "".join(chunk.choices[0].text for chunk in chunks) == before
        assert chunks[-1].choices[0].finish_reason == "stop"
    choice = complete(client, stop=["never there"]).choices[0]
    assert (choice.text, choice.finish_reason) == (world.text(BASE, "Hello", 12), "length")
    assert shared.leaked_pages() == 0


def test_a_stop_token_ends_and_is_not_told(world, client):
    tokens = world.tokens(BASE, world.tokenizer.encode("Hello"), 12)
    at = next(i for i, token in enumerate(tokens) if i >= 3 and token not in tokens[:i])
    answer = complete(client, extra_body={"stop_token_ids": [tokens[at]]})
    assert answer.choices[0].text == world.tokenizer.decode(tokens[:at]).rstrip("\ufffd")
    assert (answer.choices[0].finish_reason, answer.usage.completion_tokens) == ("stop", at)


def test_a_seed_makes_the_same_draw_and_another_seed_another(client):
    def draw(seed, **options):
        return complete(client, "red", max_tokens=30, temperature=1.0, seed=seed, **options).choices[0].text

    assert draw(7) == draw(7)
    assert len({draw(seed) for seed in range(4)}) > 1
    assert draw(7, top_p=1e-6) == complete(client, "red", max_tokens=30).choices[0].text


def test_models_lists_base_and_adapters(client):
    cards = {card.id: card.model_dump() for card in client.models.list()}
    assert {BASE, "red", "blue"} <= set(cards)
    assert (cards["red"]["parent"], cards["red"]["root"]) == (BASE, "red")
    assert (cards[BASE]["parent"], cards[BASE]["max_model_len"]) == (None, 256)
    assert client.models.retrieve("blue").id == "blue"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("nobody")


def test_an_unknown_model_is_a_404(client):
    with pytest.raises(openai.NotFoundError) as caught:
        complete(client, "nobody")
    assert caught.value.body == {
        "message": "The model `nobody` does not exist.",
        "type": "not_found_error",
        "param": "model",
        "code": "model_not_found",
    }


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 252}, "prompt"),
        ({"temperature": -1}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"n": 2}, "n"),
        ({"logprobs": 1}, "logprobs"),
        ({"logit_bias": {"5": 1}}, "logit_bias"),
        ({"frequency_penalty": 0.5}, "frequency_penalty"),
        ({"echo": True}, "echo"),
        ({"suffix": "x"}, "suffix"),
        ({"stop": ["a", "b", "c", "d", "e"]}, "stop"),
        ({"stop": ""}, "stop"),
        ({"seed": 2**63}, "seed"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": [256]}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": ["a", 5]}, "prompt"),
        ({"prompt": "x" * 300}, "prompt"),
        ({"extra_body": {"top_k": 5}}, "top_k"),
        ({"extra_body": {"min_tokens": 5}}, "min_tokens"),
        ({"extra_body": {"best_of": 3}}, "best_of"),
        ({"extra_body": {"whatever": 5}}, "whatever"),
        ({"extra_body": {"stream_options": {"include_usage": True}}}, "stream_options"),
    ],
)
def test_what_cannot_be_done_is_a_400_that_names_it(client, options, param):
    with pytest.raises(openai.BadRequestError) as caught:
        complete(client, **options)
    assert caught.value.body["param"] == param
    assert caught.value.body["type"] == "invalid_request_error"


def test_what_changes_nothing_is_accepted(client):
    complete(client, n=1, user="me", echo=False, logit_bias={}, presence_penalty=0)
    complete(client, extra_body={"metadata": {"a": "b"}, "top_k": -1, "best_of": 1, "ignore_eos": True})


@pytest.mark.parametrize(
    ("messages", "param"),
    [
        ([], "messages"),
        ([{"role": "nobody", "content": "x"}], "messages[0].role"),
        ([{"role": "user", "content": 5}], "messages[0].content"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "messages[0].content"),
        ([{"role": "user", "content": "x", "tool_calls": [1]}], "messages[0].tool_calls"),
        ([{"role": "assistant", "content": "x"}], "messages"),
    ],
)
def test_messages_that_cannot_be_read_are_a_400(client, messages, param):
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model=BASE, messages=messages)
    assert caught.value.body["param"] == param
