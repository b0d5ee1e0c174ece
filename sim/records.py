"""Run records as the simulator takes them: the configuration, the adapters, the trace that the requests were, and what was measured."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from engine.adapter import AdapterSpec
from engine.config import ServingConfig
from engine.errors import UserError
from engine.step import SHAPE_FIELDS, StepShape
from traces import Trace, TraceRequest
from traces.metrics import metrics
from traces.run_record import RunRecord, read_run


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RecordedRun:
    """A run record as the simulator takes it.

    load: the offered load over the capacity, where the record tells it. requests: as measured, in the trace's order; steps: as recorded, one of
    every `steps_every`.
    """

    name: str
    config: ServingConfig
    adapters: Mapping[str, AdapterSpec]
    trace: Trace
    measured: Mapping[str, float]
    load: float | None
    requests: pd.DataFrame
    steps: pd.DataFrame
    machine: str = ""
    steps_every: int = 1

    @property
    def key(self) -> Hashable:
        """What two records of the same trace under the same configuration have in common."""
        columns = self.trace.columns
        arrays = (columns.arrival_s, columns.prompt_tokens, columns.output_tokens, columns.adapter_index)
        config = tuple(sorted((name, repr(value)) for name, value in self.config.to_json().items()))
        return config, columns.adapter_names, tuple(array.tobytes() for array in arrays)


def recorded_run(path: Path, root: Path | None = None) -> RecordedRun:
    """Read a run record. Raises TraceError or UserError naming the place."""
    record = read_run(path)
    place = str(path / "run.json")
    name = path.name if root is None or path == root else str(path.relative_to(root))
    load = record.run.get("load")
    if load is not None and (
        isinstance(load, bool) or not isinstance(load, (int, float)) or not 0 < load < np.inf
    ):
        raise UserError(f"{place}: load={load!r} must be a number above 0")
    requests = record.requests.sort_values("arrival_s", kind="stable").reset_index(drop=True)
    return RecordedRun(
        name=name,
        config=ServingConfig.from_json(record.run.get("config"), source=f"{place}: config"),
        adapters=_adapters(record.run.get("adapters"), place),
        trace=_trace(requests, name),
        measured=metrics(requests),
        load=load,
        requests=requests,
        steps=record.steps,
        machine=_machine(record),
        steps_every=int(record.run.get("steps_kept_every", 1)),
    )


def recorded_steps(run: RecordedRun) -> list[tuple[StepShape, float]]:
    """Return the shape and the GPU seconds of each step of a record; none where it does not hold shapes."""
    known = [name for name in SHAPE_FIELDS if name in run.steps.columns]
    if "decode_rows" not in known or "duration_s" not in run.steps.columns:
        return []
    rows = zip(*(run.steps[name].tolist() for name in known), strict=True)
    none = dict.fromkeys(SHAPE_FIELDS[:-1], 0)
    shapes = (StepShape.from_json(none | dict(zip(known, row, strict=True))) for row in rows)
    return list(zip(shapes, run.steps["duration_s"].astype(float).tolist(), strict=True))


def _machine(record: RunRecord) -> str:
    """Say where and when a record was made, as far as it tells."""
    keys = ("gpu_name", "driver", "commit", "date")
    return ", ".join(str(record.run[key]) for key in keys if record.run.get(key))


def _adapters(given: Any, place: str) -> dict[str, AdapterSpec]:
    if given is None:
        return {}
    if not isinstance(given, list) or not all(isinstance(item, dict) for item in given):
        raise UserError(f"{place}: adapters must be a list of objects")
    known = {item.name for item in fields(AdapterSpec)} - {"path"}
    specs = {}
    for item in given:
        values = {key: _tuples(value) for key, value in item.items() if key in known and value is not None}
        if "name" not in values:
            raise UserError(f"{place}: adapters: name is missing")
        spec = AdapterSpec(**values)
        specs[spec.name] = spec
    return specs


def _tuples(value: Any) -> Any:
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value


def _trace(requests: pd.DataFrame, name: str) -> Trace:
    rows = zip(
        *(
            requests[column].tolist()
            for column in ("id", "arrival_s", "prompt_tokens", "output_tokens", "adapter", "rank")
        ),
        requests["prefix_blocks"].tolist() if "prefix_blocks" in requests else [None] * len(requests),
        strict=True,
    )
    return Trace(
        (
            TraceRequest(
                id=id_,
                arrival_s=float(arrival_s),
                prompt_tokens=int(prompt_tokens),
                output_tokens=int(output_tokens),
                adapter=adapter if isinstance(adapter, str) else None,
                rank=int(rank)
                if isinstance(adapter, str) and rank is not None and not pd.isna(rank)
                else None,
                prefix_blocks=tuple(blocks) if isinstance(blocks, list) else None,
            )
            for id_, arrival_s, prompt_tokens, output_tokens, adapter, rank, blocks in rows
        ),
        name,
    )
