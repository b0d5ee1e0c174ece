"""A scenario: what a person asks of the dashboard, as one value that a link can hold.

It says where the trace comes from, never where a file lies: a trace that was uploaded is named by its content.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args

from engine.budget import GPUS
from engine.errors import UserError
from engine.model_shape import MODEL_CATALOGUE
from traces.assign import RANK_MIXES
from traces.metrics import Slo

Objective = Literal["goodput", "min-gpus"]  # as planner.plan has them
Source = Literal["sample", "synthetic", "upload"]
LengthKind = Literal["uniform", "azure-conv", "azure-code", "mooncake"]

MOST_GPUS = 64
MOST_REQUESTS = 50_000  # of a synthetic trace: a search over more belongs on the command line
# Field -> (lowest, highest) of the numbers.
BOUNDS: Mapping[str, tuple[float, float]] = {
    "gpus": (1, MOST_GPUS),
    "ttft_ms": (1, 600_000),
    "tpot_ms": (0.1, 60_000),
    "e2e_ms": (0, 3_600_000),
    "attainment_pct": (1, 100),
    "rate_scale": (0.01, 100),
    "rate_rps": (0.01, 1000),
    "cv": (0.1, 20),
    "requests": (10, MOST_REQUESTS),
    "adapters": (0, 10_000),
    "zipf_s": (0, 3),
    "prompt_low": (1, 100_000),
    "prompt_high": (2, 100_000),
    "output_low": (1, 100_000),
    "output_high": (2, 100_000),
    "seed": (0, 1_000_000),
}
SYNTHETIC_ONLY = (
    "rate_rps",
    "cv",
    "requests",
    "adapters",
    "zipf_s",
    "ranks",
    "lengths",
    "prompt_low",
    "prompt_high",
    "output_low",
    "output_high",
    "seed",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """What is asked: a trace, what to serve it on, and what is promised.

    source: the bundled sample, a synthetic trace (rate_rps to seed say which), or an upload. upload: digest of its
    content. e2e_ms: 0 is no bound. rate_scale: plan for so many times the trace's rate. zipf_s: how much of the traffic
    popular adapters have. prompt_*, output_*: bounds of uniform lengths in tokens. Raises UserError naming field, value
    and bound.
    """

    source: Source = "sample"
    upload: str = ""
    model: str = "llama-3.1-8b"
    gpu: str = "h200"
    gpus: int = 8
    ttft_ms: float = 500.0
    tpot_ms: float = 50.0
    e2e_ms: float = 0.0
    attainment_pct: float = 95.0
    objective: Objective = "goodput"
    rate_scale: float = 1.0
    rate_rps: float = 8.0
    cv: float = 1.0
    requests: int = 2000
    adapters: int = 100
    zipf_s: float = 0.9
    ranks: str = "WIDE"
    lengths: LengthKind = "azure-conv"
    prompt_low: int = 8
    prompt_high: int = 512
    output_low: int = 8
    output_high: int = 512
    seed: int = 0

    def __post_init__(self) -> None:
        choices = {
            "source": get_args(Source),
            "objective": get_args(Objective),
            "lengths": get_args(LengthKind),
            "ranks": tuple(RANK_MIXES),
            "model": tuple(MODEL_CATALOGUE),
            "gpu": tuple(GPUS),
        }
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise UserError(f"{name}={getattr(self, name)!r} must be one of {', '.join(known)}")
        for name, (low, high) in BOUNDS.items():
            value = getattr(self, name)
            if not (math.isfinite(value) and low <= value <= high):
                raise UserError(f"{name}={value:g} must be in {low:g}..{high:g}")
        for name in ("prompt", "output"):
            low, high = getattr(self, f"{name}_low"), getattr(self, f"{name}_high")
            if low >= high:
                raise UserError(f"{name}_low={low} must be below {name}_high={high}")

    @property
    def slo(self) -> Slo:
        """What is promised."""
        return Slo(
            ttft_s=self.ttft_ms * 1e-3,
            tpot_s=self.tpot_ms * 1e-3,
            e2e_s=self.e2e_ms * 1e-3 if self.e2e_ms else None,
            attainment=self.attainment_pct / 100,
        )

    @property
    def promise(self) -> str:
        """What is promised, in words."""
        bounds = [f"first token within {self.ttft_ms:g} ms", f"later ones every {self.tpot_ms:g} ms"]
        if self.e2e_ms:
            bounds.append(f"all within {self.e2e_ms:g} ms")
        return f"{', '.join(bounds)}, for {self.attainment_pct:g} % of the requests"

    def to_query(self) -> dict[str, str]:
        """Return the query of a link: what differs from the defaults."""
        default = asdict(Scenario())
        return {
            name: _text(value)
            for name, value in asdict(self).items()
            if value != default[name] and (self.source == "synthetic" or name not in SYNTHETIC_ONLY)
        }

    @classmethod
    def from_query(cls, query: Mapping[str, str]) -> Scenario:
        """Build from a link's query; keys that are not a scenario's are left alone. Raises UserError."""
        kinds: dict[str, Any] = {item.name: type(item.default) for item in fields(cls)}
        given: dict[str, Any] = {}
        for name, text in query.items():
            if name not in kinds:
                continue
            try:
                given[name] = kinds[name](text)
            except ValueError:
                raise UserError(f"{name}={text[:40]!r} must be a number") from None
        return cls(**given)


def _text(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
