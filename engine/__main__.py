"""Commands of the engine: `python -m engine serve | profile | replay | bench | make-dynamic`."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from engine import torchrun
from engine.adapter import AdapterSpec, adapters_of_trace, load_adapters
from engine.budget import gpu_spec
from engine.config import ServingConfig
from engine.errors import UserError
from engine.make_dynamic import make_dynamic
from traces import TraceError, load
from traces.command_line import run_app
from traces.files import check_writable

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    help="The multi-LoRA engine: measure it, or serve a trace with it.",
)


app.command()(make_dynamic)


def _tell(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


@app.command()
def profile(
    out: Annotated[Path, typer.Option(help="Folder to write the profile into: <model>.<gpu>.json.")],
    model: Annotated[str, typer.Option(help="A catalogue name or a path to a config.json.")] = "llama-3.1-8b",
    tp: Annotated[
        int,
        typer.Option(
            min=1,
            help="GPUs of a replica. 1 measures operators and steps; more measure steps in every way that adapters can be cut.",
        ),
    ] = 1,
    gpu: Annotated[
        str, typer.Option(help="The GPU's name in the catalogue, or a .json file that describes it.")
    ] = "h200",
    quick: Annotated[
        bool, typer.Option(help="Thin every grid: a minute instead of several, to try the tool.")
    ] = False,
    max_num_batched_tokens: Annotated[
        int, typer.Option(help="Largest step that is measured, at --tp 1.")
    ] = 2048,
    ranks: Annotated[str, typer.Option(help="Adapter ranks, at --tp above 1.")] = "16,64",
    adapters: Annotated[int, typer.Option(min=1, help="Adapters of each kind, at --tp above 1.")] = 64,
    requests: Annotated[
        int, typer.Option(min=0, help="Requests of the bursts that are served in each mode, at --tp above 1.")
    ] = 0,
) -> None:
    """Measure operators and whole steps on this GPU, over a designed grid, with medians over graph replays."""
    config = ServingConfig(model=model, gpu=gpu, tp=tp, max_num_batched_tokens=max_num_batched_tokens)
    kind = gpu_spec(gpu).name
    suffix = f".tp{tp}" if tp > 1 else ""
    target = out / f"{Path(model).stem if Path(model).exists() else model}.{kind}{suffix}.json"
    if target.exists():
        raise UserError(f"{target}: is there already")
    check_writable(target)
    _check_gpu(gpu)
    if tp > 1:
        _profile_parallel(config, target, ranks, adapters, requests, quick)
        print(target)
        return
    from engine.profiler import profile as measure

    data = measure(config, quick=quick, progress=_tell)
    out.mkdir(parents=True, exist_ok=True)
    temporary = target.with_suffix(".tmp")
    temporary.write_text(_compact(data), encoding="utf-8")
    temporary.replace(target)
    print(target)


def _check_gpu(gpu: str) -> None:
    """Raise UserError where the GPU that is here is of another kind of the catalogue than is said; a described one is believed."""
    import torch

    if not torch.cuda.is_available() or gpu.endswith(".json"):
        return
    here = torch.cuda.get_device_name()
    if gpu.lower().split("-")[0] not in here.lower():
        raise UserError(f"--gpu {gpu}: the GPU here is {here!r}; say which with --gpu (docs/calibration.md)")


def _profile_parallel(
    config: ServingConfig, target: Path, ranks: str, adapters: int, requests: int, quick: bool
) -> None:
    from engine.parallel_profile import ParallelPlan, profile_parallel

    try:
        wanted = tuple(int(part) for part in ranks.split(","))
    except ValueError:
        raise UserError(f"--ranks takes numbers as in 16,64, not {ranks!r}") from None
    plan = ParallelPlan(
        ranks=wanted, adapters=adapters, grid=8 if quick else ParallelPlan().grid, requests=requests
    )
    seats = max(plan.batches)
    config = config.with_changes(max_num_batched_tokens=1024, max_num_seqs=max(seats, 256))
    profile_parallel(config, plan, target, progress=_tell)


def _compact(data: dict[str, Any]) -> str:
    """Return JSON with one measurement a line."""

    def rows(items: list[Any], indent: str) -> str:
        return "[\n" + ",\n".join(f"{indent} {json.dumps(item)}" for item in items) + f"\n{indent}]"

    parts = []
    for key, value in data.items():
        if key == "operators":
            operators = ",\n".join(
                f"  {json.dumps(name)}: {rows(items, '  ')}" for name, items in value.items()
            )
            parts.append(f' "operators": {{\n{operators}\n }}')
        elif isinstance(value, list):
            parts.append(f" {json.dumps(key)}: {rows(value, ' ')}")
        else:
            parts.append(f" {json.dumps(key)}: {json.dumps(value)}")
    return "{\n" + ",\n".join(parts) + "\n}\n"


@app.command()
def replay(
    trace: Annotated[
        list[Path],
        typer.Option(help="Trace to serve, JSON lines, .gz accepted. Several: one after the other."),
    ],
    config: Annotated[Path, typer.Option(help="Serving configuration: JSON, as `plan` writes it.")],
    out: Annotated[
        Path,
        typer.Option(
            help="Folder for the run record, or, for several traces, for a folder each; must not hold anything."
        ),
    ],
    adapters: Annotated[
        Path | None,
        typer.Option(help="adapters.jsonl; without it ranks come from the trace and weights are random."),
    ] = None,
    seed: Annotated[
        int, typer.Option(min=0, max=2**31 - 1, help="Seed of prompts and of random weights.")
    ] = 0,
    load_level: Annotated[
        float | None, typer.Option(help="Offered load relative to capacity, to keep in the record.")
    ] = None,
    raw_arrivals: Annotated[
        bool, typer.Option(help="Take arrival_s even where arrival_spread_s is there.")
    ] = False,
    output_format: Annotated[str, typer.Option("--format", help="table or json.")] = "table",
) -> None:
    """Serve a trace in real time: random prompts, exactly the output lengths asked for, adapters cold on the GPU. Writes a run record."""
    if output_format not in ("table", "json"):
        raise UserError(f"--format {output_format!r} must be table or json")
    if load_level is not None and not (math.isfinite(load_level) and load_level > 0):
        raise UserError(f"--load-level={load_level} must be a finite number above 0")
    from engine.recording import record_replays
    from traces.run_record import check_free

    asked = [load(path, raw_arrivals=raw_arrivals) for path in trace]
    folders = [out / item.name for item in asked] if len(asked) > 1 else [out]
    if len(set(folders)) < len(folders):
        raise UserError("--trace: two traces have the same name, so their records would have the same folder")
    for folder in folders:
        check_free(folder)
    serving = ServingConfig.load(config)
    specs = _adapters(adapters, [item.adapters for item in asked])
    totals = record_replays(
        serving,
        specs,
        list(zip(asked, folders, strict=True)),
        seed=seed,
        load_level=load_level,
        progress=_tell,
    )
    for folder, values in zip(folders, totals, strict=True):
        _show(folder, values, output_format)


def _show(folder: Path, totals: dict[str, float], output_format: str) -> None:
    if output_format == "json":
        numbers = {key: None if math.isnan(value) else value for key, value in totals.items()}
        print(json.dumps({"run": str(folder), **numbers}))
        return
    print(folder)
    for key, value in totals.items():
        print(f"  {key:24} {value:.6g}")


@app.command()
def bench(
    config: Annotated[Path, typer.Option(help="Serving configuration: JSON, as `plan` writes it.")],
    out: Annotated[Path, typer.Option(help="JSON file to write; must not be there.")],
    adapters: Annotated[
        Path | None,
        typer.Option(help="adapters.jsonl; without it 128 random ones of rank 16 on all linears."),
    ] = None,
    batches: Annotated[str, typer.Option(help="Batches of the steady decode.")] = "1,16,32,64,128",
    base_requests: Annotated[int, typer.Option(min=1, help="Requests of the burst without adapters.")] = 1000,
    lora_requests: Annotated[int, typer.Option(min=1, help="Requests of the burst with adapters.")] = 600,
    seed: Annotated[
        int, typer.Option(min=0, max=2**31 - 1, help="Seed of prompts, lengths and random weights.")
    ] = 0,
) -> None:
    """Time steady decode by batch, and a burst, without and with adapters. Prints and writes one row a measurement."""
    from engine.bench import BenchPlan
    from engine.bench import bench as measure

    if out.exists():
        raise UserError(f"{out}: is there already")
    check_writable(out)
    serving = ServingConfig.load(config)
    if serving.replicas != 1:
        raise UserError(f"replicas={serving.replicas}: bench measures one replica")
    try:
        sizes = tuple(int(part) for part in batches.split(","))
    except ValueError:
        raise UserError(f"--batches {batches!r} must be whole numbers, such as 1,32,64") from None
    specs = _random_adapters() if adapters is None else load_adapters(adapters)
    plan = BenchPlan(batches=sizes, base_requests=base_requests, lora_requests=lora_requests)
    rows = []
    for row in measure(serving, specs, plan, seed=seed, progress=_tell):
        rows.append(row)
        rps = "" if row["rps"] is None else f"  {row['rps']:7.2f} req/s"
        print(
            f"{row['case']:6}  batch {row['batch']:4}  adapters {row['adapters']:4}  TPOT {row['tpot_ms']:7.3f} ms{rps}",
            flush=True,
        )
    _write_rows(out, rows, serving)


@app.command()
def serve(
    config: Annotated[
        Path | None, typer.Option(help="Serving configuration: JSON, as `plan` writes it.")
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(help="Folder of the model and its tokenizer; goes before the configuration's."),
    ] = None,
    adapters: Annotated[Path | None, typer.Option(help="adapters.jsonl: those known from the start.")] = None,
    adapter_dir: Annotated[
        Path | None, typer.Option(help="The one folder that /v1/load_lora_adapter may read.")
    ] = None,
    host: Annotated[
        str, typer.Option(help="Address to listen on; only this machine by default.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 takes a free one.")] = 8000,
    api_keys: Annotated[
        Path | None, typer.Option(help='JSON of keys and their models: {"key": ["adapter"] or "*"}.')
    ] = None,
    record: Annotated[
        Path | None, typer.Option(help="Native trace file to write: one line a request served.")
    ] = None,
    served_model_name: Annotated[
        str | None, typer.Option(help="The base model's name for clients; its folder's without it.")
    ] = None,
    tokenizer: Annotated[
        Path | None, typer.Option(help="Folder of a tokenizer, where the model's has none.")
    ] = None,
    max_queue: Annotated[int, typer.Option(help="Requests that may wait; more get a 429.")] = 1024,
    max_body_bytes: Annotated[int, typer.Option(help="Largest request.")] = 4 * 2**20,
    max_registered: Annotated[int, typer.Option(help="Most adapters registered at a time.")] = 10_000,
    max_adapter_bytes: Annotated[int, typer.Option(help="Largest safetensors file of an adapter.")] = 4
    * 2**30,
    drain_timeout: Annotated[
        float, typer.Option(help="Seconds that SIGTERM lets requests finish in.")
    ] = 30.0,
    seed: Annotated[int, typer.Option(min=0, max=2**31 - 1, help="Seed of random weights.")] = 0,
) -> None:
    """Serve over HTTP as OpenAI does: completions, chat, models, adapters loaded and unloaded while it runs. SIGTERM drains."""
    from engine.server.launch import ServerOptions, build_server
    from engine.server.launch import serve as run
    from engine.server.limits import ServerLimits

    limits = ServerLimits(
        max_queue=max_queue,
        max_body_bytes=max_body_bytes,
        max_adapters=max_registered,
        max_adapter_bytes=max_adapter_bytes,
        drain_timeout_s=drain_timeout,
    )
    options = ServerOptions(
        limits=limits,
        adapter_dir=adapter_dir,
        api_keys=api_keys,
        record=record,
        served_name=served_model_name,
        tokenizer=tokenizer,
        seed=seed,
    )
    serving = ServingConfig() if config is None else ServingConfig.load(config)
    if model is not None:
        serving = serving.with_changes(model=model)
    specs = {} if adapters is None else load_adapters(adapters)
    server = build_server(serving, specs, options, _tell)
    run(server, host, port, ready=_tell)


@app.command("load-bench")
def load_bench(
    config: Annotated[Path, typer.Option(help="Serving configuration: JSON, as `plan` writes it.")],
    out: Annotated[Path, typer.Option(help="JSON file to write; must not be there.")],
    adapters: Annotated[
        Path | None,
        typer.Option(help="adapters.jsonl; without it 128 random ones of rank 16 on all linears."),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**31 - 1, help="Seed of random weights.")] = 0,
) -> None:
    """Time adapter loads from host memory, back to back and beside decode steps. Prints and writes one row a measurement."""
    from engine.build import build_runner
    from engine.load_bench import bench_loads

    if out.exists():
        raise UserError(f"{out}: is there already")
    check_writable(out)
    serving = ServingConfig.load(config)
    if serving.gpus != 1:
        raise UserError(f"tp={serving.tp}, replicas={serving.replicas}: load-bench measures one GPU")
    specs = _random_adapters() if adapters is None else load_adapters(adapters)
    rows = bench_loads(build_runner(serving, specs, seed=seed, progress=_tell), seed=seed)
    for row in rows:
        print(
            "  ".join(
                f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}"
                for key, value in row.items()
            )
        )
    _write_rows(out, rows, serving)


def _write_rows(out: Path, rows: list[dict[str, Any]], serving: ServingConfig) -> None:
    """Write a benchmark's rows with where they come from, whole or not at all."""
    from engine.provenance import provenance

    temporary = out.with_name(f".{out.name}.tmp")
    temporary.write_text(
        json.dumps({"rows": rows, "config": serving.to_json(), **provenance()}, indent=1), encoding="utf-8"
    )
    temporary.replace(out)


def _random_adapters() -> dict[str, AdapterSpec]:
    return {f"r16-{number}": AdapterSpec(name=f"r16-{number}") for number in range(128)}


def _adapters(path: Path | None, asked: list[dict[str, int | None]]) -> dict[str, AdapterSpec]:
    """Return the adapters of all traces; a name has one rank in all of them."""
    given = None if path is None else load_adapters(path)
    specs: dict[str, AdapterSpec] = {}
    for names in asked:
        for name, spec in adapters_of_trace(names, given).items():
            if specs.setdefault(name, spec) != spec:
                raise UserError(
                    f"adapter {name!r} has rank {specs[name].rank} in one trace and {spec.rank} in another"
                )
    return specs


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return its exit code: 0, 2 for bad input or usage, 130 if interrupted."""
    here = torchrun.world()
    if here is not None and here.rank > 0:
        torchrun.join(here)  # the first rank runs the command
        return 0
    try:
        return run_app(
            app, program="python -m engine", arguments=arguments, user_errors=(UserError, TraceError)
        )
    finally:
        if here is not None:
            torchrun.dismiss(here)


if __name__ == "__main__":
    sys.exit(main())
