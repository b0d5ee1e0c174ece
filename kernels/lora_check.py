"""Argument checks shared by the LoRA kernels: every failure is a ValueError that names the argument."""

from __future__ import annotations

import torch

from kernels.lora_plan import HEADER_COLUMNS, ITEM_COLUMNS, NUM_GROUPS, ROW_ALIGN_BYTES, TILE_COLUMNS

FLOATS = (torch.bfloat16, torch.float16, torch.float32)


def check(ok: bool, message: str) -> None:
    """Raise ValueError(message) unless ok."""
    if not ok:
        raise ValueError(message)


def check_matrix(
    name: str, tensor: torch.Tensor, dtype: torch.dtype, device: torch.device, columns: int | None = None
) -> None:
    """Check a 2-D tensor with contiguous rows."""
    check(
        tensor.ndim == 2 and tensor.stride(1) == 1,
        f"{name} must be 2-D with contiguous rows, got strides {tuple(tensor.stride())}",
    )
    check(
        columns is None or tensor.shape[1] == columns,
        f"{name} must have {columns} columns, got {tensor.shape[1]}",
    )
    check(tensor.dtype == dtype, f"{name} must be {dtype}, got {tensor.dtype}")
    check(tensor.device == device, f"{name} must be on {device}, got {tensor.device}")


def check_pool(pool: torch.Tensor, device: torch.device) -> None:
    """Check the pool: 2-D, contiguous, pages a whole number of 128-byte units."""
    check(pool.dtype in FLOATS, f"pool must be bf16, fp16 or fp32, got {pool.dtype}")
    check(
        pool.ndim == 2 and pool.is_contiguous(),
        f"pool must be 2-D and contiguous, got shape {tuple(pool.shape)}",
    )
    check(
        pool.shape[1] * pool.element_size() % ROW_ALIGN_BYTES == 0,
        f"pool pages must be a multiple of {ROW_ALIGN_BYTES} bytes",
    )
    check(pool.device == device, f"pool must be on {device}, got {pool.device}")


def check_bridge(bridge: torch.Tensor, tokens: int, device: torch.device) -> None:
    """Check the bridge: fp32 [planes, at least tokens, width], rows contiguous."""
    check(bridge.dtype == torch.float32, f"bridge must be float32, got {bridge.dtype}")
    check(bridge.ndim == 3 and bridge.stride(2) == 1, "bridge must be 3-D with contiguous rows")
    check(bridge.shape[1] >= tokens, f"bridge must have at least {tokens} rows, got {bridge.shape[1]}")
    check(bridge.device == device, f"bridge must be on {device}, got {bridge.device}")


def check_tiles(tiles: torch.Tensor, num_tiles: torch.Tensor, device: torch.device) -> None:
    """Check the tile list and its length."""
    _check_list("tiles", tiles, device)
    _check_columns("tiles", tiles, TILE_COLUMNS)
    _check_list("num_tiles", num_tiles, device)
    check(num_tiles.numel() == 1, f"num_tiles must have one element, got {num_tiles.numel()}")


def check_headers(headers: torch.Tensor, device: torch.device) -> None:
    """Check the groups' headers."""
    _check_list("headers", headers, device)
    _check_columns("headers", headers, HEADER_COLUMNS)
    check(headers.shape[0] == NUM_GROUPS, f"headers must have {NUM_GROUPS} rows, got {headers.shape[0]}")


def check_items(items: torch.Tensor, device: torch.device) -> None:
    """Check the shrink items."""
    _check_list("items", items, device)
    _check_columns("items", items, ITEM_COLUMNS)


def check_launch(group: int, layer: int, tile_tokens: int, num_programs: int) -> None:
    """Check the launch scalars."""
    check(0 <= group < NUM_GROUPS, f"group(={group}) must be 0 to {NUM_GROUPS - 1}")
    check(layer >= 0, f"layer(={layer}) must be >= 0")
    check(tile_tokens in (16, 32), f"tile_tokens(={tile_tokens}) must be 16 or 32")
    check(num_programs >= 1, f"num_programs(={num_programs}) must be >= 1")


def _check_list(name: str, tensor: torch.Tensor, device: torch.device) -> None:
    check(tensor.dtype == torch.int32, f"{name} must be int32, got {tensor.dtype}")
    check(tensor.is_contiguous(), f"{name} must be contiguous")
    check(tensor.device == device, f"{name} must be on {device}, got {tensor.device}")


def _check_columns(name: str, tensor: torch.Tensor, columns: int) -> None:
    check(
        tensor.ndim == 2 and tensor.shape[1] == columns,
        f"{name} must be [capacity, {columns}], got {tuple(tensor.shape)}",
    )
