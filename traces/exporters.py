"""Writers of the formats that other tools' benchmarks replay: vLLM's timed trace (seconds) and Mooncake's (milliseconds).

Both make a prompt of the hash ids of its blocks of 512 tokens, and an empty one where there are none: a request without prefix blocks, or with
fewer than its prompt has, gets blocks that no other request has.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Literal

from traces.trace import Trace

Target = Literal["vllm", "mooncake"]
BLOCK_TOKENS = 512
ROWS_AT_ONCE = 4096


def to_timed_lines(trace: Trace, target: Target) -> Iterator[str]:
    """Yield the lines of a trace for another tool: timestamp (vllm: s; mooncake: whole ms), input_length, output_length, hash_ids and
    adapter, where the request has one.
    """
    columns = trace.columns
    fresh = 1 + max((max(row, default=0) for row in columns.prefix_blocks or () if row), default=0)
    for first in range(0, len(trace), ROWS_AT_ONCE):
        rows = slice(first, first + ROWS_AT_ONCE)
        numbers = zip(
            columns.arrival_s[rows].tolist(),
            columns.prompt_tokens[rows].tolist(),
            columns.output_tokens[rows].tolist(),
            columns.adapter_index[rows].tolist(),
            strict=True,
        )
        for place, (arrival_s, prompt, output, adapter) in enumerate(numbers, first):
            wanted = -(-prompt // BLOCK_TOKENS)
            shared = list((columns.prefix_blocks[place] if columns.prefix_blocks else None) or ())[:wanted]
            row = {
                "timestamp": arrival_s if target == "vllm" else round(arrival_s * 1e3),
                "input_length": prompt,
                "output_length": output,
                "hash_ids": [*shared, *range(fresh, fresh + wanted - len(shared))],
            }
            fresh += wanted - len(shared)
            yield json.dumps(row if adapter < 0 else row | {"adapter": columns.adapter_names[adapter]})
