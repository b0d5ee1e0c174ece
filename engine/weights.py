"""The weights of a base model on one GPU, read from safetensors or drawn at random.

Linears that share an input are one matrix (q,k,v and gate,up), so that each group is one product. Under
tensor parallelism every rank reads only its own part of each file.
"""

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch

from engine.errors import UserError
from engine.json_files import read_json
from engine.model_shape import GROUPS, ROW_PARALLEL, ModelShape
from engine.peft_config import module_path
from engine.tensor_files import TensorFile, open_tensors

INIT_STD = 0.02
"""Standard deviation of random weights: transformers' ``initializer_range``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerWeights:
    """One layer on one GPU. D: head_dim; Hq, Hkv, I: this GPU's query heads, KV heads and width.

    qkv [(Hq + 2·Hkv)·D, H]; qkv_bias [(Hq + 2·Hkv)·D] or None; o [H, Hq·D]; gate_up [2·I, H], gate first;
    down [H, I]; input_norm [H]; post_norm [H].
    """

    qkv: torch.Tensor
    qkv_bias: torch.Tensor | None
    o: torch.Tensor
    gate_up: torch.Tensor
    down: torch.Tensor
    input_norm: torch.Tensor
    post_norm: torch.Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelWeights:
    """A base model on one GPU: embed and lm_head [rows of ``shape.vocab_range``, H], norm [H].

    ``lm_head`` is the very tensor ``embed`` where the model ties them.
    """

    embed: torch.Tensor
    layers: list[LayerWeights]
    norm: torch.Tensor
    lm_head: torch.Tensor


def load_weights(
    model_dir: str | Path,
    shape: ModelShape,
    dtype: torch.dtype,
    device: torch.device | str,
    tp: int = 1,
    rank: int = 0,
) -> ModelWeights:
    """Read rank ``rank`` of ``tp``'s part of a Hugging Face folder: model.safetensors, or shards and their
    index.

    Raises UserError naming the file and the tensor that is missing, misshapen or cannot be read.
    """
    shape.validate_tp(tp)
    device = torch.device(device)
    with ExitStack() as stack:
        reader = _ShardReader(_open_checkpoint(Path(model_dir), stack), shape, dtype, device, tp, rank)
        layers = [reader.layer(index) for index in range(shape.num_layers)]
        embed = reader.vocabulary("model.embed_tokens.weight")
        lm_head = embed if shape.tie_word_embeddings else reader.vocabulary("lm_head.weight")
        return ModelWeights(
            embed=embed, layers=layers, norm=reader.vector("model.norm.weight"), lm_head=lm_head
        )


def random_weights(
    shape: ModelShape,
    dtype: torch.dtype,
    device: torch.device | str,
    seed: int,
    tp: int = 1,
    rank: int = 0,
) -> ModelWeights:
    """Draw weights of the right shapes on the device itself; equal arguments give equal weights on the same
    device.

    All are N(0, 0.02²), the two that add to the residual stream (o, down) divided by √(2·layers) as in GPT-2,
    so that activations stay of order one through any depth. Ranks draw each their own: they are no slices of
    one model.
    """
    shape.validate_tp(tp)
    generator = torch.Generator(device).manual_seed(seed * tp + rank)
    residual_std = INIT_STD / (2 * shape.num_layers) ** 0.5

    def draw(*size: int, std: float = INIT_STD) -> torch.Tensor:
        return torch.empty(size, dtype=dtype, device=device).normal_(0.0, std, generator=generator)

    def ones() -> torch.Tensor:
        return torch.ones(shape.hidden_size, dtype=dtype, device=device)

    first, last = shape.vocab_range(tp, rank)
    linears = shape.linear_shapes(tp)
    qkv_out = sum(linears[module][0] for module in GROUPS[0])
    layers = [
        LayerWeights(
            qkv=draw(qkv_out, shape.hidden_size),
            qkv_bias=draw(qkv_out) if shape.qkv_bias else None,
            o=draw(*linears["o_proj"], std=residual_std),
            gate_up=draw(2 * linears["up_proj"][0], shape.hidden_size),
            down=draw(*linears["down_proj"], std=residual_std),
            input_norm=ones(),
            post_norm=ones(),
        )
        for _ in range(shape.num_layers)
    ]
    embed = draw(last - first, shape.hidden_size)
    lm_head = embed if shape.tie_word_embeddings else draw(last - first, shape.hidden_size)
    return ModelWeights(embed=embed, layers=layers, norm=ones(), lm_head=lm_head)


def shard_slices(shape: ModelShape, module: str, tp: int, rank: int) -> tuple[slice, slice]:
    """Return the (out, in) part of one linear's full matrix that GPU ``rank`` of ``tp`` holds."""
    if module in ("k_proj", "v_proj"):
        first, last = shape.kv_head_range(tp, rank)
        return slice(first * shape.head_dim, last * shape.head_dim), slice(None)
    out, inp = shape.linear_shapes(tp)[module]
    if module in ROW_PARALLEL:
        return slice(None), slice(rank * inp, (rank + 1) * inp)
    return slice(rank * out, (rank + 1) * out), slice(None)


class _ShardReader:
    """Reads one rank's tensors, each checked against the shape and moved to the device."""

    def __init__(
        self,
        file_of: Callable[[str], TensorFile],
        shape: ModelShape,
        dtype: torch.dtype,
        device: torch.device,
        tp: int,
        rank: int,
    ) -> None:
        self._file_of = file_of
        self._shape = shape
        self._dtype, self._device = dtype, device
        self._tp, self._rank = tp, rank

    def layer(self, index: int) -> LayerWeights:
        prefix = f"model.layers.{index}"
        return LayerWeights(
            qkv=self._stack(index, GROUPS[0]),
            qkv_bias=self._bias(index) if self._shape.qkv_bias else None,
            o=self._stack(index, GROUPS[1]),
            gate_up=self._stack(index, GROUPS[2]),
            down=self._stack(index, GROUPS[3]),
            input_norm=self.vector(f"{prefix}.input_layernorm.weight"),
            post_norm=self.vector(f"{prefix}.post_attention_layernorm.weight"),
        )

    def vector(self, name: str) -> torch.Tensor:
        return self._place(self._read(name, (self._shape.hidden_size,)))

    def vocabulary(self, name: str) -> torch.Tensor:
        first, last = self._shape.vocab_range(self._tp, self._rank)
        full = (self._shape.vocab_size, self._shape.hidden_size)
        return self._place(self._read(name, full, slice(first, last), slice(None)))

    def _stack(self, index: int, modules: tuple[str, ...]) -> torch.Tensor:
        full = self._shape.linear_shapes()
        parts = []
        for module in modules:
            rows, columns = shard_slices(self._shape, module, self._tp, self._rank)
            parts.append(self._read(f"{module_path(index, module)}.weight", full[module], rows, columns))
        return self._place(torch.cat(parts))

    def _bias(self, index: int) -> torch.Tensor:
        full = self._shape.linear_shapes()
        parts = []
        for module in GROUPS[0]:
            rows, _ = shard_slices(self._shape, module, self._tp, self._rank)
            parts.append(self._read(f"{module_path(index, module)}.bias", full[module][:1], rows))
        return self._place(torch.cat(parts))

    def _place(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(device=self._device, dtype=self._dtype).contiguous()

    def _read(
        self, name: str, full: tuple[int, ...], rows: slice = slice(None), columns: slice | None = None
    ) -> torch.Tensor:
        file = self._file_of(name)
        found = file.shape(name)
        if found != full:
            raise UserError(f"{file.path}: tensor {name} has shape {list(found)}, {list(full)} is needed.")
        return file.read(name, rows, columns)


def _open_checkpoint(folder: Path, stack: ExitStack) -> Callable[[str], TensorFile]:
    """Return what finds the file of a tensor; files stay open until ``stack`` closes."""
    index_path = folder / "model.safetensors.index.json"
    single_path = folder / "model.safetensors"
    if single_path.is_file():
        single = stack.enter_context(open_tensors(single_path))
        return lambda name: single
    if not index_path.is_file():
        raise UserError(
            f"{folder}: holds neither model.safetensors nor its index; pickled weights are not read."
        )
    weight_map = _read_index(index_path)
    files: dict[str, TensorFile] = {}

    def file_of(name: str) -> TensorFile:
        file_name = weight_map.get(name)
        if file_name is None:
            raise UserError(f"{index_path}: tensor {name} is missing.")
        if file_name not in files:
            files[file_name] = stack.enter_context(open_tensors(folder / file_name))
        return files[file_name]

    return file_of


def _read_index(path: Path) -> Mapping[str, str]:
    index = read_json(path)
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict):
        raise UserError(f"{path}: weight_map is missing.")
    for name, file_name in weight_map.items():
        if not isinstance(file_name, str) or Path(file_name).name != file_name:
            raise UserError(f"{path}: weight_map[{name!r}] (={file_name!r}) must be a file name.")
    return weight_map
