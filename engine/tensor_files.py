"""Safetensors files, opened so that every fault is one clear line."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from engine.errors import UserError


class TensorFile:
    """One open safetensors file. ``keys`` are the names of its tensors."""

    def __init__(self, path: Path, handle: Any) -> None:
        self.path = path
        self._handle = handle
        self.keys = frozenset(handle.keys())

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape without reading it. Raises UserError where there is no such tensor."""
        if name not in self.keys:
            raise UserError(f"{self.path}: tensor {name} is missing.")
        return tuple(self._handle.get_slice(name).get_shape())

    def read(self, name: str, rows: slice = slice(None), columns: slice | None = None) -> torch.Tensor:
        """Read a tensor, or the part of a matrix that one GPU holds: on the CPU, in the file's own dtype."""
        self.shape(name)
        try:
            part = self._handle.get_slice(name)
            tensor: torch.Tensor = part[rows] if columns is None else part[rows, columns]
        except (SafetensorError, OSError) as error:
            raise UserError(f"{self.path}: tensor {name} cannot be read: {error}") from None
        if not tensor.dtype.is_floating_point or tensor.itemsize < 2:
            raise UserError(
                f"{self.path}: tensor {name} is {tensor.dtype}; only 16-bit and wider floats are supported."
            )
        return tensor


@contextmanager
def open_tensors(path: Path) -> Iterator[TensorFile]:
    """Open a safetensors file. Raises UserError where it is missing, truncated or no such file."""
    if not path.is_file():
        raise UserError(f"{path}: no such file.")
    try:
        handle = safe_open(path, framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: not a whole safetensors file (truncated or corrupt): {error}") from None
    with handle:
        yield TensorFile(path, handle)
