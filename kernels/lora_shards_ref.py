"""Plain PyTorch reference of `kernels.lora_shards`; also the CPU backend's."""

from __future__ import annotations

from kernels.lora_plan import COLUMN_PARALLEL, GROUPS, NUM_SPLITS, RANKS, ROW_COUNT, ROW_START


def lora_pack_part(bridge, tiles, num_tiles, headers, message, *, group, ranks, tile_tokens, num_programs):
    """Compute what `lora_pack_part` computes: message[m, t, i] = Σ_s bridge[s, t, first of m + i]."""
    splits = int(headers[group, NUM_SPLITS])
    for rows, counts in _tiles(tiles, num_tiles, group):
        first = 0
        for number, rank in enumerate(counts):
            part = _part(rank, group, ranks)
            h = bridge[:splits, rows, first : first + part].sum(dim=0)
            message[number, rows, :part] = h.to(message.dtype)
            first += part
    return message


def lora_collect(received, tiles, num_tiles, headers, out, *, group, ranks, tile_tokens, num_programs):
    """Compute what `lora_collect` computes: out[0, t, first of m + g · part + i] = received[m, g, t, i]."""
    for rows, counts in _tiles(tiles, num_tiles, group):
        first = 0
        for number, rank in enumerate(counts):
            part = _part(rank, group, ranks)
            for column in range(0, rank, max(part, 1)):
                width = min(part, rank - column)
                shard = received[number, column // part, rows, :width]
                out[0, rows, first + column : first + column + width] = shard.float()
            first += rank
    return out


def _tiles(tiles, num_tiles, group):
    first, last = GROUPS[group]
    for record in tiles[: int(num_tiles)].tolist():
        rows = slice(record[ROW_START], record[ROW_START] + record[ROW_COUNT])
        yield rows, record[RANKS + first : RANKS + last]


def _part(rank, group, ranks):
    return -(-rank // ranks) if COLUMN_PARALLEL[GROUPS[group][0]] else rank
