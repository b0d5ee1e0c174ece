"""What a plan's configuration is in the words of an engine: commands for every replica, or a manifest.

The options used are held against the lists in `planner/export_options`, read out of the engines' own parsers (docs/measured/record_options.py). None
of the other engines behaves as ours, so each export says what its predictions are worth.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.adapter import DEFAULT_RANK, AdapterSpec
from engine.config import ServingConfig

OPTIONS = Path(__file__).parent / "export_options"
ENGINES = ("ours", "vllm", "sglang", "lorax", "kserve")
FIRST_PORT = 8000
MOST_LORAS = 64  # slots of vLLM and SGLang hold memory whether they are used or not
BENCH_PORT = 8000


@dataclass(frozen=True, slots=True, kw_only=True)
class Export:
    """A file that serves a configuration with an engine. warnings: what it does not carry over."""

    name: str
    engine: str
    text: str
    flags: tuple[str, ...]
    warnings: tuple[str, ...]


def options_of(engine: str) -> dict[str, Any]:
    """Return the recorded options of an engine."""
    found: dict[str, Any] = json.loads((OPTIONS / f"{engine}.json").read_text(encoding="utf-8"))
    return found


def export(engine: str, config: ServingConfig, adapters: Mapping[str, AdapterSpec], trace: str) -> Export:
    """Return the export of a configuration; `trace`: the file that the benchmark command replays."""
    makers: dict[str, Callable[[ServingConfig, Mapping[str, AdapterSpec], str], Export]] = {
        "ours": _ours,
        "vllm": _vllm,
        "sglang": _sglang,
        "lorax": _lorax,
        "kserve": _kserve,
    }
    return makers[engine](config, adapters, trace)


def _ours(config: ServingConfig, adapters: Mapping[str, AdapterSpec], trace: str) -> Export:
    given = ["--adapters", "adapters.jsonl"] if adapters else []
    serve = [
        "python",
        "-m",
        "engine",
        "serve",
        "--model",
        config.model,
        "--config",
        "recommended.json",
        *given,
    ]
    replay = ["python", "-m", "engine", "replay", "--trace", trace, "--config", "recommended.json", *given]
    verify = ["plan", "--verify", "RUN", "--config", "recommended.json"]
    lines = [
        f"# {config.replicas} replicas of {config.tp} GPUs: one process a GPU, started by the first",
        shlex.join(serve),
        "",
        "# verify the plan: replay the trace, then hold the run against the prediction",
        shlex.join([*replay, "--out", "RUN"]),
        shlex.join(verify),
    ]
    return _script("ours", lines, [*serve, *replay], [])


def _vllm(config: ServingConfig, adapters: Mapping[str, AdapterSpec], trace: str) -> Export:
    flags = [
        "--tensor-parallel-size", str(config.tp),
        "--max-model-len", str(config.max_model_len),
        "--max-num-seqs", str(config.max_num_seqs),
        "--max-num-batched-tokens", str(config.max_num_batched_tokens),
        "--gpu-memory-utilization", f"{config.gpu_memory_utilization:g}",
        "--enable-prefix-caching" if config.prefix_caching else "--no-enable-prefix-caching",
    ]  # fmt: skip
    if adapters:
        slots = _slots(config, adapters)
        flags += ["--enable-lora", "--max-loras", str(slots)]
        flags += ["--max-lora-rank", str(_rank_step(adapters))]
        flags += ["--max-cpu-loras", str(max(slots, len(adapters)))]
        flags += ["--fully-sharded-loras"] if config.exchanges_lora else []
        flags += ["--lora-modules", *_named(adapters)]
    lines = _replicas(config, lambda port: ["vllm", "serve", config.model, *flags, "--port", str(port)])
    bench = ["vllm", "bench", "serve", "--model", config.model, "--port", str(BENCH_PORT), "--ignore-eos"]
    bench += ["--dataset-name", "timed_trace", "--timed-trace-chunk-hash-size", "512"]
    bench += ["--lora-modules", *sorted(adapters)] if adapters else []
    note = "adapters are drawn evenly, not by the trace" if adapters else ""
    return _script("vllm", [*lines, *_bench("vllm", bench, trace, note)], flags, _lost(config, adapters))


def _sglang(config: ServingConfig, adapters: Mapping[str, AdapterSpec], trace: str) -> Export:
    flags = [
        "--tp-size", str(config.tp),
        "--context-length", str(config.max_model_len),
        "--max-running-requests", str(config.max_num_seqs),
        "--chunked-prefill-size", str(config.max_num_batched_tokens),
        "--mem-fraction-static", f"{config.gpu_memory_utilization:g}",
    ]  # fmt: skip
    flags += [] if config.prefix_caching else ["--disable-radix-cache"]
    if adapters:
        slots = _slots(config, adapters) + 1  # it counts the base model
        flags += ["--enable-lora", "--max-loras-per-batch", str(slots)]
        flags += ["--max-loaded-loras", str(max(slots, len(adapters)))]
        flags += ["--max-lora-rank", str(_rank(adapters)), "--lora-target-modules", *_modules(adapters)]
        flags += ["--lora-eviction-policy", "lru"]
        # It pins what is loaded: refused where more than twice the slots are.
        flags += ["--enable-lora-overlap-loading"] if len(adapters) <= 2 * slots else []
        flags += ["--lora-paths", *_named(adapters)]
    launch = ["python", "-m", "sglang.launch_server", "--model-path", config.model]
    lines = _replicas(config, lambda port: [*launch, *flags, "--port", str(port)])
    bench = ["python", "-m", "sglang.benchmark.serving", "--backend", "sglang", "--port", str(BENCH_PORT)]
    bench += ["--dataset-name", "mooncake", "--use-trace-timestamps"]
    bench += ["--lora-name", *sorted(adapters)] if adapters else []
    note = "its prompts have 128 words a block of 512 tokens: shorter than the trace's"
    note += "; adapters are drawn evenly, not by the trace" if adapters else ""
    return _script(
        "sglang",
        [*lines, *_bench("mooncake", bench, trace, note)],
        ["--model-path", *flags, "--port"],
        _lost(config, adapters),
    )


def _lorax(config: ServingConfig, adapters: Mapping[str, AdapterSpec], trace: str) -> Export:
    flags = [
        "--model-id", config.model,
        "--num-shard", str(config.tp),
        "--max-concurrent-requests", str(4 * config.max_num_seqs),
        "--max-input-length", str(config.max_model_len - 1),
        "--max-total-tokens", str(config.max_model_len),
        "--max-batch-prefill-tokens", str(max(config.max_model_len, config.max_num_batched_tokens)),
    ]  # fmt: skip
    if adapters:
        flags += ["--max-active-adapters", str(_slots(config, adapters)), "--adapter-cycle-time-s", "2"]
    lines = _replicas(config, lambda port: ["lorax-launcher", *flags, "--port", str(port)])
    lines += [
        "",
        "# LoRAX takes an adapter by its path in each request (adapter_id); it has no command to replay",
    ]
    lines += [f"# a trace with adapters: send {trace} with your own client."]
    lost = [
        *_lost(config, adapters),
        "LoRAX bounds a batch by tokens, not by requests: max_num_seqs is not carried over.",
    ]
    return _script("lorax", lines, [*flags, "--port"], lost)


def _kserve(config: ServingConfig, adapters: Mapping[str, AdapterSpec], trace: str) -> Export:
    spec: dict[str, Any] = {
        "model": {"uri": f"hf://{config.model}", "name": config.model},
        "replicas": config.replicas,
        "parallelism": {"tensor": config.tp},
        "router": {"route": {}, "gateway": {}, "scheduler": {}},
        "template": {
            "containers": [
                {
                    "name": "main",
                    "args": [
                        f"--max-num-seqs={config.max_num_seqs}",
                        f"--max-num-batched-tokens={config.max_num_batched_tokens}",
                        f"--max-model-len={config.max_model_len}",
                        f"--gpu-memory-utilization={config.gpu_memory_utilization:g}",
                    ],
                    "resources": {"limits": {"nvidia.com/gpu": str(config.tp)}},
                }
            ]
        },
    }
    if adapters:
        slots = _slots(config, adapters)
        spec["model"]["lora"] = {
            "maxRank": _rank_step(adapters),
            "maxAdapters": slots,
            "maxCpuAdapters": max(slots, len(adapters)),
            "adapters": [{"name": name, "uri": _uri(spec)} for name, spec in sorted(adapters.items())],
        }
    manifest = {
        "apiVersion": "serving.kserve.io/v1alpha2",
        "kind": "LLMInferenceService",
        "metadata": {"name": "loraplan"},
        "spec": spec,
    }
    warnings = _warnings("kserve", _lost(config, adapters))
    note = "".join(f"# {line}\n" for line in warnings)
    note += f"# verify: replay {trace} against the service's address, as the vllm export does\n"
    return Export(
        name="kserve.yaml",
        engine="kserve",
        text=note + json.dumps(manifest, indent=2) + "\n",  # JSON is YAML
        flags=tuple(_paths(manifest)),
        warnings=warnings,
    )


# ---- what they share ----


def _replicas(config: ServingConfig, command: Callable[[int], list[str]]) -> list[str]:
    """Return a command a replica, each on GPUs of its own."""
    lines = [
        f"# {config.replicas} replicas of {config.tp} GPUs; a load balancer goes in front ({config.router})"
    ]
    for index in range(config.replicas):
        gpus = ",".join(str(index * config.tp + rank) for rank in range(config.tp))
        lines.append(f"CUDA_VISIBLE_DEVICES={gpus} {shlex.join(command(FIRST_PORT + index))} &")
    return lines


def _bench(form: str, command: Sequence[str], trace: str, note: str) -> list[str]:
    """Return the commands that replay the trace, in the form that the engine's benchmark reads. note: how far it is the trace's traffic."""
    file = f"trace.{form}.jsonl"
    convert = ["python", "-m", "traces", "export", form, trace, "--out", file]
    said = "# verify the plan, per replica, with its share of the trace"
    counted = f'--dataset-path {file} --num-prompts "$(wc -l < {file})"'
    return ["", f"{said}; {note}" if note else said, shlex.join(convert), f"{shlex.join(command)} {counted}"]


def _script(engine: str, lines: Sequence[str], flags: Sequence[str], lost: Sequence[str]) -> Export:
    warnings = _warnings(engine, lost)
    note = [f"# {line}" for line in warnings]
    text = "\n".join(["#!/bin/sh", *note, "", *lines]) + "\n"
    used = tuple(flag for flag in flags if flag.startswith("--"))
    return Export(name=f"{engine}.sh", engine=engine, text=text, flags=used, warnings=warnings)


def _warnings(engine: str, lost: Sequence[str]) -> tuple[str, ...]:
    if engine == "ours":
        return tuple(lost)
    recorded = options_of(engine)
    return (
        f"For {recorded['engine']} {recorded['version']}.",
        "The plan's latencies and rates are predictions for loraplan's own engine, not for this one; plan --engine vllm "
        "predicts vLLM's, with a profile of it.",
        *lost,
    )


def _lost(config: ServingConfig, adapters: Mapping[str, AdapterSpec]) -> list[str]:
    """Say what an engine other than ours does not do."""
    lost = []
    if config.scheduler != "fcfs":
        lost.append(
            f"The scheduler {config.scheduler!r} is ours alone: this engine serves first come, first served."
        )
    if config.placement != "everywhere" or config.router == "adapter_affinity":
        lost.append(
            f"Router {config.router!r}, placement {config.placement!r}: to be set up in your load balancer."
        )
    if config.merge != "never":
        lost.append(f"merge={config.merge!r} is ours alone: this engine merges nothing.")
    if len(adapters) > _slots(config, adapters):
        lost.append(
            f"{len(adapters)} adapters share {_slots(config, adapters)} slots, which hold the largest rank each; ours holds each at its own."
        )
    if any(spec.path is None for spec in adapters.values()):
        lost.append("Adapters without a path in adapters.jsonl stand as /path/to/NAME: put theirs in.")
    return lost


def _slots(config: ServingConfig, adapters: Mapping[str, AdapterSpec]) -> int:
    return min(len(adapters), config.max_adapters_per_step or MOST_LORAS, config.max_num_seqs)


def _rank(adapters: Mapping[str, AdapterSpec]) -> int:
    return max((max(spec.module_ranks) for spec in adapters.values()), default=DEFAULT_RANK)


def _rank_step(adapters: Mapping[str, AdapterSpec]) -> int:
    """Return the least rank that vLLM takes and that holds all adapters."""
    steps: list[int] = options_of("vllm")["choices"]["--max-lora-rank"]
    return min(step for step in steps if step >= _rank(adapters))


def _modules(adapters: Mapping[str, AdapterSpec]) -> list[str]:
    return sorted({module for spec in adapters.values() for module in spec.target_modules})


def _named(adapters: Mapping[str, AdapterSpec]) -> list[str]:
    return [f"{name}={spec.path or f'/path/to/{name}'}" for name, spec in sorted(adapters.items())]


def _uri(spec: AdapterSpec) -> str:
    return f"pvc://adapters/{spec.name}" if spec.path is None else f"pvc://adapters/{Path(spec.path).name}"


def _paths(value: Any, at: str = "") -> list[str]:
    """Return the dotted names of all keys of a manifest."""
    if isinstance(value, list):
        return [path for item in value for path in _paths(item, f"{at}[]")]
    if not isinstance(value, dict):
        return []
    found = []
    for key, item in value.items():
        name = f"{at}.{key}" if at else key
        found += [name, *_paths(item, name)]
    return list(dict.fromkeys(found))
