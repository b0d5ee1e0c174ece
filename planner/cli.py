"""The `plan` command."""

from __future__ import annotations

import json
import math
import shlex
import sys
from pathlib import Path
from typing import Annotated, Literal, cast, get_args

import typer

from engine.adapter import load_adapters
from engine.budget import gpu_spec
from engine.config import LoraSharding, ServingConfig
from engine.errors import UserError
from engine.model_shape import load_model_shape
from planner.output import check_folder, write_folder
from planner.plan import Objective, Plan
from planner.prices import load_prices
from planner.progress import ProgressReport
from planner.recommend import Question, recommend
from planner.report import Commands, print_plan, slo_text
from planner.space import LORA_SHARDINGS, MAX_NUM_BATCHED_TOKENS, MAX_NUM_SEQS, TP_DEGREES, Space
from planner.vllm import MAX_LORAS
from planner.vllm_command import VllmRequest, plan_vllm
from planner.workload import max_model_len
from sim.profile import Profile, find_profile, load_profile
from traces import Trace, TraceError, load
from traces.command_line import run_app
from traces.metrics import Slo

app = typer.Typer(no_args_is_help=True, add_completion=False)

PROGRAM = "plan"
DEFAULT = Slo()


def _list(values: tuple[int, ...]) -> str:
    return ",".join(map(str, values))


@app.command(
    epilog="Exit codes: 0 a plan; 1 no feasible configuration (the nearest miss is shown) or failure; "
    "2 bad input or usage; 130 interrupted."
)
def plan(
    trace: Annotated[Path, typer.Option(help="Trace to plan for: native JSONL, plain or gzip.")],
    gpus: Annotated[int, typer.Option(min=1, help="Most GPUs there are.")],
    model: Annotated[
        str, typer.Option(help="Base model: a known name, or a config.json or its folder.")
    ] = "llama-3.1-8b",
    gpu: Annotated[str, typer.Option(help="Kind of GPU.")] = "h200",
    ttft_ms: Annotated[
        float | None, typer.Option(help="Bound on the time to the first token, ms.  [default: 500]")
    ] = None,
    tpot_ms: Annotated[
        float | None, typer.Option(help="Bound on the time per further token, ms.  [default: 50]")
    ] = None,
    e2e_ms: Annotated[
        float | None, typer.Option(help="Bound on the whole request, ms; none unless given.")
    ] = None,
    percentile: Annotated[
        float, typer.Option(help="Percentile at which latencies are shown.")
    ] = DEFAULT.percentile,
    attainment: Annotated[
        float, typer.Option(help="Share of requests that must meet every bound.")
    ] = DEFAULT.attainment,
    adapters: Annotated[
        Path | None, typer.Option(help="adapters.jsonl: what the trace's adapters are.")
    ] = None,
    objective: Annotated[
        Objective, typer.Option(help="goodput: the highest rate; min-gpus: the fewest GPUs.")
    ] = "goodput",
    tp: Annotated[
        str | None, typer.Option(help=f"TP degrees to try.  [default: {_list(TP_DEGREES)}]")
    ] = None,
    max_num_seqs: Annotated[str, typer.Option(help="Limits on running requests to try.")] = _list(
        MAX_NUM_SEQS
    ),
    max_num_batched_tokens: Annotated[str, typer.Option(help="Limits on a step's tokens to try.")] = _list(
        MAX_NUM_BATCHED_TOKENS
    ),
    lora_sharding: Annotated[
        str, typer.Option(help="Ways to try to cut adapters over the GPUs of a replica.")
    ] = ",".join(LORA_SHARDINGS),
    rate_scale: Annotated[float, typer.Option(help="Plan for so many times the trace's rate.")] = 1.0,
    raw_arrivals: Annotated[
        bool, typer.Option("--raw-arrivals", help="Use `arrival_s` even where `arrival_spread_s` is given.")
    ] = False,
    profile: Annotated[
        Path | None, typer.Option(help="Measured profile; else the one shipped for model and GPU.")
    ] = None,
    engine: Annotated[
        Literal["ours", "vllm"], typer.Option(help="What serves; vllm with a profile of `sim calibrate`.")
    ] = "ours",
    max_loras: Annotated[str, typer.Option(help="vLLM's adapter slots to try.")] = _list(MAX_LORAS),
    gpu_memory_utilization: Annotated[str, typer.Option(help="vLLM's shares of memory to try.")] = "0.9",
    prices: Annotated[
        Path | None, typer.Option(help="US dollars per GPU-hour, as planner/prices.json.")
    ] = None,
    top: Annotated[int, typer.Option(min=0, help="Alternatives to show.")] = 5,
    seed: Annotated[int, typer.Option(min=0, help="Seed of randomness.")] = 42,
    timeout_s: Annotated[
        float | None, typer.Option(help="Give the best so far after so many seconds.")
    ] = None,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Processes; all cores unless given. Changes nothing but time.")
    ] = None,
    output_dir: Annotated[
        Path | None, typer.Option(help="Folder to write: plan, trials, configurations.")
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an earlier plan in the output folder.")
    ] = False,
    form: Annotated[
        Literal["table", "json"], typer.Option("--format", help="How to print the plan.")
    ] = "table",
    quiet: Annotated[bool, typer.Option("--quiet", help="Nothing on standard error but errors.")] = False,
) -> int:
    """Recommend a serving configuration for a trace: how many GPUs, how cut up, with which limits.

    Every candidate is simulated on the trace with costs measured on a real GPU.
    """
    slo = Slo(
        ttft_s=_seconds("--ttft-ms", ttft_ms, DEFAULT.ttft_s),
        tpot_s=_seconds("--tpot-ms", tpot_ms, DEFAULT.tpot_s),
        e2e_s=None if e2e_ms is None else _seconds("--e2e-ms", e2e_ms, 0.0),
        percentile=_in_range("--percentile", percentile, 100),
        attainment=_in_range("--attainment", attainment, 1),
    )
    if timeout_s is not None:
        _above_zero("--timeout-s", timeout_s)
    if output_dir is not None:
        check_folder(output_dir, overwrite=overwrite)
    requests = load(trace, raw_arrivals).scaled(_above_zero("--rate-scale", rate_scale))
    if engine == "vllm":
        return plan_vllm(
            VllmRequest(
                trace=requests,
                trace_file=trace,
                slo=slo,
                default_slo=ttft_ms is None and tpot_ms is None and e2e_ms is None,
                gpus=gpus,
                model=model,
                gpu=gpu,
                profile=profile,
                adapters=adapters,
                objective=objective,
                tp=tp,
                max_num_seqs=max_num_seqs,
                max_loras=max_loras,
                utilizations=gpu_memory_utilization,
                prices=prices,
                top=top,
                seed=seed,
                timeout_s=timeout_s,
                workers=workers,
                output_dir=output_dir,
                overwrite=overwrite,
                as_json=form == "json",
                quiet=quiet,
            )
        )
    measured = _profile(profile, model, gpu)
    question = Question(
        trace=requests,
        space=_space(
            requests, measured, model, gpu, gpus, tp, max_num_seqs, max_num_batched_tokens, lora_sharding
        ),
        slo=slo,
        profile=measured,
        adapters=None if adapters is None else load_adapters(adapters),
        objective=objective,
        prices=load_prices(prices),
        show=top,
        seed=seed,
    )
    if not quiet and ttft_ms is None and tpot_ms is None and e2e_ms is None:
        typer.echo(f"no SLO given, so the defaults: {slo_text(slo)}", err=True)
    with ProgressReport(quiet=quiet) as progress:
        answer = recommend(question, workers=workers, timeout_s=timeout_s, progress=progress)
    if output_dir is not None:
        write_folder(answer, output_dir, overwrite=overwrite)
    commands = _commands(answer, output_dir, trace, adapters, profile)
    if form == "json":
        typer.echo(json.dumps(answer.to_json(), indent=2, allow_nan=False))
    else:
        print_plan(answer, commands)
    if answer.recommended is None and not quiet:
        typer.echo(_no_plan(answer), err=True)
    return 0 if answer.recommended is not None else 1


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    return run_app(
        app,
        program=PROGRAM,
        arguments=arguments,
        user_errors=(UserError, TraceError),
        failures=(RuntimeError,),
    )


def _no_plan(answer: Plan) -> str:
    if answer.nearest is None:
        reasons = sorted({setting.reason for setting in answer.impossible})
        return f"no feasible configuration: {'; '.join(reasons[:3])}"
    near = answer.nearest
    return (
        f"no feasible configuration within {answer.gpus} GPUs: the nearest, TP {near.config.tp} × {near.config.replicas}, "
        f"sustains {near.sustainable_rps:.2f} of {answer.rate_rps:.2f} req/s; what binds: {near.misses}, {near.bottleneck}"
    )


def _profile(path: Path | None, model: str, gpu: str) -> Profile:
    gpu_spec(gpu)
    load_model_shape(model)
    return load_profile(path or find_profile(ServingConfig(model=model, gpu=gpu)))


def _space(
    trace: Trace,
    profile: Profile,
    model: str,
    gpu: str,
    gpus: int,
    tp: str | None,
    seqs: str,
    tokens: str,
    ways: str,
) -> Space:
    shape = load_model_shape(model)
    degrees = TP_DEGREES if tp is None else _numbers("--tp", tp)
    if tp is not None:
        for degree in degrees:
            shape.validate_tp(degree)
    base = ServingConfig(
        model=model,
        gpu=gpu,
        max_model_len=max_model_len(trace, shape),
        page_tokens=profile.page_tokens,
        graph_max_tokens=profile.graph_max_tokens,
    )
    return Space(
        gpus=gpus,
        tp=degrees,
        max_num_seqs=_numbers("--max-num-seqs", seqs),
        max_num_batched_tokens=_numbers("--max-num-batched-tokens", tokens),
        lora_sharding=_shardings(ways),
        base=base,
    )


def _shardings(text: str) -> tuple[LoraSharding, ...]:
    known = get_args(LoraSharding)
    for way in text.split(","):
        if way not in known:
            raise UserError(f"--lora-sharding: {way!r} must be one of {', '.join(known)}")
    return tuple(cast(LoraSharding, way) for way in text.split(","))


def _commands(
    answer: Plan, folder: Path | None, trace: Path, adapters: Path | None, profile: Path | None
) -> Commands | None:
    if answer.recommended is None:
        return None
    where = folder or Path("plan-output")

    def flags(name: str) -> list[str]:
        given = ["--trace", str(trace), "--config", str(where / f"{name}.json")]
        return given if adapters is None else [*given, "--adapters", str(adapters)]

    simulate = ["python", "-m", "sim", "run", *flags("recommended")]
    if profile is not None:
        simulate += ["--profile", str(profile)]
    hint = "" if folder is not None else "   # after --output-dir plan-output"
    replay = ["python", "-m", "engine", "replay", *flags("recommended"), "--out", "RUN"]
    return Commands(shlex.join(simulate) + hint, shlex.join(replay))


def _seconds(flag: str, milliseconds: float | None, default_s: float) -> float:
    return default_s if milliseconds is None else _above_zero(flag, milliseconds) * 1e-3


def _above_zero(flag: str, value: float) -> float:
    if not (math.isfinite(value) and value > 0):
        raise UserError(f"{flag}={value:g} must be a finite number above 0")
    return value


def _in_range(flag: str, value: float, most: float) -> float:
    if not 0 < value <= most:
        raise UserError(f"{flag}={value:g} must be above 0 and at most {most:g}")
    return value


def _numbers(flag: str, text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise UserError(f"{flag}={text} must be whole numbers, such as 1,2,4") from None


if __name__ == "__main__":
    sys.exit(main())
