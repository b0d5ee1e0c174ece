"""The HTTP surface without a client library: status codes, OpenAI's error shape, health and metrics."""

import json
from concurrent.futures import ThreadPoolExecutor

import httpx2 as httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.engine.server.world import running

BODY = {"model": "tiny-base", "prompt": "Hi", "max_tokens": 3, "temperature": 0}


@pytest.fixture(scope="module")
def http(shared):
    with httpx.Client(base_url=shared.url, timeout=30) as client:
        yield client


def error_of(answer, status):
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error["message"]


@pytest.mark.parametrize(
    "body",
    [
        b"", b"{", b"[]", b"5", b'"x"', b"\xff\xfe", b"[" * 100_000, b'{"seed": ' + b"9" * 5000 + b"}",
        b'{"model": "tiny-base", "prompt": "x", "temperature": NaN}',
        b'{"model": "tiny-base", "prompt": "\\ud800"}',
        b'{"model": "\\ud800", "prompt": "x"}',
        b'{"\\ud800": 1, "model": "tiny-base", "prompt": "x"}',
        b'{"model": "tiny-base", "prompt": "x", "stop": "\\udc00"}',
        b'{"model": "tiny-base", "prompt": "x", "temperature": 1e400}',
        b'{"model": "tiny-base", "prompt": "x", "logprobs": 0}',
        b'{"model": null, "prompt": "x"}',
        b'{"model": "tiny-base"}',
    ],
)  # fmt: skip
def test_a_body_that_is_not_a_request_is_a_400(http, body):
    for path in (
        "/v1/completions",
        "/v1/chat/completions",
        "/v1/load_lora_adapter",
        "/v1/unload_lora_adapter",
    ):
        answer = http.post(path, content=body, headers={"Content-Type": "application/json"})
        assert error_of(answer, 400)


def test_only_json_is_taken(http):
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data", ""):
        answer = http.post("/v1/completions", content=json.dumps(BODY), headers={"Content-Type": kind})
        assert "Content-Type" in error_of(answer, 415)
    kind = "application/json; charset=utf-8"
    assert http.post("/v1/completions", content=json.dumps(BODY), headers={"Content-Type": kind}).is_success


def test_a_body_may_be_too_large_whether_it_says_so_or_not(world):
    with running(world.server(limits={"max_body_bytes": 1000})) as process:
        whole = json.dumps(BODY | {"prompt": "x" * 2000}).encode()
        head = {"Content-Type": "application/json"}
        with httpx.Client(base_url=process.url) as http:
            assert "1000 bytes" in error_of(http.post("/v1/completions", content=whole, headers=head), 413)
            chunks = (whole[i : i + 100] for i in range(0, len(whole), 100))
            assert "1000 bytes" in error_of(http.post("/v1/completions", content=chunks, headers=head), 413)
            assert http.post("/v1/completions", json=BODY).is_success


def test_unknown_routes_and_methods_are_errors_in_the_same_shape(http):
    assert error_of(http.get("/v1/nothing"), 404)
    assert error_of(http.get("/v1/completions"), 405)
    assert error_of(http.post("/v1/models", json={}), 405)
    assert error_of(http.get("/docs"), 404)


def test_health_is_ok(http):
    answer = http.get("/health")
    assert (answer.status_code, answer.json()) == (200, {"status": "ok", "engine_failures": 0})


def test_metrics_count_what_was_served(world):
    with running(world.server(max_num_seqs=2)) as process, httpx.Client(base_url=process.url) as http:
        for model in ("tiny-base", "red", "red"):
            http.post("/v1/completions", json=BODY | {"model": model, "prompt": "x" * 70}).raise_for_status()
        http.post("/v1/completions", json=BODY | {"model": "nobody"})
        families = {f.name: f for f in text_string_to_metric_families(http.get("/metrics").text)}

    def value(name, **labels):
        family = families[name.removesuffix("_total").removesuffix("_count")]
        found = [s.value for s in family.samples if s.name == name and labels.items() <= s.labels.items()]
        assert len(found) == 1, (name, found)
        return found[0]

    assert value("vllm:prompt_tokens_total") == 210
    assert value("vllm:generation_tokens_total") == 9
    assert value("vllm:request_success_total", finished_reason="length") == 3
    assert value("vllm:time_to_first_token_seconds_count") == 3
    assert value("vllm:inter_token_latency_seconds_count") == 6
    assert value("vllm:e2e_request_latency_seconds_count") == 3
    assert (value("vllm:num_requests_running"), value("vllm:num_requests_waiting")) == (0, 0)
    assert value("vllm:num_preemptions_total") == 0
    assert value("vllm:prefix_cache_queries_total") > value("vllm:prefix_cache_hits_total") > 0
    assert value("vllm:kv_cache_usage_perc") == 0
    assert value("loraplan:adapter_loads_total") == 1
    assert (value("loraplan:adapter_queries_total"), value("loraplan:adapter_hits_total")) == (2, 1)
    assert value("loraplan:requests_rejected_total", status="404") == 1
    pages = [value("loraplan:pages", use=use) for use in ("free", "kv", "cached", "adapter")]
    assert sum(pages) == 160
    assert pages[3] > 0
    assert "vllm:lora_requests_info" in families


def test_a_full_queue_answers_429_and_when_to_come_again(world):
    with (
        running(world.server(limits={"max_queue": 1}, max_num_seqs=1)) as process,
        httpx.Client(base_url=process.url) as http,
    ):
        answer = http.post("/v1/completions", json=BODY | {"prompt": ["a", "b", "c"]})
        assert "queue is full" in error_of(answer, 429)
        assert int(answer.headers["Retry-After"]) >= 1
        assert http.post("/v1/completions", json=BODY | {"prompt": ["a", "b"]}).is_success


def test_what_would_come_too_late_is_turned_away_with_a_429(world):
    server = world.server(scheduler="slo", ttft_slo_s=1e-9)
    with running(server) as process, httpx.Client(base_url=process.url) as http:
        for stream in (False, True):
            answer = http.post("/v1/completions", json=BODY | {"stream": stream})
            assert error_of(answer, 429)
            assert int(answer.headers["Retry-After"]) >= 1


@pytest.mark.parametrize("scheduler", ["fcfs", "clustered", "fair", "slo"])
def test_every_scheduler_serves_a_mix(world, scheduler):
    names = ["red", "blue", "tiny-base", "red"] * 2
    expected = [world.text(name, "Hi", 3) for name in names]
    with running(world.server(scheduler=scheduler, ttft_slo_s=60.0, max_num_seqs=3)) as process:
        client = process.client()

        def ask(name):
            return client.completions.create(**BODY | {"model": name}).choices[0].text

        with ThreadPoolExecutor(len(names)) as pool:
            assert list(pool.map(ask, names)) == expected
