"""What may go wrong while requests run: each ends or gets an error that says why, no page is lost, and the server keeps serving."""

import concurrent.futures
import socket
import threading

import httpx2 as httpx
import openai
import pytest

from tests.engine.server.world import break_once, running

BASE = "tiny-base"


def complete(client, **options):
    return client.completions.create(
        **({"model": BASE, "prompt": "Hello", "max_tokens": 8, "temperature": 0} | options)
    )


@pytest.fixture(scope="module")
def process(world):
    with running(world.server()) as server:
        yield server


@pytest.mark.parametrize(
    ("owner", "method"),
    [
        ("scheduler", "schedule"),
        ("runner", "launch"),
        ("runner", "wait"),
        ("scheduler", "complete"),
        ("", "turn"),
    ],
)
def test_an_exception_in_the_worker_ends_what_runs_and_the_server_goes_on(world, process, owner, method):
    client = process.client()
    before = process.server.engine.failures
    streams = [complete(client, model=m, max_tokens=200, stream=True) for m in ("red", BASE, "blue")]
    for stream in streams:
        next(iter(stream))
    break_once(process, owner, method)
    for stream in streams:
        with pytest.raises(openai.APIError) as caught:
            list(stream)
        assert "started anew" in caught.value.message
        assert "secret" not in str(caught.value.body)
    health = httpx.get(f"{process.url}/health").json()
    assert health == {"status": "ok", "engine_failures": before + 1}
    for model in (BASE, "red", "blue"):
        assert complete(client, model=model).choices[0].text == world.text(model, "Hello", 8)
    assert process.leaked_pages() == 0


def test_an_exception_before_the_first_token_is_a_503(process):
    break_once(process, "scheduler", "schedule")
    with pytest.raises(openai.InternalServerError) as caught:
        complete(process.client())
    assert (caught.value.status_code, caught.value.body["code"]) == (503, "engine_error")


def test_adapters_that_came_while_serving_outlive_a_failure(world, process):
    with httpx.Client(base_url=process.url) as http:
        http.post(
            "/v1/load_lora_adapter", json={"lora_name": "kept", "lora_path": "green"}
        ).raise_for_status()
        break_once(process, "runner", "launch")
        with pytest.raises(openai.InternalServerError):
            complete(process.client(), model="kept")
        assert complete(process.client(), model="kept").choices[0].text == world.text("green", "Hello", 8)
        http.post("/v1/unload_lora_adapter", json={"lora_name": "kept"}).raise_for_status()


def test_an_engine_that_cannot_be_started_anew_says_so(world):
    server = world.server()
    with running(server) as process:
        original = server.engine.thread.engine.reset
        break_once(process, "", "reset")
        break_once(process, "scheduler", "schedule")
        with pytest.raises(openai.InternalServerError):
            complete(process.client())
        assert httpx.get(f"{process.url}/health").status_code == 503
        with pytest.raises(openai.InternalServerError, match="could not be started anew"):
            complete(process.client())
        assert httpx.get(f"{process.url}/metrics").status_code == 503
        server.engine.thread.dead = False  # so that the accounts can be looked at
        process.inspect(lambda engine: original("test"))


def test_a_client_that_goes_gives_its_pages_back(world, process):
    for options in ({"stream": True}, {"stream": False}, {"stream": False, "stop": ["never"]}):
        body = {"model": "red", "prompt": "Hello", "max_tokens": 240, "temperature": 0} | options
        with httpx.Client(base_url=process.url) as http:
            aborted = threading.Event()
            watch_abort(process, aborted)
            if options["stream"]:
                with http.stream("POST", "/v1/completions", json=body) as answer:
                    next(answer.iter_lines())
            else:
                with pytest.raises(httpx.ReadTimeout):
                    http.post("/v1/completions", json=body, timeout=0.05)
        assert aborted.wait(10)
        assert process.leaked_pages() == 0
    assert complete(process.client()).choices[0].text == world.text(BASE, "Hello", 8)


def watch_abort(process, event):
    """Set an event when the engine is told to abort next."""

    def arm(engine):
        original = engine.abort

        def abort(*arguments, **options):
            engine.abort = original
            event.set()
            return original(*arguments, **options)

        engine.abort = abort

    process.inspect(arm)


def test_a_client_that_goes_while_it_waits_leaves_the_queue(world):
    with running(world.server(max_num_seqs=1)) as process, httpx.Client(base_url=process.url) as http:
        body = {"model": BASE, "prompt": "Hello", "max_tokens": 240, "temperature": 0}
        with http.stream("POST", "/v1/completions", json=body | {"stream": True}) as answer:
            next(answer.iter_lines())
            with httpx.Client(base_url=process.url) as other, pytest.raises(httpx.ReadTimeout):
                other.post("/v1/completions", json=body, timeout=0.05)
        assert process.leaked_pages() == 0


def test_a_pool_without_room_makes_requests_wait_and_all_end_well(world):
    names = [BASE, "red", "blue", "red"] * 4
    expected = {name: world.text(name, "Hello there", 60) for name in set(names)}
    with running(world.server(num_pages=24, max_num_seqs=8)) as process:
        client = process.client()
        with concurrent.futures.ThreadPoolExecutor(16) as pool:
            asked = [
                pool.submit(complete, client, model=n, prompt="Hello there", max_tokens=60) for n in names
            ]
            texts = [one.result().choices[0].text for one in asked]
        assert texts == [expected[name] for name in names]
        assert process.leaked_pages() == 0


def test_what_the_pool_can_never_hold_is_a_400(world):
    with running(world.server(num_pages=9, adapters=("red",))) as process:
        with pytest.raises(openai.BadRequestError) as caught:
            complete(process.client(), model="red", prompt=[1] * 200, max_tokens=56)
        assert "pages" in caught.value.body["message"]
        assert complete(process.client()).choices


def test_half_a_request_and_nonsense_harm_nobody(world, process):
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 999\r\n\r\n"
    for sent in (
        head + b'{"model":',
        b"\x00\xff\r\n\r\n",
        b"GET /",
        b"A" * 100_000,
        b"PUT / HTTP/9.9\r\n\r\n",
    ):
        with socket.create_connection(("127.0.0.1", process.port)) as connection:
            connection.sendall(sent)
    assert complete(process.client()).choices[0].text == world.text(BASE, "Hello", 8)


def test_what_does_not_finish_while_draining_ends_with_an_error_that_says_why(world):
    with running(world.server(limits={"drain_timeout_s": 0.0})) as process:
        client = process.client()
        stream = complete(client, max_tokens=240, stream=True)
        next(iter(stream))
        process.run(process.server.drain())
        with pytest.raises(openai.APIError, match="shutting down"):
            list(stream)
        with pytest.raises(openai.InternalServerError, match="shutting down"):
            complete(client)
        assert httpx.get(f"{process.url}/health").json()["status"] == "draining"


@pytest.mark.slow
def test_500_connections_at_once_are_all_answered(world):
    """A fifth of them leave before the end."""
    expected = {name: world.text(name, "Hello", 4) for name in (BASE, "red", "blue")}

    def ask(number):
        name = (BASE, "red", "blue")[number % 3]
        body = {"model": name, "prompt": "Hello", "max_tokens": 4, "temperature": 0}
        with httpx.Client(base_url=process.url, timeout=300) as http:
            barrier.wait()
            if number % 5 == 0:
                body["max_tokens"] = 200
                with pytest.raises(httpx.TimeoutException):
                    http.post("/v1/completions", json=body, timeout=1)
                return True
            return http.post("/v1/completions", json=body).json()["choices"][0]["text"] == expected[name]

    barrier = threading.Barrier(500)
    with running(world.server(max_num_seqs=32)) as process:
        with concurrent.futures.ThreadPoolExecutor(500) as pool:
            assert all(pool.map(ask, range(500)))
        assert process.leaked_pages() == 0
