"""What a plan takes for granted, and what its reader should be warned of: one sentence each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from engine.adapter import DEFAULT_RANK, AdapterSpec
from engine.config import ServingConfig
from planner.paced import PACES, StepErrors
from planner.trial import Trial
from planner.workload import REQUESTS_A_REPLICA, STRETCH_REQUESTS, WINDOW_REQUESTS, longest_request, too_long
from sim.merge_costs import switch_provenance
from sim.profile import Profile
from traces import Trace


def assumptions(
    trace: Trace, given: Mapping[str, AdapterSpec] | None, profile: Profile, errors: StepErrors
) -> list[str]:
    """Return what the plan takes for granted."""
    said = [
        _profile(profile),
        "Attainment is the criterion: the share of all requests that meet every bound.",
        "Adapters are warm in host memory and cold on the GPU when the trace begins.",
        f"A prediction's interval: nine times of ten, by the cost model's held-out errors (±{errors.typical(0.0):.1%} a step; extrapolated "
        f"steps ±{errors.typical(1.0):.0%}), with the busiest {WINDOW_REQUESTS:,} requests simulated at {len(PACES)} paces of the steps.",
        "Sustainable rates speed the trace up evenly: the same requests and bursts in less time.",
        f"Settings are compared with one replica on the busiest {WINDOW_REQUESTS:,} requests, shapes on the busiest "
        f"{STRETCH_REQUESTS:,}, the best on the whole trace.",
        "Prices are examples in planner/prices.json; --prices gives your own.",
    ]
    if trace.columns.prefix_blocks is not None:
        said.append(
            "The trace's shared prompt prefixes are found in the prefix cache of the same replica, under the same adapter; "
            "requests are not routed by them."
        )
    if trace.adapters and given is None:
        said.append("Adapters are dense LoRA on all seven linears, on every replica.")
    unknown = sum(rank is None for rank in trace.adapters.values())
    if unknown and given is None:
        said.append(f"{unknown} adapters have no rank in the trace: rank {DEFAULT_RANK} is assumed.")
    return said


def _profile(profile: Profile) -> str:
    facts = profile.provenance
    commit = str(facts.get("commit") or "unknown")[:12]
    return (
        f"Costs: {profile.source}, measured on {facts.get('gpu_name') or profile.gpu} at commit {commit}, "
        f"{facts.get('date') or 'no date'}."
    )


def warnings(
    trace: Trace,
    config: ServingConfig,
    profile: Profile,
    shown: Sequence[Trial],
    *,
    timed_out: bool,
    priced: bool,
) -> list[str]:
    """Return what weakens the plan."""
    said = []
    if timed_out:
        said.append("Time was up before the search was done: this is the best so far.")
    refused = too_long(trace, config.max_model_len)
    if refused:
        said.append(
            f"{refused} requests are longer (up to {longest_request(trace):,} tokens) than the model can attend to "
            f"({config.max_model_len:,}): they are refused and count as missed."
        )
    if trace.columns.prefix_blocks is not None and not config.prefix_caching:
        said.append(
            "The trace shares prompt prefixes: prefix caching is off, every prompt is computed in full."
        )
    shedding = [trial for trial in shown if trial.config.scheduler == "slo" and trial.at_best is not None]
    if shedding and shedding[0].at_best is not None:
        turned = shedding[0].at_best.use.get("refused", 0.0)
        requests = float(shedding[0].at_best.metrics.get("requests", 0.0))
        share = turned / requests if requests else 0.0
        said.append(
            "Only a scheduler that turns away requests that would be too late ('slo') meets the SLO: at its highest rate it refuses "
            f"{share:.1%} of them, which count as missed. --scheduler fcfs,clustered,fair plans without."
        )
    measured = {steps.tp for steps in profile.parallel if steps.model.name == config.model.lower()}
    degrees = sorted({trial.config.tp for trial in shown if trial.config.tp > 1} - measured)
    if degrees:
        said.append(
            f"TP {', '.join(map(str, degrees))} is extrapolated: composed from operators and exchanges between fewer GPUs, "
            "not measured as whole steps."
        )
    if profile.gpu.lower() != config.gpu.lower():
        said.append(
            f"Costs were measured on {profile.gpu} and are scaled to {config.gpu} by specification: all numbers are extrapolated."
        )
    if any(trial.config.merge == "dynamic" for trial in shown):
        said.append(
            f"What merging another adapter takes, under merge='dynamic': {switch_provenance(config)}."
        )
    if profile.model.name != config.model.lower():
        said.append(f"Costs are scaled from {profile.model.name}, which was measured, to {config.model}.")
    if profile.gpu.lower() == config.gpu.lower() and profile.model.name == config.model.lower():
        said += _single_gpu(shown)
    if any(trial.capped for trial in shown):
        said.append(
            "A sustainable rate is where arithmetic ends it, not the SLO: the trace is too short to fill the GPUs."
        )
    most = max((trial.config.replicas for trial in shown), default=1)
    if len(trace) < REQUESTS_A_REPLICA * most:
        said.append(
            f"The trace has {len(trace):,} requests for {most} replicas: it was repeated to find sustainable rates."
        )
    if any(trial.meets(trace.rate_rps) and trial.sustainable_rps < trace.rate_rps for trial in shown):
        said.append(
            "The trace is over before its queue has grown: the SLO is met on it, at a rate that cannot be sustained."
        )
    if not priced:
        said.append(f"No price of gpu {config.gpu!r} is known: --prices gives one.")
    return said


def _single_gpu(shown: Sequence[Trial]) -> list[str]:
    """Return how much of what TP 1 rests on lies beyond what was measured."""
    shares = [
        trial.at_rate.extrapolated_share
        for trial in shown
        if trial.config.tp == 1 and trial.at_rate is not None and trial.at_rate.extrapolated_share
    ]
    if not shares:
        return []
    return [
        f"TP 1: up to {max(shares):.2%} of the steps lie beyond the measured sizes, so its numbers are marked extrapolated."
    ]
