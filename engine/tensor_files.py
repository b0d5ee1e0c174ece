"""Safetensors files, opened so that every fault is one clear line."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load

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
            raise UserError(f"tensor {name} is missing.", path=self.path)
        return tuple(self._handle.get_slice(name).get_shape())

    def read(self, name: str, rows: slice = slice(None), columns: slice | None = None) -> torch.Tensor:
        """Read a tensor, or the part of a matrix that one GPU holds: on the CPU, in the file's own dtype."""
        self.shape(name)
        try:
            part = self._handle.get_slice(name)
            tensor: torch.Tensor = part[rows] if columns is None else part[rows, columns]
        except (SafetensorError, OSError) as error:
            raise UserError(f"tensor {name} cannot be read: {error}", path=self.path) from None
        _check_dtype(self.path, name, tensor)
        return tensor


class LoadedTensors:
    """The tensors of a safetensors file that was read whole, by name.

    For files that somebody may write to meanwhile: reading a mapped file that has become shorter kills the process.
    """

    def __init__(self, path: Path, tensors: dict[str, torch.Tensor]) -> None:
        self.path = path
        self._tensors = tensors
        self.keys = frozenset(tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape."""
        return tuple(self._tensors[name].shape)

    def read(self, name: str) -> torch.Tensor:
        """Return a tensor in the file's own dtype."""
        _check_dtype(self.path, name, self._tensors[name])
        return self._tensors[name]


def load_tensors(path: Path, most_bytes: int) -> LoadedTensors:
    """Read a safetensors file of at most so many bytes. Raises UserError where it is missing, larger, truncated or no such file."""
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size > most_bytes:
                raise UserError(f"has {size} bytes, at most {most_bytes} can be of use.", path=path)
            data = file.read(most_bytes + 1)
    except OSError as error:
        raise UserError(f"cannot be read: {error.strerror}.", path=path) from None
    if len(data) != size:
        raise UserError("was written to while it was read.", path=path)
    try:
        return LoadedTensors(path, load(data))
    except (SafetensorError, KeyError, ValueError, AssertionError) as error:
        raise UserError(f"not a whole safetensors file (truncated or corrupt): {error}", path=path) from None


def _check_dtype(path: Path, name: str, tensor: torch.Tensor) -> None:
    if not tensor.dtype.is_floating_point or tensor.itemsize < 2:
        raise UserError(
            f"tensor {name} is {tensor.dtype}; only 16-bit and wider floats are supported.", path=path
        )


@contextmanager
def open_tensors(path: Path) -> Iterator[TensorFile]:
    """Open a safetensors file. Raises UserError where it is missing, truncated or no such file."""
    if not path.is_file():
        raise UserError("no such file.", path=path)
    try:
        handle = safe_open(path, framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        raise UserError(f"not a whole safetensors file (truncated or corrupt): {error}", path=path) from None
    with handle:
        yield TensorFile(path, handle)
