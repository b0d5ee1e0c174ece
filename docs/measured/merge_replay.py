"""A skewed trace under merge=never, hot and dynamic: replayed on one GPU, and predicted.

    python -m docs.measured.merge_replay OUT            replay (a GPU; OUT gets trace, configurations, run records, results.json)
    python -m docs.measured.merge_replay OUT --predict  simulate the same and set it beside what OUT holds (no GPU)
    python -m docs.measured.merge_replay OUT --tiny     dry run on a CPU

32 adapters of rank 16 on all linears, one of them with 70 % of the requests; S-LoRA's lengths; more than the GPU can serve, so that
throughput is capacity.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from engine.config import ServingConfig
from traces import Trace, load
from traces.native import save
from traces.synth import S_LORA, Uniform, Workload, synthesize

ADAPTERS, RANK, HOT_SHARE, SEED = 32, 16, 0.7, 1
MODES: dict[str, dict[str, Any]] = {
    "never": {},
    "hot": {"merge": "hot", "merge_adapter": "adapter-00"},
    "dynamic": {"merge": "dynamic"},
    "dynamic-0.6": {"merge": "dynamic", "merge_alpha": 0.6, "merge_beta": 0.4},
}
SHOWN = ("throughput_rps", "output_tokens_per_s", "ttft_p50_s", "tpot_p50_s")
TINY_MODEL = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 256, "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "hidden_act": "silu", "tie_word_embeddings": False,
}  # fmt: skip


def main() -> int:
    """Replay or predict; return 0, or 1 where a replay failed."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    options.add_argument("out", type=Path)
    options.add_argument("--predict", action="store_true")
    options.add_argument("--tiny", action="store_true")
    options.add_argument("--modes", default="never,hot,dynamic-0.6")
    options.add_argument("--requests", type=int, default=450)
    options.add_argument("--rate", type=float, default=60.0)
    options.add_argument("--hot-share", type=float, default=HOT_SHARE)
    given = options.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    path = given.out / "trace.jsonl.gz"
    if not path.exists():
        save(skewed(given.requests if not given.tiny else 8, given.rate, given.hot_share, given.tiny), path)
    modes = given.modes.split(",")
    if given.predict:
        predict(given.out, load(path), modes)
        return 0
    return replay(given.out, path, modes, given.tiny)


def skewed(requests: int, rate_rps: float, hot_share: float, tiny: bool) -> Trace:
    """Draw the trace: one adapter with its share, the others alike."""
    lengths = Uniform(low=2, high=12)
    workload = (
        Workload(rate_rps=rate_rps, cv=1.0, prompt=lengths, output=lengths)
        if tiny
        else replace(S_LORA, rate_rps=rate_rps)
    )
    base = synthesize(workload, requests, SEED)
    rng = np.random.default_rng([SEED, 7])
    index = np.where(rng.random(requests) < hot_share, 0, rng.integers(1, ADAPTERS, requests))
    columns = replace(
        base.columns,
        adapter_index=index.astype(np.int64),
        adapter_names=tuple(f"adapter-{number:02d}" for number in range(ADAPTERS)),
        adapter_ranks=(RANK if not tiny else 4,) * ADAPTERS,
    )
    return Trace.from_columns(columns, "skewed")


def config_of(out: Path, mode: str, tiny: bool) -> ServingConfig:
    """Return a mode's configuration: the default one, or a tiny one on the CPU."""
    if not tiny:
        return ServingConfig(**MODES[mode])
    folder = out / "tiny.config.json"
    folder.write_text(json.dumps(TINY_MODEL), encoding="utf-8")
    return ServingConfig(
        model=str(folder), backend="reference", dtype="float32", max_num_seqs=4, max_num_batched_tokens=64, max_model_len=64,
        page_tokens=32, num_pages=200, **MODES[mode],
    )  # fmt: skip


def replay(out: Path, trace: Path, modes: list[str], tiny: bool) -> int:
    """Replay in each mode, a process each; write and print the totals."""
    results: dict[str, Any] = {}
    for mode in modes:
        config = out / f"{mode}.config.json"
        config.write_text(json.dumps(config_of(out, mode, tiny).to_json()), encoding="utf-8")
        command = [sys.executable, "-m", "engine", "replay", "--trace", str(trace), "--config", str(config)]
        command += ["--out", str(out / "runs" / mode), "--load-level", "2", "--format", "json"]
        began = time.monotonic()
        ended = subprocess.run(command, stdout=subprocess.PIPE, text=True)
        took_s = round(time.monotonic() - began, 1)
        if ended.returncode:
            results[mode] = {"error": ended.returncode, "took_s": took_s}
        else:
            totals = json.loads(ended.stdout.strip().splitlines()[-1])
            results[mode] = {name: totals[name] for name in SHOWN} | {
                "took_s": took_s,
                "merged_steps": merged_steps(out, mode),
            }
        print(mode, json.dumps(results[mode]), flush=True)
        (out / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    return 1 if any("error" in row for row in results.values()) else 0


def merged_steps(out: Path, mode: str) -> dict[str, int]:
    """Return how many steps ran, and in how many no row needed LoRA."""
    from traces.run_record import read_run

    steps = read_run(out / "runs" / mode).steps
    return {"steps": len(steps), "without_lora": int((steps["lora_tokens"] == 0).sum())}


def predict(out: Path, trace: Trace, modes: list[str]) -> None:
    """Simulate each mode and print it beside what was measured."""
    from sim.costs import costs_for
    from sim.profile import find_profile, load_profile
    from sim.simulate import simulate

    results = out / "results.json"
    measured = json.loads(results.read_text(encoding="utf-8")) if results.exists() else {}
    profile = load_profile(find_profile(ServingConfig()))
    predicted = {}
    for mode in modes:
        config = ServingConfig(**MODES[mode])
        found = simulate(trace, config, costs_for(profile, config)).metrics
        predicted[mode] = {name: round(float(found[name]), 5) for name in SHOWN}
        print(f"{mode:12}", json.dumps(predicted[mode]))
        for name in SHOWN:
            if name in measured.get(mode, {}):
                real = measured[mode][name]
                print(
                    f"{'':12} {name:22} measured {real:10.4f}  predicted {found[name]:10.4f}  {100 * (found[name] / real - 1):+6.1f} %"
                )
    (out / "predicted.json").write_text(json.dumps(predicted, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
