"""One adapter's weights reach nobody else's outputs, whatever they are, and nor does the company that a request has in its batch.

On a CPU in fp32, bit for bit. Adapters with NaN are refused when they are read (test_peft_adapter.py); here they are written into the pool.
"""

import dataclasses

import numpy as np
import pytest
import torch

from engine.adapter import AdapterSpec
from engine.blueprint import blueprint
from engine.config import ServingConfig
from engine.engine import Engine
from engine.requests import Request
from engine.runner import Runner
from engine.sampling import GREEDY, Sampling
from engine.weights import load_weights
from tests.engine.tiny import save_model, tiny_model

SPECS = {
    spec.name: spec
    for spec in (
        AdapterSpec(name="bad", rank=16),
        AdapterSpec(name="r8", rank=8),
        AdapterSpec(name="r3", rank=3, target_modules=("gate_proj", "down_proj")),
        AdapterSpec(name="r16", rank=16, target_modules=("q_proj", "v_proj", "o_proj")),
        AdapterSpec(name="r64", rank=64),
    )
}
POISONS = {
    "nan": (float("nan"),),
    "infinities": (float("inf"), float("-inf")),
    "huge": (3e38, -3e38),  # products overflow
    "large": (1e6, -1e6),  # nothing overflows at first
}
WARM = Sampling(temperature=0.8, top_p=0.9, seed=7)


class Wanted:
    """A request to be made: adapter, prompt length and its seed, outputs, sampling."""

    def __init__(self, adapter, length=20, output=8, seed=0, sampling=GREEDY):
        self.adapter, self.output, self.sampling = adapter, output, sampling
        self.prompt = np.random.default_rng([seed, length]).integers(0, 256, length)


class Served:
    """What became of a request: its tokens, its logits a token, the KV that it wrote, and the pages it had."""

    def __init__(self):
        self.tokens, self.logits, self.kv, self.pages = [], [], None, []

    def equals(self, other):
        return (
            self.tokens == other.tokens
            and len(self.logits) == len(other.logits)
            and all(map(torch.equal, self.logits, other.logits))
            and torch.equal(self.kv, other.kv)
        )


class RecordingEngine(Engine):
    """Keeps what `Served` says, and overwrites an adapter's pages once it is loaded, but for the row table in front."""

    def __init__(self, plan, runner, poison=None):
        super().__init__(plan, runner)
        self.served = {}
        self.loaded_pages = {}
        self._steps_logits = []
        self._poison = poison
        self._logits, runner.model.logits = runner.model.logits, self._keep_logits
        self._start_load, runner.start_load = runner.start_load, self._load
        self.on_end = self._keep_kv

    def _keep_logits(self, rows):
        self._steps_logits.append(self._logits(rows))
        return self._steps_logits[-1]

    def _load(self, load):
        self._start_load(load)  # on a CPU the bytes are there when it returns
        self.loaded_pages[load.adapter] = load.pages
        if load.adapter == "bad" and self._poison is not None:
            layout = self.blueprint.layout("bad")
            pages = list(load.pages)
            bad = self.runner.buffers.pool[pages]
            start = layout.table_bytes // bad.element_size()
            values = torch.tensor(self._poison).repeat(bad.numel())[: bad.numel() - start]
            bad.view(-1)[start:] = values
            self.runner.buffers.pool[pages] = bad

    def _end(self, flight, host_s):
        rows = self._steps_logits.pop(0)
        for row, sequence in zip(rows, flight.sampled.sequences, strict=False):
            self.served[sequence.request.request_id].logits.append(row.clone())
        super()._end(flight, host_s)

    def _keep_kv(self, generation):
        served, geometry = self.served[generation.request.request_id], self.blueprint.geometry
        written = len(generation.prompt) + len(generation.tokens) - 1
        served.pages = list(generation.sequence.pages)
        shape = (-1, geometry.num_layers, 2, geometry.kv_heads, geometry.page_tokens, geometry.head_dim)
        tokens = self.runner.buffers.pool[served.pages].view(shape).permute(0, 4, 1, 2, 3, 5).flatten(0, 1)
        served.kv = tokens[:written].clone()

    def serve(self, wanted):
        """Serve requests that arrive together; return what became of each."""
        generations = []
        for item in wanted:
            number = len(self.served)
            self.served[number] = Served()
            request = Request(
                request_id=number,
                arrival_s=0.0,
                prompt_tokens=len(item.prompt),
                output_tokens=item.output,
                adapter=item.adapter,
            )
            generations.append(self.add(request, item.prompt, item.sampling))
        self.drain()
        self.scheduler.check_integrity()
        for generation in generations:
            assert generation.finish_reason == "length"
            self.served[generation.request.request_id].tokens = generation.tokens
        return [self.served[generation.request.request_id] for generation in generations]


class World:
    """A tiny model; engines over it."""

    def __init__(self, folder):
        self.folder = save_model(tiny_model("llama", seed=3), folder / "model")
        self.bad_pages = self.engine().blueprint.footprints["bad"].pages

    def engine(self, poison=None, **changes):
        options = {
            "model": str(self.folder),
            "backend": "reference",
            "dtype": "float32",
            "max_num_seqs": 16,
            "max_num_batched_tokens": 48,
            "max_model_len": 128,
            "page_tokens": 32,
            "num_pages": 200,
        }
        plan = blueprint(ServingConfig(**(options | changes)), SPECS)
        weights = load_weights(self.folder, plan.model, torch.float32, "cpu")
        runner = Runner(plan, weights, torch.device("cpu"))
        for _ in runner.store.register_all():
            pass
        return RecordingEngine(plan, runner, poison)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return World(tmp_path_factory.mktemp("isolation"))


# ---- bad weights ----

CROWD = [
    Wanted("bad", 21, seed=1),
    Wanted("r8", 33, seed=2),
    Wanted(None, 40, 12, seed=3),
    Wanted("bad", 5, 20, seed=4, sampling=WARM),
    Wanted("r3", 50, seed=5, sampling=WARM),
    Wanted("r16", 1, 20, seed=6),
    Wanted("bad", 60, seed=7),
    Wanted("r64", 30, 9, seed=8, sampling=Sampling(temperature=1.0, seed=1)),
    Wanted("r8", 17, 15, seed=9),
    Wanted(None, 9, 16, seed=10, sampling=WARM),
]


@pytest.fixture(scope="module")
def unharmed(world):
    return world.engine().serve(CROWD)


@pytest.mark.parametrize("poison", POISONS.values(), ids=POISONS)
def test_bad_weights_change_no_bit_of_others(world, unharmed, poison):
    served = world.engine(poison).serve(CROWD)
    for item, expected, found in zip(CROWD, unharmed, served, strict=True):
        assert found.equals(expected) == (item.adapter != "bad")


def test_the_crowd_shares_steps_and_pages_are_conserved(world):
    engine = world.engine(POISONS["nan"])
    served = engine.serve(CROWD)
    assert all(not row.isfinite().any() for item, found in zip(CROWD, served, strict=True)
               if item.adapter == "bad" for row in found.logits)  # fmt: skip
    assert max(step.shape.decode_rows for step in engine.steps) >= 8
    assert any(step.shape.decode_rows and step.shape.prefill_chunks > 1 for step in engine.steps)
    assert engine.scheduler.pool.num_used == engine.scheduler.residency.pages_held


def on_dirty_pages(world, poison):
    """Serve with "bad", remove it, and serve others on the pages that it and its requests had."""
    engine = world.engine(poison, prefix_caching=False, num_pages=world.bad_pages + 7)
    first = engine.serve([Wanted("bad", 40, 30, seed=number) for number in range(2)])
    dirty = {page for one in first for page in one.pages} | set(engine.loaded_pages["bad"])
    engine.unregister("bad")
    second = engine.serve([Wanted("r8", 33, 20, seed=2), Wanted(None, 40, 30, seed=3), Wanted("r3", seed=4)])
    assert all(dirty & set(found.pages) for found in second)
    assert all(dirty & set(engine.loaded_pages[name]) for name in ("r8", "r3"))
    return second


@pytest.fixture(scope="module")
def unharmed_later(world):
    return on_dirty_pages(world, None)


@pytest.mark.parametrize("poison", [POISONS["nan"], POISONS["huge"]], ids=["nan", "huge"])
def test_pages_that_held_bad_weights_and_their_kv_serve_others(world, unharmed_later, poison):
    """Freed pages are not cleared, so every read must end where its owner's data ends."""
    for expected, found in zip(unharmed_later, on_dirty_pages(world, poison), strict=True):
        assert found.equals(expected)


# ---- company ----

COMPANIES = {
    "base": (None,) * 5,
    "one adapter": ("r64",) * 5,
    "its own adapter": ("r8", "r16", "r8", "r16", "r8"),
    "small ranks": ("r3", "r3", "bad", "r3", "bad"),
    "all": ("bad", "r3", "r64", None, "r3"),
    "all, other order": (None, "r64", "bad", "r3", None),
}
LENGTHS = (13, 40, 27, 8, 31)
SUBJECTS = [
    Wanted("r8", 37, 6, seed=1),
    Wanted(None, 20, 6, seed=2, sampling=WARM),
    Wanted("r16", 30, 6, sampling=WARM),
]


@pytest.mark.parametrize("budget", [256, 48], ids=["whole prompts", "chunks"])
def test_at_equal_step_shapes_company_changes_no_bit(world, budget):
    answers, shapes = [], []
    for number, company in enumerate(COMPANIES.values()):
        engine = world.engine(max_num_batched_tokens=budget, prefix_caching=False)
        names = list(SPECS)[:: 1 if number % 2 else -1]  # other slots, so other places in the batch
        engine.serve([Wanted(name, 4, 1) for name in names])  # so that nobody waits for a load below
        first_step = len(engine.steps)
        others = [
            Wanted(name, length, 3 + place, seed=100 * number + place, sampling=(GREEDY, WARM)[place % 2])
            for place, (name, length) in enumerate(zip(company, LENGTHS, strict=True))
        ]
        answers.append(engine.serve([*others[:2], *SUBJECTS, *others[2:]])[2:5])
        shapes.append([shape_alone(step.shape) for step in engine.steps[first_step:]])
    assert all(shape == shapes[0] for shape in shapes)
    for name, answer in zip(COMPANIES, answers, strict=True):
        for subject, found, expected in zip(SUBJECTS, answer, answers[0], strict=True):
            assert found.equals(expected), f"{subject.adapter} beside {name}"


def shape_alone(shape):
    """Return a step's shape without what it says of adapters."""
    return {name: value for name, value in dataclasses.asdict(shape).items() if not name.startswith("lora_")}
