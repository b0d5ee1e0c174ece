"""On a GPU: the Triton backend, in CUDA graphs, against the reference backend on the same weights, in bf16."""

import numpy as np
import pytest
import torch

from engine.adapter import AdapterSpec
from engine.blueprint import blueprint
from engine.config import ServingConfig
from engine.engine import Engine
from engine.model_shape import ModelShape
from engine.requests import Request
from engine.runner import Runner
from engine.sampling import GREEDY, Sampling
from engine.weights import random_weights
from kernels import sample_ref, top_p_threshold_ref
from kernels.sample_params import POSITION, sample_params

pytestmark = pytest.mark.gpu

# ‖logits − reference‖ / ‖reference‖ of one row after 4 layers in bf16: rounding of 2^-9 an operation, about 30 of them in sequence.
LOGITS_TOLERANCE = 3e-2

SHAPES = {
    "gqa": ModelShape(
        name="gqa",
        hidden_size=512,
        intermediate_size=1408,
        num_layers=4,
        num_heads=8,
        num_kv_heads=2,
        head_dim=128,
        vocab_size=4096,
        max_position_embeddings=4096,
    ),
    "mha": ModelShape(
        name="mha",
        hidden_size=512,
        intermediate_size=1024,
        num_layers=4,
        num_heads=8,
        num_kv_heads=8,
        head_dim=64,
        vocab_size=4096,
        max_position_embeddings=4096,
    ),
}
SPECS = {
    "r8": AdapterSpec(name="r8", rank=8),
    "r16": AdapterSpec(name="r16", rank=16, target_modules=("q_proj", "v_proj")),
    "r64": AdapterSpec(name="r64", rank=64),
    "r5": AdapterSpec(name="r5", rank=5, target_modules=("gate_proj", "up_proj", "down_proj")),
}


class Recorder(Engine):
    """Keeps the logits of every sampled row, by request."""

    def __init__(self, shape, backend, capture, **changes):
        options = {
            "model": shape.name,
            "backend": backend,
            "max_num_seqs": 16,
            "max_num_batched_tokens": 256,
            "graph_max_tokens": 256 if capture else 0,
            "max_model_len": 2048,
            "page_tokens": 64,
            "num_pages": 400,
        }
        plan = blueprint(ServingConfig(**(options | changes)), SPECS, shape)
        weights = random_weights(shape, torch.bfloat16, "cuda", seed=5)
        for layer in weights.layers:  # larger than at initialisation, so that every layer shows in the logits
            layer.o.mul_(4)
            layer.down.mul_(4)
        runner = Runner(plan, weights, torch.device("cuda"), seed=1)
        list(runner.store.register_all())
        # Where a graph runs, the logits are a tensor that each replay rewrites: it is found by the tensor of tokens it belongs to.
        self._held = {}
        original = runner.model.logits

        def logits(rows):
            self._last = original(rows)
            return self._last

        runner.model.logits = logits
        captured = {}
        for key in runner.capture():
            captured[key] = self._last
        super().__init__(plan, runner)
        self.logits = {}
        self._captured = captured
        launch = runner.launch

        def recording_launch(step, *arguments):
            flight = launch(step, *arguments)
            rows = self._captured.get(runner.key(step), self._last)
            self._held[step.index] = rows.float().clone()
            return flight

        runner.launch = recording_launch

    def _end(self, flight, host_s):
        rows = self._held.pop(flight.step.index)
        for row, sequence in enumerate(flight.sampled.sequences):
            self.logits.setdefault(sequence.request.request_id, []).append(rows[row].cpu())
        super()._end(flight, host_s)


def serve(engine, seed=0, samplings=(GREEDY,)):
    rng = np.random.default_rng(seed)
    names = [None, *SPECS]
    generations = []
    for number in range(20):
        prompt = rng.integers(0, 4096, int(rng.integers(1, 700))).astype(np.int32)
        request = Request(
            request_id=number,
            arrival_s=0.0,
            prompt_tokens=len(prompt),
            output_tokens=int(rng.integers(1, 24)),
            adapter=names[number % len(names)],
        )
        generations.append(engine.add(request, prompt, samplings[number % len(samplings)]))
    engine.drain()
    engine.scheduler.check_integrity()
    return generations


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize(
    "changes", [{}, {"num_pages": 60}, {"graph_max_tokens": 0}], ids=["graphs", "pressure", "eager"]
)
def test_triton_in_graphs_equals_the_reference(shape, changes):
    triton_engine = Recorder(shape, "triton", changes.get("graph_max_tokens", 1) > 0, **changes)
    reference_engine = Recorder(shape, "reference", False, **(changes | {"graph_max_tokens": 0}))
    ours, theirs = serve(triton_engine), serve(reference_engine)
    if "num_pages" in changes:
        assert triton_engine.scheduler.preemptions or triton_engine.scheduler.residency.evictions
    compared = 0
    for number, (one, other) in enumerate(zip(ours, theirs, strict=True)):
        rows = zip(triton_engine.logits[number], reference_engine.logits[number], strict=True)
        for index, (row, expected) in enumerate(rows):
            if one.tokens[:index] != other.tokens[:index]:
                break  # a near tie went the other way; from here the two are different texts
            error = float((row - expected).norm() / expected.norm())
            assert error < LOGITS_TOLERANCE, f"request {number}, token {index}: {error}"
            compared += 1
    total = sum(len(generation.tokens) for generation in ours)
    assert compared > 0.6 * total, f"only {compared} of {total} rows could be compared"


def test_tokens_of_graphs_are_those_that_the_reference_draws_from_the_same_logits():
    samplings = (
        GREEDY,
        Sampling(temperature=1.0, top_p=0.9, seed=1),
        Sampling(temperature=0.6, seed=2**63),
        Sampling(temperature=2.0, top_p=0.3, seed=-7),
        Sampling(temperature=1.0, top_p=1e-9, seed=3),
    )
    engine = Recorder(SHAPES["gqa"], "triton", True)
    drawn = 0
    for number, generation in enumerate(serve(engine, samplings=samplings)):
        sampling = samplings[number % len(samplings)]
        first = len(generation.prompt)
        for position, (token, row) in enumerate(
            zip(generation.tokens, engine.logits[number], strict=True), start=first
        ):
            params = torch.from_numpy(sample_params(sampling.temperature, sampling.top_p, sampling.seed))[
                None
            ]
            params[0, POSITION] = position
            thresholds = top_p_threshold_ref.top_p_threshold(row[None], params)
            assert token == sample_ref.scores(row[None], params, thresholds).argmax(), f"request {number}"
            drawn += sampling.temperature > 0
    assert drawn > 100
