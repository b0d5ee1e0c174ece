"""Whatever is sent, the server answers, and never with a 500."""

import json

import httpx2 as httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

PATHS = ("/v1/completions", "/v1/chat/completions", "/v1/load_lora_adapter", "/v1/unload_lora_adapter")
ALLOWED = {200, 400, 404, 409, 413, 415}

scalars = (
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False)
    | st.text(max_size=12)
    | st.sampled_from(["\ud800", "\0", "..", "red", "tiny-base", "user", "text"])
)
values = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["role", "content", "type", "text", "x"]), inner, max_size=3)
    ),
    max_leaves=6,
)
NAMES = [
    *("model", "prompt", "messages", "max_tokens", "temperature", "top_p", "seed", "stop", "stream", "n"),
    *("stream_options", "echo", "logprobs", "logit_bias", "stop_token_ids", "ignore_eos", "user", "tools"),
    *("response_format", "max_completion_tokens", "lora_name", "lora_path", "load_inplace", "what"),
]
anything = st.dictionaries(st.sampled_from(NAMES) | st.text(max_size=5), values, max_size=6)
nearly = st.fixed_dictionaries(
    {
        "model": st.sampled_from(["tiny-base", "red"]),
        "max_tokens": st.integers(1, 4),
        "temperature": st.just(0),
    },
    optional={
        "prompt": st.text(max_size=20) | st.lists(st.integers(-1, 256), max_size=5) | values,
        "messages": st.lists(
            st.fixed_dictionaries({"role": st.sampled_from(["user", "system", "x"]), "content": values}),
            max_size=2,
        ),
        "stop": st.text(max_size=3) | st.lists(st.text(max_size=2), max_size=5),
        "stream": st.booleans(),
        "stream_options": st.dictionaries(st.sampled_from(["include_usage", "x"]), scalars, max_size=2),
        "top_p": scalars,
        "seed": scalars,
        "n": scalars,
        "lora_name": scalars,
        "lora_path": scalars,
    },
)
SETTINGS = settings(
    max_examples=80,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@pytest.fixture(scope="module")
def http(shared):
    with httpx.Client(base_url=shared.url, timeout=30) as client:
        yield client


def check(answer):
    assert answer.status_code in ALLOWED, answer.text
    if answer.status_code != 200:
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
    elif answer.headers["content-type"].startswith("text/event-stream"):
        assert answer.text.endswith("data: [DONE]\n\n")
        assert '"error"' not in answer.text


@SETTINGS
@given(path=st.sampled_from(PATHS), body=anything | nearly)
def test_json_of_any_kind(http, path, body):
    check(http.post(path, content=json.dumps(body), headers={"Content-Type": "application/json"}))


@SETTINGS
@given(path=st.sampled_from(PATHS[:2]), body=nearly)
def test_requests_that_are_nearly_right(http, path, body):
    check(http.post(path, content=json.dumps(body), headers={"Content-Type": "application/json"}))


@settings(SETTINGS, max_examples=50)
@given(
    path=st.sampled_from(PATHS),
    body=st.binary(max_size=60),
    kind=st.sampled_from(["application/json", "text/plain", "application/json;x", "?"]),
    length=st.sampled_from([None, "5", "999999999999999999999999"]),
)
def test_bytes_of_any_kind(http, path, body, kind, length):
    if length == "5":
        body = (body + b"     ")[:5]
    headers = {"Content-Type": kind} | ({"Content-Length": length} if length else {})
    if length and length != "5":
        with httpx.Client(base_url=http.base_url, timeout=30) as one:  # the body is never sent to its end
            try:
                check(one.post(path, content=body, headers=headers))
            except httpx.HTTPError:
                return
    else:
        check(http.post(path, content=body, headers=headers))


@settings(SETTINGS, max_examples=50)
@given(
    method=st.sampled_from(["GET", "HEAD", "PUT", "DELETE", "OPTIONS", "PATCH"]),
    path=st.text(st.characters(codec="ascii", exclude_characters="#?\\"), max_size=15).map(
        lambda p: f"/v1/models/{p}"
    )
    | st.sampled_from(["/", "/v1", "/health", "/metrics", "/v1/models", *PATHS]),
)
def test_paths_and_methods_of_any_kind(http, method, path):
    try:
        answer = http.request(method, path)
    except httpx.InvalidURL:
        return
    assert answer.status_code in {200, 400, 404, 405}, answer.text


def test_after_all_that_nothing_is_left(shared):
    assert shared.leaked_pages() == 0
    assert shared.server.engine.failures == 0
