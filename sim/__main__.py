"""The command line of the simulator: run, validate, bench and fit."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from engine import compiled
from engine.adapter import adapters_of_trace, load_adapters
from engine.blueprint import blueprint
from engine.config import ServingConfig
from engine.errors import UserError
from engine.json_files import read_json
from sim import calibrate_command as calibration
from sim import validate as validation
from sim import vllm_micro, vllm_micro_v0
from sim.bench import bench
from sim.costs import StepCosts, costs_for, fit_costs
from sim.intervals import Interval, intervals
from sim.profile import find_profile, load_profile
from sim.result import plain
from sim.router_costs import with_router_costs
from sim.scenario import Scenario
from sim.simulate import simulate
from sim.tables import bench_lines, fit_lines, interval_lines, result_lines, validation_lines
from sim.validation_page import write_page
from sim.vllm_predict import run_vllm
from sim.vllm_profile import find_vllm_profile, is_vllm_profile, load_vllm_profile
from sim.vllm_runs_v0 import validate_v0
from sim.vllm_validate import is_vllm_folder, tell_progress, validate_vllm, vllm_lines
from traces import TraceError, load
from traces.command_line import run_app
from traces.metrics import Slo

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    help="Simulate multi-LoRA serving, and hold the simulation against recorded runs.",
)

PROGRAM = "python -m sim"

Format = Annotated[Literal["table", "json"], typer.Option("--format", help="How to print the result.")]
ProfileFile = Annotated[
    Path | None, typer.Option("--profile", help="Measured profile; else the one shipped for model and GPU.")
]


@app.command()
def run(
    trace: Annotated[Path, typer.Option(help="Trace to serve (JSONL, plain or gzip).")],
    config: Annotated[Path, typer.Option(help="Serving configuration (JSON).")],
    adapters: Annotated[
        Path | None, typer.Option(help="adapters.jsonl: what the trace's adapters are.")
    ] = None,
    profile: ProfileFile = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of randomness.")] = 0,
    raw_arrivals: Annotated[
        bool, typer.Option("--raw-arrivals", help="Take arrival_s even where arrival_spread_s is there.")
    ] = False,
    scenario: Annotated[
        Path | None,
        typer.Option(help="JSON of replicas that fail and traffic that swells (sim/scenario.py)."),
    ] = None,
    with_intervals: Annotated[
        bool, typer.Option("--intervals", help="Say where each metric should lie: five more simulations.")
    ] = False,
    form: Format = "table",
) -> None:
    """Simulate one configuration on a trace."""
    serving = ServingConfig.load(config)
    given = None if adapters is None else load_adapters(adapters)
    requests = load(trace, raw_arrivals=raw_arrivals)
    found: dict[str, Interval] = {}
    if profile is not None and is_vllm_profile(read_json(profile)):
        if scenario is not None or with_intervals:
            raise UserError("run: --scenario and --intervals are for our engine, not for a vLLM profile")
        result = run_vllm(load_vllm_profile(profile), serving, requests, given)
    else:
        happens = None if scenario is None else Scenario.load(scenario)
        costs = _costs(profile, serving)
        result = simulate(requests, serving, costs, adapters=given, seed=seed, scenario=happens)
        if with_intervals:
            names = validation.METRICS
            found = intervals(requests, serving, costs, names, adapters=given, seed=seed, scenario=happens)
    told = {"intervals": {name: item.to_json() for name, item in found.items()}} if with_intervals else {}
    _print(form, result.to_json() | told, lambda: [*result_lines(result), *interval_lines(found)])


@app.command()
def validate(
    runs: Annotated[
        Path, typer.Option(help="Folder of run records, or of others' vLLM runs (runs.jsonl).")
    ] = validation.RUNS,
    profile: ProfileFile = None,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Processes for vLLM runs; else all cores.")
    ] = None,
    docs: Annotated[
        Path | None, typer.Option(help="Folder to write validation.md and validation.svg into.")
    ] = None,
    also: Annotated[
        Path | None,
        typer.Option(help="With --docs: JSON of another `validate`, whose errors are shown without rows."),
    ] = None,
    form: Format = "table",
) -> None:
    """Simulate every recorded run and compare: metrics, adapters, requests, steps, intervals, and twins for the noise floor."""
    if also is not None and docs is None:
        raise UserError("validate: --also goes with --docs")
    other = None if also is None else _outcome(also)
    if is_vllm_folder(runs) or runs.name == vllm_micro_v0.RUNS_FILE:
        vllm = vllm_outcome(runs, profile, workers)
        _print(form, vllm, lambda: vllm_lines(vllm))
        return
    outcome = validation.validate(runs, validation.costs_of_records(profile))
    if docs is not None:
        given = "" if also is None else f" --also {also}"
        write_page(docs, outcome, f"python -m sim validate --docs {docs}{given}", other)
    _print(form, outcome, lambda: validation_lines(outcome))


@app.command("router-costs")
def router_costs_command(
    config: Annotated[Path, typer.Option(help="Serving configuration (JSON).")],
    trace: Annotated[
        Path | None, typer.Option(help="Trace whose adapters, without --adapters, are those to serve.")
    ] = None,
    adapters: Annotated[Path | None, typer.Option(help="adapters.jsonl: the adapters to serve.")] = None,
    profile: ProfileFile = None,
    ttft_slo_ms: Annotated[float, typer.Option(help="Promised time to the first token.")] = 500.0,
    tpot_slo_ms: Annotated[float, typer.Option(help="Promised time per further token.")] = 50.0,
) -> None:
    """Print the configuration with the router cost_aware, and what it prices requests by, from the profile."""
    serving = ServingConfig.load(config).with_changes(router="least_loaded")
    asked = {} if trace is None else load(trace).adapters
    specs = adapters_of_trace(asked) if adapters is None else load_adapters(adapters)
    slo = Slo(ttft_s=ttft_slo_ms / 1e3, tpot_s=tpot_slo_ms / 1e3)
    plan = blueprint(serving, specs)
    found = with_router_costs(serving, _costs(profile, serving), plan, slo)
    typer.echo(json.dumps(found.to_json(), indent=2))


@app.command("bench")
def bench_command(
    requests: Annotated[int, typer.Option(min=1, help="Requests a load.")] = 20_000,
    profile: ProfileFile = None,
    form: Format = "table",
) -> None:
    """Measure the simulator's own speed at 10 %, 75 % and saturated load."""
    config = ServingConfig()
    rows = list(bench(requests, config, _costs(profile, config)))
    _print(form, {"rows": rows, "modules": compiled.state()}, lambda: bench_lines(rows, compiled.state()))


@app.command()
def fit(profile: ProfileFile = None, form: Format = "table") -> None:
    """Show how well the fitted costs describe a profile, in sample and held out."""
    report = fit_costs(load_profile(profile or find_profile(ServingConfig()))).report
    fits = [*report.operators, *([report.steps] if report.steps is not None else [])]
    names = ("rows", "median_error", "worst_error", "held_out_median_error", "held_out_worst_error")
    rows = [
        {"name": item.name, "method": item.method, **plain({n: getattr(item, n) for n in names})}
        for item in fits
    ]
    _print(form, {"rows": rows}, lambda: fit_lines(report))


@app.command()
def calibrate(
    folder: Annotated[Path | None, typer.Argument(help="Folder of measurements, with --from.")] = None,
    source: Annotated[
        Literal["vllm-measurements"] | None,
        typer.Option("--from", help="Kind of measurements in the folder: those of others' vLLM."),
    ] = None,
    endpoint: Annotated[
        str | None, typer.Option(help="URL of a running OpenAI-compatible server to measure instead.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Profile to write.")] = None,
    minutes: Annotated[float, typer.Option(help="Budget of measuring a server.")] = 10.0,
    model: Annotated[str, typer.Option(help="Shape of the served model.")] = "llama-3.1-8b",
    base: Annotated[str | None, typer.Option(help="Served name of the base model; else the first.")] = None,
    adapters: Annotated[str, typer.Option(help="Served names of adapters; else all but the base.")] = "",
    gpu: Annotated[str, typer.Option(help="Name to give the server's GPU.")] = "unknown",
    gpu_memory_gib: Annotated[float, typer.Option(help="Memory of that GPU.")] = 80.0,
    gpu_memory_utilization: Annotated[float, typer.Option(help="The server's flag.")] = 0.9,
    max_loras: Annotated[int, typer.Option(min=0, help="The server's flag; 0: LoRA is off.")] = 0,
    max_lora_rank: Annotated[int, typer.Option(min=1, help="The server's flag.")] = 8,
    max_num_seqs: Annotated[int, typer.Option(min=1, help="Largest batch to measure.")] = 256,
    max_model_len: Annotated[int, typer.Option(min=64, help="The server's flag: no longer prompts.")] = 2048,
    kv_tokens: Annotated[
        int | None, typer.Option(min=1, help="Tokens of KV cache, as the server's log says.")
    ] = None,
    profile: Annotated[
        Path | None, typer.Option(help="vLLM profile that gives the shape of the cost; else a shipped one.")
    ] = None,
    api_key: Annotated[str | None, typer.Option(envvar="OPENAI_API_KEY", help="Key of the server.")] = None,
    form: Format = "table",
) -> None:
    """Fit the profile of a vLLM server: to measurements in a folder, or by measuring one that runs."""
    if (source is None) == (endpoint is None):
        raise UserError("calibrate: give either --from vllm-measurements DIR or --endpoint URL")
    if source is not None:
        if folder is None:
            raise UserError("calibrate: --from vllm-measurements needs a folder")
        fitted = calibration.from_measurements(folder, model)
    else:
        assert endpoint is not None
        fitted = calibration.from_endpoint(
            calibration.EndpointOptions(
                url=endpoint,
                model=model,
                gpu=gpu,
                gpu_gib=gpu_memory_gib,
                utilization=gpu_memory_utilization,
                max_loras=max_loras,
                max_lora_rank=max_lora_rank,
                max_num_seqs=max_num_seqs,
                max_model_len=max_model_len,
                minutes=minutes,
                base=base,
                adapters=tuple(name for name in adapters.split(",") if name),
                kv_tokens=kv_tokens,
                start=profile,
                api_key=api_key,
            ),
            calibration.to_stderr,
        )
    if out is not None:
        fitted.save(out)
    _print(form, fitted.to_json(), lambda: calibration.profile_lines(fitted))


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return its exit code: 0, 2 for bad input or usage, 130 if interrupted."""
    return run_app(app, program=PROGRAM, arguments=arguments, user_errors=(UserError, TraceError))


def _costs(profile: Path | None, config: ServingConfig) -> StepCosts:
    """Price a configuration: from the profile given, else from the one shipped for it."""
    return costs_for(load_profile(profile or find_profile(config)), config)


def _outcome(path: Path) -> dict[str, Any]:
    """Read what `validate --format json` printed."""
    data = read_json(path)
    if not isinstance(data, dict) or not isinstance(data.get("rows"), list) or "runs" not in data:
        raise UserError(f"{path}: is not what `python -m sim validate --format json` prints")
    return data


def vllm_outcome(runs: Path, profile: Path | None, workers: int | None) -> dict[str, Any]:
    """Predict the runs of others' vLLM: those of a folder, or the file of the older engine's."""
    if runs.name == vllm_micro_v0.RUNS_FILE:
        old = load_vllm_profile(profile) if profile else vllm_micro_v0.fit_micro_v0(runs.parent)
        return validate_v0(runs, old, workers=workers, progress=tell_progress)
    path = profile or find_vllm_profile(vllm_micro.MODEL)
    return validate_vllm(runs, load_vllm_profile(path), workers=workers, progress=tell_progress)


def _print(form: str, value: dict[str, Any], lines: Callable[[], Iterable[str]]) -> None:
    typer.echo(json.dumps(value, indent=2, allow_nan=False) if form == "json" else "\n".join(lines()))


if __name__ == "__main__":
    sys.exit(main())
