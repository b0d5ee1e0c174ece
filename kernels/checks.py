"""Argument checks of the kernels' public functions: each raises ValueError naming the argument."""

from collections.abc import Sequence

import torch

FLOAT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def check_tensor(
    name: str,
    tensor: torch.Tensor,
    *,
    shape: Sequence[int | None],
    dtypes: Sequence[torch.dtype],
    device: torch.device,
    strided_rows: bool = False,
) -> None:
    """Raise ValueError unless `tensor` has this shape (None: any size), one of these dtypes and this device.

    It must be contiguous; with `strided_rows` its first stride is free and each row must be contiguous.
    """
    if tensor.dim() != len(shape) or any(
        want not in (None, have) for want, have in zip(shape, tensor.shape, strict=True)
    ):
        wanted = ", ".join("any" if size is None else str(size) for size in shape)
        raise ValueError(f"{name} must have shape [{wanted}], not {list(tensor.shape)}")
    if tensor.dtype not in dtypes:
        wanted = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise ValueError(f"{name} must be {wanted}, not {str(tensor.dtype).removeprefix('torch.')}")
    if tensor.device != device:
        raise ValueError(f"{name} must be on {device}, not {tensor.device}")
    if strided_rows:
        if not _rows_contiguous(tensor):
            raise ValueError(f"{name} must have contiguous rows, not strides {tensor.stride()}")
    elif not tensor.is_contiguous():
        raise ValueError(f"{name} must be contiguous, not strides {tensor.stride()}")


def check_work_list(
    name: str, items: torch.Tensor, count_name: str, count: torch.Tensor, device: torch.device
) -> None:
    """Check a work list `[cap, 4] int32` and its length `[1] int32`."""
    check_tensor(name, items, shape=(None, 4), dtypes=(torch.int32,), device=device)
    check_tensor(count_name, count, shape=(1,), dtypes=(torch.int32,), device=device)


def check_pool(
    pool: torch.Tensor,
    *,
    layer: int,
    num_layers: int,
    num_kv_heads: int,
    head_dim: int,
    page_tokens: int,
    like: torch.Tensor,
) -> None:
    """Check that `pool [num_pages, page_elems]` holds KV pages of this geometry in the dtype and on the
    device of `like`."""
    if not 0 <= layer < num_layers:
        raise ValueError(f"layer(={layer}) must be in [0, num_layers={num_layers})")
    for name, value, least in (("head_dim", head_dim, 16), ("page_tokens", page_tokens, 1)):
        if value < least or value & (value - 1):
            raise ValueError(f"{name}(={value}) must be a power of two, at least {least}")
    page_elems = num_layers * 2 * num_kv_heads * page_tokens * head_dim
    check_tensor("pool", pool, shape=(None, page_elems), dtypes=(like.dtype,), device=like.device)


def check_heads(num_heads: int, num_kv_heads: int) -> None:
    """Check that the query heads split evenly into groups, one a KV head."""
    if num_kv_heads < 1 or num_heads < 1 or num_heads % num_kv_heads:
        raise ValueError(
            f"num_heads(={num_heads}) must be a positive multiple of num_kv_heads(={num_kv_heads})"
        )


def check_positive(**values: int) -> None:
    """Raise ValueError for the first value below one."""
    for name, value in values.items():
        if value < 1:
            raise ValueError(f"{name}(={value}) must be > 0")


def _rows_contiguous(tensor: torch.Tensor) -> bool:
    expected = 1
    for size, stride in zip(reversed(tensor.shape[1:]), reversed(tensor.stride()[1:]), strict=True):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return tensor.shape[0] <= 1 or tensor.stride(0) >= expected
