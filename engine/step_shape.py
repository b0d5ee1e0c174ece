"""What a planned step is made of, as counts: the facts that its cost depends on."""

from __future__ import annotations

from collections.abc import Sequence

from engine.decode_set import DecodeSet
from engine.step import PrefillChunk, StepShape


def shape_of(decoding: DecodeSet, decode_rows: int, prefills: Sequence[PrefillChunk]) -> StepShape:
    """Count the decode rows of the next tick and these prefill chunks."""
    lora = decoding.lora
    rows = lora.rows
    tokens, adapters, distinct, token_bytes = lora.tokens, len(rows), lora.distinct_bytes, lora.token_bytes
    prefill = pairs = kv_tokens = kv_max = 0
    samples = decode_rows
    seen: list[str] = []  # adapters that only prompts use
    for chunk in prefills:
        length, start = chunk.length, chunk.start
        prefill += length
        pairs += length * start + length * (length + 1) // 2
        kv_tokens += start + length
        if start + length > kv_max:
            kv_max = start + length
        samples += chunk.last
        resident = chunk.sequence.resident
        if resident is not None:
            weight_bytes, name = resident.footprint.weight_bytes, resident.name
            tokens += length
            token_bytes += length * weight_bytes
            if name not in rows and name not in seen:
                seen.append(name)
                adapters += 1
                distinct += (
                    weight_bytes
                    if resident.footprint.experts is None
                    else int(resident.footprint.bytes_of(length))
                )
    return StepShape(  # by position: 1.3 µs a step less than by name
        decode_rows,
        decoding.kv_tokens(),
        decoding.longest_kv() if decode_rows else 0,
        prefill,
        len(prefills),
        pairs,
        kv_tokens,
        samples,
        tokens,
        adapters,
        distinct,
        lora.single_bytes,
        token_bytes,
        kv_max,
    )
