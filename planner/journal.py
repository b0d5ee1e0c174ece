"""A search's answers, written down as they come, so that one that is killed goes on where it was.

The search is a function of its jobs' answers, so a job whose answer is in the journal is not run again and the outcome is
the same. One line an answer: {"job": what was asked, hashed; "answer": all of it, exactly}. A last line that is cut short
is as if it had not been written.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, TextIO, get_args

from engine.config import ServingConfig
from engine.errors import UserError
from planner import paced
from planner.jobs import Answer, Job, Jobs
from planner.paced import Paced
from planner.probe import Probe
from planner.retraining import Retraining
from planner.trial import Trial


class Journal:
    """Jobs whose answers are kept in a file; `rows` is a second file, with a line for people a trial.

    Use it in a `with` block. Raises UserError where another plan is writing the same journal.
    """

    def __init__(self, path: Path, rows: Path) -> None:
        self._known = read_answers(path)
        self._whole(path)
        self._file: TextIO = path.open("a", encoding="utf-8")
        self._rows: TextIO = rows.open("a", encoding="utf-8")
        if not _locked(self._file):
            self.close()
            raise UserError(f"{path.parent}: another plan is being made there")

    @property
    def answers(self) -> int:
        """How many answers are known."""
        return len(self._known)

    def over(self, jobs: Jobs) -> JournaledJobs:
        """Return what runs jobs and keeps the answers here."""
        return JournaledJobs(self, jobs)

    def find(self, key: str) -> Any:
        """Return a known answer in its JSON form, or None."""
        return self._known.get(key)

    def append(self, key: str, answer: Answer) -> None:
        """Write an answer down, so that it survives whatever comes."""
        line = json.dumps({"job": key, "answer": encoded(answer)}, default=_plain)
        self._file.write(f"{line}\n")
        self._file.flush()
        os.fsync(self._file.fileno())
        for trial in answer if isinstance(answer, list) else ():
            self._rows.write(f"{json.dumps(trial.to_json(), default=_plain)}\n")
        self._rows.flush()

    def close(self) -> None:
        """Close the files."""
        self._file.close()
        self._rows.close()

    def _whole(self, path: Path) -> None:
        """Cut off a line that was not written to its end."""
        if path.exists():
            data = path.read_bytes()
            end = data.rfind(b"\n") + 1
            if end < len(data):
                with path.open("r+b") as file:
                    file.truncate(end)


class JournaledJobs:
    """Runs the jobs whose answers are not known yet."""

    def __init__(self, journal: Journal, jobs: Jobs) -> None:
        self._journal = journal
        self._jobs = jobs

    @property
    def timed_out(self) -> bool:
        """Whether time is up."""
        return self._jobs.timed_out

    def run(
        self,
        jobs: Sequence[Job],
        on_done: Callable[[], None] = lambda: None,
        on_answer: Callable[[int, Answer], None] = lambda index, answer: None,
    ) -> list[Answer | None]:
        """Return the answers in order; None where time was up."""
        keys = [key_of(job) for job in jobs]
        answers: list[Answer | None] = [None] * len(jobs)
        missing = []
        for index, key in enumerate(keys):
            known = self._journal.find(key)
            if known is None:
                missing.append(index)
            else:
                answers[index] = decoded(known)
                on_done()

        def keep(place: int, answer: Answer) -> None:
            self._journal.append(keys[missing[place]], answer)
            on_answer(missing[place], answer)

        found = self._jobs.run([jobs[index] for index in missing], on_done, keep)
        for index, answer in zip(missing, found, strict=True):
            answers[index] = answer
        return answers


def read_answers(path: Path) -> dict[str, Any]:
    """Return the answers of a journal by job, in their JSON form; nothing where there is none."""
    if not path.exists():
        return {}
    known: dict[str, Any] = {}
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        try:
            row = json.loads(line)
            known[row["job"]] = row["answer"]
        except (ValueError, KeyError, TypeError):
            continue
    return known


def key_of(job: Job) -> str:
    """Return the hash of what a job asks."""
    asked = {item.name: _json(getattr(job, item.name)) for item in fields(job)}
    text = json.dumps([type(job).__name__, asked], sort_keys=True, default=_plain)
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def encoded(answer: Answer) -> Any:
    """Return the JSON form of an answer, with every digit; NaN and infinity as Python's JSON writes them."""
    if isinstance(answer, list):
        return {"trials": [_trial_json(trial) for trial in answer]}
    if isinstance(answer, Probe):
        return {"probe": asdict(answer)}
    if isinstance(answer, Paced):
        return {"paced": paced.to_json(answer)}
    if isinstance(answer, Retraining):
        return {"retraining": asdict(answer) | {"config": answer.config.to_json()}}
    return {"nothing": True}


def decoded(data: Any) -> Answer:
    """Return an answer from its JSON form."""
    if "trials" in data:
        return [_trial(item) for item in data["trials"]]
    if "probe" in data:
        return Probe(**data["probe"])
    if "paced" in data:
        return paced.from_json(data["paced"])
    if "retraining" in data:
        given = data["retraining"]
        return Retraining(**given | {"config": ServingConfig.from_json(given["config"])})
    return None


_PROBES = ("at_best", "above", "at_rate")


def _trial_json(trial: Trial) -> dict[str, Any]:
    values = {item.name: _json(getattr(trial, item.name)) for item in fields(trial)}
    return values | {
        name: None if (probe := getattr(trial, name)) is None else asdict(probe) for name in _PROBES
    }


def _trial(data: dict[str, Any]) -> Trial:
    probes = {name: None if data[name] is None else Probe(**data[name]) for name in _PROBES}
    return Trial(**data | probes | {"config": ServingConfig.from_json(data["config"])})


def _json(value: Any) -> Any:
    if isinstance(value, ServingConfig):
        return value.to_json()
    return [_json(item) for item in value] if isinstance(value, tuple) else value


def _plain(value: Any) -> Any:
    """Return a number of numpy's as Python's."""
    if hasattr(value, "item"):
        return value.item()
    raise TypeError(f"{type(value).__name__} has no JSON form: one of {get_args(Answer)}")


def _locked(file: TextIO) -> bool:
    """Take the file for this process; where files cannot be locked, trust that nobody else has it."""
    try:
        import fcntl
    except ImportError:
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
