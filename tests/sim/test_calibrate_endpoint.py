"""Measuring a running server from outside: our own, with a tiny model on a CPU; and the fit, on a server that computes its delays."""

import json
import threading
import time
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar

import pytest

from engine.errors import UserError
from sim.__main__ import main
from sim.calibrate import Measured, Server, measure, memory_of, scaled_profile
from sim.calibrate_client import Answer, Endpoint
from sim.vllm_fit import Observation
from sim.vllm_profile import GIB, find_vllm_profile, load_vllm_profile
from sim.vllm_steps import TERMS, KernelGrid, StepFacts, terms

STEP_S = 0.004


class Fake(BaseHTTPRequestHandler):
    """Streams a token each STEP_S; adapter `cold` takes 50 ms more the first time."""

    protocol_version = "HTTP/1.1"
    seen: ClassVar[set[str]] = set()

    def log_message(self, *_):
        pass

    def do_GET(self):
        self._send(json.dumps({"data": [{"id": "base"}, {"id": "cold"}]}).encode(), "application/json")

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if body["model"] not in ("base", "cold"):
            self.send_error(404, "no such model")
            return
        if body["model"] not in self.seen:
            self.seen.add(body["model"])
            time.sleep(0.05)
        words = len(body["prompt"].split())
        self.send_response(200)
        self.send_header("Connection", "close")
        self.end_headers()
        time.sleep(words * 1e-5)
        for _ in range(body["max_tokens"]):
            time.sleep(STEP_S)
            self.wfile.write(b'data: {"choices": [{"text": "x"}]}\n\n')
            self.wfile.flush()
        usage = {"prompt_tokens": words, "completion_tokens": body["max_tokens"]}
        self.wfile.write(
            b"data: " + json.dumps({"choices": [], "usage": usage}).encode() + b"\n\ndata: [DONE]\n\n"
        )

    def _send(self, data, kind):
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


@pytest.fixture
def fake():
    Fake.seen = set()
    server = ThreadingHTTPServer(("127.0.0.1", 0), Fake)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def shipped():
    return load_vllm_profile(find_vllm_profile("llama-3.1-8b"))


def test_what_a_client_sees(fake):
    endpoint = Endpoint(fake + "/v1")
    assert endpoint.models() == ["base", "cold"]
    answer = endpoint.complete("base", 8, 5)
    assert (answer.tokens, answer.pieces, answer.prompt_tokens) == (5, 5, 9)
    assert STEP_S < answer.tpot_s < 5 * STEP_S
    with pytest.raises(UserError, match="404"):
        endpoint.complete("other", 8, 5)
    with pytest.raises(UserError):
        Endpoint("ftp://x")
    assert (
        Answer(0.1, 0.1, 3, 1, 1).tpot_s != Answer(0.1, 0.1, 3, 1, 1).tpot_s
    )  # NaN: there was no further token


def test_cold_adapters_batches_and_prompts_are_measured(fake):
    told = []
    server = Server(base="base", adapters=("cold",), max_loras=1, max_num_seqs=2)
    found = measure(Endpoint(fake), server, 60.0, lambda what, gone: told.append((what, gone)))
    assert 0.03 < found.load_s < 0.09
    assert {item.group for item in found.observations} == {"prompts", "batches"}
    batches = [item for item in found.observations if item.group == "batches"]
    assert all(STEP_S < item.seconds < 4 * STEP_S for item in batches)
    assert {item.mix[0][1].adapters for item in batches} == {0, 1}
    assert told[-1][0] == "done" and not found.late


def test_the_budget_is_kept_and_what_was_left_out_is_told(fake):
    server = Server(base="base", max_num_seqs=256)
    begun_s = time.monotonic()
    found = measure(Endpoint(fake), server, 0.5, lambda *_: None)
    assert time.monotonic() - begun_s < 5
    assert found.late and found.observations


def test_the_fit_finds_the_factors(shipped):
    """A server that is 1.5 times as slow in its steps and 3 times in its adapters."""
    factors = dict.fromkeys(TERMS, 1.5) | {name: 3.0 for name in TERMS if name.startswith("adapter")}
    grid = KernelGrid(model=shipped.model, rank=8)
    server = Server(base="base", adapters=("a",), max_loras=64, max_lora_rank=8)
    found = Measured()
    for batch in (1, 2, 8, 32, 64, 128, 200):
        for adapters in (0, batch // 2, min(batch, 60)):
            facts = StepFacts(tokens=batch, rows=batch, kv_tokens=40 * batch, adapters=adapters, slots=64)
            row = zip(TERMS, terms(facts, grid), strict=True)
            seconds = sum(shipped.seconds[name] * factors[name] * value for name, value in row)
            found.observations.append(
                Observation(name=f"{batch} {adapters}", group="b", seconds=seconds, mix=((1.0, facts),))
            )
    fitted = scaled_profile(shipped, found, server, source="here")
    assert fitted.errors["factor_adapters"] == pytest.approx(3.0, rel=0.1)
    assert fitted.errors["factor_step"] == pytest.approx(1.5, rel=0.1)
    assert fitted.errors["in_sample_mape"] < 0.02


def test_memory_is_what_the_server_tells_or_assumed(shipped):
    server = Server(base="base", max_loras=8)
    told, _ = memory_of(shipped, server, 80 * GIB, 0.9, 400_000)
    assert told.kv_bytes(8, 8, 0.9) == pytest.approx(400_000 * shipped.kv_bytes_per_token)
    guessed, said = memory_of(shipped, server, 80 * GIB, 0.9, None)
    assert "profile that was started from" in said["memory"]
    assert guessed.kv_bytes(8, 8, 0.9) > 0


def test_the_command_needs_a_model_that_is_served(fake, capsys):
    assert main(["calibrate", "--endpoint", fake, "--base", "other"]) == 2
    assert "does not serve 'other'" in capsys.readouterr().err


def test_our_own_server_is_measured(tmp_path, capsys):
    """The real thing end to end: a tiny model, two adapters, on a CPU."""
    pytest.importorskip("torch")
    pytest.importorskip("uvicorn")
    from tests.engine.server.world import World, running

    (tmp_path / "world").mkdir()
    world = World(tmp_path / "world")
    out = tmp_path / "profile.json"
    with running(world.server()) as process:
        code = main(
            [
                "calibrate", "--endpoint", process.url, "--minutes", "0.1", "--model", "llama-3.2-1b", "--max-loras", "2",
                "--max-lora-rank", "16", "--max-num-seqs", "4", "--adapters", "red,blue", "--kv-tokens", "5000", "--gpu", "cpu",
                "--max-model-len", "256", "--out", str(out), "--format", "json",
            ]
        )  # fmt: skip
    said = capsys.readouterr()
    assert code == 0, said.err
    profile = load_vllm_profile(out)
    assert profile.gpu == "cpu" and profile.seconds["step"] > 0
    assert profile.provenance["requests"] > 10
    assert "of the time" in said.err
    assert replace(profile, source="").to_json() == json.loads(said.out)
