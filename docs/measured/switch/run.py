"""What is measured, where it goes, and how long things take."""

from __future__ import annotations

import gc
import json
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from engine.ops import ops_for
from engine.provenance import provenance
from engine.switch_ops import SwitchOps, switch_ops_for
from kernels.graph_time import replay_us
from kernels.sgmm_launch import CANDIDATES, SgmmTuning

EXPERTS, TOP_K = 8, 2


class Run:
    """What is measured, where it goes, and how much time is left."""

    def __init__(self, out: Path, tiny: bool, budget_s: float) -> None:
        self.out, self.tiny = out, tiny
        self.start, self.budget_s = time.monotonic(), budget_s
        self.device = torch.device("cpu" if tiny else "cuda")
        self.dtype = torch.float32 if tiny else torch.bfloat16
        self.result: dict[str, Any] = {"provenance": provenance(), "errors": []}
        self.wrong: set[str] = set()

    def log(self, line: str) -> None:
        print(f"{time.monotonic() - self.start:5.0f} s  {line}", flush=True)

    def add(self, part: str, row: dict[str, Any]) -> None:
        """Keep a row, print it, write the file."""
        self.result.setdefault(part, []).append(row)
        self.log(f"{part}: " + "  ".join(f"{key} {value}" for key, value in row.items() if key != "tunings"))
        self.write()

    def write(self) -> None:
        temporary = self.out.with_suffix(".tmp")
        temporary.write_text(json.dumps(self.result, indent=1) + "\n", encoding="utf-8")
        temporary.replace(self.out)

    def failed(self, what: str, error: BaseException) -> None:
        """Write down what went wrong."""
        last = traceback.format_exception(error)[-12:]
        self.result["errors"].append(
            {"what": what, "error": repr(error)[:400], "trace": "".join(last)[-2000:]}
        )
        self.log(f"FAILED {what}: {repr(error)[:300]}")
        self.write()

    @contextmanager
    def guarded(self, what: str) -> Iterator[None]:
        """Write down what fails and go on. Past the budget nothing new begins: TimeoutError, which ends what is around this too."""
        if time.monotonic() - self.start > self.budget_s:
            raise TimeoutError(f"{what} and what follows left out: past {self.budget_s:.0f} s")
        try:
            yield
            self.synchronize()
        except Exception as error:
            self.failed(what, error)

    def synchronize(self) -> None:
        if not self.tiny:
            torch.cuda.synchronize()

    def capture(self, call: Callable[[], object]) -> Callable[[], object]:
        """Return what replays a captured call; the call itself on a CPU."""
        if self.tiny:
            return call
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):
                call()
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        gc.collect()
        gc.disable()  # what it frees during a capture would end the capture
        try:
            with torch.cuda.graph(graph):
                call()
        finally:
            gc.enable()
        return graph.replay

    def ms(self, call: Callable[[], object], replays: int = 20) -> float:
        """Return the median milliseconds of a call by the device's clock, or of a captured one's replays."""
        graph = getattr(call, "__self__", None)
        if not self.tiny and isinstance(graph, torch.cuda.CUDAGraph):
            return replay_us(graph, replays) / 1e3
        return self.wall_ms(call, 1 if self.tiny else replays)

    def wall_ms(self, call: Callable[[], object], steps: int, warm: int = 2) -> float:
        """Return the mean milliseconds of calls one after the other, the host's work included."""
        for _ in range(1 if self.tiny else warm):
            call()
        self.synchronize()
        begin = time.perf_counter()
        for _ in range(steps):
            call()
        self.synchronize()
        return (time.perf_counter() - begin) / steps * 1e3

    def free(self) -> None:
        gc.collect()
        if not self.tiny:
            torch.cuda.empty_cache()


def ops_of(run: Run) -> SwitchOps:
    """Return the kernels; on a CPU those of the base, which are tested elsewhere, by their references."""
    ops = switch_ops_for("triton")
    return replace(ops, base=ops_for("reference")) if run.tiny else ops


def candidates(run: Run) -> tuple[SgmmTuning, ...]:
    """Return the tunings to try."""
    return (
        (SgmmTuning(block_out=64, block_in=64), SgmmTuning(block_out=64, block_in=64, flatten=True))
        if run.tiny
        else CANDIDATES
    )
