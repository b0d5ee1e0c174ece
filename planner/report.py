"""A plan as text: one table, then what it rests on and what to run next."""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite
from shutil import get_terminal_size

from rich.console import Console
from rich.table import Table
from rich.text import Text

from planner.intervals import Prediction
from planner.plan import Choice, Plan
from planner.workload import WINDOW_REQUESTS
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
    console.print(_table(plan))
    for choice, name in _named(plan):
        console.print(Text(textwrap.fill(_sentence(choice, name), width, subsequent_indent="  ")))
    if any(choice.predicted_on != "trace" for choice in plan.alternatives):
        console.print(f"* latencies of the busiest {WINDOW_REQUESTS:,} requests")
    _notes(console, "If the adapters were retrained (one replica, the busiest requests)", _retrained(plan))
    _notes(console, "Warnings", plan.warnings)
    _notes(console, "Assumptions", plan.assumptions)
    if commands is not None:
        console.print()
        console.print("Run it:")
        for command in (commands.simulate, commands.replay):
            console.print(Text(f"  {command}"), soft_wrap=True)


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
    named = [
        (plan.recommended, "recommended"),
        (plan.fewest_gpus, "fewest GPUs"),
        (plan.nearest, "nearest miss"),
    ]
    return [(choice, name) for choice, name in named if choice is not None]


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


def _range(value: Prediction) -> str:
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
