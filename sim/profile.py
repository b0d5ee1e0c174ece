"""A profile:

what the engine's operators and whole steps took on one GPU, as `python -m engine profile` measured it.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.budget import GpuSpec, gpu_spec, parse_gpu
from engine.config import ServingConfig
from engine.errors import UserError
from engine.model_shape import ModelShape, load_model_shape
from engine.step import SHAPE_FIELDS, StepShape
from sim.heating import Series
from sim.parallel import ParallelSteps, parallel_files, parse_parallel

Floats = NDArray[np.float64]

SCHEMA_VERSION = 1
PROFILES = Path(__file__).parent / "profiles"
_OF_ONE_GPU = re.compile(r"(?!collectives\.|vllm).+\.(?!tp\d+\.)[^.]+\.json")  # <model>.<gpu>.json

# Operator -> numbers that each of its rows must have, beside `us`.
NUMBERS: dict[str, tuple[str, ...]] = {
    "matmul": ("tp", "tokens"),
    "attention_decode": ("tp", "rows", "kv_tokens", "kv_max"),
    "attention_prefill": ("tp", "tokens", "pairs", "kv_tokens", "kv_max"),
    "elementwise": ("tp", "tokens"),
    "lora": ("tp", "tokens", "tile_tokens", "adapters", "bytes", "single_bytes", "token_bytes"),
    "sample": ("rows",),
    "transfer": ("bytes",),
    "collective": ("ranks", "bytes"),
}
WORDS: dict[str, tuple[str, ...]] = {"matmul": ("linear",), "collective": ("op",)}
LINEARS = ("qkv", "o", "gate_up", "down", "head")
OPTIONAL = {"collective"}


@dataclass(frozen=True, slots=True, eq=False)
class Table:
    """Measurements of one operator by column; `us` is the time in microseconds."""

    numbers: Mapping[str, Floats]
    words: Mapping[str, tuple[str, ...]]

    def __len__(self) -> int:
        return len(self.numbers["us"])

    def where(self, **wanted: float | str) -> Table:
        """Return the rows that have these values."""
        keep = np.ones(len(self), dtype=bool)
        for name, value in wanted.items():
            if isinstance(value, str):
                keep &= np.array([word == value for word in self.words[name]], dtype=bool)
            else:
                keep &= self.numbers[name] == value
        words = {
            name: tuple(word for word, kept in zip(values, keep.tolist(), strict=True) if kept)
            for name, values in self.words.items()
        }
        return Table({name: values[keep] for name, values in self.numbers.items()}, words)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Profile:
    """Measurements on one GPU of one model's shapes.

    steps: whole captured steps at TP 1 and their GPU microseconds, those with prompts on a GPU that has been at
    them for a while. clock: series of such steps from a cool GPU on, if any.
    parallel: whole steps under tensor parallelism, also of other models. host: rows, prefill chunks and
    microseconds of one loop turn. provenance: GPU name, driver, versions, commit, date and command, to show.
    collective_source: where collectives come from.
    """

    source: str
    gpu: str
    gpu_spec: GpuSpec
    model: ModelShape
    dtype: str
    page_tokens: int
    graph_max_tokens: int
    operators: Mapping[str, Table]
    steps: tuple[StepShape, ...]
    steps_us: Floats
    clock: tuple[Series, ...]
    parallel: tuple[ParallelSteps, ...]
    host: Table
    provenance: Mapping[str, Any]
    collective_source: str


def load_profile(path: str | Path) -> Profile:
    """Read a profile, and beside it those of tensor parallelism on the same kind of GPU. Raises UserError naming the file and the place in it."""
    data = _read_json(Path(path))
    gpu = data.get("gpu") if isinstance(data, dict) else None
    files = parallel_files(Path(path), gpu) if isinstance(gpu, str) else []
    return parse_profile(data, str(path), [(_read_json(file), str(file)) for file in files])


def find_profile(config: ServingConfig) -> Path:
    """Return the shipped profile for a configuration: of its model and GPU, else of another model on that GPU, else of another GPU. Raises
    UserError for a GPU that is not in the catalogue.
    """
    gpu = gpu_spec(config.gpu).name  # an unknown one is said
    exact = PROFILES / f"{config.model.lower()}.{gpu}.json"
    if "/" not in config.model and exact.is_file():
        return exact
    model = "" if "/" in config.model else config.model.lower()
    others = [path for path in PROFILES.glob("*.json") if _OF_ONE_GPU.fullmatch(path.name)]
    if not others:
        raise UserError(f"no profile in {PROFILES}; give one with --profile")
    # Another model on the same kind of GPU says more than the same model on another kind.
    return min(
        others,
        key=lambda path: (f".{gpu}." not in path.name, not path.name.startswith(f"{model}."), path.name),
    )


def parse_profile(data: Any, source: str, parallel: Sequence[tuple[Any, str]] = ()) -> Profile:
    """Check a profile's JSON form, and those of tensor parallelism with it, each with its source. Raises UserError naming the place."""
    if not isinstance(data, dict):
        raise UserError(f"{source}: a profile must be a JSON object, got {type(data).__name__}")
    if data.get("schema_version") != SCHEMA_VERSION:
        raise UserError(f"{source}: schema_version={data.get('schema_version')!r} must be {SCHEMA_VERSION}")
    steps_of_ranks: list[ParallelSteps] = []
    exchanges: list[dict[str, Any]] = []
    for part, place in parallel:
        steps, timed = parse_parallel(part, place)
        steps_of_ranks += steps
        exchanges += timed
    operators, collective_source = _operators(data, source, exchanges)
    shapes, steps_us = _steps(data.get("steps"), source)
    return Profile(
        source=source,
        gpu=_text(data, "gpu", source),
        gpu_spec=_gpu(data, source),
        model=load_model_shape(_text(data, "model", source)),
        dtype=_text(data, "dtype", source),
        page_tokens=_count(data, "page_tokens", source),
        graph_max_tokens=_count(data, "graph_max_tokens", source),
        operators=operators,
        steps=shapes,
        steps_us=steps_us,
        clock=_clock(data.get("clock"), f"{source}: clock"),
        parallel=tuple(steps_of_ranks),
        host=_table(data.get("host"), ("rows", "prefill_chunks"), (), f"{source}: host"),
        provenance={
            name: data.get(name) for name in ("gpu_name", "driver", "versions", "commit", "date", "command")
        },
        collective_source=collective_source,
    )


def _gpu(data: Mapping[str, Any], source: str) -> GpuSpec:
    """Return the GPU as the profile describes it, else as the catalogue does."""
    if "gpu_spec" in data:
        return parse_gpu(data["gpu_spec"], f"{source}: gpu_spec")
    try:
        return gpu_spec(_text(data, "gpu", source))
    except UserError as error:
        raise UserError(f"{source}: {error}") from None


def _clock(given: Any, place: str) -> tuple[Series, ...]:
    if given is None:
        return ()
    if not isinstance(given, list):
        raise UserError(f"{place} must be a list")
    series = []
    for index, row in enumerate(given):
        at = f"{place}[{index}]"
        times = row.get("us") if isinstance(row, dict) else None
        if not isinstance(times, list) or len(times) < 2:
            raise UserError(f"{at}: us must be a list of at least two times")
        for us in times:
            _number({"us": us}, "us", at)
        decodes = row.get("decodes", 0)
        if isinstance(decodes, bool) or not isinstance(decodes, int) or decodes < 0:
            raise UserError(f"{at}: decodes={decodes!r} must be an integer of at least 0")
        series.append(Series(_count(row, "tokens", at), decodes, np.array(times, dtype=float)))
    return tuple(series)


def _operators(
    data: Mapping[str, Any], source: str, exchanges: list[dict[str, Any]]
) -> tuple[dict[str, Table], str]:
    given = data.get("operators")
    if not isinstance(given, dict):
        raise UserError(f"{source}: operators must be an object")
    given = dict(given)
    collective_source = source
    if not given.get("collective"):
        given["collective"], collective_source = _shipped_collectives(data)
    if exchanges:
        given["collective"] = [*given["collective"], *exchanges]
    tables = {}
    for name, numbers in NUMBERS.items():
        place = f"{source}: operators.{name}"
        tables[name] = _table(given.get(name), numbers, WORDS.get(name, ()), place, optional=name in OPTIONAL)
        if "tp" in numbers and 1 not in tables[name].numbers["tp"]:
            raise UserError(f"{place} has no measurement at tp=1")
    for linear in tables["matmul"].words["linear"]:
        if linear not in LINEARS:
            raise UserError(
                f"{source}: operators.matmul: linear={linear!r} must be one of {', '.join(LINEARS)}"
            )
    return tables, collective_source


def _shipped_collectives(data: Mapping[str, Any]) -> tuple[list[Any], str]:
    path = PROFILES / f"collectives.{data.get('gpu')}.json"
    if not path.is_file():
        return [], "none"
    return _read_json(path)["rows"], path.name


def _table(
    rows: Any, numbers: tuple[str, ...], words: tuple[str, ...], place: str, *, optional: bool = False
) -> Table:
    if not isinstance(rows, list) or not (rows or optional):
        raise UserError(f"{place} must be a list of measurements with at least one")
    columns: dict[str, list[float]] = {name: [] for name in (*numbers, "us")}
    texts: dict[str, list[str]] = {name: [] for name in words}
    for index, row in enumerate(rows):
        if not isinstance(row, dict):
            raise UserError(f"{place}[{index}] must be an object")
        for name, column in columns.items():
            if name not in row:
                again = "an earlier version's profile? measure again: `python -m engine profile`"
                raise UserError(f"{place}[{index}]: {name} is missing ({again})")
            column.append(_number(row, name, f"{place}[{index}]"))
        for name, text in texts.items():
            text.append(_text(row, name, f"{place}[{index}]"))
    return Table(
        {name: np.array(column) for name, column in columns.items()},
        {name: tuple(text) for name, text in texts.items()},
    )


def _steps(rows: Any, source: str) -> tuple[tuple[StepShape, ...], Floats]:
    if rows is None:
        rows = []
    if not isinstance(rows, list):
        raise UserError(f"{source}: steps must be a list")
    shapes, times_us = [], []
    for index, row in enumerate(rows):
        place = f"{source}: steps[{index}]"
        if not isinstance(row, dict) or not isinstance(row.get("shape"), dict):
            raise UserError(f"{place} must be an object with shape and gpu_us")
        for name in SHAPE_FIELDS[:-1]:
            _number(row["shape"], name, f"{place}.shape")
        shapes.append(StepShape.from_json(row["shape"]))
        times_us.append(_number(row, "gpu_us", place))
    return tuple(shapes), np.array(times_us)


def _number(row: Mapping[str, Any], name: str, place: str) -> float:
    value = row.get(name)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise UserError(f"{place}: {name}={value!r} must be a finite number")
    if value < 0 or (value == 0 and name in ("us", "gpu_us", "tp")):
        raise UserError(f"{place}: {name}={value!r} must be above 0")
    return float(value)


def _text(row: Mapping[str, Any], name: str, place: str) -> str:
    value = row.get(name)
    if not isinstance(value, str) or not value:
        raise UserError(f"{place}: {name}={value!r} must be a name")
    return value


def _count(row: Mapping[str, Any], name: str, place: str) -> int:
    value = row.get(name)
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise UserError(f"{place}: {name}={value!r} must be a whole number of at least 0")
    return value


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON: {error}") from None
