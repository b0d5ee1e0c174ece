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
from planner.options import DEFAULT_GPU, PlanOptions, numbers, shares
from planner.output import write_folder
from planner.plan import Plan
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


@dataclass(frozen=True, slots=True, kw_only=True)
class VllmRequest:
    """What `plan --engine vllm` was given, and its trace."""

    options: PlanOptions
    trace: Trace
    slo: Slo

    @classmethod
    def of(cls, options: PlanOptions, trace: Trace, slo: Slo) -> VllmRequest:
        """Build from the options of `plan`."""
        return cls(options=options, trace=trace, slo=slo)


def plan_vllm(request: VllmRequest) -> int:
    """Search, print and write; return the exit code: 0 a plan, 1 none."""
    options = request.options
    profile = _profile(options)
    question = _question(request, profile)
    if options.default_slo and not options.quiet:
        typer.echo(f"no SLO given, so the defaults: {slo_text(request.slo)}", err=True)
    with ProgressReport(quiet=options.quiet) as progress:
        answer = recommend_vllm(
            question,
            VllmEngine(profile),
            workers=options.workers,
            timeout_s=options.timeout_s,
            progress=progress,
        )
    plan = answer.plan
    if options.output_dir is not None:
        write_folder(plan, options.output_dir, overwrite=options.overwrite)
    if options.form == "json":
        typer.echo(json.dumps(answer.to_json(), indent=2, allow_nan=False))
    else:
        _print(answer, options)
    if plan.recommended is None and not options.quiet:
        typer.echo(_no_plan(plan), err=True)
    return 0 if plan.recommended is not None else 1


def _profile(options: PlanOptions) -> VllmProfile:
    profile = load_vllm_profile(options.profile or find_vllm_profile(options.model))
    if options.gpu not in (DEFAULT_GPU, profile.gpu):
        raise UserError(f"{profile.source}: is of gpu {profile.gpu!r}, not of {options.gpu!r}")
    if options.model != profile.model.name and options.profile is None:
        raise UserError(f"{profile.source}: is of model {profile.model.name!r}, not of {options.model!r}")
    return profile


def _question(request: VllmRequest, profile: VllmProfile) -> Question:
    options = request.options
    given = None if options.adapters is None else load_adapters(options.adapters)
    assert options.gpus is not None
    space = vllm_space(
        profile,
        request.trace,
        adapters_of_trace(request.trace.adapters, given),
        gpus=options.gpus,
        tp=TP_DEGREES if options.tp is None else numbers("--tp", options.tp),
        max_num_seqs=numbers("--max-num-seqs", options.max_num_seqs),
        max_loras=numbers("--max-loras", options.max_loras),
        utilizations=shares("--gpu-memory-utilization", options.gpu_memory_utilization),
        context=context_of(request.trace, profile.model),
    )
    return Question(
        trace=request.trace,
        space=space,
        slo=request.slo,
        profile=cast(Any, profile),
        adapters=given,
        objective=options.objective,
        prices=load_prices(options.prices),
        show=options.top,
        seed=options.seed,
    )


def _print(answer: VllmPlan, options: PlanOptions) -> None:
    commands = None
    chosen = answer.plan.recommended
    if chosen is not None:
        where = options.output_dir or Path("plan-output")
        simulate = ["python", "-m", "sim", "run", "--trace", str(options.trace)]
        simulate += ["--config", str(where / "recommended.json")]
        simulate += ["--profile", str(options.profile or find_vllm_profile(options.model))]
        if options.adapters is not None:
            simulate += ["--adapters", str(options.adapters)]
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
