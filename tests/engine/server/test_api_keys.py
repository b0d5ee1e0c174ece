"""API keys: each has its models, and learns nothing of the others."""

import json

import openai
import pytest

from engine.errors import UserError
from engine.server.api_keys import load_api_keys
from tests.engine.server.world import running

KEYS = {"key-of-red-tenant": ["red"], "key-of-both": ["blue", "tiny-base"], "key-of-owner": "*"}


@pytest.fixture(scope="module")
def guarded(world, tmp_path_factory):
    path = tmp_path_factory.mktemp("keys") / "keys.json"
    path.write_text(json.dumps(KEYS))
    with running(world.server(options={"api_keys": path})) as process:
        yield process


def complete(client, model):
    return client.completions.create(model=model, prompt="x", max_tokens=2, temperature=0)


def test_without_a_key_there_is_nothing_but_health(guarded):
    for key in ("wrong-key-0123", "key-of-red-tenan", "key-of-red-tenant2"):
        client = guarded.client(key)
        for call in (lambda: complete(client, "red"), lambda: client.models.list()):  # noqa: B023
            with pytest.raises(openai.AuthenticationError) as caught:
                call()
            assert caught.value.body["code"] == "invalid_api_key"
            assert key not in str(caught.value)


def test_a_key_reaches_its_own_models_and_the_rest_does_not_exist(guarded):
    client = guarded.client("key-of-red-tenant")
    assert complete(client, "red").choices
    for model in ("blue", "tiny-base"):
        with pytest.raises(openai.NotFoundError) as hidden:
            complete(client, model)
        with pytest.raises(openai.NotFoundError) as absent:
            complete(client, "no-such-model")
        assert hidden.value.body["message"] == absent.value.body["message"].replace("no-such-model", model)
    assert [card.id for card in client.models.list()] == ["red"]
    assert {card.id for card in guarded.client("key-of-both").models.list()} == {"blue", "tiny-base"}


def test_only_the_owner_changes_and_watches_the_server(guarded):
    tenant = guarded.client("key-of-red-tenant")
    for path, body in (("/load_lora_adapter", {"lora_name": "x", "lora_path": "red"}),
                       ("/unload_lora_adapter", {"lora_name": "blue"})):  # fmt: skip
        with pytest.raises(openai.PermissionDeniedError):
            tenant.post(path, body=body, cast_to=str)
    owner = guarded.client("key-of-owner")
    loaded = owner.post("/load_lora_adapter", body={"lora_name": "x", "lora_path": "red"}, cast_to=str)
    assert "added successfully" in loaded
    assert complete(owner, "x").choices


@pytest.mark.parametrize(
    "text", ["{", "[]", "{}", '{"short": "*"}', '{"with a space": "*"}', '{"long-enough": "red"}',
             '{"long-enough": [5]}', '{"long-enöugh": []}']
)  # fmt: skip
def test_a_bad_file_is_one_line_without_keys(tmp_path, text):
    path = tmp_path / "keys.json"
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        load_api_keys(path)
    assert "enough" not in str(caught.value)
