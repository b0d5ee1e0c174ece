"""Measure a running OpenAI-compatible server from outside and fit a vLLM profile to it, within a budget of minutes.

Asked are: steady batches by size and by distinct adapters (time a token), lone prompts by length (time to the first token), and adapters that were
not used before (what a cold one adds). One server has one number of slots and one `max_lora_rank`, so neither can be told from the rest: a
measured profile gives the shape of the cost, and the server's own measurements one factor for each of FACTORS.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import median
from typing import Any

import numpy as np
from scipy.optimize import nnls

from engine.errors import UserError
from sim.calibrate_client import Answer, Endpoint
from sim.vllm_fit import Observation
from sim.vllm_profile import VllmMemory, VllmProfile
from sim.vllm_steps import TERMS, TOKEN_KNOTS, Floats, KernelGrid, StepFacts, terms

BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
PROMPT_WORDS = (16, 64, 256, 768)
STEADY_TOKENS = 32
SHORT_WORDS = 8

# Terms that share a factor between the profile that is started from and this server.
FACTORS: dict[str, tuple[str, ...]] = {
    "step": ("step",),
    "tokens": (*(f"tokens_from_{knot}" for knot in TOKEN_KNOTS), "rows"),
    "attention": ("kv_tokens",),
    "slots": ("lora", "slot_blocks_few", "slot_blocks_many"),
    "adapters": ("adapters_few", "adapters_many", "adapter_blocks", "adapter_tiles"),
}

Progress = Callable[[str, float], None]  # what is measured, share of the budget that is gone


@dataclass(frozen=True, slots=True, kw_only=True)
class Server:
    """What is known of the server beforehand.

    adapters: names it serves; max_loras, max_lora_rank, max_model_len: its flags; max_num_seqs: the largest batch tried.
    """

    base: str
    adapters: tuple[str, ...] = ()
    max_loras: int = 0
    max_lora_rank: int = 8
    max_num_seqs: int = 256
    max_model_len: int = 2048


@dataclass(slots=True)
class Measured:
    """Observations, and delays outside a step. late: what the budget left undone."""

    observations: list[Observation] = field(default_factory=list)
    client_s: float = 0.0
    load_s: float = 0.0
    requests: int = 0
    seconds: float = 0.0
    late: list[str] = field(default_factory=list)


def measure(endpoint: Endpoint, server: Server, budget_s: float, progress: Progress) -> Measured:
    """Measure as much as the budget allows, the cheapest first; a probe that was begun is ended. Raises UserError."""
    return _Session(endpoint, server, budget_s, progress).run()


class _Session:
    def __init__(self, endpoint: Endpoint, server: Server, budget_s: float, progress: Progress) -> None:
        self._endpoint, self._server = endpoint, server
        self._budget_s, self._progress = budget_s, progress
        self._begun_s = time.monotonic()
        self._seed = 0
        self._tokens_a_word = 1.0
        self._found = Measured()

    def run(self) -> Measured:
        self._ask([self._server.base], SHORT_WORDS, 2)  # whatever the server does at its first request
        for label, probe in self._probes():
            if self._gone >= 1:
                self._found.late.append(label)
                continue
            self._progress(label, self._gone)
            probe()
        self._found.seconds = time.monotonic() - self._begun_s
        if not self._found.observations:
            raise UserError(
                f"a budget of {self._budget_s:g} s was over before anything was measured; give more --minutes"
            )
        self._progress("done", min(1.0, self._gone))
        return self._found

    @property
    def _gone(self) -> float:
        return (time.monotonic() - self._begun_s) / self._budget_s

    def _probes(self) -> Iterator[tuple[str, Callable[[], None]]]:
        server = self._server
        if server.adapters:
            yield "cold adapters", self._cold_adapters
        for words in PROMPT_WORDS:
            yield f"a prompt of about {words} tokens", lambda words=words: self._prompt(words)  # type: ignore[misc]
        for batch in (size for size in BATCHES if size <= server.max_num_seqs):
            for count in self._adapter_counts(batch):
                label = f"a batch of {batch}, {count} adapters"
                yield label, lambda batch=batch, count=count: self._batch(batch, count)  # type: ignore[misc]

    def _adapter_counts(self, batch: int) -> Sequence[int]:
        most = min(batch, len(self._server.adapters), self._server.max_loras)
        return sorted({0, min(1, most), most // 2, most})

    # ---- probes ----

    def _batch(self, batch: int, adapters: int) -> None:
        """A steady batch: all ask at once for the same number of tokens; the median time a token is a decode step's."""
        names = self._server.adapters[:adapters] or (self._server.base,)
        models = [names[index % len(names)] for index in range(batch)]
        self._ask(list(dict.fromkeys(models)), SHORT_WORDS, 2)  # so that none is cold
        answers = self._ask(models, SHORT_WORDS, STEADY_TOKENS)
        times = [answer.tpot_s for answer in answers if math.isfinite(answer.tpot_s)]
        if not times or median(times) <= 0:
            return
        prompt = fsum_mean([answer.prompt_tokens for answer in answers])
        facts = StepFacts(
            tokens=batch,
            rows=batch,
            kv_tokens=batch * (prompt + STEADY_TOKENS / 2),
            adapters=adapters,
            slots=self._server.max_loras,
            rank=self._server.max_lora_rank,
        )
        self._add(f"batch {batch} {adapters}", "batches", median(times), facts)

    def _prompt(self, words: int) -> None:
        """A lone prompt: its time to the first token, less what the shortest one takes beyond a decode step."""
        if words * self._tokens_a_word > self._server.max_model_len - 2:
            return
        answers = [self._ask([self._server.base], words, 2)[0] for _ in range(3)]
        self._tokens_a_word = max(1.0, answers[0].prompt_tokens / words)
        ttft_s = median(answer.ttft_s for answer in answers)
        if words == PROMPT_WORDS[0]:
            tpot_s = median(answer.total_s - answer.ttft_s for answer in answers)
            self._found.client_s = max(0.0, ttft_s - tpot_s)
        tokens = max(1, answers[0].prompt_tokens)
        facts = StepFacts(
            tokens=tokens,
            rows=1,
            kv_tokens=tokens,
            prompt_tokens=tokens,
            slots=self._server.max_loras,
            rank=self._server.max_lora_rank,
        )
        seconds = ttft_s - self._found.client_s
        if seconds > 0:
            self._add(f"prompt {words}", "prompts", seconds, facts)

    def _cold_adapters(self) -> None:
        """Ask each adapter twice in turn: where there are more than slots, the first finds it cold; else only once in the server's life."""
        extra = []
        for name in self._server.adapters[: max(8, 2 * self._server.max_loras)]:
            first, second = (self._ask([name], SHORT_WORDS, 2)[0].ttft_s for _ in range(2))
            extra.append(max(0.0, first - second))
            if self._gone >= 0.3:
                break
        self._found.load_s = median(extra)

    # ---- requests ----

    def _ask(self, models: Sequence[str], words: int, max_tokens: int) -> list[Answer]:
        answers = self._endpoint.together(models, words, max_tokens, self._seed)
        self._seed += len(models)  # prompts differ, so that no prefix cache answers
        self._found.requests += len(models)
        return answers

    def _add(self, name: str, group: str, seconds: float, facts: StepFacts) -> None:
        self._found.observations.append(
            Observation(name=name, group=group, seconds=seconds, mix=((1.0, facts),))
        )


def fsum_mean(values: Sequence[float]) -> float:
    """Return the mean of at least one value."""
    return math.fsum(values) / len(values)


# ---- the fit ----


def scaled_profile(start: VllmProfile, found: Measured, server: Server, **identity: Any) -> VllmProfile:
    """Return `start` with one factor for each of FACTORS, fitted to what was measured. identity: fields of the new profile."""
    profile: VllmProfile = replace(start, **identity)
    grid = KernelGrid(
        model=profile.model, rank=server.max_lora_rank, max_graph_tokens=profile.max_graph_tokens
    )
    rows = np.array([_row(observation, grid) for observation in found.observations])
    times = np.array([observation.seconds for observation in found.observations])
    before = np.array([start.seconds.get(name, 0.0) for name in TERMS])
    groups = np.array([[name in names for name in TERMS] for names in FACTORS.values()])
    columns = np.stack([(rows * (before * group)).sum(axis=1) for group in groups], axis=1)
    factors = _factors(columns, times)
    after = before * (factors[:, None] * groups).sum(axis=0)
    errors = columns @ factors / times - 1
    largest = {
        "tokens": max(item.tokens for o in found.observations for _, item in o.mix),
        "kv_tokens": max(item.kv_tokens for o in found.observations for _, item in o.mix),
        "adapters": max(item.adapters for o in found.observations for _, item in o.mix),
        "slots": server.max_loras,
        "rank": server.max_lora_rank,
    }
    return replace(
        profile,
        seconds=dict(zip(TERMS, after.tolist(), strict=True)),
        load_s=found.load_s,
        client_s=found.client_s,
        largest=largest,
        errors={
            "observations": float(len(times)),
            "in_sample_mape": float(np.abs(errors).mean()),
            "held_out_p90": held_out_p90(columns, times),
            **{f"factor_{name}": float(f) for name, f in zip(FACTORS, factors, strict=True)},
        },
    )


def held_out_p90(columns: Floats, times: Floats) -> float:
    """Return the 90th percentile of the relative error of each observation by a fit to all others."""
    errors = []
    for out in range(len(times)):
        left = np.arange(len(times)) != out
        if left.any():
            errors.append(abs(float(columns[out] @ _factors(columns[left], times[left])) / times[out] - 1))
    return float(np.quantile(errors, 0.9)) if errors else 0.15


def _factors(columns: Floats, times: Floats) -> Floats:
    """Least squares on relative errors; a factor that nothing was measured of, or hardly, stays near that of the step."""
    scaled = columns / times[:, None]
    overall = float(scaled.sum(axis=1).mean())
    pull = (
        0.03 * len(times) ** 0.5 * np.abs(scaled).mean()
    )  # towards one factor for all: three percent of what is measured
    eye = np.eye(len(FACTORS)) * pull
    found: Floats = nnls(
        np.vstack([scaled, eye]), np.concatenate([np.ones(len(times)), np.full(len(FACTORS), pull / overall)])
    )[0]
    return found


def _row(observation: Observation, grid: KernelGrid) -> Floats:
    total = np.zeros(len(TERMS))
    for share, facts in observation.mix:
        total += share * terms(facts, grid)
    return total


# ---- memory, which no request shows ----


def memory_of(
    profile: VllmProfile, server: Server, gpu_bytes: float, utilization: float, kv_tokens: int | None
) -> tuple[VllmMemory, Mapping[str, str]]:
    """Return the memory of the server, and what of it is an assumption.

    Slots are of the model's shape. kv_tokens: of KV cache, where the server tells; else what is neither weights nor slots is taken to be as in
    `profile`.
    """
    from sim.vllm_costs import slot_bytes_by_shape

    slot, per_rank = slot_bytes_by_shape(profile, profile.tp)
    weights = float(profile.model.weight_bytes(profile.tp))
    known = VllmMemory(
        gpu_bytes=gpu_bytes,
        weights_bytes=weights,
        base_bytes=weights + profile.memory.base_bytes - profile.memory.weights_bytes,
        slot_bytes=slot,
        slot_bytes_per_rank=per_rank,
    )
    if kv_tokens is None:
        return known, {"memory": "beside weights and slots as in the profile that was started from"}
    kv = kv_tokens * profile.kv_bytes_per_token
    base = gpu_bytes * utilization - kv - known.slots_bytes(server.max_loras, server.max_lora_rank)
    return replace(known, base_bytes=max(weights, base)), {"memory": "KV cache as the server tells"}
