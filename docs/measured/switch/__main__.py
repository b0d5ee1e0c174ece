"""Measure every decode path of dynamic adapters, and merging, on one H200: python -m docs.measured.switch OUT.json [--tiny].

Correctness first, then the segmented product alone, then whole tokens, drift and break-even. What fails is written down and the rest goes on;
the file is written after every row. Beside it comes merge.h200.json: what a merge takes over its bound, for sim/profiles. --tiny: a dry run on a
CPU in Triton's interpreter, whose times mean nothing.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import os
import sys
from pathlib import Path

if "--tiny" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"  # decided when Triton is imported

from docs.measured.switch.checks import check_kernels
from docs.measured.switch.drift import measure_drift
from docs.measured.switch.paths import measure_model
from docs.measured.switch.run import Run
from docs.measured.switch.static import measure_static
from engine.model_shape import MODEL_CATALOGUE, ModelShape
from engine.provenance import provenance

TINY = ModelShape(
    name="tiny", hidden_size=64, intermediate_size=64, num_layers=1, num_heads=4, num_kv_heads=2, head_dim=16,
    vocab_size=128, max_position_embeddings=1024,
)  # fmt: skip


def main() -> int:
    """Measure; return 0, or 1 where something failed."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("out", type=Path)
    options.add_argument("--tiny", action="store_true", help="dry run on a CPU")
    options.add_argument("--models", default="llama-2-7b,llama-3.1-8b")
    options.add_argument("--ranks", default="64,128")
    options.add_argument("--budget-s", type=float, default=280.0, help="start nothing new after so long")
    given = options.parse_args()
    faulthandler.enable()
    if not given.tiny:  # once, where something hangs: a dump of a thread that runs on can end it
        faulthandler.dump_traceback_later(given.budget_s, repeat=False)
    run = Run(given.out, given.tiny, given.budget_s)
    shapes = [TINY] if run.tiny else [MODEL_CATALOGUE[name] for name in given.models.split(",")]
    ranks = [16] if run.tiny else [int(rank) for rank in given.ranks.split(",")]
    try:
        measure(run, shapes, ranks)
    except TimeoutError as error:
        run.failed("budget", error)
    faulthandler.cancel_dump_traceback_later()
    run.log(f"{len(run.result['errors'])} errors; {run.out}")
    run.write()
    return 1 if run.result["errors"] else 0


def measure(run: Run, shapes: list[ModelShape], ranks: list[int]) -> None:
    """Measure everything, what is wanted most first."""
    check_kernels(run, shapes, ranks)
    with run.guarded("static merge"):
        measure_static(run, shapes[-1])
        if not run.tiny:
            write_switch_costs(run, shapes[-1])
    run.free()
    for shape in shapes:
        with run.guarded(f"{shape.name}: weights"):
            measure_model(run, shape, ranks)
        run.free()
    for rank in ranks:
        with run.guarded(f"drift r={rank}"):
            measure_drift(run, shapes[-1], rank)


def write_switch_costs(run: Run, shape: ModelShape) -> None:
    """Write what the simulator takes of the merges measured (sim/merge_costs.py)."""
    names = ("model", "rank", "merge_ms", "restore_ms", "merge_over_bound", "restore_over_bound")
    rows = [{name: row[name] for name in names} for row in run.result.get("merge", [])]
    data = {"gpu": "h200", "model": shape.name, "rows": rows, **provenance()}
    path = run.out.with_name("merge.h200.json")
    path.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
