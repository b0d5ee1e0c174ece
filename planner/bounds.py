"""What no schedule can beat: bounds by arithmetic, before anything is simulated."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from engine.config import ServingConfig
from engine.prefix_keys import BLOCK_TOKENS, BlockKeys
from engine.step import StepShape
from sim.replica import StepTimes
from traces import Trace
from traces.metrics import Slo


@dataclass(frozen=True, slots=True, kw_only=True)
class Bounds:
    """Of one replica: seconds that even a lone request takes, and requests per second never exceeded.

    ttft_s is of the prompt that is exceeded by just the share of requests that may miss the SLO.
    """

    ttft_s: float
    tpot_s: float
    rate_rps: float

    def reason(self, slo: Slo) -> str | None:
        """Say why the SLO cannot be met at any rate; None where it may be."""
        if self.tpot_s > slo.tpot_s:
            return f"a decode step of one sequence takes {self.tpot_s * 1e3:.1f} ms, TPOT may be {slo.tpot_s * 1e3:g} ms"
        if self.ttft_s > slo.ttft_s:
            return (
                f"a lone prompt of the trace's {slo.attainment * 100:g}th percentile takes {self.ttft_s * 1e3:.0f} ms, "
                f"TTFT may be {slo.ttft_s * 1e3:g} ms"
            )
        return None


def bounds(trace: Trace, config: ServingConfig, costs: StepTimes, slo: Slo) -> Bounds:
    """Bound one replica of a configuration on a trace.

    Each step takes at least what its tokens take without attention, LoRA and host, and at most
    max_num_batched_tokens of them, max_num_seqs of which decode. A token is cheapest in the fullest step. With prefix
    caching no more is computed of a prompt than a cache without end would not have.
    """
    prompts, outputs = trace.columns.prompt_tokens, trace.columns.output_tokens
    if config.prefix_caching and trace.columns.prefix_blocks is not None:
        prompts = _least_prompts(trace)
    prompt = int(np.quantile(prompts, slo.attainment, method="lower"))
    tpot_s = _decode_s(costs, 1) if float((outputs > 1).mean()) > 1 - slo.attainment else 0.0
    tokens, seqs = config.max_num_batched_tokens, config.max_num_seqs
    most = max(tokens, 1)
    by_tokens_s = (float(prompts.mean()) + float(outputs.mean()) - 1) * _dense_s(costs, most) / most
    by_slots_s = (float(outputs.mean()) - 1) * _decode_s(costs, seqs) / seqs
    least_s = max(by_tokens_s, by_slots_s)
    return Bounds(ttft_s=_prefill_s(costs, prompt, tokens), tpot_s=tpot_s, rate_rps=1 / least_s)


@lru_cache(maxsize=1)
def _least_prompts(trace: Trace) -> NDArray[np.int64]:
    """Return the tokens of each prompt that no request before it had in the same blocks under the same adapter; at least one."""
    columns = trace.columns
    names = BlockKeys(BLOCK_TOKENS)  # a page a block
    seen: set[int] = set()
    shared = np.zeros(len(trace), dtype=np.int64)
    for row, adapter in enumerate(columns.adapter_index.tolist()):
        blocks = (columns.prefix_blocks or ())[row] or ()
        keys = names.keys(str(adapter), blocks, len(blocks) * BLOCK_TOKENS)
        shared[row] = next((place for place, key in enumerate(keys) if key not in seen), len(keys))
        seen.update(keys)
    least: NDArray[np.int64] = np.maximum(1, columns.prompt_tokens - BLOCK_TOKENS * shared)
    return least


def _decode_s(costs: StepTimes, rows: int) -> float:
    shape = StepShape(decode_rows=rows, decode_kv_tokens=rows, decode_kv_max=1, sample_rows=rows)
    return costs.step_s(shape)


def _dense_s(costs: StepTimes, tokens: int) -> float:
    """Return the least time of a step's tokens, whether as decodes or as a prompt: either kind has its own correction."""
    return min(costs.step_s(StepShape(prefill_tokens=tokens, prefill_chunks=chunks)) for chunks in (0, 1))


def _prefill_s(costs: StepTimes, prompt: int, chunk: int) -> float:
    """Return the least time of a prompt on an idle replica: full chunks and the rest, without attention."""
    full, rest = divmod(prompt, chunk)
    return full * _dense_s(costs, chunk) + (_dense_s(costs, rest) if rest else 0.0)
