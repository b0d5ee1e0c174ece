"""The command line of traces: import, synth, assign, export and describe."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal

import typer

from traces.assign import RANK_MIXES, Assignment, RankOrder, Rule, assign
from traces.command_line import run_app
from traces.describe import describe, table
from traces.errors import TraceError
from traces.exporters import Target, to_timed_lines
from traces.files import write_lines
from traces.importers import TimeUnit, import_azure, import_burstgpt, import_mooncake
from traces.like import LIKE, Like, cut, synthesize_like
from traces.native import load, save, to_lines
from traces.synth import S_LORA, Uniform, Workload, synthesize
from traces.tenant_traffic import load_tenant_lengths, synthesize_tenants
from traces.tenants import load_tenants
from traces.tool_importers import import_blis, import_timed, import_vidur
from traces.trace import Trace

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    help="Import, synthesise and summarise traces of LLM requests, and attach LoRA adapters to them.",
)

PROGRAM = "python -m traces"
OFFSET_S = Assignment().offset_s
DEFAULT_DURATION_S = 300.0  # S-LoRA's benchmark runs five minutes

Source = Literal["azure", "burstgpt", "mooncake", "aiperf", "vidur", "blis", "vllm"]
Format = Literal["table", "json"]

Out = Annotated[
    Path | None, typer.Option(help="File to write, gzip if it ends in .gz; else standard output.")
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the output file if it is there.")]
RawArrivals = Annotated[
    bool, typer.Option("--raw-arrivals", help="Use `arrival_s` even where `arrival_spread_s` is given.")
]
Seed = Annotated[int, typer.Option(min=0, help="Equal seeds give equal traces.")]
Adapters = Annotated[int, typer.Option(min=0, help="Number of adapters; 0: the base model alone.")]
Zipf = Annotated[float, typer.Option(help="R1, R2: popularity falls as 1/position^s; 0 is uniform.")]
Alpha = Annotated[
    float, typer.Option(help="R1-slora: share of the first k of n is (k/n)^alpha; 1 is uniform.")
]
Ranks = Annotated[
    str, typer.Option(help=f"Mix of ranks: {', '.join(RANK_MIXES)}, or a list such as 8,16,64.")
]
Order = Annotated[
    RankOrder, typer.Option(help="Which adapter has which rank; hot-small: the popular, the smallest.")
]
BaseShare = Annotated[float, typer.Option(help="Share of the requests that use no adapter.")]
Clients = Annotated[
    Path | None, typer.Option(help="ServeGen's client rates, CSV, plain or gzip (R3, R3-gen).")
]
Offset = Annotated[float, typer.Option(help="Where in the tenants' time the trace begins (R3, R3-gen).")]


@app.command("import")
def import_command(
    source: Annotated[Source, typer.Argument(help="Format of the file; aiperf is Mooncake's with adapters.")],
    file: Annotated[Path, typer.Argument(help="File to read, plain or gzip.")],
    out: Out = None,
    time_unit: Annotated[
        TimeUnit | None, typer.Option(help="Unit of `timestamp` (mooncake, aiperf); ms unless told.")
    ] = None,
    spread: Annotated[
        bool | None,
        typer.Option(
            help="Spread requests of one tick of a 3 s clock (mooncake, aiperf). Unless told: if it is one."
        ),
    ] = None,
    rate: Annotated[
        float | None, typer.Option(help="Requests per second of Poisson arrivals (vidur without times).")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of these arrivals.")] = 0,
    overwrite: Overwrite = False,
) -> None:
    """Turn a public trace into the native format.

    Times count from the first row. Mooncake's clock ticks every 3 s: requests of one tick are spread over it,
    as `arrival_spread_s` beside the raw `arrival_s`.
    """
    timed = source in ("mooncake", "aiperf", "vllm")
    if time_unit is not None and not timed:
        raise TraceError(f"--time-unit is for mooncake, aiperf and vllm: {source} says its own time")
    if spread is not None and source not in ("mooncake", "aiperf"):
        raise TraceError(f"--spread is for mooncake and aiperf, not {source}")
    if rate is not None and source != "vidur":
        raise TraceError(f"--rate is for vidur: {source} has its own arrivals")
    trace = _imported(source, file, time_unit, spread, rate, seed)
    _write(trace, out, overwrite)


def _imported(
    source: str, file: Path, time_unit: TimeUnit | None, spread: bool | None, rate: float | None, seed: int
) -> Trace:
    if source in ("mooncake", "aiperf"):
        return import_mooncake(file, time_unit or "ms", spread, warn=_warn)
    if source == "vllm":
        return import_timed(file, time_unit or "s", warn=_warn)
    if source == "vidur":
        return import_vidur(file, rate, seed, warn=_warn)
    if source == "blis":
        return import_blis(file, warn=_warn)
    return (import_azure if source == "azure" else import_burstgpt)(file, warn=_warn)


@app.command()
def synth(
    out: Out = None,
    like: Annotated[
        Like | None,
        typer.Option(
            help="Lengths, arrivals and reuse of prefixes of a real trace, from published statistics; else S-LoRA's workload."
        ),
    ] = None,
    rate: Annotated[
        float | None, typer.Option(help="Requests per second; the source's own, or 2 (S-LoRA).")
    ] = None,
    cv: Annotated[
        float | None, typer.Option(help="CV of the gaps between arrivals (Gamma); 1 is Poisson.")
    ] = None,
    requests: Annotated[int | None, typer.Option(help="Number of requests.")] = None,
    duration_s: Annotated[
        float | None,
        typer.Option(help=f"Instead of --requests: rate × seconds; {DEFAULT_DURATION_S:g} unless told."),
    ] = None,
    prompt_range: Annotated[
        str | None, typer.Option(help="Prompt tokens, uniform in LOW,HIGH without HIGH; S-LoRA's is 8,512.")
    ] = None,
    output_range: Annotated[str | None, typer.Option(help="Output tokens, likewise.")] = None,
    rule: Annotated[
        Rule | None,
        typer.Option(
            help="How adapters are drawn; unless told R1-slora, with --like R1, and R2 where prefixes are reused."
        ),
    ] = None,
    max_model_len: Annotated[
        int | None, typer.Option(help="Cut prompts so that prompt and output are at most so many tokens.")
    ] = None,
    adapters: Adapters = 100,
    zipf_s: Zipf = 0.92,
    alpha: Alpha = 1.0,
    ranks: Ranks = "WIDE",
    rank_order: Order = "interleave",
    base_share: BaseShare = 0.0,
    tenants: Clients = None,
    tenant_lengths: Annotated[
        Path | None, typer.Option(help="ServeGen's densities of lengths, JSONL, plain or gzip (R3-gen).")
    ] = None,
    offset_s: Offset = OFFSET_S,
    seed: Seed = 0,
    overwrite: Overwrite = False,
) -> None:
    """Make a synthetic trace: S-LoRA's workload, one like a real trace, or the traffic of real tenants.

    Gaps are Gamma with shape 1/cv² and scale cv²/rate. Prompt and output lengths are drawn independently. With --like, arrivals
    like azure-code's come in bursts with pauses between, and mooncake's prompts repeat each other's start in conversations; with
    --cv or a range of lengths beside --like, gaps are Gamma and nothing repeats. --rule R3-gen: each of ServeGen's clients sends at
    its own times with its own lengths, all together at --rate.
    """
    how = Assignment(
        rule=rule or "R1",
        adapters=max(1, adapters),
        zipf_s=zipf_s,
        alpha=alpha,
        rank_mix=_mix(ranks),
        rank_order=rank_order,
        base_share=base_share,
        offset_s=offset_s,
        seed=seed,
    )
    _check_tenants(how.rule, tenants, tenant_lengths)
    if how.rule == "R3-gen":
        if like is not None or cv is not None or prompt_range is not None or output_range is not None:
            raise TraceError(
                "--rule R3-gen has its own arrivals and lengths: no --like, --cv or range of lengths"
            )
        if adapters == 0 or base_share:
            raise TraceError(
                "--rule R3-gen gives every request its tenant's adapter: no --adapters 0, no --base-share"
            )
        trace = _tenant_trace(how, tenants, tenant_lengths, rate, requests, duration_s)
        _write(trace if max_model_len is None else cut(trace, max_model_len), out, overwrite)
        return
    if like is not None and cv is None and prompt_range is None and output_range is None:
        source = LIKE[like]
        count = _count(source.workload.rate_rps if rate is None else rate, requests, duration_s)
        trace = synthesize_like(source, count, seed, rate_rps=rate, max_model_len=max_model_len)
    else:
        base = S_LORA if like is None else LIKE[like].workload
        workload = Workload(
            rate_rps=base.rate_rps if rate is None else rate,
            cv=base.cv if cv is None else cv,
            prompt=base.prompt if prompt_range is None else _range("--prompt-range", prompt_range),
            output=base.output if output_range is None else _range("--output-range", output_range),
        )
        trace = synthesize(workload, _count(workload.rate_rps, requests, duration_s), seed)
        if max_model_len is not None:
            trace = cut(trace, max_model_len)
    if adapters:
        unless_told: Rule = "R1-slora" if like is None else "R1" if trace.columns.sessions is None else "R2"
        known = None if tenants is None else load_tenants(tenants)
        trace = assign(trace, replace(how, rule=rule or unless_told), known)
    _write(trace, out, overwrite)


def _tenant_trace(
    how: Assignment,
    tenants: Path | None,
    lengths: Path | None,
    rate: float | None,
    requests: int | None,
    duration_s: float | None,
) -> Trace:
    assert tenants is not None and lengths is not None
    rate_rps = S_LORA.rate_rps if rate is None else rate
    count = _count(rate_rps, requests, duration_s)
    span_s = duration_s or DEFAULT_DURATION_S
    if requests is not None:
        span_s = count / rate_rps if rate_rps > 0 else 0.0
    return synthesize_tenants(
        load_tenants(tenants),
        load_tenant_lengths(lengths),
        how,
        rate_rps=rate_rps,
        duration_s=span_s,
        requests=requests,
    )


def _check_tenants(rule: str, tenants: Path | None, lengths: Path | None) -> None:
    if (rule in ("R3", "R3-gen")) != (tenants is not None):
        raise TraceError("--tenants and --rule R3 or R3-gen go together")
    if (rule == "R3-gen") != (lengths is not None):
        raise TraceError("--tenant-lengths and --rule R3-gen go together")


@app.command("assign")
def assign_command(
    trace: Annotated[Path, typer.Argument(help="Native trace, plain or gzip.")],
    out: Out = None,
    rule: Annotated[
        Rule,
        typer.Option(
            help="R1, R1-slora: by request, which ends prefix reuse; R2: by session, which keeps it; R3: by real tenants' rates over time."
        ),
    ] = "R1",
    adapters: Adapters = 100,
    zipf_s: Zipf = 0.92,
    alpha: Alpha = 1.0,
    ranks: Ranks = "WIDE",
    rank_order: Order = "interleave",
    base_share: BaseShare = 0.0,
    tenants: Clients = None,
    offset_s: Offset = OFFSET_S,
    seed: Seed = 20240607,
    raw_arrivals: RawArrivals = False,
    overwrite: Overwrite = False,
) -> None:
    """Attach an adapter and a rank to every request of a trace, in place of those that it has.

    The draw is by SHA-256 of seed, rule and row number or session: the same on every machine and in any
    language.
    """
    if adapters < 1:
        raise TraceError("--adapters must be at least 1")
    if rule == "R3-gen":
        raise TraceError("--rule R3-gen makes arrivals and lengths too: python -m traces synth --rule R3-gen")
    _check_tenants(rule, tenants, None)
    how = Assignment(
        rule=rule,
        adapters=adapters,
        zipf_s=zipf_s,
        alpha=alpha,
        rank_mix=_mix(ranks),
        rank_order=rank_order,
        base_share=base_share,
        offset_s=offset_s,
        seed=seed,
    )
    known = None if tenants is None else load_tenants(tenants)
    _write(assign(load(trace, raw_arrivals), how, known), out, overwrite)


@app.command("export")
def export_command(
    target: Annotated[
        Target, typer.Argument(help="vllm: its timed trace, in seconds; mooncake: in milliseconds.")
    ],
    trace: Annotated[Path, typer.Argument(help="Native trace, plain or gzip.")],
    out: Out = None,
    raw_arrivals: RawArrivals = False,
    overwrite: Overwrite = False,
) -> None:
    """Write a trace as the benchmarks of vLLM and SGLang replay it.

    They make prompts of blocks of 512 tokens: requests without prefix blocks get blocks of their own.
    """
    lines = to_timed_lines(load(trace, raw_arrivals), target)
    if out is None:
        sys.stdout.writelines(f"{line}\n" for line in lines)
        sys.stdout.flush()
    else:
        write_lines(out, lines, overwrite=overwrite)


@app.command("describe")
def describe_command(
    trace: Annotated[Path, typer.Argument(help="Native trace, plain or gzip.")],
    output_format: Annotated[Format, typer.Option("--format", help="json: one object.")] = "table",
    raw_arrivals: RawArrivals = False,
) -> None:
    """Summarise a trace: load, burstiness, lengths, adapters and how skewed their use is."""
    summary = describe(load(trace, raw_arrivals))
    if output_format == "json":
        typer.echo(json.dumps(summary.to_dict(), indent=2))
    else:
        typer.echo("\n".join(table(summary)))


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return its exit code: 0, 2 for bad input or usage, 130 if interrupted."""
    return run_app(app, program=PROGRAM, arguments=arguments, user_errors=(TraceError,))


def _warn(message: str) -> None:
    typer.echo(f"warning: {message}", err=True)


def _write(trace: Trace, out: Path | None, overwrite: bool) -> None:
    if out is None:
        for line in to_lines(trace):
            sys.stdout.write(f"{line}\n")
        sys.stdout.flush()
        return
    save(trace, out, overwrite=overwrite)
    typer.echo(f"{out}: {len(trace):,} requests, {len(trace.adapters):,} adapters", err=True)


def _mix(text: str) -> tuple[int, ...]:
    if text in RANK_MIXES:
        return RANK_MIXES[text]
    return tuple(_numbers("--ranks", text, f"one of {', '.join(RANK_MIXES)}, or whole numbers"))


def _range(option: str, text: str) -> Uniform:
    numbers = _numbers(option, text, "LOW,HIGH")
    if len(numbers) != 2:
        raise TraceError(f"{option} must be LOW,HIGH, not {text}")
    return Uniform(low=numbers[0], high=numbers[1])


def _numbers(option: str, text: str, wanted: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise TraceError(f"{option} must be {wanted}, not {text}") from None


def _count(rate_rps: float, requests: int | None, duration_s: float | None) -> int:
    if requests is not None and duration_s is not None:
        raise TraceError("--requests and --duration-s exclude each other")
    if requests is not None:
        return requests
    seconds = DEFAULT_DURATION_S if duration_s is None else duration_s
    if not 0 < seconds <= 1e9:
        raise TraceError(f"--duration-s must be above 0 and at most 1e9, not {seconds}")
    return int(rate_rps * seconds)


if __name__ == "__main__":
    sys.exit(main())
