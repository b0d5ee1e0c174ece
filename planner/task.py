"""Work that takes longer than a page may wait: what is asked, by what its answer is known, and which code answers it."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from engine.config import ServingConfig
from planner.scenario import SYNTHETIC_ONLY, Scenario
from planner.trace_input import digest
from traces import Trace

Kind = Literal["plan", "curve", "grid", "traffic", "timeline", "trust", "domain"]
Answer = dict[str, Any]  # as JSON holds it
Tell = Callable[[str, int, int], None]  # stage, done, of how many

ROOT = Path(__file__).parent.parent
_FROM_TRACE = ("source", "upload", "rate_scale", *SYNTHETIC_ONLY)  # the trace's digest says them
_IMPORT = re.compile(
    r"^\s*(?:from|import)\s+((?:engine|planner|sim|traces)(?:\.\w+)*)(?: import (.+))?", re.M
)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Task:
    """One question. trace: at the rate to plan for. config: the configuration it is about, where it is about one.
    usd_per_gpu_hour: None: no price is known; no part of the key, for it changes no search.
    """

    kind: Kind
    scenario: Scenario
    trace: Trace
    config: ServingConfig | None = None
    usd_per_gpu_hour: float | None = field(default=None)

    @property
    def key(self) -> str:
        """What the answer is known by: equal for equal questions, wherever the trace came from."""
        asked = {name: getattr(self.scenario, name) for name in Scenario.__slots__ if name not in _FROM_TRACE}
        config = None if self.config is None else self.config.to_json()
        # What is recorded depends on nothing that is asked.
        parts = [self.kind] if self.kind == "trust" else [self.kind, asked, config, digest(self.trace)]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:24]


def plain_json(value: Any) -> Any:
    """Return a value as JSON holds it, what is not finite as null."""
    if isinstance(value, Mapping):
        return {str(name): plain_json(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain_json(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


@lru_cache(maxsize=1)
def code_version() -> str:
    """Return a digest of the code and the measurements that answers come from: every module that they import, and the data beside them."""
    found = hashlib.sha256()
    for path in sorted({*_sources("planner.answers"), *_data()}):
        found.update(str(path.relative_to(ROOT)).encode() + path.read_bytes())
    return found.hexdigest()[:16]


def _data() -> Iterator[Path]:
    for folder in ("sim/profiles", "sim/runs"):
        yield from (path for path in (ROOT / folder).rglob("*") if path.is_file())


def _sources(module: str) -> set[Path]:
    """Return the files of a module and of all of ours that it imports, by itself or through others."""
    seen: set[Path] = set()
    left = [module]
    while left:
        path = ROOT / (left.pop().replace(".", "/") + ".py")
        if path in seen or not path.is_file():
            continue
        seen.add(path)
        for name, imported in _IMPORT.findall(path.read_text("utf-8")):
            left.append(name)
            left += [f"{name}.{part.strip(' ()')}" for part in imported.split(",")]
    return seen
