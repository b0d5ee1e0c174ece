"""The `plan` command."""

from __future__ import annotations

import sys

import typer

from engine.errors import UserError
from planner import options as flag
from planner.command import run
from planner.options import DEFAULT, DEFAULT_GPU, DEFAULTS, PlanOptions
from traces import TraceError
from traces.command_line import run_app

app = typer.Typer(no_args_is_help=True, add_completion=False)

PROGRAM = "plan"


@app.command(
    epilog="Exit codes: 0 a plan; 1 no feasible configuration (the nearest miss is shown), a prediction outside its "
    "interval (--verify), or failure; 2 bad input or usage; 130 interrupted (the best so far is printed)."
)
def plan(
    trace: flag.Trace = None,
    gpus: flag.Gpus = None,
    model: flag.Model = "llama-3.1-8b",
    gpu: flag.Gpu = DEFAULT_GPU,
    ttft_ms: flag.TtftMs = None,
    tpot_ms: flag.TpotMs = None,
    e2e_ms: flag.E2eMs = None,
    percentile: flag.Percentile = DEFAULT.percentile,
    attainment: flag.Attainment = DEFAULT.attainment,
    adapters: flag.Adapters = None,
    objective: flag.Goal = "goodput",
    tp: flag.Tp = None,
    max_num_seqs: flag.Seqs = DEFAULTS["max_num_seqs"],
    max_num_batched_tokens: flag.Tokens = DEFAULTS["max_num_batched_tokens"],
    lora_sharding: flag.Sharding = DEFAULTS["lora_sharding"],
    scheduler: flag.Scheduler = DEFAULTS["scheduler"],
    max_adapters_per_step: flag.Cap = DEFAULTS["max_adapters_per_step"],
    merge: flag.Merge = DEFAULTS["merge"],
    router: flag.Router = DEFAULTS["router"],
    placement: flag.Placement = DEFAULTS["placement"],
    rate_scale: flag.RateScale = 1.0,
    raw_arrivals: flag.RawArrivals = False,
    profile: flag.ProfileFile = None,
    engine: flag.Engine = "ours",
    max_loras: flag.MaxLoras = DEFAULTS["max_loras"],
    gpu_memory_utilization: flag.Utilization = DEFAULTS["gpu_memory_utilization"],
    prices: flag.Prices = None,
    top: flag.Top = 5,
    seed: flag.Seed = 42,
    timeout_s: flag.TimeoutS = None,
    workers: flag.WorkerCount = None,
    cluster: flag.Cluster = None,
    output_dir: flag.OutputDir = None,
    overwrite: flag.Overwrite = False,
    export: flag.Export = None,
    explain: flag.Explain = None,
    verify: flag.Verify = None,
    config: flag.Config = None,
    form: flag.Form = "table",
    quiet: flag.Quiet = False,
) -> int:
    """Recommend a serving configuration for a trace: how many GPUs, how cut up, with which limits and policies.

    Every candidate is simulated on the trace with costs measured on a real GPU.

    plan --trace trace.jsonl --gpus 8 finds the best plan; with --explain CONFIG.json it says what one configuration does and
    what would break first; with --verify RUN it holds a prediction against a run of the engine.
    """
    given = dict(locals())
    return run(PlanOptions(**given))


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    return run_app(
        app,
        program=PROGRAM,
        arguments=arguments,
        user_errors=(UserError, TraceError),
        failures=(RuntimeError,),
    )


if __name__ == "__main__":
    sys.exit(main())
