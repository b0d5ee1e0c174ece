"""Everything that is measured on N GPUs of one host, N above two:

    python -m docs.measured.many_gpus N DIR --out OUT [--parts 8b,replays,replicas,70b] [--budget-s 590]

8b and 70b: `engine profile --tp N` of Llama-3.1-8B and -70B (exchanges, steps in every mode; of 70B bursts too). replays, replicas: the records of
`docs.measured.run_matrix.many_gpus`, whose traces `python -m docs.measured.record_runs prepare DIR --visits 7` has left in DIR (8 for eight GPUs).
What does not fit into the budget is passed over, and said.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from docs.measured.record_runs import visit
from docs.measured.run_matrix import VISITS
from engine.config import ServingConfig
from engine.parallel_profile import MODES, ParallelPlan, profile_parallel

VISIT_OF = {4: 7, 8: 8}
FIRST = (*MODES[:3], MODES[5], MODES[4], MODES[3])  # what the paper compares comes first, should time run out
PLANS = {
    "llama-3.1-8b": ParallelPlan(modes=FIRST, grid=80),
    "llama-3.1-70b": ParallelPlan(modes=FIRST[:4], adapters=16, burst_adapters=16, grid=24, requests=96),
}
LIMITS: dict[str, dict[str, Any]] = {
    "llama-3.1-8b": {"max_num_seqs": 256, "max_num_batched_tokens": 1024},
    "llama-3.1-70b": {"max_num_seqs": 64, "max_num_batched_tokens": 1024},
}
PARTS = ("8b", "replays", "replicas", "70b")
LEAST_S = 60.0  # a part is not begun with less


def profile(model: str, gpus: int, out: Path) -> None:
    """Write OUT/MODEL.tpN.json, as far as it comes."""
    config = ServingConfig(model=model, tp=gpus, **LIMITS[model])
    profile_parallel(config, PLANS[model], out / f"{model}.tp{gpus}.json", progress=_tell)


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("gpus", type=int, choices=VISIT_OF)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--budget-s", type=float, default=590.0)
    asked = parser.parse_args()
    unknown = sorted(set(asked.parts.split(",")) - set(PARTS))
    if unknown:
        parser.error(f"--parts: {unknown[0]!r} is none of {', '.join(PARTS)}")
    ends_s = time.monotonic() + asked.budget_s
    number, failed = VISIT_OF[asked.gpus], 0
    for part in asked.parts.split(","):
        begun_s = time.monotonic()
        left_s = ends_s - begun_s
        if left_s < LEAST_S:
            _tell(f"{part}: passed over, {left_s:.0f} s are left")
            failed += 1
        elif part in ("8b", "70b"):
            model = f"llama-3.1-{part}"
            call = f"from docs.measured.many_gpus import Path, profile; profile({model!r}, {asked.gpus}, Path({str(asked.out)!r}))"
            failed += _within(left_s, [sys.executable, "-c", call])
        else:
            groups = [group.name for group in VISITS[number]]
            for name in [name for name in groups if name.startswith("replicas") == (part == "replicas")]:
                failed += visit(number, asked.folder, asked.out, ends_s - time.monotonic(), name)
        _tell(f"{part}: {time.monotonic() - begun_s:.0f} s")
    return 1 if failed else 0


def _within(limit_s: float, command: list[str]) -> bool:
    """Run a command; return whether it failed or took too long."""
    try:
        return subprocess.run(command, timeout=limit_s, check=False).returncode != 0
    except subprocess.TimeoutExpired:
        return True


def _tell(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    sys.exit(main())
