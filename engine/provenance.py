"""Where a measurement comes from: GPU, driver, versions, commit, date."""

from __future__ import annotations

import platform
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import triton


def provenance() -> dict[str, Any]:
    """Return what a run record and a profile say of their origin. Unknown facts are "unknown"."""
    return {
        "gpu_name": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "gpu_memory_bytes": torch.cuda.mem_get_info()[1] if torch.cuda.is_available() else 0,
        "driver": _output(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "triton": triton.__version__,
            "cuda": str(torch.version.cuda),
        },
        "commit": _commit(),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "command": " ".join(["python -m engine", *sys.argv[1:]]),
    }


def _commit() -> str:
    """Return the commit of the working tree, from git or, where the tree travelled without it, from the file `.commit`."""
    told = Path(__file__).resolve().parent.parent / ".commit"
    if told.is_file():
        return told.read_text(encoding="utf-8").strip()
    return _output(
        ["git", "-C", str(Path(__file__).resolve().parent), "describe", "--always", "--dirty", "--abbrev=10"]
    )


def _output(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return done.stdout.strip().splitlines()[0] if done.stdout.strip() else "unknown"
