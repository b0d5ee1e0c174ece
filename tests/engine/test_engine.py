"""The whole engine on a CPU against Hugging Face transformers + PEFT, in fp32: same logits, same greedy tokens."""

import numpy as np
import pytest
import torch

from engine.adapter import AdapterSpec, spec_of_peft
from engine.blueprint import blueprint
from engine.config import ServingConfig
from engine.engine import Engine
from engine.requests import Request
from engine.runner import Runner
from engine.weights import load_weights
from tests.engine.tiny import save_adapter, save_model, tiny_model

ADAPTERS = {
    "r8": {"rank": 8},
    "r16_qv": {"rank": 16, "targets": ("q_proj", "v_proj")},
    "r64": {"rank": 64},
    "r3_mlp": {"rank": 3, "targets": ("gate_proj", "down_proj", "up_proj"), "use_rslora": True},
    "r16_o": {"rank": 16, "targets": ("o_proj", "k_proj")},
}
LOGITS_TOLERANCE = (
    2e-4  # relative error of fp32 logits: two orders of summation over at most 128 terms and 2 layers
)


class World:
    """A tiny model with five adapters, on disk and in PEFT."""

    def __init__(self, family, folder):
        self.folder = save_model(tiny_model(family, seed=3), folder / "model")
        base = tiny_model(family, seed=3)
        self.models = {None: base}
        self.specs = {}
        for seed, (name, options) in enumerate(ADAPTERS.items()):
            path = folder / name
            self.models[name] = save_adapter(base, path, seed=seed, **options)
            self.specs[name] = spec_of_peft(name, path, num_layers=2)

    def engine(self, **changes):
        options = {
            "model": str(self.folder),
            "backend": "reference",
            "dtype": "float32",
            "max_num_seqs": 8,
            "max_num_batched_tokens": 64,
            "max_model_len": 128,
            "page_tokens": 32,
            "num_pages": 200,
        }
        config = ServingConfig(**(options | changes))
        plan = blueprint(config, self.specs)
        weights = load_weights(self.folder, plan.model, torch.float32, "cpu")
        runner = Runner(plan, weights, torch.device("cpu"))
        for _ in runner.store.register_all():
            pass
        return RecordingEngine(plan, runner)

    def expected(self, adapter, prompt, count):
        """Greedy tokens and their logits from the whole sequence anew for each token: no cache, no batch."""
        ids = torch.tensor(prompt)[None]
        logits = []
        for _ in range(count):
            with torch.no_grad():
                logits.append(self.models[adapter](input_ids=ids).logits[0, -1])
            ids = torch.cat([ids, logits[-1].argmax().view(1, 1)], dim=1)
        return ids[0, len(prompt) :].tolist(), torch.stack(logits)


class RecordingEngine(Engine):
    """Keeps each request's logits, and checks the page accounts after every turn."""

    def __init__(self, plan, runner):
        super().__init__(plan, runner)
        self.logits = {}
        self._steps_logits = []
        original = runner.model.logits

        def logits(rows):
            result = original(rows)
            self._steps_logits.append(result)
            return result

        runner.model.logits = logits

    def _end(self, flight, host_s):
        rows = self._steps_logits.pop(0)
        for row, sequence in enumerate(flight.sampled.sequences):
            self.logits.setdefault(sequence.request.request_id, []).append(rows[row])
        super()._end(flight, host_s)

    def turn(self):
        moved = super().turn()
        self.scheduler.check_integrity()
        return moved


@pytest.fixture(scope="module", params=["llama", "mistral", "qwen2"])
def world(request, tmp_path_factory):
    return World(request.param, tmp_path_factory.mktemp(request.param))


def requests(count=8, seed=0, output=6):
    rng = np.random.default_rng(seed)
    names = [None, *ADAPTERS, None, "r64"]
    return [
        (
            names[index % len(names)],
            rng.integers(0, 256, int(rng.integers(1, 60))).tolist(),
            output + index % 3,
        )
        for index in range(count)
    ]


def serve(engine, wanted):
    for number, (adapter, prompt, output) in enumerate(wanted):
        generation = engine.add(
            Request(
                request_id=number,
                arrival_s=0.0,
                prompt_tokens=len(prompt),
                output_tokens=output,
                adapter=adapter,
            ),
            np.array(prompt),
        )
        wanted[number] = (adapter, prompt, output, generation)
    engine.drain()
    return [generation for *_, generation in wanted]


def check(world, engine, wanted):
    generations = serve(engine, wanted)
    for number, (generation, (adapter, prompt, output, _)) in enumerate(
        zip(generations, wanted, strict=True)
    ):
        tokens, logits = world.expected(adapter, prompt, output)
        assert generation.tokens == tokens, f"request {number} with adapter {adapter}"
        error = (torch.stack(engine.logits[number]) - logits).norm() / logits.norm()
        assert error < LOGITS_TOLERANCE, f"request {number} with adapter {adapter}: {error}"
    assert engine.scheduler.pool.num_used == engine.scheduler.residency.pages_held


def test_a_mixed_batch_equals_hugging_face_and_peft(world):
    check(world, world.engine(), requests())


def test_one_by_one_equals_hugging_face_and_peft(world):
    check(world, world.engine(max_num_seqs=1), requests())


def test_decodes_padded_past_max_num_seqs_change_nothing(world):
    engine = world.engine(max_num_seqs=9, max_num_batched_tokens=600)
    check(world, engine, requests(9))
    assert any(step.shape.decode_rows == step.shape.tokens == 9 for step in engine.steps)


def test_chunked_prefill_changes_nothing(world):
    engine = world.engine(max_num_batched_tokens=9)
    check(world, engine, requests())
    assert max(step.shape.tokens for step in engine.steps) <= 9


def test_forced_preemption_changes_nothing(world):
    pages = world.engine().blueprint.footprints["r8"].pages
    engine = world.engine(num_pages=pages + 7, max_num_seqs=8)
    wanted = [("r8", list(range(20 + n)), 40) for n in range(6)]
    check(world, engine, wanted)
    assert engine.scheduler.preemptions > 0


def test_forced_eviction_changes_nothing(world):
    footprints = world.engine().blueprint.footprints
    engine = world.engine(num_pages=max(f.pages for f in footprints.values()) + 8, max_num_seqs=2)
    check(world, engine, requests(16, seed=1))
    assert engine.scheduler.residency.evictions > 0


def test_an_adapter_without_path_gets_seeded_random_weights(world):
    specs = {"x": AdapterSpec(name="x", rank=16)}
    plan = blueprint(world.engine().blueprint.config, specs)
    images = []
    for seed in (1, 1, 2):
        runner = Runner(
            plan, load_weights(world.folder, plan.model, torch.float32, "cpu"), torch.device("cpu"), seed=seed
        )
        assert list(runner.store.register_all()) == ["x"]
        images.append(runner.store.image("x"))
    assert torch.equal(images[0], images[1])
    assert not torch.equal(images[0], images[2])
