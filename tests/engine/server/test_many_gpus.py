"""The server on several processes: replicas behind the router, and tensor parallelism; one that dies takes nobody along who need not go."""

import json
import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx2 as httpx
import openai
import pytest

from engine.communicator import leave
from tests.engine.server.test_adapters import load, unload
from tests.engine.server.test_command import BODY, serving
from tests.engine.server.test_faults import complete
from tests.engine.server.world import running

PROMPT = "Tell me"
WAIT_S = 30


def text(process, model, count=8, **options):
    answer = complete(process.client(), model=model, prompt=PROMPT, max_tokens=count, **options)
    return answer.choices[0].text


def read(stream):
    return "".join(chunk.choices[0].text for chunk in stream)


def metric(process, name):
    """Return a metric's values by its labels' text."""
    lines = httpx.get(f"{process.url}/metrics").text.splitlines()
    return {line.split(" ")[0]: float(line.split(" ")[1]) for line in lines if line.startswith(name + "{")}


def health(process):
    answer = httpx.get(f"{process.url}/health")
    return answer.status_code, answer.json()


def wait_for(is_so):
    until = time.monotonic() + WAIT_S
    while not is_so():
        assert time.monotonic() < until
        time.sleep(0.02)


@pytest.fixture(scope="module")
def process(world):
    with running(world.server(replicas=2, router="round_robin")) as server:
        yield server


@pytest.fixture
def http(process):
    with httpx.Client(base_url=process.url, timeout=60) as client:
        yield client


def test_two_replicas_answer_as_one_engine_would(world, process):
    names = ["tiny-base", "red", "blue"] * 4
    expected = {name: world.text(name, PROMPT, 20) for name in set(names)}
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda name: text(process, name, 20), names)) == [expected[n] for n in names]
    streams = [
        complete(process.client(), prompt=PROMPT, model=n, max_tokens=20, stream=True) for n in names[:6]
    ]
    assert [read(stream) for stream in streams] == [expected[name] for name in names[:6]]
    usage = metric(process, "vllm:prefix_cache_queries_total")
    assert len(usage) == 2 and all(usage.values())
    assert sum(metric(process, "vllm:request_success_total").values()) == 18
    assert health(process)[1]["replicas"] == {"serving": [0, 1], "lost": []}
    assert process.leaked_pages() == 0


def test_what_can_never_run_is_refused_at_once(process):
    with pytest.raises(openai.BadRequestError, match="maximum context length"):
        text(process, "red", 300)


def test_an_adapter_comes_to_all_replicas_is_replaced_and_goes(world, process, http):
    load(http, "new", "red").raise_for_status()
    assert {text(process, "new") for _ in range(4)} == {world.text("red", PROMPT, 8)}
    with complete(process.client(), prompt=PROMPT, model="new", max_tokens=200, stream=True) as stream:
        pieces = [next(iter(stream)).choices[0].text]
        load(http, "new", "green", load_inplace=True).raise_for_status()
        assert {text(process, "new") for _ in range(4)} == {world.text("green", PROMPT, 8)}
        pieces.append(read(stream))
    assert "".join(pieces) == world.text("red", PROMPT, 200)
    unload(http, "new").raise_for_status()
    with pytest.raises(openai.NotFoundError):
        text(process, "new")
    registered = metric(process, "loraplan:adapters")
    assert [value for labels, value in registered.items() if "registered" in labels] == [2, 2]


def test_a_bad_adapter_is_refused_by_all_and_harms_nobody(world, process, http):
    folder = world.copy_adapter("green", "broken-copy")
    weights = folder / "adapter_model.safetensors"
    os.truncate(weights, weights.stat().st_size - 100)
    answer = load(http, "bad", "broken-copy")
    assert answer.status_code == 400
    assert "truncated or corrupt" in answer.json()["error"]["message"]
    assert "/" not in answer.json()["error"]["message"]
    assert {text(process, "red") for _ in range(2)} == {world.text("red", PROMPT, 8)}


def test_a_client_that_goes_gives_its_pages_back(process, http):
    for _ in range(2):
        with http.stream(
            "POST", "/v1/completions", json=BODY | {"max_tokens": 240, "stream": True}
        ) as answer:
            next(answer.iter_lines())
        with pytest.raises(httpx.ReadTimeout):
            http.post("/v1/completions", json=BODY | {"max_tokens": 240}, timeout=0.05)
    assert process.leaked_pages() == 0


def test_a_replica_that_dies_takes_only_what_has_begun(world):
    server = world.server(replicas=2, router="round_robin", max_num_seqs=1)
    replicas = server.engine.thread.engine._replicas
    with running(server) as process, httpx.Client(base_url=process.url) as http:
        client = process.client()
        begun = [
            complete(client, prompt=PROMPT, model=name, max_tokens=230, stream=True)
            for name in ("red", "blue")
        ]
        firsts = [next(iter(stream)).choices[0].text for stream in begun]
        with ThreadPoolExecutor(4) as pool:  # two wait on each replica behind the one that runs
            waiting = [pool.submit(text, process, name, 12) for name in ("red", "blue", "tiny-base", "red")]
            wait_for(lambda: server.engine.num_active == 6)
            replicas._processes[0].kill()
            with pytest.raises(openai.APIError, match="died after its first token"):
                read(begun[0])
            assert health(process)[0] == 200
            assert health(process)[1]["status"] == "degraded"
            assert health(process)[1]["replicas"] == {"serving": [1], "lost": [0]}
            assert firsts[1] + read(begun[1]) == world.text("blue", PROMPT, 230)
            found = [one.result() for one in waiting]
        assert found == [world.text(name, PROMPT, 12) for name in ("red", "blue", "tiny-base", "red")]
        load(http, "new", "green").raise_for_status()
        assert text(process, "new") == world.text("green", PROMPT, 8)
        assert list(metric(process, "vllm:num_requests_running")) == [
            'vllm:num_requests_running{engine="1",model_name="tiny-base"}'
        ]
        assert process.leaked_pages() == 0
        stream = complete(client, max_tokens=230, stream=True)
        next(iter(stream))
        replicas._processes[1].kill()
        with pytest.raises(openai.APIError, match="none is left"):
            read(stream)
        wait_for(lambda: health(process)[0] == 503)
        assert health(process)[1]["status"] == "down"
        with pytest.raises(openai.InternalServerError):
            text(process, "red")
        assert load(http, "newer", "green").status_code == 503
        process.leaked_pages = lambda: 0


def test_tensor_parallel_server_takes_adapters_while_it_runs(world):
    with (
        running(world.server(tp=2, page_tokens=64, num_pages=120)) as process,
        httpx.Client(base_url=process.url, timeout=60) as http,
    ):
        with complete(process.client(), prompt=PROMPT, model="red", max_tokens=150, stream=True) as stream:
            first = next(iter(stream)).choices[0].text
            load(http, "new", "green").raise_for_status()
            assert text(process, "new") == world.text("green", PROMPT, 8)
            load(http, "new", "blue", load_inplace=True).raise_for_status()
            assert text(process, "new") == world.text("blue", PROMPT, 8)
            assert first + read(stream) == world.text("red", PROMPT, 150)
        unload(http, "new").raise_for_status()
        assert load(http, "x", "nothing").status_code == 404
        assert process.leaked_pages() == 0
    leave()


def descendants(pid):
    found, left = [], [pid]
    while left:
        for task in Path(f"/proc/{left.pop()}/task").glob("*/children"):
            left += map(int, task.read_text().split())
        found += left
    return set(found)


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"replicas": 2}, marks=pytest.mark.slow),
        pytest.param({"tp": 2}, marks=pytest.mark.slow),
        pytest.param({"replicas": 2, "tp": 2}, marks=pytest.mark.slow),
    ],
)
def test_sigterm_to_all_processes_drains_and_leaves_none_behind(world, tmp_path, changes):
    config = json.loads((world.folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | changes | {"page_tokens": 64}))
    with serving(world, "--config", tmp_path / "config.json") as (process, http):
        results = {}

        def ask():
            results["text"] = http.post("/v1/completions", json=BODY).json()["choices"][0]["text"]

        thread = threading.Thread(target=ask)
        thread.start()
        wait_for(lambda: 'model_name="tiny-base"} 1.0' in http.get("/metrics").text)
        children = descendants(process.pid)
        assert len(children) >= changes.get("replicas", 1) * changes.get("tp", 1)
        for pid in (process.pid, *children):  # as systemd does
            os.kill(pid, signal.SIGTERM)
        thread.join()
        assert process.wait(40) == 0
    assert results["text"] == world.text("red", BODY["prompt"], 200)
    wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in children))


@pytest.mark.slow
def test_a_rank_that_dies_ends_its_replica_alone(world):
    server = world.server(replicas=2, tp=2, page_tokens=64, num_pages=120, router="round_robin")
    replicas = server.engine.thread.engine._replicas
    with running(server) as process, httpx.Client(base_url=process.url, timeout=60) as http:
        (rank,) = (
            pid
            for pid in descendants(replicas._processes[0].pid)
            if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()
        )
        os.kill(rank, signal.SIGKILL)
        wait_for(lambda: health(process)[1]["status"] == "degraded")
        assert {text(process, "red") for _ in range(2)} == {world.text("red", PROMPT, 8)}
        load(http, "new", "green").raise_for_status()
        assert text(process, "new") == world.text("green", PROMPT, 8)
