"""Reference of kernels/paged_prefill_attention.py."""

import torch

from kernels.paged_decode_attention_ref import read_kv


def paged_prefill_attention(
    q: torch.Tensor,
    pool: torch.Tensor,
    page_table: torch.Tensor,
    items: torch.Tensor,
    num_items: torch.Tensor,
    out: torch.Tensor,
    *,
    layer: int,
    num_layers: int,
    num_kv_heads: int,
    head_dim: int,
    page_tokens: int,
    block_q: int,
    num_programs: int,
) -> torch.Tensor:
    """softmax(q·Kᵀ·D^−½ + causal mask)·V for each item, in fp32."""
    layers = pool.view(len(pool), num_layers, 2, num_kv_heads, page_tokens, head_dim)[:, layer]
    for row_start, row_count, first_position, slot in items[: int(num_items)].tolist():
        rows = slice(row_start, row_start + row_count)
        kv_end = first_position + row_count
        key, value = read_kv(layers, page_table[slot], 0, kv_end)
        query = q[rows].float().unflatten(1, (num_kv_heads, -1)).permute(1, 2, 0, 3)
        scores = query @ key[:, None].transpose(2, 3) * head_dim**-0.5
        position = torch.arange(first_position, kv_end, device=q.device)
        hidden = torch.arange(kv_end, device=q.device) > position[:, None]
        result = scores.masked_fill(hidden, float("-inf")).softmax(-1) @ value[:, None]
        out[rows] = result.permute(2, 0, 1, 3).flatten(1).to(out.dtype)
    return out
