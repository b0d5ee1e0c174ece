"""What the kernel benchmark prints and writes: a table of aligned columns, and where the numbers come from."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

import torch
import triton

COLUMNS = {
    "layer": ("case", "rank", "tokens", "adapters", "us", "bound_us", "ratio", "chain_us"),
    "decode_attention": ("kv", "heads", "kv_heads", "head_dim", "items", "us", "bound_us", "ratio"),
    "prefill_attention": ("sequences", "tokens", "before", "us", "bound_us", "ratio", "us_sdpa", "vs_sdpa"),
    "small": ("op", "tokens", "us", "bound_us", "ratio"),
    "switch": ("op", "rank", "tokens", "us", "bound_us", "ratio"),
}


def provenance() -> dict[str, str]:
    """Return where the numbers come from. (The engine has one that says more, but kernels may not import it.)"""
    return {
        "gpu_name": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "torch": torch.__version__,
        "triton": triton.__version__,
        "commit": _commit(),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "command": " ".join(["python -m kernels", *sys.argv[1:]]),
    }


def report(result: dict) -> str:
    """Return the tables of a result, a line a case; times in µs."""
    parts = []
    if layers := result.get("layer"):
        parts.append("LoRA shrink + expand of one Llama-3.1-8B layer, µs\n" + layer_table(layers))
    if mixed := result.get("mixed_ranks"):
        parts.append(
            "Mixed ranks, time per byte over that of one rank: {time_per_byte_quotient:.2f}"
            " ({mixed_us:.1f} µs for {mixed_bytes:,} bytes, {uniform_us:.1f} µs for {uniform_bytes:,})".format(
                **mixed
            )
        )
    attention = result.get("attention", [])
    for op, title in (
        ("decode_attention", "Decode attention of one layer"),
        ("prefill_attention", "Prefill attention of one layer, and torch's on contiguous KV"),
    ):
        if rows := [row for row in attention if row["op"] == op]:
            parts.append(f"{title}, µs\n" + table(COLUMNS[op], rows))
    if small := result.get("small"):
        parts.append("Small kernels, µs\n" + table(COLUMNS["small"], small))
    if switch := result.get("switch"):
        parts.append("Dynamic adapters, one layer, 8 experts, top-2, µs\n" + table(COLUMNS["switch"], switch))
    return "\n\n".join(parts)


def layer_table(layers: Sequence[dict]) -> str:
    """Return the table of the layer rows, the peers' times beside ours, and ours over the best of theirs."""
    peers = list(layers[0].get("peers", ()))
    rows = [{**layer, **layer.get("peers", {}), "best_peer/us": _against_best(layer)} for layer in layers]
    return table((*COLUMNS["layer"], *peers, *(("best_peer", "best_peer/us") if peers else ())), rows)


def table(columns: Sequence[str], rows: Sequence[dict]) -> str:
    """Return columns aligned to the right; "-" for what a row has not."""
    cells = [[*columns], *([_cell(row.get(column)) for column in columns] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in cells
    )


def _against_best(layer: dict) -> float | None:
    best = layer.get("best_peer")
    return round(layer["peers"][best] / layer["us"], 2) if best else None


def _cell(value: object) -> str:
    if value is None:
        return "-"
    return f"{value:.2f}" if isinstance(value, float) else str(value)


def _commit() -> str:
    """Return the commit of the working tree, from git or, where the tree travelled without it, from the file `.commit`."""
    root = Path(__file__).resolve().parent.parent
    if (root / ".commit").is_file():
        return (root / ".commit").read_text(encoding="utf-8").strip()
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=10"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"
