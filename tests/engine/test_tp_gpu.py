"""Tensor parallelism on GPUs: every mode, by peers' memory and by NCCL, equals the dense computation; a rank that dies ends the engine."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from engine.build import build_runner
from engine.communicator import leave
from engine.config import ServingConfig
from tests.engine.test_tp import CONFIG, Logits, World, serve

GPUS = torch.cuda.device_count()
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(GPUS < 2, reason="needs two GPUs of one host")]
LOGITS_TOLERANCE = 1e-4  # fp32: sums over the ranks are in another order than on one GPU
MODES = [
    ("replicated", "fast"),
    ("replicated", "nccl"),
    ("block_diagonal", "fast"),
    ("slora", "fast"),
    ("slora", "nccl"),
    ("slora_published", "nccl"),
]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return World(tmp_path_factory.mktemp("tp"))


@pytest.mark.parametrize(
    "tp", [2, pytest.param(4, marks=pytest.mark.skipif(GPUS < 4, reason="needs four GPUs"))]
)
@pytest.mark.parametrize(("sharding", "collectives"), MODES)
def test_every_mode_equals_the_dense_computation(world, monkeypatch, sharding, collectives, tp):
    """In CUDA graphs, and the engine ends: NCCL would wait for graphs that still use it, and for ranks that do not part."""
    steps = Logits(monkeypatch)
    names = ["r8", "r3", f"bd{tp}"]
    config = ServingConfig(
        model=str(world.folder),
        **(CONFIG | {"backend": "triton", "tp": tp, "lora_sharding": sharding, "collectives": collectives}),
    )
    runner = build_runner(config, {name: world.specs[name] for name in names})
    try:
        for adapter, prompt, tokens, logits in serve(runner, names, steps):
            expected_tokens, expected = world.expected(adapter, prompt, len(tokens))
            error = (logits.cpu() - expected).norm() / expected.norm()
            assert error < LOGITS_TOLERANCE, (adapter, float(error))
            assert tokens == expected_tokens, adapter
    finally:
        runner.close()
        leave()


def test_a_rank_that_dies_ends_the_engine_with_an_error(world, tmp_path):
    """Its peer's kernels would wait for it for ever: the process must end, and leave nothing on the GPUs."""
    script = tmp_path / "serve.py"
    script.write_text(
        textwrap.dedent(f"""
        import os, signal
        import numpy as np
        from engine.build import build_runner
        from engine.config import ServingConfig
        from engine.engine import Engine
        from engine.requests import Request
        if __name__ == "__main__":
            config = ServingConfig(model={str(world.folder)!r}, **{CONFIG | {"backend": "triton", "tp": 2}!r})
            runner = build_runner(config, {{}})
            engine = Engine(runner.blueprint, runner)
            engine.add(Request(request_id=1, arrival_s=0.0, prompt_tokens=4, output_tokens=200), np.arange(4))
            for _ in range(3):
                engine.turn()
            os.kill(runner._followers._processes[0].pid, signal.SIGKILL)
            engine.drain()
        """)
    )
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(
        [sys.executable, str(script)],
        capture_output=True,
        text=True,
        timeout=180,
        env=environment,
        check=False,
    )
    assert done.returncode == 1, done.returncode
    assert "error: rank-1 died" in done.stderr
