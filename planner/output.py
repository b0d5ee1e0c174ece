"""The output folder: begun before the search, complete when `plan.json` is there; what is in between resumes.

    request.json   what is asked, resolved; written first
    journal.jsonl  the answers so far (`planner.journal`); gone when the plan is complete
    trials.jsonl   a line a trial, failures too: as they end, and at last those of the plan
    recommended.json, fewest_gpus.json, alternatives/1.json …, exports/…, report.html
    plan.json      written last

Each file is written beside its place and moved there.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from engine.errors import UserError
from planner.journal import Journal
from planner.plan import Plan

PLAN = "plan.json"
REQUEST = "request.json"
JOURNAL = "journal.jsonl"
TRIALS = "trials.jsonl"
FOLDERS = ("alternatives", "exports")
FILES = (REQUEST, JOURNAL, TRIALS, PLAN, "recommended.json", "fewest_gpus.json", "report.html")


def check_folder(folder: Path, *, overwrite: bool) -> None:
    """Raise UserError where a plan may not be written: before the work that it would take.

    What may be overwritten is an earlier plan's folder, what may be resumed an unfinished one's, and nothing else.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder}: is a file, not a folder")
    if folder.is_dir() and any(folder.iterdir()):
        if (folder / PLAN).is_file():
            if not overwrite:
                raise UserError(f"{folder}: is not empty; --overwrite replaces an earlier plan")
        elif not (folder / REQUEST).is_file():
            raise UserError(f"{folder}: is not empty and holds no {PLAN}: it is no earlier plan to overwrite")
    existing = folder.absolute()
    while not existing.exists():
        existing = existing.parent
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise UserError(f"{folder}: cannot be written")


class OutputFolder:
    """A folder that a plan is being made in. Use it in a `with` block."""

    def __init__(self, folder: Path, request: Mapping[str, Any], *, overwrite: bool) -> None:
        """Begin, or go on with the same request. Raises UserError where the folder is another's."""
        check_folder(folder, overwrite=overwrite)
        self.folder = folder
        asked = _text(request)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if not _same(folder, asked):
                if (folder / REQUEST).is_file() and not overwrite:
                    raise UserError(
                        f"{folder}: holds the beginning of a plan for another question; --overwrite replaces it"
                    )
                _clear(folder)
                _replace(folder / REQUEST, asked)
            self.journal = Journal(folder / JOURNAL, folder / TRIALS)
        except OSError as error:
            raise UserError(f"{folder}: cannot be written: {error.strerror}") from None

    def __enter__(self) -> OutputFolder:
        return self

    def __exit__(self, *_: object) -> None:
        self.journal.close()

    def finish(self, plan: Mapping[str, Any], files: Mapping[str, str]) -> None:
        """Write the plan and what goes with it. Raises UserError."""
        try:
            for name, text in files.items():
                path = self.folder / name
                path.parent.mkdir(exist_ok=True)
                _replace(path, text)
            _replace(self.folder / PLAN, _text(plan))
            self.journal.close()
            (self.folder / JOURNAL).unlink(missing_ok=True)
        except OSError as error:
            raise UserError(f"{self.folder}: cannot be written: {error.strerror}") from None


def plan_files(plan: Plan) -> dict[str, str]:
    """Return the plan's trials, and each configuration as a file that the engine and the simulator take."""
    return dict(_files(plan))


def write_folder(plan: Plan, folder: Path, *, overwrite: bool) -> None:
    """Write a plan that is complete. Raises UserError."""
    with OutputFolder(folder, {}, overwrite=overwrite) as output:
        output.finish(plan.to_json(), plan_files(plan))


def _files(plan: Plan) -> Iterator[tuple[str, str]]:
    yield TRIALS, "".join(f"{json.dumps(row, allow_nan=False)}\n" for row in plan.trial_rows())
    for name, choice in (("recommended", plan.recommended), ("fewest_gpus", plan.fewest_gpus)):
        if choice is not None:
            yield f"{name}.json", _text(choice.config.to_json())
    for number, choice in enumerate(plan.alternatives, start=1):
        yield f"alternatives/{number}.json", _text(choice.config.to_json())


def _same(folder: Path, asked: str) -> bool:
    """Whether the folder holds the beginning of the plan that is asked for."""
    path = folder / REQUEST
    return not (folder / PLAN).exists() and path.is_file() and path.read_text(encoding="utf-8") == asked


def _clear(folder: Path) -> None:
    """Remove an earlier plan, `plan.json` first; what is not a plan's stays."""
    for name in (PLAN, *FILES):
        (folder / name).unlink(missing_ok=True)
    for name in FOLDERS:
        shutil.rmtree(folder / name, ignore_errors=True)


def _replace(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def _text(value: Any) -> str:
    return json.dumps(value, indent=2, allow_nan=False) + "\n"
