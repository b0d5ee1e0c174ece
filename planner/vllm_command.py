"""`plan --engine vllm`: the same question, asked of vLLM."""

from __future__ import annotations

import json
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import typer

from engine.adapter import adapters_of_trace, load_adapters
from engine.errors import UserError
from planner.output import write_folder
from planner.plan import Objective, Plan
from planner.prices import load_prices
from planner.progress import ProgressReport
from planner.recommend import Question
from planner.report import Commands, print_plan, slo_text
from planner.space import TP_DEGREES
from planner.vllm import VllmEngine, context_of, vllm_space
from planner.vllm_recommend import VllmPlan, recommend_vllm
from sim.vllm_profile import VllmProfile, find_vllm_profile, load_vllm_profile
from traces import Trace
from traces.metrics import Slo

OUR_DEFAULT_GPU = "h200"  # what `plan` takes where no --gpu is given; a vLLM profile knows its own


@dataclass(frozen=True, slots=True, kw_only=True)
class VllmRequest:
    """What `plan --engine vllm` was given."""

    trace: Trace
    trace_file: Path
    slo: Slo
    default_slo: bool
    gpus: int
    model: str
    gpu: str
    profile: Path | None
    adapters: Path | None
    objective: Objective
    tp: str | None
    max_num_seqs: str
    max_loras: str
    utilizations: str
    prices: Path | None
    top: int
    seed: int
    timeout_s: float | None
    workers: int | None
    output_dir: Path | None
    overwrite: bool
    as_json: bool
    quiet: bool


def plan_vllm(request: VllmRequest) -> int:
    """Search, print and write; return the exit code: 0 a plan, 1 none."""
    profile = _profile(request)
    question = _question(request, profile)
    if request.default_slo and not request.quiet:
        typer.echo(f"no SLO given, so the defaults: {slo_text(request.slo)}", err=True)
    with ProgressReport(quiet=request.quiet) as progress:
        answer = recommend_vllm(
            question,
            VllmEngine(profile),
            workers=request.workers,
            timeout_s=request.timeout_s,
            progress=progress,
        )
    plan = answer.plan
    if request.output_dir is not None:
        write_folder(plan, request.output_dir, overwrite=request.overwrite)
    if request.as_json:
        typer.echo(json.dumps(answer.to_json(), indent=2, allow_nan=False))
    else:
        _print(answer, request)
    if plan.recommended is None and not request.quiet:
        typer.echo(_no_plan(plan), err=True)
    return 0 if plan.recommended is not None else 1


def _profile(request: VllmRequest) -> VllmProfile:
    profile = load_vllm_profile(request.profile or find_vllm_profile(request.model))
    if request.gpu not in (OUR_DEFAULT_GPU, profile.gpu):
        raise UserError(f"{profile.source}: is of gpu {profile.gpu!r}, not of {request.gpu!r}")
    if request.model != profile.model.name and request.profile is None:
        raise UserError(f"{profile.source}: is of model {profile.model.name!r}, not of {request.model!r}")
    return profile


def _question(request: VllmRequest, profile: VllmProfile) -> Question:
    given = None if request.adapters is None else load_adapters(request.adapters)
    space = vllm_space(
        profile,
        request.trace,
        adapters_of_trace(request.trace.adapters, given),
        gpus=request.gpus,
        tp=TP_DEGREES if request.tp is None else _integers("--tp", request.tp),
        max_num_seqs=_integers("--max-num-seqs", request.max_num_seqs),
        max_loras=_integers("--max-loras", request.max_loras),
        utilizations=_numbers("--gpu-memory-utilization", request.utilizations),
        context=context_of(request.trace, profile.model),
    )
    return Question(
        trace=request.trace,
        space=space,
        slo=request.slo,
        profile=cast(Any, profile),
        adapters=given,
        objective=request.objective,
        prices=load_prices(request.prices),
        show=request.top,
        seed=request.seed,
    )


def _print(answer: VllmPlan, request: VllmRequest) -> None:
    commands = None
    chosen = answer.plan.recommended
    if chosen is not None:
        where = request.output_dir or Path("plan-output")
        simulate = ["python", "-m", "sim", "run", "--trace", str(request.trace_file)]
        simulate += ["--config", str(where / "recommended.json")]
        simulate += ["--profile", str(request.profile or find_vllm_profile(request.model))]
        if request.adapters is not None:
            simulate += ["--adapters", str(request.adapters)]
        commands = Commands(shlex.join(simulate), answer.exports["recommended"])
    print_plan(answer.plan, commands)
    if chosen is not None:
        config = chosen.config
        typer.echo(
            f"\nmax_loras {config.max_adapters}, max_lora_rank {config.max_adapter_rank}, "
            f"gpu_memory_utilization {config.gpu_memory_utilization:g}"
        )


def _no_plan(plan: Plan) -> str:
    if plan.nearest is None:
        reasons = sorted({setting.reason for setting in plan.impossible})
        return f"no feasible configuration: {'; '.join(reasons[:3])}"
    near = plan.nearest
    return (
        f"no feasible configuration within {plan.gpus} GPUs: the nearest, TP {near.config.tp} × {near.config.replicas} with "
        f"{near.config.max_adapters} slots, sustains {near.sustainable_rps:.2f} of {plan.rate_rps:.2f} req/s; "
        f"what binds: {near.misses}, {near.bottleneck}"
    )


def _integers(flag: str, text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise UserError(f"{flag}={text} must be whole numbers, such as 1,2,4") from None


def _numbers(flag: str, text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise UserError(f"{flag}={text} must be numbers, such as 0.9,0.95") from None
