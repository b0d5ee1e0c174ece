"""The published traces, where they are present: in a folder beside the repository, or in LORAPLAN_SHARED."""

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def shared_traces() -> Path:
    root = Path(__file__).parents[2]
    folder = Path(os.environ.get("LORAPLAN_SHARED", root.parent / "shared")) / "traces"
    if not (folder / "ready").is_dir():
        pytest.skip(f"the published traces are not at {folder} (set LORAPLAN_SHARED)")
    return folder
