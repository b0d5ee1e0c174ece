"""The operations of a step, by backend: Triton kernels, or their plain PyTorch references. Chosen once, never switched in silence."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from engine.config import Backend

Op = Callable[..., Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Ops:
    """One function an operation; the signatures are those of `kernels/`."""

    fetch_from_host: Op
    scatter_from_host_: Op
    send_to_host: Op
    gather_tokens: Op
    rms_norm: Op
    add_rms_norm_: Op
    silu_mul: Op
    rotary_write_kv_: Op
    paged_decode_attention: Op
    paged_prefill_attention: Op
    lora_shrink: Op
    lora_expand_: Op
    lora_pack_part: Op
    lora_collect: Op
    lora_collect_peers: Op
    peer_add_rms_norm_: Op
    top_p_threshold: Op
    sample: Op


def ops_for(backend: Backend) -> Ops:
    """Return the operations of a backend. The reference one imports no Triton."""
    if backend == "reference":
        return _reference_ops()
    return _triton_ops()


def _no_peers(*_: Any, **__: Any) -> None:
    raise RuntimeError("ranks on CPUs cannot read each other's memory; they exchange by collectives")


def _triton_ops() -> Ops:
    from kernels.gather_tokens import gather_tokens
    from kernels.host_memory import fetch_from_host, scatter_from_host_, send_to_host
    from kernels.lora_expand import lora_expand_
    from kernels.lora_shards import lora_collect, lora_collect_peers, lora_pack_part
    from kernels.lora_shrink import lora_shrink
    from kernels.paged_decode_attention import paged_decode_attention
    from kernels.paged_prefill_attention import paged_prefill_attention
    from kernels.peer_add_rms_norm import peer_add_rms_norm_
    from kernels.rms_norm import add_rms_norm_, rms_norm
    from kernels.rotary_write_kv import rotary_write_kv_
    from kernels.sample import sample
    from kernels.silu_mul import silu_mul
    from kernels.top_p_threshold import top_p_threshold

    return Ops(
        fetch_from_host=fetch_from_host,
        scatter_from_host_=scatter_from_host_,
        send_to_host=send_to_host,
        gather_tokens=gather_tokens,
        rms_norm=rms_norm,
        add_rms_norm_=add_rms_norm_,
        silu_mul=silu_mul,
        rotary_write_kv_=rotary_write_kv_,
        paged_decode_attention=paged_decode_attention,
        paged_prefill_attention=paged_prefill_attention,
        lora_shrink=lora_shrink,
        lora_expand_=lora_expand_,
        lora_pack_part=lora_pack_part,
        lora_collect=lora_collect,
        lora_collect_peers=lora_collect_peers,
        peer_add_rms_norm_=peer_add_rms_norm_,
        top_p_threshold=top_p_threshold,
        sample=sample,
    )


def _reference_ops() -> Ops:
    from kernels.gather_tokens_ref import gather_tokens
    from kernels.host_memory_ref import fetch_from_host, scatter_from_host_, send_to_host
    from kernels.lora_expand_ref import lora_expand_ref_
    from kernels.lora_shards_ref import lora_collect, lora_pack_part
    from kernels.lora_shrink_ref import lora_shrink_ref
    from kernels.paged_decode_attention_ref import paged_decode_attention
    from kernels.paged_prefill_attention_ref import paged_prefill_attention
    from kernels.rms_norm_ref import add_rms_norm_, rms_norm
    from kernels.rotary_write_kv_ref import rotary_write_kv_
    from kernels.sample_ref import sample
    from kernels.silu_mul_ref import silu_mul
    from kernels.top_p_threshold_ref import top_p_threshold

    return Ops(
        fetch_from_host=fetch_from_host,
        scatter_from_host_=scatter_from_host_,
        send_to_host=send_to_host,
        gather_tokens=gather_tokens,
        rms_norm=rms_norm,
        add_rms_norm_=add_rms_norm_,
        silu_mul=silu_mul,
        rotary_write_kv_=rotary_write_kv_,
        paged_decode_attention=paged_decode_attention,
        paged_prefill_attention=paged_prefill_attention,
        lora_shrink=lora_shrink_ref,
        lora_expand_=lora_expand_ref_,
        lora_pack_part=lora_pack_part,
        lora_collect=lora_collect,
        lora_collect_peers=_no_peers,
        peer_add_rms_norm_=_no_peers,
        top_p_threshold=top_p_threshold,
        sample=sample,
    )
