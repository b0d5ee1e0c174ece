"""What speed for each user costs in throughput: every configuration tried, and those that none beats in both."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from math import isfinite
from typing import Any

from planner.trial import Trial
from planner.workload import PIECES, SCREEN_REQUESTS, STRETCH_REQUESTS, WINDOW_REQUESTS, Piece
from traces.metrics import Slo

COUNTED: Mapping[Piece, int] = {
    "screen": SCREEN_REQUESTS,
    "window": WINDOW_REQUESTS,
    "stretch": STRETCH_REQUESTS,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ParetoPoint:
    """One configuration at the highest rate that it sustains.

    tokens_per_s_per_user: what 95 % of the requests get at least, 1 / TPOT p95. judged_on, judged_order: on how much of the trace, the
    longest first. front: nothing else has more throughput per GPU and is as fast.
    """

    tp: int
    replicas: int
    gpus: int
    max_num_seqs: int
    max_num_batched_tokens: int
    lora_sharding: str
    judged_on: str
    judged_order: int
    rps_per_gpu: float
    tokens_per_s_per_gpu: float
    tokens_per_s_per_user: float
    ttft_p95_s: float
    bottleneck: str
    front: bool


def pareto_points(trials: Iterable[Trial]) -> list[dict[str, Any]]:
    """Return a point for every trial that sustains any rate; on the front are those that no other beats."""
    found = [point for trial in trials if (point := _point(trial)) is not None]
    ahead = front([(point.tokens_per_s_per_gpu, point.tokens_per_s_per_user) for point in found])
    return [
        asdict(point) | {"front": on_front, "label": _label(point)}
        for point, on_front in zip(found, ahead, strict=True)
    ]


def front(points: Sequence[tuple[float, float]]) -> list[bool]:
    """Say of each point whether no other is at least as high in both and higher in one."""
    return [
        not any(x >= mine_x and y >= mine_y and (x, y) != (mine_x, mine_y) for x, y in points)
        for mine_x, mine_y in points
    ]


def piece_name(piece: Piece) -> str:
    """Return what a piece of the trace is, in words."""
    return f"busiest {COUNTED[piece]:,} requests" if piece in COUNTED else "the whole trace"


def slo_corner(slo: Slo) -> dict[str, float]:
    """Return what the SLO asks: tokens per second for a user, and seconds to the first token."""
    return {"tokens_per_s_per_user": 1 / slo.tpot_s, "ttft_p95_s": slo.ttft_s}


def _point(trial: Trial) -> ParetoPoint | None:
    probe = trial.at_best
    if probe is None or trial.sustainable_rps <= 0:
        return None
    config, metrics = trial.config, probe.metrics
    tpot_s = metrics["tpot_p95_s"]
    if not (isfinite(tpot_s) and tpot_s > 0):
        return None
    return ParetoPoint(
        tp=config.tp,
        replicas=config.replicas,
        gpus=config.gpus,
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens,
        lora_sharding=config.lora_sharding,
        judged_on=piece_name(trial.piece),
        judged_order=-PIECES.index(trial.piece),
        rps_per_gpu=trial.sustainable_rps / config.gpus,
        tokens_per_s_per_gpu=metrics["output_tokens_per_s"] / config.gpus,
        tokens_per_s_per_user=1 / tpot_s,
        ttft_p95_s=metrics["ttft_p95_s"],
        bottleneck=trial.bottleneck,
        front=False,
    )


def _label(point: ParetoPoint) -> str:
    return f"TP {point.tp} × {point.replicas}, {point.max_num_seqs} requests, {point.max_num_batched_tokens} tokens a step"
