"""A plan as text: one table, then what it rests on and what to run next."""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from shutil import get_terminal_size

from rich.console import Console
from rich.table import Table
from rich.text import Text

from engine.config import ServingConfig
from planner.plan import Choice, Plan
from planner.space import POLICIES, ROUTING
from planner.workload import STRETCH_REQUESTS, WINDOW_REQUESTS
from sim.intervals import Interval
from traces.metrics import Slo

WIDTH = (100, 120)  # of the text: a terminal's own within this
SHAPE = "TP × replicas"


@dataclass(frozen=True, slots=True)
class Commands:
    """How to run the recommendation; shown below it."""

    simulate: str
    replay: str


def print_plan(plan: Plan, commands: Commands | None) -> None:
    """Print a plan on standard output, without colour codes unless that is a terminal."""
    terminal = sys.stdout.isatty()
    width = min(WIDTH[1], max(WIDTH[0], get_terminal_size().columns)) if terminal else WIDTH[1]
    console = Console(file=sys.stdout, highlight=False, no_color=not terminal, width=width)
    console.print(f"{plan.requests:,} requests at {plan.rate_rps:.2f} req/s, at most {plan.gpus} GPUs")
    console.print(f"SLO: {slo_text(plan.slo)}")
    console.print()
    if plan.why_not is not None:
        console.print(Text(textwrap.fill(f"{plan.why_not[:1].upper()}{plan.why_not[1:]}.", width)))
        console.print()
    if _named(plan) or plan.alternatives:
        console.print(_table(plan))
    for choice, name in _named(plan):
        console.print(Text(textwrap.fill(_sentence(choice, name), width, subsequent_indent="  ")))
    if any(choice.predicted_on != "trace" for choice in plan.alternatives):
        console.print(
            f"* latencies of the busiest {WINDOW_REQUESTS:,} requests; rates of these or of the busiest {STRETCH_REQUESTS:,}"
        )
    if _is_fewest(plan):
        console.print("No configuration with fewer GPUs meets the SLO at the trace's rate.")
    for line in [] if plan.recommended is None else choice_lines(plan.recommended):
        console.print(Text(textwrap.fill(line, width, subsequent_indent="  ")))
    if plan.runner_up is not None:
        up = plan.runner_up
        takes = "; ".join(up.would_take) or "nothing that was simulated"
        said = f"Runner-up: {_shape(up.config)}, {up.sustainable_rps:.1f} req/s. It would take: {takes}."
        console.print(Text(textwrap.fill(said, width, subsequent_indent="  ")))
    _notes(console, "No other has fewer GPUs and a higher rate (Pareto)", _front(plan))
    _notes(console, "If the adapters were retrained (one replica, the busiest requests)", _retrained(plan))
    _notes(console, "Warnings", plan.warnings)
    _notes(console, "Assumptions", plan.assumptions)
    if commands is not None:
        console.print()
        console.print("Run it:")
        for command in (commands.simulate, commands.replay):
            console.print(Text(f"  {command}"), soft_wrap=True)


def choice_lines(choice: Choice) -> list[str]:
    """Return what breaks first, the headroom of the rest, and whose SLO is missed, as lines of text."""
    config = choice.config
    lines = [
        f"{_shape(config)} sustains {choice.sustainable_rps:.2f} req/s; what bounds it: {choice.bottleneck}"
    ]
    first = choice.breaks_first
    if first is not None:
        rest = ", ".join(
            f"{item.name} {item.used:.0%}"
            for item in choice.resources
            if item is not first and isfinite(item.used)
        )
        lines.append(
            f"breaks first: {first.name}, {first.used:.0%} used at that rate ({first.how}); then {rest}"
        )
    if choice.cost_usd_per_million_tokens is not None:
        lines.append(f"${choice.cost_usd_per_million_tokens:.3f} a million tokens at that rate")
    if choice.adapters_missing:
        worst = [f"{name} {share:.1%}" for name, share in list(choice.adapters_missing.items())[:5]]
        count = len(choice.adapters_missing)
        lines.append(
            f"{count} adapters miss the attainment at the trace's rate; the worst: {', '.join(worst)}"
        )
    return lines


def print_kinds(plans: Mapping[str, Plan]) -> None:
    """Print plans for several kinds of GPU: a line each, which is ahead in what, then the plans."""
    print(f"{'kind':<10}{'GPUs':>5}{'sustains':>10}{'fewest':>8}{'$/hour':>9}{'$/M tokens':>12}  rests on")
    for kind, plan in plans.items():
        best, fewest = plan.recommended, plan.fewest_gpus
        if best is None:
            print(f"{kind:<10}{plan.why_not}")
            continue
        hour, tokens = best.cost_usd_per_hour, best.cost_usd_per_million_tokens
        print(
            f"{kind:<10}{best.config.gpus:>5}{best.sustainable_rps:>8.1f}/s{'–' if fewest is None else fewest.config.gpus:>8}"
            f"{'–' if hour is None else f'{hour:g}':>9}{'–' if tokens is None else f'{tokens:.3f}':>12}"
            f"  {best.predicted['sustainable_rps'].provenance} costs"
        )
    for line in _ahead(plans):
        print(line)
    for kind, plan in plans.items():
        print(f"\n=== {kind}")
        print_plan(plan, None)


def _ahead(plans: Mapping[str, Plan]) -> list[str]:
    """Say which kind of GPU sustains most, and which costs least, where that is known of more than one."""
    found = {kind: plan.recommended for kind, plan in plans.items() if plan.recommended is not None}
    costs = {
        kind: choice.cost_usd_per_million_tokens
        for kind, choice in found.items()
        if choice.cost_usd_per_million_tokens is not None
    }
    lines = []
    if len(found) > 1:
        most = max(found, key=lambda kind: found[kind].sustainable_rps)
        lines.append(f"highest rate: {most}")
    if len(costs) > 1:
        lines.append(f"cheapest per token: {min(costs, key=lambda kind: costs[kind])}")
    return lines


def _shape(config: ServingConfig) -> str:
    """Return a configuration in a few words: its shape, and the policies that are not the plainest."""
    odd = [
        f"{name.replace('_', ' ')} {getattr(config, name)}"
        for name, values in (*POLICIES.items(), *ROUTING.items())
        if getattr(config, name) != values[0]
    ]
    words = [f"TP {config.tp} × {config.replicas}", f"{config.max_num_seqs} seqs"]
    words += [f"{config.max_num_batched_tokens} tokens a step", *odd]
    if config.tp > 1:
        words.append(config.lora_sharding)
    return ", ".join(words)


def _front(plan: Plan) -> list[str]:
    return [
        f"{choice.config.gpus} GPUs: {_shape(choice.config)}, {choice.sustainable_rps:.1f} req/s, "
        f"TTFT p95 {_ms(choice.predicted['ttft_p95_s'].value)}"
        for choice in plan.front
    ]


def _retrained(plan: Plan) -> list[str]:
    return [
        f"{item.change}: TP {item.config.tp} would sustain {item.then_rps:.2f} req/s instead of {item.now_rps:.2f} ({item.gain:+.1%})."
        for item in plan.retraining
    ]


def slo_text(slo: Slo) -> str:
    """Return an SLO in a line."""
    bounds = [f"TTFT ≤ {_ms(slo.ttft_s)}", f"TPOT ≤ {_ms(slo.tpot_s)}"]
    if slo.e2e_s is not None:
        bounds.append(f"E2E ≤ {_ms(slo.e2e_s)}")
    return f"{', '.join(bounds)} for {slo.attainment:.4g} of the requests; percentiles shown: p{slo.percentile:g}"


def _table(plan: Plan) -> Table:
    p = f"p{plan.slo.percentile:g}"
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    table.add_column("")
    for name in (
        "GPUs",
        SHAPE,
        "seqs",
        "chunk",
        "sustains",
        f"TTFT {p}",
        f"TPOT {p}",
        "SLO met",
        "memory",
        "bottleneck",
    ):
        table.add_column(name, justify="left" if name in (SHAPE, "bottleneck") else "right", no_wrap=True)
    rows = [(name, choice) for choice, name in _named(plan)]
    for number, choice in enumerate(plan.alternatives, start=1):
        rows.append((f"{number}" if choice.predicted_on == "trace" else f"{number} *", choice))
    for name, choice in rows:
        style = "bold" if choice is plan.recommended else ""
        table.add_row(name, *_cells(choice, p), style=style)
    return table


def _named(plan: Plan) -> list[tuple[Choice, str]]:
    fewest = None if _is_fewest(plan) else plan.fewest_gpus
    named = [(plan.recommended, "recommended"), (fewest, "fewest GPUs"), (plan.nearest, "nearest miss")]
    return [(choice, name) for choice, name in named if choice is not None]


def _is_fewest(plan: Plan) -> bool:
    """Whether the recommendation is the plan with the fewest GPUs too: it is shown once."""
    best, fewest = plan.recommended, plan.fewest_gpus
    return best is not None and fewest is not None and best.config == fewest.config


def _cells(choice: Choice, p: str) -> list[str]:
    config, predicted = choice.config, choice.predicted
    memory = choice.memory_per_gpu_bytes
    used = memory["total"] - memory["free"] - memory["unused"]
    return [
        str(config.gpus),
        f"{config.tp} × {config.replicas}",
        str(config.max_num_seqs),
        str(config.max_num_batched_tokens),
        f"{choice.sustainable_rps:.1f}/s",
        _ms(predicted[f"ttft_{p}_s"].value),
        _ms(predicted[f"tpot_{p}_s"].value),
        f"{predicted['slo_attainment'].value:.2%}",
        f"{used / 1e9:.0f} GB",
        choice.bottleneck,
    ]


def _sentence(choice: Choice, name: str) -> str:
    rate, attainment = choice.predicted["sustainable_rps"], choice.predicted["slo_attainment"]
    said = (
        f"{name}: sustains {rate.value:.1f} req/s ({rate.low:.1f} to {rate.high:.1f}, {rate.provenance}); at the trace's "
        f"rate TTFT p95 {_range(choice.predicted['ttft_p95_s'])}, TPOT p95 {_range(choice.predicted['tpot_p95_s'])}, "
        f"SLO met by {attainment.value:.2%}"
    )
    if choice.misses is not None:
        said += f"; what binds: {choice.misses}, {choice.bottleneck}"
    if choice.cost_usd_per_hour is not None:
        said += f"; ${choice.cost_usd_per_hour:g} an hour"
    return said[0].upper() + said[1:] + "."


def _range(value: Interval) -> str:
    return f"{_ms(value.value)} ({_ms(value.low)} to {_ms(value.high)})"


def _notes(console: Console, title: str, notes: Sequence[str]) -> None:
    if notes:
        console.print()
        console.print(f"{title}:")
        for note in notes:
            lines = textwrap.fill(note, console.width, initial_indent="  - ", subsequent_indent="    ")
            console.print(Text(lines))


def _ms(seconds: float) -> str:
    if not isfinite(seconds):
        return "–"
    milliseconds = seconds * 1e3
    return f"{milliseconds:,.0f} ms" if milliseconds >= 100 else f"{milliseconds:.3g} ms"
