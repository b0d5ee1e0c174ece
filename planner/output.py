"""The output folder: written whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from engine.errors import UserError
from planner.plan import Plan

PLAN = "plan.json"


def check_folder(folder: Path, *, overwrite: bool) -> None:
    """Raise UserError where a plan may not be written: before the work that it would take.

    What may be overwritten is an earlier plan's folder, and nothing else.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder}: is a file, not a folder")
    if folder.is_dir() and any(folder.iterdir()):
        if not overwrite:
            raise UserError(f"{folder}: is not empty; --overwrite replaces an earlier plan")
        if not (folder / PLAN).is_file():
            raise UserError(f"{folder}: is not empty and holds no {PLAN}: it is no earlier plan to overwrite")
    existing = folder.absolute()
    while not existing.exists():
        existing = existing.parent
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise UserError(f"{folder}: cannot be written")


def write_folder(plan: Plan, folder: Path, *, overwrite: bool) -> None:
    """Write the plan, every trial, and each configuration as a file that the engine and the simulator take."""
    check_folder(folder, overwrite=overwrite)
    folder = folder.absolute()
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    old = folder.with_name(f".{folder.name}.{os.getpid()}.old")
    try:
        for name, text in _files(plan):
            path = temporary / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
        if folder.exists():
            folder.rename(old)
        temporary.rename(folder)
    except OSError as error:
        if old.exists() and not folder.exists():
            old.rename(folder)
        raise UserError(f"{folder}: cannot be written: {error.strerror}") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)


def _files(plan: Plan) -> Iterator[tuple[str, str]]:
    yield PLAN, _text(plan.to_json())
    yield "trials.jsonl", "".join(f"{json.dumps(row, allow_nan=False)}\n" for row in plan.trial_rows())
    for name, choice in (("recommended", plan.recommended), ("fewest_gpus", plan.fewest_gpus)):
        if choice is not None:
            yield f"{name}.json", _text(choice.config.to_json())
    for number, choice in enumerate(plan.alternatives, start=1):
        yield f"alternatives/{number}.json", _text(choice.config.to_json())


def _text(value: Any) -> str:
    return json.dumps(value, indent=2, allow_nan=False) + "\n"
