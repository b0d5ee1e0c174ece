"""Tensor parallelism on a CPU, ranks as processes that talk by gloo: every mode equals the dense computation of Hugging Face + PEFT."""

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from peft.tuners.lora.config import BdLoraConfig

from engine.adapter import AdapterSpec, spec_of_peft
from engine.build import build_runner
from engine.communicator import leave
from engine.config import ServingConfig
from engine.engine import Engine
from engine.errors import UserError
from engine.model import Model
from engine.requests import Request
from engine.runner import Runner
from tests.engine.tiny import save_adapter, save_model, tiny_model

COLUMN = ["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"]
ROW = ["o_proj", "down_proj"]
DENSE = {"r8": {"rank": 8}, "r3": {"rank": 3, "targets": ["q_proj", "o_proj", "up_proj", "down_proj"]}}
BLOCKS = {"bd2": 2, "bd4": 4, "bd8": 8}
LOGITS_TOLERANCE = 1e-5
CONFIG = {
    "max_num_seqs": 8,
    "max_num_batched_tokens": 32,
    "max_model_len": 256,
    "page_tokens": 64,
    "num_pages": 120,
    "backend": "reference",
    "dtype": "float32",
}


class World:
    """A tiny model and adapters on disk, and what Hugging Face + PEFT make of them."""

    def __init__(self, folder: Path, kv_heads: int = 4):
        model = tiny_model(
            "llama", num_key_value_heads=kv_heads, num_attention_heads=8, hidden_size=128, head_dim=16
        )
        self.folder = save_model(model, folder / "model")
        self.models = {None: model}
        self.specs = {}
        for seed, (name, options) in enumerate(DENSE.items()):
            self._add(folder, name, save_adapter(model, folder / name, seed=seed, **options))
        for seed, (name, nblocks) in enumerate(BLOCKS.items(), start=10):
            blocks = BdLoraConfig(target_modules_bd_a=ROW, target_modules_bd_b=COLUMN, nblocks=nblocks)
            self._add(folder, name, save_adapter(model, folder / name, rank=8, seed=seed, use_bdlora=blocks))

    def _add(self, folder: Path, name: str, model: PeftModel) -> None:
        self.models[name] = model
        self.specs[name] = spec_of_peft(name, folder / name, 2)

    def expected(self, adapter, prompt, count):
        ids, logits = torch.tensor(prompt)[None], []
        for _ in range(count):
            with torch.no_grad():
                logits.append(self.models[adapter](input_ids=ids).logits[0, -1])
            ids = torch.cat([ids, logits[-1].argmax().view(1, 1)], dim=1)
        return ids[0, len(prompt) :].tolist(), torch.stack(logits)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return World(tmp_path_factory.mktemp("tp"))


@pytest.fixture
def start():
    """Build a tensor-parallel runner whose ranks end with the test."""
    runners = []

    def build(world, names, **changes):
        config = ServingConfig(model=str(world.folder), **(CONFIG | changes))
        runner = build_runner(config, {name: world.specs[name] for name in names})
        runners.append(runner)
        return runner

    yield build
    for runner in runners:
        runner.close()
    leave()


class Logits:
    """Keeps every step's logits, of runners built after it: a captured graph rewrites the same tensor in each replay."""

    def __init__(self, monkeypatch):
        self._of, self._last, self._steps = {}, None, []
        logits, forward, run = Model.logits, Runner._forward, Runner.run

        def note_logits(model, rows):
            self._last = logits(model, rows)
            return self._last

        def note_forward(runner, key, layout):
            tokens = forward(runner, key, layout)
            self._of[id(tokens)] = (tokens, self._last)  # with the tensor, as another one could get its id
            return tokens

        def note_run(runner, key, layout):
            tokens = run(runner, key, layout)
            self._steps.append(self._of[id(tokens)][1].clone())
            return tokens

        monkeypatch.setattr(Model, "logits", note_logits)
        monkeypatch.setattr(Runner, "_forward", note_forward)
        monkeypatch.setattr(Runner, "run", note_run)

    def pop(self):
        """Return the logits of the step that ran first of those not asked for."""
        return self._steps.pop(0)


def serve(runner, names, logits, count=10):
    """Serve requests of a mix of adapters; return (adapter, prompt, tokens, logits) of each."""
    rng = np.random.default_rng(3)
    engine = Engine(runner.blueprint, runner)
    rows = {}
    end = engine._end

    def note(flight, host_s):
        step_logits = logits.pop()
        for row, sequence in enumerate(flight.sampled.sequences):
            rows.setdefault(sequence.request.request_id, []).append(step_logits[row])
        end(flight, host_s)

    engine._end = note
    generations = []
    for number in range(count):
        adapter = [None, *names][number % (len(names) + 1)]
        prompt = rng.integers(0, 256, int(rng.integers(1, 60)))
        request = Request(
            request_id=number, arrival_s=0.0, prompt_tokens=len(prompt), output_tokens=5, adapter=adapter
        )
        generations.append((adapter, prompt.tolist(), engine.add(request, prompt)))
    engine.drain()
    engine.scheduler.check_integrity()
    return [(a, p, g.tokens, torch.stack(rows[n])) for n, (a, p, g) in enumerate(generations)]


@pytest.mark.parametrize(
    ("tp", "sharding", "names"),
    [
        (2, "replicated", ["r8", "r3", "bd2", "bd4"]),
        (2, "block_diagonal", ["r8", "r3", "bd2", "bd4"]),
        (2, "slora", ["r8", "r3", "bd2"]),
        pytest.param(2, "slora_published", ["r8", "r3"], marks=pytest.mark.slow),
        pytest.param(4, "slora", ["r8", "r3", "bd4"], marks=pytest.mark.slow),  # four processes on two cores
        pytest.param(4, "block_diagonal", ["r8", "r3", "bd4"], marks=pytest.mark.slow),
        pytest.param(4, "slora_published", ["r8", "r3"], marks=pytest.mark.slow),
        pytest.param(8, "replicated", ["r8", "r3"], marks=pytest.mark.slow),  # eight processes on two cores
        pytest.param(8, "slora", ["r8", "r3", "bd8"], marks=pytest.mark.slow),
        pytest.param(8, "slora_published", ["r8", "r3"], marks=pytest.mark.slow),
    ],
    ids=[
        "2-replicated",
        "2-block_diagonal",
        "2-slora",
        "2-slora_published",
        "4-slora",
        "4-block_diagonal",
        "4-slora_published",
        "8-replicated-kv-heads-shared",
        "8-slora-kv-heads-shared",
        "8-slora_published-kv-heads-shared",
    ],
)
def test_every_mode_equals_the_dense_computation(world, start, monkeypatch, tp, sharding, names):
    equals_the_dense_computation(world, start, monkeypatch, tp, sharding, names)


@pytest.mark.slow  # eight processes on two cores
def test_block_diagonal_over_as_many_ranks_as_kv_heads(tmp_path, start, monkeypatch):
    equals_the_dense_computation(
        World(tmp_path, kv_heads=8), start, monkeypatch, 8, "block_diagonal", ["r8", "bd8"]
    )


def equals_the_dense_computation(world, start, monkeypatch, tp, sharding, names):
    steps = Logits(monkeypatch)
    runner = start(world, names, tp=tp, lora_sharding=sharding)
    for adapter, prompt, tokens, logits in serve(runner, names, steps):
        expected_tokens, expected = world.expected(adapter, prompt, len(tokens))
        assert tokens == expected_tokens, adapter
        assert (logits - expected).norm() / expected.norm() < LOGITS_TOLERANCE, adapter


def test_without_tensor_parallelism_block_diagonal_runs_as_dense(world, start, monkeypatch):
    steps = Logits(monkeypatch)
    runner = start(world, ["bd2", "bd4"])
    for adapter, prompt, tokens, _ in serve(runner, ["bd2", "bd4"], steps, count=6):
        assert tokens == world.expected(adapter, prompt, len(tokens))[0]


BASE_COLLECTIVES = {"all_reduce": 2 * 2 + 1, "all_gather": 1}  # two layers, the embedding; the logits


@pytest.mark.parametrize(
    ("sharding", "names", "further"),
    [
        ("block_diagonal", ["r8", "bd2"], {"all_reduce": 0, "all_gather": 0}),
        ("slora", ["r8"], {"all_reduce": 2 * 2, "all_gather": 2 * 2}),  # o, down; qkv, gate and up
        ("slora_published", ["r8"], {"all_reduce": 2 * 2, "all_gather": 2 * 5}),
    ],
)
def test_collectives_beyond_the_bases(world, start, sharding, names, further):
    runner = start(world, names, tp=2, lora_sharding=sharding)
    issued = {}
    for adapters in ([None], names):
        before = runner.model.communicator.issued.copy()
        engine = Engine(runner.blueprint, runner)
        for number in range(4):
            request = Request(
                request_id=number,
                arrival_s=0.0,
                prompt_tokens=8,
                output_tokens=4,
                adapter=adapters[number % len(adapters)],
            )
            engine.add(request, np.arange(8))
        engine.drain()
        after = runner.model.communicator.issued
        issued[adapters[0]] = {kind: (after[kind] - before[kind]) / len(engine.steps) for kind in after}
        runner.reset()
    assert issued[None] == BASE_COLLECTIVES
    assert issued[names[0]] == {kind: BASE_COLLECTIVES[kind] + further[kind] for kind in further}


@pytest.mark.parametrize(
    ("tp", "name", "reason"),
    [
        (4, "bd2", r"'bd2': nblocks \(=2\) must be a multiple of tp \(=4\)"),
        (8, "bd8", r"'bd8': .* KV heads are held by several GPUs: tp=8, 4 KV heads"),
    ],
)
def test_what_cannot_run_is_refused_with_the_reason(world, tp, name, reason):
    changes = {"tp": tp, "lora_sharding": "block_diagonal"}
    config = ServingConfig(model=str(world.folder), **(CONFIG | changes))
    with pytest.raises(UserError, match=reason):
        build_runner(config, {name: world.specs[name]})


def test_an_adapter_that_no_rank_can_read_fails_its_requests_alone(world, start, tmp_path):
    gone = save_adapter(
        tiny_model("llama", num_key_value_heads=4, num_attention_heads=8, hidden_size=128, head_dim=16),
        tmp_path / "gone",
    )
    del gone
    world.specs["gone"] = spec_of_peft("gone", tmp_path / "gone", 2)
    size = 40 * 2**20
    runner = start(world, ["r8", "gone"], tp=2, lora_sharding="replicated", host_memory_bytes=size)
    (tmp_path / "gone" / "adapter_model.safetensors").unlink()
    own = runner.store.own
    for adapter in list(own.cache):
        with own._lock:
            own.cache.remove(adapter)
            own._release(adapter)
    engine = Engine(runner.blueprint, runner)
    bad, good = (
        engine.add(
            Request(request_id=name, arrival_s=0.0, prompt_tokens=4, output_tokens=3, adapter=name),
            np.arange(4),
        )
        for name in ("gone", "r8")
    )
    engine.drain()
    assert (bad.finish_reason, good.finish_reason) == ("error", "length")
    assert "no such file" in (bad.error or "")
    engine.scheduler.check_integrity()


def test_a_rank_that_dies_ends_the_engine_with_an_error(world, tmp_path):
    script = tmp_path / "serve.py"
    script.write_text(
        textwrap.dedent(f"""
        import os, signal, sys, time
        import numpy as np
        from engine.build import build_runner
        from engine.config import ServingConfig
        from engine.engine import Engine
        from engine.requests import Request
        if __name__ == "__main__":
            runner = build_runner(ServingConfig(model={str(world.folder)!r}, tp=2, **{CONFIG!r}), {{}})
            engine = Engine(runner.blueprint, runner)
            engine.add(Request(request_id=1, arrival_s=0.0, prompt_tokens=4, output_tokens=200), np.arange(4))
            for _ in range(3):
                engine.turn()
            os.kill(runner._followers._processes[0].pid, signal.SIGKILL)
            engine.drain()
            time.sleep(30)
        """)
    )
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, timeout=120, env=environment
    )
    assert done.returncode == 1, done.returncode
    assert "rank" in done.stderr or "gloo" in done.stderr.lower()
    assert signal.SIGKILL.name != done.stdout


def test_random_adapters_and_weights_need_no_files(start):
    config = ServingConfig(model="llama-3.1-8b", tp=2)
    spec = AdapterSpec(name="random")
    from engine.blueprint import blueprint

    plan = blueprint(config, {"random": spec})
    alone = blueprint(config.with_changes(tp=1), {"random": spec})
    assert plan.footprints["random"].weight_bytes > alone.footprints["random"].weight_bytes / 2
