"""The real engine (reference backend, a tiny model, a virtual clock) and the simulator decide alike, step by step and to the nanosecond.

The engine's own loop runs: it plans, launches and completes, and tokens are computed. Only time is made up: a step takes what the cost model
says, a load what the simulator's link says.
"""

from math import inf
from typing import Any

import numpy as np
import pytest

from engine.adapter import AdapterSpec
from engine.adapter_loader import AdapterLoader
from engine.build import build_runner
from engine.config import ServingConfig
from engine.engine import Engine
from engine.replay import _prepare, _send
from engine.replica_process import Timeline, timeline_of
from engine.runner import Runner
from sim.loads import LoadQueue
from sim.simulate import simulate
from tests.engine.tiny import save_model, tiny_model
from tests.sim.constant import ConstantCosts
from traces import Trace, TraceRequest

ADAPTERS = {f"a{rank}": AdapterSpec(name=f"a{rank}", rank=rank) for rank in (4, 8, 16, 32)}
COSTS = ConstantCosts(step=0.01, token=0.0003, kv=0.00001, host=0.004, load=0.013, byte=1e-7)


class VirtualTime:
    """Stands between an engine and its runner: steps and loads take what costs say, on a clock that they alone move."""

    def __init__(self, engine, costs):
        self.now_s = 0.0
        self._costs, self._engine, self._runner = costs, engine, engine.runner
        self._free_at_s = 0.0  # when the GPU has done all that was launched
        self._ends_s = []  # of the steps in flight
        self._links = LoadQueue(costs.load_s)
        self._copied = set()
        engine.clock = lambda: self.now_s
        engine.runner.launch, engine.runner.wait = self.launch, self.wait
        engine.runner.start_load, engine.runner.loader.finished = self.start_load, self.finished

    def launch(self, step, *rest):
        host_s = self._costs.host_s(step.shape)
        if self._engine._in_flight is None:  # it starts when the host has prepared it
            self.now_s = self._free_at_s = self.now_s + host_s
        self._free_at_s += max(self._costs.step_s(step.shape), host_s)
        self._ends_s.append(self._free_at_s)
        return Runner.launch(self._runner, step, *rest)

    def wait(self, flight):
        self.now_s = self._ends_s.pop(0)
        return Runner.wait(self._runner, flight)

    def start_load(self, load):
        Runner.start_load(self._runner, load)
        self._links.add([load], self.now_s)

    def finished(self):
        ended = self._links.ended(self.now_s)
        while not self._copied.issuperset(ended):
            self._copied.update(AdapterLoader.finished(self._runner.loader))
        self._copied.difference_update(ended)
        return ended

    def pass_until(self, arrival_s):
        """Nothing runs: let time pass to an arrival or the end of a load."""
        self.now_s = min(arrival_s, self._links.next_end_s)
        assert self.now_s < inf


def serve(runner, trace):
    """Serve a trace as `engine.replay.replay` does, in virtual time; return the engine and what became of each request."""
    runner.reset()
    engine = Engine(runner.blueprint, runner)
    time = VirtualTime(engine, COSTS)
    asked = [_prepare(runner.blueprint, request, 0) for request in trace.requests]
    sent = []
    while len(sent) < len(asked) or engine.busy:
        while len(sent) < len(asked) and asked[len(sent)].request.arrival_s <= time.now_s:
            sent.append(_send(engine, asked[len(sent)]))
        if not engine.turn():
            time.pass_until(asked[len(sent)].request.arrival_s if len(sent) < len(asked) else inf)
    return engine, [Timeline(refused=item) if isinstance(item, str) else timeline_of(item) for item in sent]


def random_trace(seed, requests=14):
    """Bursts and pauses, prompts that share their start, adapters of all sizes and none."""
    rng = np.random.default_rng(seed)
    at_s = np.cumsum(rng.choice([0.0, 0.002, 0.03, 0.3], requests, p=[0.3, 0.4, 0.25, 0.05]))
    return Trace(
        TraceRequest(
            id=number,
            arrival_s=round(float(at_s[number]), 6),
            prompt_tokens=int(rng.integers(1, 90)),
            output_tokens=int(rng.integers(1, 30)),
            adapter=str(rng.choice(list(ADAPTERS))) if rng.random() < 0.8 else None,
            prefix_blocks=(int(rng.integers(0, 3)),),
        )
        for number in range(requests)
    )


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    save_model(tiny_model("llama"), folder)
    return folder


VARIANTS: dict[str, dict[str, Any]] = {
    "plenty": {},
    "short of pages": {"num_pages": 21},
    "clustered": {"scheduler": "clustered", "max_adapters_per_step": 2, "num_pages": 40},
    "fair": {"scheduler": "fair", "adapter_eviction": "gdsf", "num_pages": 40, "prefix_caching": False},
    "slo": {"scheduler": "slo", "ttft_slo_s": 0.2},
    "fenced": {"adapter_pool_pages": 14, "num_pages": 40},
}


CASES = [
    pytest.param(
        variant, seeds, marks=[pytest.mark.slow] if slow else [], id=f"{variant}, {len(seeds)} traces"
    )
    for variant, seeds, slow in (
        ("short of pages", (0,), False),
        *((variant, (1, 2, 3), True) for variant in VARIANTS),
    )
]


@pytest.mark.parametrize(("variant", "seeds"), CASES)
def test_engine_and_simulator_take_the_same_decisions(model, variant, seeds):
    options: dict[str, Any] = {
        "model": str(model),
        "backend": "reference",
        "dtype": "float32",
        "max_num_seqs": 4,
        "max_num_batched_tokens": 32,
        "max_model_len": 128,
        "page_tokens": 32,
        "num_pages": 200,
    }
    config = ServingConfig(**{**options, **VARIANTS[variant]})
    runner = build_runner(config, ADAPTERS)
    hard = np.zeros(2)
    for seed in seeds:
        trace = random_trace(seed)
        engine, served = serve(runner, trace)
        engine.scheduler.check_integrity()
        for fast_forward in (False, True):
            result = simulate(
                trace,
                config,
                COSTS,
                plan=runner.blueprint,
                record_steps=True,
                fast_forward=fast_forward,
            )
            assert [row.shape for row in result.steps] == [record.shape for record in engine.steps]
            ends_s = [row.start_s + row.duration_s for row in result.steps]
            assert ends_s == pytest.approx([record.ended_s for record in engine.steps], abs=1e-9)
            _same_requests(result, served)
        assert result.adapter_loads == engine.scheduler.residency.loads > 0
        hard += np.array([result.facts["preemptions"], result.facts["evictions"]])
    assert variant != "short of pages" or (hard > 0).all()  # what is hard to do alike was done


def _same_requests(result, served):
    for row, timeline in enumerate(served):
        refused = result.columns["refused"][row]
        assert timeline.refused == refused
        if refused is not None:
            continue
        for name in ("scheduled_s", "first_token_s", "finish_s", "load_wait_s"):
            assert result.columns[name][row] == pytest.approx(getattr(timeline, name), abs=1e-9)
        assert result.columns["preemptions"][row] == timeline.preemptions
        assert result.columns["cached_tokens"][row] == timeline.found_tokens
