"""Reference of kernels/paged_decode_attention.py."""

import torch


def paged_decode_attention(
    q: torch.Tensor,
    pool: torch.Tensor,
    page_table: torch.Tensor,
    sequence_slots: torch.Tensor,
    items: torch.Tensor,
    num_items: torch.Tensor,
    combine: torch.Tensor,
    num_combine: torch.Tensor,
    partial: torch.Tensor,
    partial_lse: torch.Tensor,
    out: torch.Tensor,
    *,
    layer: int,
    num_layers: int,
    num_kv_heads: int,
    head_dim: int,
    page_tokens: int,
    num_programs: int,
) -> torch.Tensor:
    """softmax(q·Kᵀ·D^−½)·V for each item in fp32, then the weighted mean of the partial results of each
    split row."""
    layers = pool.view(len(pool), num_layers, 2, num_kv_heads, page_tokens, head_dim)[:, layer]
    slots = sequence_slots.tolist()
    for row, kv_start, kv_end, part in items[: int(num_items)].tolist():
        key, value = read_kv(layers, page_table[slots[row]], kv_start, kv_end)
        query = q[row].float().view(num_kv_heads, -1, head_dim)
        scores = query @ key.transpose(1, 2) * head_dim**-0.5
        result = (scores.softmax(-1) @ value).view(-1, head_dim)
        if part < 0:
            out[row] = result.flatten().to(out.dtype)
        else:
            partial[part] = result
            partial_lse[part] = scores.logsumexp(-1).flatten()
    for row, first, count, _ in combine[: int(num_combine)].tolist():
        weight = partial_lse[first : first + count].softmax(0)
        out[row] = (weight[..., None] * partial[first : first + count]).sum(0).flatten().to(out.dtype)
    return out


def read_kv(
    layers: torch.Tensor, pages: torch.Tensor, kv_start: int, kv_end: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gather K and V of tokens kv_start … kv_end − 1 from one layer's pages, each [Hkv, n, D] fp32.

    layers: [num_pages, 2, Hkv, page_tokens, D]; pages: the sequence's row of the page table.
    """
    page_tokens = layers.shape[3]
    first_page = kv_start // page_tokens
    wanted = pages[first_page : -(-kv_end // page_tokens)].long()
    kv = (
        layers[wanted]
        .permute(1, 2, 0, 3, 4)
        .flatten(2, 3)[:, :, kv_start - first_page * page_tokens : kv_end - first_page * page_tokens]
    )
    key, value = kv.float()
    return key, value
