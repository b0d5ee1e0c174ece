"""Replicas as processes behind the router: everything is served, wherever; a replica that dies is routed around."""

import json

import numpy as np
import pytest

from engine.adapter import AdapterSpec
from engine.blueprint import blueprint
from engine.config import ServingConfig
from engine.recording import record_replays
from engine.replay import replay_on_replicas
from engine.replicas import Replicas
from engine.requests import Request
from engine.router import Router
from engine.router_costs import RouterCosts
from tests.engine.tiny import save_model, tiny_model
from traces import load
from traces.run_record import read_run

ADAPTERS = {f"a{number}": AdapterSpec(name=f"a{number}", rank=4) for number in range(4)}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("replicas")
    save_model(tiny_model("llama"), folder / "model")
    lines = [
        {
            "id": number,
            "arrival_s": 0.02 * number,
            "prompt_tokens": 5 + number,
            "output_tokens": 4 + number % 5,
            "adapter": f"a{number % 4}",
            "rank": 4,
        }
        for number in range(24)
    ]
    (folder / "trace.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def config(world, **changes):
    options = {
        "model": str(world / "model"),
        "backend": "reference",
        "dtype": "float32",
        "max_num_seqs": 4,
        "max_num_batched_tokens": 32,
        "max_model_len": 128,
        "page_tokens": 32,
        "num_pages": 60,
        "replicas": 2,
    }
    return ServingConfig(**(options | changes))


@pytest.mark.parametrize("router", ["round_robin", pytest.param("adapter_affinity", marks=pytest.mark.slow)])
def test_a_replay_on_two_replicas_serves_every_request_once(world, tmp_path, router):
    trace = load(world / "trace.jsonl")
    (totals,) = record_replays(
        config(world, router=router),
        ADAPTERS,
        [(trace, tmp_path / "run")],
        seed=0,
        load_level=None,
        progress=lambda _: None,
    )
    record = read_run(tmp_path / "run")
    requests = record.requests
    assert totals["requests"] == len(trace)
    assert requests["id"].tolist() == [request.id for request in trace.requests]
    assert requests["finish_s"].notna().all()
    assert (requests["first_token_s"] >= requests["arrival_s"]).all()
    assert (requests["finish_s"] >= requests["first_token_s"]).all()
    assert set(requests["replica"]) == set(record.steps["replica"]) == {0, 1}
    if router == "round_robin":
        assert requests["replica"].tolist() == [number % 2 for number in range(len(trace))]


def test_what_a_dead_replica_had_is_served_by_the_others(world):
    plan = blueprint(config(world, router="round_robin"), ADAPTERS)
    replicas = Replicas(plan.config, ADAPTERS)
    try:
        replicas.await_ready()
        told = []

        def kill_one(now_s, unfinished):
            told.append(unfinished)

        original = replicas.submit

        def submit(request, prompt):
            if request.request_id == 9:
                replicas._processes[1].kill()
            return original(request, prompt)

        replicas.submit = submit
        served = replay_on_replicas(replicas, plan, load(world / "trace.jsonl"), progress=kill_one)
        assert replicas.lost == [1]
        assert all(item.timeline.finish_s is not None for item in served)
        assert {item.replica for item in served[10:]} == {0}
        assert list(replicas.reports()) == [0]
    finally:
        replicas.close()


def test_a_request_that_no_replica_can_hold_is_refused_with_the_reason(world):
    plan = blueprint(config(world), ADAPTERS)
    replicas = Replicas(plan.config, ADAPTERS)
    try:
        replicas.await_ready()
        replicas.begin(0.0)
        request = Request(request_id="x", arrival_s=0.0, prompt_tokens=200, output_tokens=5)
        replicas.submit(request, np.zeros(200, dtype=np.int32))
        ended = []
        while not ended:
            ended = replicas.ended(1.0)
        ((name, _, timeline),) = ended
        assert name == "x"
        assert "max_model_len=128" in (timeline.refused or "")
    finally:
        replicas.close()


def test_the_router_passes_over_what_is_removed():
    costs = RouterCosts(prefill_token_s=1e-4, step_s=0.01, row_s=1e-4, adapter_s=1e-4, load_s=1e-3)
    for policy in ("round_robin", "least_loaded", "adapter_affinity", "cost_aware"):
        router = Router(policy, 3, costs=costs)
        router.remove(1)
        assert {router.route(f"a{number}", 10) for number in range(20)} == {0, 2}
        router.remove(0)
        assert router.route("a0", 10) == 2
        with pytest.raises(ValueError, match="last one"):
            router.remove(2)
