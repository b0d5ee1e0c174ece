"""How a scenario gets its trace: read from bytes that somebody sent, made by rule, or the sample.

What is sent is untrusted: its size is bounded before and after it is unpacked, and an error names the file as its sender called it, and the line.
"""

from __future__ import annotations

import json
import tempfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

from engine.errors import UserError
from planner.scenario import Scenario
from traces import Trace, TraceError, load
from traces.assign import RANK_MIXES, Assignment, assign
from traces.files import GZIP_MAGIC
from traces.importers import Warn, import_azure, import_burstgpt, import_mooncake
from traces.like import LIKE
from traces.synth import Uniform, Workload, synthesize
from traces.tool_importers import import_blis, import_timed, import_vidur
from traces.trace import sample_path

TraceFormat = Literal["native", "azure", "burstgpt", "mooncake", "vidur", "blis", "vllm"]
FORMATS: tuple[TraceFormat, ...] = get_args(TraceFormat)

MOST_BYTES = 64 * 2**20  # as sent
MOST_UNPACKED_BYTES = 512 * 2**20
_HEAD_BYTES = 1 << 16
LOOKED_AT = 50  # lines, to tell a format

Read = Callable[[Path, Warn], Trace]
READERS: dict[TraceFormat, Read] = {
    "native": lambda path, warn: load(path),
    "azure": lambda path, warn: import_azure(path, warn=warn),
    "burstgpt": lambda path, warn: import_burstgpt(path, warn=warn),
    "mooncake": lambda path, warn: import_mooncake(path, warn=warn),
    "vidur": lambda path, warn: import_vidur(path, warn=warn),
    "blis": lambda path, warn: import_blis(path, warn=warn),
    "vllm": lambda path, warn: import_timed(path, warn=warn),
}
# Which column or key gives a format away, the rarest first.
_COLUMNS: tuple[tuple[str, TraceFormat], ...] = (
    ("ContextTokens", "azure"),
    ("Request tokens", "burstgpt"),
    ("num_prefill_tokens", "vidur"),
    ("arrival_time_us", "blis"),
)


@dataclass(frozen=True, slots=True)
class Upload:
    """A trace that was read from what somebody sent, what its reader warned of, and the format it was taken for."""

    trace: Trace
    warnings: tuple[str, ...]
    kind: TraceFormat


def read_upload(name: str, data: bytes, kind: TraceFormat | None = None) -> Upload:
    """Read a trace from a file's name and content; kind None: tell by the content.

    Raises UserError, one line that names the file as it was called, and the line.
    """
    shown = Path(name.replace("\\", "/")).name[:80] or "trace"
    if len(data) > MOST_BYTES:
        raise UserError(f"{shown}: is larger than {MOST_BYTES // 2**20} MiB")
    if not data:
        raise UserError(f"{shown}: is empty")
    head = _unpacked_head(shown, data)
    kind = kind or detect(head)
    if kind is None:
        raise UserError(f"{shown}:1: the format cannot be told from its beginning; choose it")
    warned: list[str] = []
    with tempfile.TemporaryDirectory(prefix="loraplan-") as folder:
        path = Path(folder) / ("trace.gz" if data.startswith(GZIP_MAGIC) else "trace")
        path.write_bytes(data)
        said = partial(_in_their_words, path=str(path), shown=shown)
        try:
            trace = READERS[kind](path, lambda message: warned.append(said(str(message))))
        except (TraceError, UserError) as error:
            raise UserError(said(str(error))) from None
    if trace.rate_rps <= 0:
        raise UserError(f"{shown}: all requests arrive at one instant, so there is no rate to plan for")
    named = Trace.from_columns(trace.columns, _stem(shown))
    return Upload(named, tuple(warned), kind)


def detect(head: str) -> TraceFormat | None:
    """Tell a format by the beginning of a file's text; None where nothing is recognised."""
    lines = [line for line in head.removeprefix("\ufeff").split("\n") if line.strip()]
    if not lines or not lines[0].lstrip().startswith("{"):
        return next((kind for column, kind in _COLUMNS if lines and column in lines[0]), None)
    rows = [row for line in lines[:LOOKED_AT] if (row := _object(line)) is not None]
    if not any("timestamp" in row for row in rows):
        return "native"  # its reader says what is wrong, if something is
    fractions = any(isinstance(row.get("timestamp"), float) for row in rows)
    # Mooncake's and AIPerf's timestamps are whole milliseconds; vLLM's are seconds.
    return "vllm" if fractions and not any("hash_ids" in row for row in rows) else "mooncake"


def made(scenario: Scenario) -> Trace:
    """Return the synthetic trace of a scenario; equal scenarios give equal traces."""
    if scenario.lengths == "uniform":
        prompt = Uniform(low=scenario.prompt_low, high=scenario.prompt_high)
        output = Uniform(low=scenario.output_low, high=scenario.output_high)
        workload = Workload(rate_rps=scenario.rate_rps, cv=scenario.cv, prompt=prompt, output=output)
    else:
        like = LIKE[scenario.lengths].workload
        workload = Workload(
            rate_rps=scenario.rate_rps, cv=scenario.cv, prompt=like.prompt, output=like.output
        )
    trace = synthesize(workload, scenario.requests, scenario.seed)
    if not scenario.adapters:
        return trace
    how = Assignment(adapters=scenario.adapters, zipf_s=scenario.zipf_s, rank_mix=RANK_MIXES[scenario.ranks])
    return assign(trace, how)


def sample() -> Trace:
    """Return the bundled sample."""
    return load(sample_path())


def digest(trace: Trace) -> str:
    """Return a digest of what a trace asks for: equal requests give equal digests, whatever the file was called."""
    return trace.digest()[:20]


def _object(line: str) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) else None


def _unpacked_head(shown: str, data: bytes) -> str:
    """Return how the text begins, having unpacked all of it once, a piece at a time, to see how large it is."""
    if not data.startswith(GZIP_MAGIC):
        return data[:_HEAD_BYTES].decode("utf-8", "replace")
    head, size, left = b"", 0, data
    unpacker = zlib.decompressobj(wbits=31)
    try:
        while left:
            piece = unpacker.decompress(left, 1 << 20)
            size += len(piece)
            head += piece[: max(0, _HEAD_BYTES - len(head))]
            if size > MOST_UNPACKED_BYTES:
                raise UserError(f"{shown}: unpacks to more than {MOST_UNPACKED_BYTES // 2**20} MiB")
            left = unpacker.unconsumed_tail
            if unpacker.eof:
                left = unpacker.unused_data if unpacker.unused_data.startswith(GZIP_MAGIC) else b""
                unpacker = zlib.decompressobj(wbits=31)
            elif not piece and not left:
                break
    except zlib.error as error:
        raise UserError(f"{shown}: the gzip file is cut short or damaged: {error}") from None
    return head.decode("utf-8", "replace")


def _in_their_words(message: str, *, path: str, shown: str) -> str:
    return " ".join(message.replace(path, shown).split())


def _stem(shown: str) -> str:
    for ending in (".gz", ".jsonl", ".csv", ".json"):
        shown = shown.removesuffix(ending)
    return shown or "trace"
