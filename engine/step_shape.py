"""What a planned step is made of, as counts: the facts that its cost depends on."""

from __future__ import annotations

from collections.abc import Sequence

from engine.decode_set import DecodeSet
from engine.step import PrefillChunk, StepShape


def shape_of(decoding: DecodeSet, decode_rows: int, prefills: Sequence[PrefillChunk]) -> StepShape:
    """Count the decode rows of the next tick and these prefill chunks."""
    lora = decoding.lora
    tokens, adapters, distinct, token_bytes = (
        lora.tokens,
        len(lora.rows),
        lora.distinct_bytes,
        lora.token_bytes,
    )
    seen: set[str] = set()
    prefill = pairs = kv_tokens = samples = 0
    for chunk in prefills:
        prefill += chunk.length
        pairs += chunk.length * chunk.start + chunk.length * (chunk.length + 1) // 2
        kv_tokens += chunk.start + chunk.length
        samples += chunk.last
        resident = chunk.sequence.resident
        if resident is not None:
            tokens += chunk.length
            token_bytes += chunk.length * resident.footprint.weight_bytes
            if resident.name not in lora.rows and resident.name not in seen:
                seen.add(resident.name)
                adapters += 1
                distinct += resident.footprint.weight_bytes
    return StepShape(
        decode_rows=decode_rows,
        decode_kv_tokens=decoding.kv_tokens(),
        decode_kv_max=decoding.longest_kv() if decode_rows else 0,
        prefill_tokens=prefill,
        prefill_chunks=len(prefills),
        prefill_pairs=pairs,
        prefill_kv_tokens=kv_tokens,
        sample_rows=decode_rows + samples,
        lora_tokens=tokens,
        lora_adapters=adapters,
        lora_bytes=distinct,
        lora_single_bytes=lora.single_bytes,
        lora_token_bytes=token_bytes,
    )
