"""Adapters that come, are replaced and go at tp 2 while requests run: every rank changes its part, or none does."""

import itertools
import os
import subprocess
import sys
import textwrap
import threading
import time
from dataclasses import replace
from multiprocessing import Pipe
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.adapter import spec_of_peft
from engine.build import build_runner
from engine.communicator import leave
from engine.config import ServingConfig
from engine.engine import Engine
from engine.errors import UserError
from engine.followers import Followers, RankError
from engine.requests import Request
from tests.engine.test_tp import CONFIG, World
from tests.engine.tiny import save_adapter

NUMBERS = itertools.count()


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return World(tmp_path_factory.mktemp("tp"))


@pytest.fixture(scope="module")
def runner(world):
    options = CONFIG | {"tp": 2, "max_adapter_rank": 16, "max_adapters": 4}
    runner = build_runner(
        ServingConfig(model=str(world.folder), lora_sharding="block_diagonal", **options),
        {"r8": world.specs["r8"]},
    )
    yield runner
    runner.close()
    leave()


@pytest.fixture
def engine(runner):
    engine = Engine(runner.blueprint, runner)
    yield engine
    for name in set(engine.scheduler.residency.footprints) - {"r8"}:
        engine.unregister(name)
    engine.drain()
    engine.scheduler.check_integrity()
    runner.store.check_integrity()
    assert len(runner.store) == 1
    runner.reset()


def adapter(world, folder, name, seed, **options):
    """Save an adapter; return its spec under an engine's name."""
    world.models[name] = save_adapter(world.models[None], folder / name, seed=seed, **options)
    return spec_of_peft(name, folder / name, 2)


def ask(engine, name, count=6):
    prompt = np.arange(5, 5 + 11)
    request = Request(
        request_id=next(NUMBERS), arrival_s=0.0, prompt_tokens=11, output_tokens=count, adapter=name
    )
    return engine.add(request, prompt)


def expected(world, name, count=6):
    return world.expected(name, list(range(5, 16)), count)[0]


def prepare(engine, spec):
    """Prepare an adapter on a thread while the engine goes on; raise what it raised."""
    results = []

    def work():
        try:
            results.append(engine.runner.store.prepare(spec))
        except Exception as error:
            results.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    while thread.is_alive():
        engine.turn()
    if isinstance(results[0], Exception):
        raise results[0]
    return results[0]


def test_an_adapter_comes_is_replaced_and_goes_while_requests_run(world, engine, tmp_path, monkeypatch):
    running = ask(engine, "r8", count=120)
    while not running.tokens:
        engine.turn()
    spec, before = adapter(world, tmp_path, "new", seed=30, rank=16), len(running.tokens)
    with monkeypatch.context() as patch:
        own = engine.runner.store.own
        original = own.prepare

        def slowly(spec):
            time.sleep(0.3)
            return original(spec)

        patch.setattr(own, "prepare", slowly)
        engine.register("new", prepare(engine, spec))
    assert len(running.tokens) > before, "steps waited for the adapter"
    first = ask(engine, "new", count=40)
    for _ in range(4):
        engine.turn()
    engine.register("new#2", prepare(engine, adapter(world, tmp_path, "new#2", seed=31, rank=4)))
    engine.unregister("new")
    second = ask(engine, "new#2")
    while second.finish_reason is None:
        engine.turn()
    engine.unregister("new#2")
    engine.drain()
    assert (running.tokens, first.tokens, second.tokens) == (
        expected(world, "r8", 120),
        expected(world, "new", 40),
        expected(world, "new#2"),
    )
    assert "new" not in engine.runner.store and "new#2" not in engine.runner.store
    with pytest.raises(ValueError, match="not registered"):
        engine.unregister("new")


def test_one_that_is_bad_for_every_rank_is_refused_with_the_reason(world, engine, tmp_path):
    spec = adapter(world, tmp_path, "bad", seed=1)
    weights = tmp_path / "bad" / "adapter_model.safetensors"
    tensors = load_file(weights)
    tensors[sorted(tensors)[0]][0, 0] = torch.nan
    save_file(tensors, weights)
    before = engine.runner.store.cache.used_bytes
    ask(engine, "r8", count=100)
    with pytest.raises(UserError, match="not finite"):
        prepare(engine, spec)
    assert engine.runner.store.cache.used_bytes == before


def test_one_that_another_rank_cannot_read_is_let_go_everywhere(world, engine, tmp_path, monkeypatch):
    spec = adapter(world, tmp_path, "good", seed=2)
    followers, before = engine.runner._followers, engine.runner.store.cache.used_bytes
    original = followers.ask
    with monkeypatch.context() as patch:
        gone = replace(spec, path=tmp_path / "nowhere")
        patch.setattr(followers, "ask", lambda kind, spec: original(kind, gone))
        with pytest.raises(UserError, match=r"rank 1: .*no such file"):
            engine.runner.store.prepare(spec)
    other = adapter(world, tmp_path, "other", seed=3)
    with monkeypatch.context() as patch:
        patch.setattr(followers, "ask", lambda kind, spec: original(kind, other))
        with pytest.raises(UserError, match="changed while they were read"):
            engine.runner.store.prepare(spec)
    assert engine.runner.store.cache.used_bytes == before
    engine.register("good", engine.runner.store.prepare(spec))
    served = ask(engine, "good")
    engine.drain()
    assert served.tokens == expected(world, "good")


def test_adapters_that_came_outlive_a_reset(world, engine, tmp_path):
    engine.register("kept", engine.runner.store.prepare(adapter(world, tmp_path, "kept", seed=4)))
    cut_short = ask(engine, "kept", count=50)
    engine.turn()
    engine.reset("a test")
    served = ask(engine, "kept")
    engine.drain()
    assert cut_short.finish_reason == "error"
    assert served.tokens == expected(world, "kept")


def test_a_rank_that_goes_fails_whoever_waits_for_it():
    ours, theirs = Pipe()
    followers = Followers([ours])
    number = followers.ask("prepare", None)
    threading.Timer(0.1, theirs.close).start()
    with pytest.raises(RankError, match="rank 1 is gone"):
        followers.questions.wait(number)
    for call in (followers.reset, followers.await_ready, followers.ended_loads):
        with pytest.raises(RankError, match="rank 1 is gone"):
            call()
    followers.close()


@pytest.mark.parametrize("closes", [False, True])
def test_a_process_that_lost_a_rank_ends_though_what_it_holds_cannot_be_freed(tmp_path, closes):
    """On a GPU that waits for kernels which wait for the rank; here sleep stands for it."""
    script = tmp_path / "serve.py"
    script.write_text(
        textwrap.dedent(f"""
        import atexit, multiprocessing, os, signal, time
        atexit.register(time.sleep, 600)
        from engine.followers import Followers, RankError
        if __name__ == "__main__":
            context = multiprocessing.get_context("spawn")
            ours, theirs = context.Pipe()
            process = context.Process(target=time.sleep, args=(600,), name="rank-1", daemon=True)
            process.start()
            followers = Followers([ours], [process])
            theirs.close()
            try:
                followers.reset()
            except RankError:
                os.kill(process.pid, signal.SIGKILL)
                if {closes}:
                    followers.close()
                raise
        """)
    )
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, str(script)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment, check=False)
    assert done.returncode == 1
    assert "error: rank-1 died" in done.stderr


def test_what_a_rank_says_ends_up_where_it_is_waited_for():
    ours, theirs = Pipe()
    followers = Followers([ours])
    theirs.send(("ready",))
    followers.await_ready()
    theirs.send(("load", "a", None))
    theirs.send(("load", "b", "a reason"))
    theirs.send(("answer", followers.ask("prepare", None), "yes"))
    assert followers.questions.wait(1) == {1: "yes"}
    assert followers.ended_loads() == [("a", None), ("b", "a reason")]
    assert followers.ended_loads() == []
    theirs.send(("user_error", "too little memory"))
    with pytest.raises(UserError, match="rank 1: too little memory"):
        followers.reset()
    followers.close()
