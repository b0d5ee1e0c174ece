"""Reference of kernels/rotary_write_kv.py."""

import torch


def rotary_write_kv_(
    qkv: torch.Tensor,
    cos_sin: torch.Tensor,
    positions: torch.Tensor,
    sequence_slots: torch.Tensor,
    page_table: torch.Tensor,
    pool: torch.Tensor,
    *,
    layer: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    page_tokens: int,
    num_layers: int,
) -> None:
    """x·cos + rotate_half(x)·sin for q and k, in fp32; k and v go to their pages."""
    live = (sequence_slots >= 0).nonzero().flatten()
    position = positions[live].long()
    heads = qkv[live].view(len(live), num_heads + 2 * num_kv_heads, head_dim)
    rotating = heads[:, : num_heads + num_kv_heads].float()
    cos, sin = (half.repeat(1, 2)[:, None] for half in cos_sin[position].chunk(2, dim=-1))
    a, b = rotating.chunk(2, dim=-1)
    heads[:, : num_heads + num_kv_heads] = (rotating * cos + torch.cat((-b, a), dim=-1) * sin).to(qkv.dtype)
    qkv[live] = heads.flatten(1)

    kv = heads[:, num_heads:].unflatten(1, (2, num_kv_heads))
    page = page_table[sequence_slots[live].long(), position // page_tokens].long()
    pages = pool.view(len(pool), num_layers, 2, num_kv_heads, page_tokens, head_dim)
    pages[page, layer, :, :, position % page_tokens] = kv
