"""What bounds a configuration: shares of time and memory, and one word for the tightest."""

from __future__ import annotations

from collections.abc import Mapping
from math import nan

import numpy as np

from engine.blueprint import Blueprint
from sim.cluster import Cluster
from sim.result import Column, Utilisation


def utilisation_of(plan: Blueprint, cluster: Cluster, duration_s: float) -> Utilisation:
    """Return shares of time and capacity over all replicas."""
    usages = [replica.observer.usage for replica in cluster.replicas]
    count, pages, slots = plan.config.replicas, plan.memory.num_pages, plan.config.max_num_seqs
    span_s = count * duration_s
    observed_s = sum(usage.observed_s for usage in usages)
    steps = sum(usage.steps for usage in usages)
    return Utilisation(
        step_share=_share(sum(usage.busy_s for usage in usages), span_s),
        gpu_share=_share(sum(usage.gpu_s for usage in usages), span_s),
        link_share=_share(sum(replica.loads.busy_s for replica in cluster.replicas), span_s),
        kv_pages_mean=_share(sum(usage.kv_page_s for usage in usages), observed_s * pages),
        kv_pages_max=max(usage.kv_pages_max for usage in usages) / pages,
        adapter_pages_mean=_share(sum(usage.adapter_page_s for usage in usages), observed_s * pages),
        adapter_pages_max=max(usage.adapter_pages_max for usage in usages) / pages,
        sequences_mean=_share(sum(usage.sequence_s for usage in usages), observed_s * slots),
        sequences_max=max(usage.sequences_max for usage in usages) / slots,
        batch_mean=_share(sum(usage.decode_rows for usage in usages), steps),
        time_shares=_time_shares(cluster),
    )


def facts_of(columns: Mapping[str, Column], cluster: Cluster) -> dict[str, float]:
    """Return what requests waited for, and how many steps it took."""
    queued_s = columns["scheduled_s"] - columns["arrival_s"]
    return {
        "queue_wait_mean_s": _mean(queued_s),
        "load_wait_mean_s": _mean(columns["load_wait_s"]),
        "preemptions": float(columns["preemptions"].sum()),
        "evictions": float(sum(replica.scheduler.residency.evictions for replica in cluster.replicas)),
        "steps": float(sum(replica.observer.usage.steps for replica in cluster.replicas)),
    }


def bottleneck(use: Utilisation, facts: Mapping[str, float]) -> str:
    """Name what bounds throughput:

    "memory", "batch slots", "adapter loads", "host", a part of the GPU's time, or "none".

    By rules, in this order: pages nearly all held by running requests or preemptions; all slots taken on
    average; the link busy or loads most of the wait; the GPU waiting for the host a fifth of the time; else,
    where steps run most of the time, the largest part.
    """
    if facts["preemptions"] or (use.kv_pages_mean + use.adapter_pages_mean > 0.9 and use.kv_pages_max > 0.8):
        return "memory"
    if use.sequences_mean > 0.9:
        return "batch slots"
    if use.link_share > 0.8 or facts["load_wait_mean_s"] > 0.5 * facts["queue_wait_mean_s"] > 0.05:
        return "adapter loads"
    if use.step_share > 0.5 and use.gpu_share < 0.8 * use.step_share:
        return "host"
    if use.step_share > 0.5 and use.time_shares:
        return max(use.time_shares, key=lambda part: use.time_shares[part])
    return "none"


def _time_shares(cluster: Cluster) -> dict[str, float]:
    sums: dict[str, float] = {}
    for replica in cluster.replicas:
        for part, part_s in replica.observer.usage.parts_s.items():
            sums[part] = sums.get(part, 0.0) + part_s
    total_s = sum(sums.values())
    return {part: part_s / total_s for part, part_s in sums.items()} if total_s > 0 else {}


def _share(part: float, whole: float) -> float:
    return part / whole if whole > 0 else 0.0


def _mean(values: Column) -> float:
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else nan
