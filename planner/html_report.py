"""A plan as one HTML page that needs nothing else: tables, and plots drawn as SVG."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from math import isfinite

from planner.plan import Choice, Plan
from planner.report import choice_lines, slo_text

WIDTH, HEIGHT, LEFT, BOTTOM = 640, 260, 60, 34
COLOURS = ("#4269d0", "#efb118", "#ff725c", "#6cc5b0", "#3ca951", "#9c6b4e", "#bbbbbb")
STYLE = """body{font:14px/1.5 system-ui,sans-serif;max-width:1000px;margin:2em auto;padding:0 1em;color:#222}
table{border-collapse:collapse}td,th{padding:.2em .8em;text-align:right;border-bottom:1px solid #ddd}
td:first-child,th:first-child{text-align:left}svg{max-width:100%;height:auto}li{margin:.2em 0}"""


def html_report(plan: Plan) -> str:
    """Return a plan as a page; the same plan is the same page."""
    parts = [
        f"<p>{plan.requests:,} requests at {plan.rate_rps:.2f} req/s, at most {plan.gpus} GPUs. {escape(slo_text(plan.slo))}</p>",
        _choices(plan),
        *_recommended(plan),
        _section("Highest rate of everything tried", _trials_plot(plan)),
        _list("If the adapters were retrained", [f"{r.change}: {r.gain:+.1%}" for r in plan.retraining]),
        _list("Warnings", plan.warnings),
        _list("Assumptions", plan.assumptions),
    ]
    return (
        "<!doctype html><html lang=en><meta charset=utf-8><title>loraplan</title>"
        f"<style>{STYLE}</style><h1>Plan</h1>{''.join(parts)}</html>\n"
    )


def _named(plan: Plan) -> list[tuple[str, Choice]]:
    named = [
        ("recommended", plan.recommended),
        ("fewest GPUs", plan.fewest_gpus),
        ("nearest miss", plan.nearest),
    ]
    named += [(str(number), choice) for number, choice in enumerate(plan.alternatives, start=1)]
    return [(name, choice) for name, choice in named if choice is not None]


def _choices(plan: Plan) -> str:
    heads = (
        "",
        "GPUs",
        "TP × replicas",
        "seqs",
        "chunk",
        "scheduler",
        "sustains",
        "TTFT p95",
        "TPOT p95",
        "SLO met",
    )
    rows = []
    for name, choice in _named(plan):
        config, predicted = choice.config, choice.predicted
        cells = (
            name,
            str(config.gpus),
            f"{config.tp} × {config.replicas}",
            str(config.max_num_seqs),
            str(config.max_num_batched_tokens),
            config.scheduler,
            f"{choice.sustainable_rps:.1f}/s",
            _ms(predicted["ttft_p95_s"].value),
            _ms(predicted["tpot_p95_s"].value),
            f"{predicted['slo_attainment'].value:.2%}",
        )
        rows.append("".join(f"<td>{escape(cell)}</td>" for cell in cells))
    head = "".join(f"<th>{head}</th>" for head in heads)
    return f"<table><tr>{head}</tr>{''.join(f'<tr>{row}</tr>' for row in rows)}</table>"


def _recommended(plan: Plan) -> list[str]:
    best = plan.recommended or plan.nearest
    if best is None:
        return [_list("Nothing is feasible", sorted({item.reason for item in plan.impossible}))]
    memory = [(name, float(size)) for name, size in best.memory_per_gpu_bytes.items() if name != "total"]
    used = [(item.name, item.used) for item in best.resources if isfinite(item.used)]
    return [
        _list("What it does", choice_lines(best)),
        _section("Memory of one GPU, GB", _stacked([(name, size / 1e9) for name, size in memory])),
        _section("Resources used at the highest rate", _bars(used, 1.0)) if used else "",
    ]


def _trials_plot(plan: Plan) -> str:
    """Draw every trial's rate against its GPUs."""
    points = [
        (trial.config.gpus, trial.sustainable_rps, trial.config.tp)
        for trial in plan.trials
        if trial.sustainable_rps > 0
    ]
    if not points:
        return "<p>none</p>"
    most_x, most_y = max(point[0] for point in points), max(point[1] for point in points)
    degrees = sorted({point[2] for point in points})

    def place(gpus: float, rate: float) -> tuple[float, float]:
        x = LEFT + (WIDTH - LEFT - 20) * gpus / (most_x + 0.5)
        return x, HEIGHT - BOTTOM - (HEIGHT - BOTTOM - 16) * rate / most_y

    dots = []
    for gpus, rate, tp in points:
        x, y = place(gpus, rate)
        dots.append(
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{COLOURS[degrees.index(tp) % 7]}" fill-opacity=".7"/>'
        )
    labels = [
        _text(place(gpus, 0)[0], HEIGHT - 14, str(gpus)) for gpus in sorted({point[0] for point in points})
    ]
    labels += [
        _text(LEFT - 8, place(0, most_y * part)[1] + 4, f"{most_y * part:.0f}", "end") for part in (0, 0.5, 1)
    ]
    for index, tp in enumerate(degrees):
        labels.append(_text(LEFT + 20 + 70 * index, 12, f"● TP {tp}", "start", COLOURS[index % 7]))
    asked = place(0, min(plan.rate_rps, most_y))[1]
    line = f'<line x1="{LEFT}" x2="{WIDTH}" y1="{asked:.1f}" y2="{asked:.1f}" stroke="#888" stroke-dasharray="4"/>'
    return _svg([line, *dots, *labels]) + "<p>req/s against GPUs; dashed: the rate that is asked for</p>"


def _stacked(parts: Sequence[tuple[str, float]]) -> str:
    total = sum(size for _, size in parts) or 1.0
    x, shapes = float(LEFT), []
    for index, (name, size) in enumerate(parts):
        width = (WIDTH - LEFT - 20) * size / total
        colour = COLOURS[index % len(COLOURS)]
        shapes.append(f'<rect x="{x:.1f}" y="10" width="{width:.1f}" height="40" fill="{colour}"/>')
        shapes.append(_text(LEFT, 76 + 18 * index, f"■ {name} {size:.1f}", "start", colour))
        x += width
    return _svg(shapes, 80 + 18 * len(parts))


def _bars(parts: Sequence[tuple[str, float]], most: float) -> str:
    shapes = []
    for index, (name, value) in enumerate(parts):
        y = 8 + 24 * index
        width = 400 * min(1.0, value / most)
        shapes.append(f'<rect x="160" y="{y}" width="{width:.1f}" height="16" fill="{COLOURS[0]}"/>')
        shapes.append(_text(150, y + 13, name, "end"))
        shapes.append(_text(168 + width, y + 13, f"{value:.0%}", "start"))
    return _svg(shapes, 16 + 24 * len(parts))


def _svg(shapes: Sequence[str], height: int = HEIGHT) -> str:
    return f'<svg viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" role="img">{"".join(shapes)}</svg>'


def _text(x: float, y: float, text: str, anchor: str = "middle", colour: str = "#222") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" font-size="12" text-anchor="{anchor}" fill="{colour}">{escape(text)}</text>'


def _section(title: str, body: str) -> str:
    return f"<h2>{escape(title)}</h2>{body}"


def _list(title: str, lines: Sequence[str]) -> str:
    if not lines:
        return ""
    return _section(title, f"<ul>{''.join(f'<li>{escape(line)}</li>' for line in lines)}</ul>")


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:,.3g} ms" if isfinite(seconds) else "–"
