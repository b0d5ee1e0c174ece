"""The command line of the simulator: run, validate, bench and fit."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from engine.adapter import load_adapters
from engine.config import ServingConfig
from engine.errors import UserError
from sim import validate as validation
from sim.bench import bench
from sim.costs import StepCosts, costs_for, fit_costs
from sim.profile import find_profile, load_profile
from sim.result import plain
from sim.simulate import simulate
from sim.tables import bench_lines, fit_lines, result_lines, validation_lines
from traces import TraceError, load
from traces.command_line import run_app

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
    form: Format = "table",
) -> None:
    """Simulate one configuration on a trace."""
    serving = ServingConfig.load(config)
    given = None if adapters is None else load_adapters(adapters)
    result = simulate(
        load(trace, raw_arrivals=raw_arrivals), serving, _costs(profile)(serving), adapters=given, seed=seed
    )
    _print(form, result.to_json(), lambda: result_lines(result))


@app.command()
def validate(
    runs: Annotated[Path, typer.Option(help="Folder of run records.")] = validation.RUNS,
    profile: ProfileFile = None,
    form: Format = "table",
) -> None:
    """Simulate every recorded run and compare: predicted against measured."""
    outcome = validation.validate(runs, _costs(profile))
    _print(form, outcome, lambda: validation_lines(outcome))


@app.command("bench")
def bench_command(
    requests: Annotated[int, typer.Option(min=1, help="Requests a load.")] = 20_000,
    profile: ProfileFile = None,
    form: Format = "table",
) -> None:
    """Measure the simulator's own speed at 10 %, 75 % and saturated load."""
    config = ServingConfig()
    rows = list(bench(requests, config, _costs(profile)(config)))
    _print(form, {"rows": rows}, lambda: bench_lines(rows))


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


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return its exit code: 0, 2 for bad input or usage, 130 if interrupted."""
    return run_app(app, program=PROGRAM, arguments=arguments, user_errors=(UserError, TraceError))


def _costs(profile: Path | None) -> Callable[[ServingConfig], StepCosts]:
    """Return what prices a configuration: from the profile given, else from the one shipped for it."""
    given = None if profile is None else load_profile(profile)

    def price(config: ServingConfig) -> StepCosts:
        return costs_for(given or load_profile(find_profile(config)), config)

    return price


def _print(form: str, value: dict[str, Any], lines: Callable[[], Iterable[str]]) -> None:
    typer.echo(json.dumps(value, indent=2, allow_nan=False) if form == "json" else "\n".join(lines()))


if __name__ == "__main__":
    sys.exit(main())
