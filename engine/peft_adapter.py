"""An adapter's weights: read from a PEFT folder or drawn at random, and packed into the pages that the pool
copies.

``alpha / r`` is folded into B when an adapter is packed, so that nothing on the GPU knows of scales.
"""

import re
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from engine.adapter import AdapterSpec, spec_of_peft
from engine.errors import UserError
from engine.layout import AdapterLayout, Sharding, Side
from engine.model_shape import MODULES, ROW_PARALLEL, ModelShape
from engine.peft_config import module_path, read_peft_config
from engine.tensor_files import LoadedTensors, load_tensors
from engine.weights import shard_slices

RANDOM_STD = 0.02
"""Spread of random factors: at r = 16 and 4,096 inputs of order one, B·A adds ~0.1 to outputs of ~1.3."""

Factors = tuple[torch.Tensor, torch.Tensor]

_TENSOR_NAME = re.compile(
    r"base_model\.model\.(?:model\.)?layers\.(\d{1,6})\.(?:self_attn|mlp)\.(\w+)\.lora_([AB])\.weight"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterWeights:
    """One adapter's factors on the CPU.

    scales: what B·A is multiplied by, for each of MODULES. tensors: (layer, module) to A [r, in] and B [out,
    r], whole or, after ``shard_adapter``, one GPU's part.
    """

    spec: AdapterSpec
    scales: tuple[float, ...]
    tensors: dict[tuple[int, str], Factors]


def load_peft_adapter(folder: str | Path, shape: ModelShape, name: str | None = None) -> AdapterWeights:
    """Read adapter_config.json and adapter_model.safetensors; ``name`` defaults to the folder's.

    Raises UserError for unsupported methods, and for tensors that are missing, unexpected, misshapen or not
    finite.
    """
    folder = Path(folder)
    config = read_peft_config(folder)
    spec = spec_of_peft(name or folder.name, folder, shape.num_layers)
    scales = config.module_scales(shape.num_layers)
    file = load_tensors(_weights_file(folder), _most_file_bytes(spec, shape))
    names = _tensor_names(file)
    tensors = {
        (layer, module): _factors(file, names, layer, module, rank, shape, config.nblocks)
        for layer in range(shape.num_layers)
        for module, rank in zip(MODULES, spec.module_ranks, strict=True)
        if rank
    }
    _refuse_unexpected(file, names, tensors)
    return AdapterWeights(
        spec=spec, scales=tuple(scales.get(module, 0.0) for module in MODULES), tensors=tensors
    )


def fingerprint(folder: str | Path) -> tuple[int, ...]:
    """Return sizes and times of change of an adapter's files. Raises UserError where one is missing."""
    files = (Path(folder) / "adapter_config.json", _weights_file(Path(folder)))
    try:
        found = [file.stat() for file in files]
    except OSError as error:
        raise UserError(f"cannot be read: {error.strerror}.", path=folder) from None
    return tuple(number for stat in found for number in (stat.st_size, stat.st_mtime_ns))


def random_adapter(spec: AdapterSpec, shape: ModelShape, seed: int, dtype: torch.dtype) -> AdapterWeights:
    """Draw the factors of a dense LoRA: N(0, 0.02²) both, scale 1."""
    if spec.kind != "lora":
        raise UserError(f"adapter {spec.name}: kind {spec.kind!r} is not supported yet.")
    generator = torch.Generator().manual_seed(seed)

    def draw(rows: int, columns: int) -> torch.Tensor:
        return torch.empty(rows, columns, dtype=dtype).normal_(0.0, RANDOM_STD, generator=generator)

    linears = shape.linear_shapes()
    tensors = {
        (layer, module): (draw(rank, linears[module][1]), draw(linears[module][0], rank))
        for layer in range(shape.num_layers)
        for module, rank in zip(MODULES, spec.module_ranks, strict=True)
        if rank
    }
    scales = tuple(1.0 if rank else 0.0 for rank in spec.module_ranks)
    return AdapterWeights(spec=spec, scales=scales, tensors=tensors)


def shard_adapter(
    adapter: AdapterWeights, shape: ModelShape, tp: int, rank: int, sharding: Sharding = "replicated"
) -> AdapterWeights:
    """Return GPU ``rank``'s part of an adapter with dense factors, as ``engine.layout`` describes the shardings.

    block_diagonal keeps what lies in the GPU's blocks: exact only where the factors are zero elsewhere.
    """
    if tp == 1:
        return adapter
    tensors = {
        (layer, module): _shard(a, b, shape, module, tp, rank, sharding)
        for (layer, module), (a, b) in adapter.tensors.items()
    }
    return replace(adapter, tensors=tensors)


def _shard(
    a: torch.Tensor, b: torch.Tensor, shape: ModelShape, module: str, tp: int, rank: int, sharding: Sharding
) -> Factors:
    outputs, inputs = shard_slices(shape, module, tp, rank)
    if sharding == "replicated":
        return a[:, inputs], b[outputs]
    part = -(-len(a) // tp)
    if sharding == "block_diagonal":
        return _rows(a, rank * part, part)[:, inputs], _rows(b.T, rank * part, part).T[outputs]
    if module in ROW_PARALLEL:
        width = len(b) // tp
        return a[:, inputs], b[rank * width : (rank + 1) * width]
    return _rows(a, rank * part, part)[:, inputs], b[outputs]


def _rows(matrix: torch.Tensor, first: int, count: int) -> torch.Tensor:
    """Return `count` rows from `first` on, zeros past the end."""
    rows = matrix[first : first + count]
    if len(rows) == count:
        return rows
    return torch.cat([rows, matrix.new_zeros(count - len(rows), matrix.shape[1])])


def pack(adapter: AdapterWeights, layout: AdapterLayout, dtype: torch.dtype) -> torch.Tensor:
    """Return the pages of one GPU's part of an adapter: ``[num_pages, page_elems]`` on the CPU, in the pool's
    dtype.

    A's rows as they are, B transposed and multiplied by the scale in fp32. The row table's place is zero: the
    loader writes it when the pages are known (``layout.table``). Raises ValueError where the factors do not
    have the layout's shapes.
    """
    _check_itemsize(layout, dtype)
    image = torch.zeros(layout.num_pages * layout.geometry.page_elems, dtype=dtype)
    for (layer, module), (a, b) in adapter.tensors.items():
        index = MODULES.index(module)
        _write_rows(image, layout, layer, index, "a", a)
        _write_rows(
            image, layout, layer, index, "b", _transposed(b).to(torch.float32) * adapter.scales[index]
        )
    if not _all_finite(image):
        raise UserError(f"adapter {adapter.spec.name}: weights times alpha / r overflow {dtype}.")
    return image.view(layout.num_pages, layout.geometry.page_elems)


def pack_random(
    layout: AdapterLayout,
    generator: torch.Generator,
    dtype: torch.dtype,
    std: float = RANDOM_STD,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return pages filled with N(0, std²): a random adapter of this layout, as every row is then random too.

    One draw on the generator's device, for benchmarks with hundreds of large adapters (84 MB each at 8B, r =
    16, all linears); gaps between rows are random as well, nothing reads them. The loader overwrites the row
    table's place. out: filled and returned instead of new memory; same device, shape and dtype.
    """
    _check_itemsize(layout, dtype)
    size = (layout.num_pages, layout.geometry.page_elems)
    if out is None:
        out = torch.empty(size, dtype=dtype, device=generator.device)
    elif out.shape != size or out.dtype != dtype:
        raise ValueError(f"out is {list(out.shape)} of {out.dtype}, {list(size)} of {dtype} is needed.")
    return out.normal_(0.0, std, generator=generator)


def _all_finite(tensor: torch.Tensor) -> bool:
    """Say whether no number is NaN or infinite: by the extremes, which NaN is one of, 30 times as fast as number by number."""
    low, high = torch.aminmax(tensor)
    return bool(torch.isfinite(low) & torch.isfinite(high))


def _transposed(matrix: torch.Tensor) -> torch.Tensor:
    """Return a transposed copy of a matrix: by numpy, which does it three times as fast as torch does."""
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[matrix.itemsize]
    swapped = np.ascontiguousarray(matrix.contiguous().view(integer).numpy().T)
    return torch.from_numpy(swapped).view(matrix.dtype)


def _check_itemsize(layout: AdapterLayout, dtype: torch.dtype) -> None:
    if dtype.itemsize != layout.geometry.itemsize:
        raise ValueError(f"dtype is {dtype}, the layout's elements have {layout.geometry.itemsize} bytes.")


def _write_rows(
    image: torch.Tensor, layout: AdapterLayout, layer: int, index: int, side: Side, rows: torch.Tensor
) -> None:
    """Copy a matrix's rows to their places; rows that follow each other in one page go in one copy."""
    count, length = layout.counts[index][side == "b"], layout.lengths[index][side == "b"]
    if rows.shape != (count, length):
        raise ValueError(
            f"layer {layer} {MODULES[index]} {side}: [rows, elements] is {list(rows.shape)}, "
            f"{[count, length]} is needed."
        )
    units = layout.row_units[layout.rows(layer, index, side)]
    starts = [int(unit) * 128 // layout.geometry.itemsize for unit in units]
    stride = -(-length * layout.geometry.itemsize // 128) * 128 // layout.geometry.itemsize
    first = 0
    for row in range(1, count + 1):
        if row == count or starts[row] != starts[row - 1] + stride:
            image.as_strided((row - first, length), (stride, 1), starts[first]).copy_(rows[first:row])
            first = row


def _weights_file(folder: Path) -> Path:
    path = folder / "adapter_model.safetensors"
    if not path.is_file():
        pickled = folder / "adapter_model.bin"
        hint = f"{pickled.name} is a pickle, which is not read" if pickled.is_file() else "no weights"
        raise UserError(f"no such file ({hint}).", path=path)
    return path


def _most_file_bytes(spec: AdapterSpec, shape: ModelShape) -> int:
    """Return the size beyond which a file holds other things than this adapter: 64-bit factors, and a long header."""
    linears = shape.linear_shapes()
    ranks = zip(MODULES, spec.module_ranks, strict=True)
    elems = shape.num_layers * sum(rank * sum(linears[module]) for module, rank in ranks)
    return elems * 8 + shape.num_layers * len(MODULES) * 2 * 1024 + 2**16


def _tensor_names(file: LoadedTensors) -> dict[tuple[int, str, str], str]:
    names: dict[tuple[int, str, str], str] = {}
    for name in sorted(file.keys):
        match = _TENSOR_NAME.fullmatch(name)
        if match is None or match[2] not in MODULES:
            raise UserError(
                f"tensor {_shown(name)} is unexpected: not a LoRA factor of one of {', '.join(MODULES)}.",
                path=file.path,
            )
        key = (int(match[1]), match[2], match[3])
        if key in names:
            raise UserError(f"tensors {names[key]} and {name} are of the same factor.", path=file.path)
        names[key] = name
    return names


def _shown(name: str) -> str:
    """Return a name that anybody may have written as part of one line."""
    return "".join(letter if letter.isprintable() else "?" for letter in name[:200])


def _factors(
    file: LoadedTensors,
    names: dict[tuple[int, str, str], str],
    layer: int,
    module: str,
    rank: int,
    shape: ModelShape,
    nblocks: int,
) -> Factors:
    """Read A [rank, in] and B [out, rank]; blocks, which PEFT stacks on the first dimension, become whole matrices with zeros between."""
    out, inp = shape.linear_shapes()[module]
    blocks_of_a = nblocks if module in ROW_PARALLEL else 1
    blocks_of_b = nblocks // blocks_of_a
    if inp % blocks_of_a or out % blocks_of_b:
        raise UserError(f"nblocks (={nblocks}) must divide {module}'s {(out, inp)}.", path=file.path)
    factors = []
    for side, blocks, wanted in (
        ("A", blocks_of_a, (rank, inp // blocks_of_a)),
        ("B", blocks_of_b, (out, rank // blocks_of_b)),
    ):
        name = names.get((layer, module, side))
        if name is None:
            raise UserError(
                f"tensor {module_path(layer, module)}.lora_{side}.weight is missing.", path=file.path
            )
        found = file.shape(name)
        if found != wanted:
            raise UserError(
                f"tensor {name} has shape {list(found)}, {list(wanted)} is needed.", path=file.path
            )
        tensor = file.read(name)
        if not _all_finite(tensor):
            raise UserError(f"tensor {name} holds values that are not finite.", path=file.path)
        factors.append(tensor if blocks == 1 else torch.block_diag(*tensor.chunk(blocks)))
    return factors[0], factors[1]


def _refuse_unexpected(
    file: LoadedTensors, names: dict[tuple[int, str, str], str], tensors: dict[tuple[int, str], Factors]
) -> None:
    for (layer, module, _), name in names.items():
        if (layer, module) not in tensors:
            raise UserError(
                f"tensor {name} is unexpected: config or model has no such target.", path=file.path
            )
