"""The `calibrate` command: a vLLM profile from measurements that others made, or from a server that runs."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from engine.errors import UserError
from engine.model_shape import load_model_shape
from sim import vllm_micro, vllm_micro_v0
from sim.calibrate import Measured, Server, measure, memory_of, scaled_profile
from sim.calibrate_client import Endpoint
from sim.vllm_profile import GIB, VllmProfile, find_vllm_profile, load_vllm_profile

VLLM_MEASUREMENTS = "vllm-measurements"
START_FROM = "llama-3.1-8b"  # whose shipped profile gives the shape of the cost where none is given


@dataclass(frozen=True, slots=True, kw_only=True)
class EndpointOptions:
    """What the user says of a server. model: its shape; gpu, gpu_gib, utilization: what it runs on; minutes: the budget."""

    url: str
    model: str
    gpu: str
    gpu_gib: float
    utilization: float
    max_loras: int
    max_lora_rank: int
    max_num_seqs: int
    max_model_len: int
    minutes: float
    base: str | None = None
    adapters: tuple[str, ...] = ()
    kv_tokens: int | None = None
    start: Path | None = None
    api_key: str | None = None


def from_measurements(folder: Path, model: str) -> VllmProfile:
    """Fit the profile of a model in a folder of measurements. Raises UserError where it holds none of the model."""
    if not folder.is_dir():
        raise UserError(f"{folder}: is not a folder")
    fits = {vllm_micro.MODEL: vllm_micro.fit_micro, vllm_micro_v0.MODEL: vllm_micro_v0.fit_micro_v0}
    if model not in fits:
        raise UserError(f"{folder}: holds measurements of {' and '.join(fits)}, not of {model!r}")
    return fits[model](folder)


def from_endpoint(options: EndpointOptions, tell: Callable[[str], None]) -> VllmProfile:
    """Measure a server and fit a profile to it. tell: takes a line of progress."""
    _check(options)
    endpoint = Endpoint(options.url, options.api_key)
    names = endpoint.models()
    base = options.base or names[0]
    if base not in names:
        raise UserError(f"{options.url}: does not serve {base!r}; it serves {', '.join(names)}")
    adapters = options.adapters or (
        tuple(name for name in names if name != base) if options.max_loras else ()
    )
    missing = sorted(set(adapters) - set(names))
    if missing:
        raise UserError(f"{options.url}: does not serve {missing[0]!r}; it serves {', '.join(names)}")
    if adapters and options.max_loras < 1:
        raise UserError("--max-loras must be at least 1 where adapters are measured")
    server = Server(
        base=base,
        adapters=adapters,
        max_loras=options.max_loras,
        max_lora_rank=options.max_lora_rank,
        max_num_seqs=options.max_num_seqs,
        max_model_len=options.max_model_len,
    )
    start = load_vllm_profile(options.start or find_vllm_profile(START_FROM))
    budget_s = options.minutes * 60
    tell(f"{options.url}: base {base!r}, {len(adapters)} adapters, at most {options.minutes:g} min")
    found = measure(endpoint, server, budget_s, lambda what, gone: tell(f"{gone:4.0%} of the time  {what}"))
    return _profile(options, start, found, server)


def _profile(options: EndpointOptions, start: VllmProfile, found: Measured, server: Server) -> VllmProfile:
    profile = scaled_profile(
        start,
        found,
        server,
        source=options.url,
        model=load_model_shape(options.model),
        gpu=options.gpu,
        engine="OpenAI-compatible server, measured from outside",
    )
    memory, assumed = memory_of(
        profile, server, options.gpu_gib * GIB, options.utilization, options.kv_tokens
    )
    facts = {
        "measured_by": "python -m sim calibrate --endpoint",
        "endpoint": options.url,
        "requests": found.requests,
        "seconds": round(found.seconds, 1),
        "shape_of_cost_from": Path(start.source).name,
        "not_measured_for_want_of_time": found.late,
        **assumed,
    }
    return replace(profile, memory=memory, provenance=facts)


def profile_lines(profile: VllmProfile) -> Iterator[str]:
    """Yield what a profile says of itself."""
    memory = profile.memory
    yield f"{profile.engine}, {profile.model.name} on {profile.gpu}, from {profile.source}"
    for name, value in profile.errors.items():
        yield f"  {name:28s} {value:10.4g}"
    yield f"  step of one token            {profile.seconds['step'] * 1e3:10.2f} ms"
    yield f"  load into a slot             {profile.load_s * 1e3:10.2f} ms"
    slot8 = (memory.slot_bytes + 8 * memory.slot_bytes_per_rank) / 1e6
    yield f"  a slot of rank 8             {slot8:10.1f} MB"
    kv = memory.kv_bytes(8, 8, 0.9) / profile.kv_bytes_per_token
    yield f"  KV tokens, 8 slots of rank 8 {kv:10,.0f}"


def to_stderr(line: str) -> None:
    """Print a line of progress."""
    print(line, file=sys.stderr, flush=True)


def _check(options: EndpointOptions) -> None:
    if not (math.isfinite(options.minutes) and options.minutes > 0):
        raise UserError(f"--minutes={options.minutes:g} must be a number above 0")
    if not 0 < options.utilization <= 1:
        raise UserError(f"--gpu-memory-utilization={options.utilization:g} must be in (0, 1]")
    if not (math.isfinite(options.gpu_gib) and options.gpu_gib > 0):
        raise UserError(f"--gpu-memory-gib={options.gpu_gib:g} must be a number above 0")
