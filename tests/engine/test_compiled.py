"""Compiled modules run only where they are of these very sources, and say the same as the sources to the last digit."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from engine import compiled

ROOT = Path(__file__).parent.parent.parent

RUN = """
import json, pickle
from dataclasses import replace
from engine.config import ServingConfig
from engine.residency import AdapterFootprint
from engine import compiled, scheduler
from engine.step import Load, StepShape
from sim.costs import costs_for
from sim.profile import find_profile, load_profile
from sim.simulate import simulate
from traces.assign import Assignment, assign
from traces.synth import S_LORA, synthesize

CONFIGS = [
    ({}, 12, 50),
    ({"num_pages": 2500, "adapter_eviction": "gdsf"}, 12, 500),
    ({"num_pages": 2000}, 40, 100),
    ({"scheduler": "slo", "ttft_slo_s": 0.5, "host_memory_bytes": 2**33}, 40, 200),
    ({"scheduler": "clustered", "adapter_pool_pages": 4000, "max_adapters_per_step": 20}, 40, 200),
    ({"scheduler": "fair", "replicas": 3, "router": "adapter_affinity"}, 60, 100),
    ({"merge": "dynamic", "merge_alpha": 0.3, "merge_beta": 0.1}, 20, 10),
    ({"tp": 2}, 40, 50),
]
results = []
for changes, rate_rps, adapters in CONFIGS:
    config = ServingConfig(**changes)
    trace = synthesize(replace(S_LORA, rate_rps=rate_rps), 800, seed=1)
    trace = assign(trace, Assignment(rule="R1-slora", adapters=adapters, rank_mix=(8, 64), seed=1))
    costs = costs_for(load_profile(find_profile(config)), config)
    result = simulate(trace, config, costs, record_steps=True)
    columns = {name: repr(column.tolist()) for name, column in result.columns.items()}
    results.append([repr(result.to_json()), columns, repr(result.steps)])
for value in (Load("a", 1, (2,), 3), AdapterFootprint(1, 2, 3), StepShape(1, 2, 3)):
    assert pickle.loads(pickle.dumps(value)) == value  # other processes get such
print(json.dumps([compiled.state(), scheduler.__file__, results]))
"""

WHAT_RUNS = "import json; from engine import compiled, scheduler; print(json.dumps([compiled.state(), scheduler.__file__]))"


@pytest.mark.slow
def test_results_are_the_same_compiled(tmp_path):
    pytest.importorskip("mypyc")
    if not any(shutil.which(name) for name in ("cc", "gcc", "clang")):
        pytest.skip("no C compiler")
    for folder in ("engine", "sim", "traces"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    state, file, plain = json.loads(_python(tmp_path, "-c", RUN))
    assert state.startswith("no compiled") and Path(file) == tmp_path / "engine" / "scheduler.py"
    _python(tmp_path, "-m", "engine.compile")
    state, file, fast = json.loads(_python(tmp_path, "-c", RUN))
    assert state == "compiled modules in use" and Path(file).suffix != ".py"
    assert fast == plain
    with (tmp_path / "engine" / "pool.py").open("a", encoding="utf-8") as source:
        source.write("\n")
    state, file = json.loads(_python(tmp_path, "-c", WHAT_RUNS))
    assert "of other sources" in state and Path(file).suffix == ".py"


def _python(folder, *arguments):
    ran = subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(folder)},
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


def test_only_twins_of_these_sources_are_found(tmp_path, monkeypatch):
    monkeypatch.setattr(compiled, "FOLDER", tmp_path)
    monkeypatch.setattr(sys, "path", [])
    for name, found in (("0" * 20, False), (compiled.digest(), True)):
        (tmp_path / name).mkdir()
        compiled.folder.cache_clear()
        places = ["engine"]
        compiled.find_compiled("engine", places)
        assert places == ([str(tmp_path / name / "engine"), "engine"] if found else ["engine"])
    compiled.folder.cache_clear()


def test_each_module_has_a_source_and_counts_in_the_digest(tmp_path, monkeypatch):
    for name in ("engine", "sim"):
        shutil.copytree(
            ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__", "profiles", "runs")
        )
    monkeypatch.setattr(compiled, "ROOT", tmp_path)
    known = {compiled.digest()}
    for path in compiled.sources():
        path.write_text(path.read_text("utf-8") + "\n", "utf-8")
        known.add(compiled.digest())
    assert len(known) == len(compiled.MODULES) + 1
