"""The shape of a base model: every number that memory, cost and the forward pass need, and no weights.

A shape comes from the catalogue of known models, or from a Hugging Face ``config.json`` (Llama 2 and 3.x,
Mistral, Qwen2). What the engine cannot run exactly is refused here, before anything is loaded.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from engine.errors import UserError
from engine.json_files import read_json

MAX_RANK = 256
"""Largest rank of an adapter that is served."""

MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""The seven linears of a layer, in the order that every rank tuple and row table uses."""

GROUPS = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))
"""Linears that share an input, and so run as one product."""

ROW_PARALLEL = frozenset({"o_proj", "down_proj"})
"""Linears whose input is sharded under tensor parallelism; the other five have their output sharded."""

DTYPES = {"float32": 4, "bfloat16": 2, "float16": 2}
"""Element types a base may have, and their bytes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeScaling:
    """How rotary frequencies are stretched beyond the length the model was first trained for.

    ``linear`` divides every frequency by ``factor`` and uses none of the other fields. ``llama3`` divides low
    frequencies by ``factor``, keeps high ones, and blends between, by wavelength relative to
    ``original_max_position_embeddings`` (transformers, ``modeling_rope_utils._compute_llama3_parameters``).
    """

    kind: Literal["llama3", "linear"]
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """Dimensions of a Llama-like decoder. Methods with ``tp`` tell what one of ``tp`` GPUs holds.

    ``max_position_embeddings`` is the longest context that full attention computes exactly: a sliding window
    clamps it. ``dtype`` is the checkpoint's own element type.
    """

    name: str
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_position_embeddings: int
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    tie_word_embeddings: bool = False
    qkv_bias: bool = False
    dtype: str = "bfloat16"

    def __post_init__(self) -> None:
        for field in _SIZES:
            value = getattr(self, field)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise UserError(f"{self.name}: {field} (={value!r}) must be an integer >= 1.")
        if self.num_heads % self.num_kv_heads:
            raise UserError(
                f"{self.name}: num_kv_heads (={self.num_kv_heads}) must divide num_heads (={self.num_heads})."
            )
        if self.head_dim % 2:
            raise UserError(f"{self.name}: head_dim (={self.head_dim}) must be even, rotary pairs need it.")
        for field in ("rms_norm_eps", "rope_theta"):
            value = getattr(self, field)
            if not (math.isfinite(value) and value > 0):
                raise UserError(f"{self.name}: {field} (={value!r}) must be > 0.")
        if self.dtype not in DTYPES:
            raise UserError(f"{self.name}: dtype (={self.dtype!r}) must be one of {', '.join(DTYPES)}.")

    def validate_tp(self, tp: int) -> None:
        """Raise UserError unless the model can be cut over ``tp`` GPUs.

        KV heads are split, or, where there are more GPUs than KV heads, each is held by ``tp / num_kv_heads``
        GPUs.
        """
        if tp < 1:
            raise UserError(f"tp (={tp}) must be >= 1.")
        for field in ("num_heads", "intermediate_size"):
            value = getattr(self, field)
            if value % tp:
                raise UserError(f"tp (={tp}) must divide {field} (={value}) of {self.name}.")
        if self.num_kv_heads % tp and tp % self.num_kv_heads:
            raise UserError(f"tp (={tp}) must divide num_kv_heads (={self.num_kv_heads}) or be its multiple.")
        if self.vocab_size < tp:
            raise UserError(f"tp (={tp}) must be <= vocab_size (={self.vocab_size}) of {self.name}.")

    def heads_per_rank(self, tp: int = 1) -> int:
        """Return the query heads on one GPU."""
        self.validate_tp(tp)
        return self.num_heads // tp

    def kv_heads_per_rank(self, tp: int = 1) -> int:
        """Return the KV heads on one GPU, at least one."""
        self.validate_tp(tp)
        return max(1, self.num_kv_heads // tp)

    def kv_head_range(self, tp: int, rank: int) -> tuple[int, int]:
        """Return the first KV head of GPU ``rank`` and the one past its last."""
        count = self.kv_heads_per_rank(tp)
        first = rank * self.num_kv_heads // tp
        return first, first + count

    def vocab_range(self, tp: int, rank: int) -> tuple[int, int]:
        """Return the first token of GPU ``rank``'s slice of embedding and head, and the one past its last.

        Slices differ by at most one row where ``tp`` does not divide the vocabulary: there are no padding
        rows.
        """
        self.validate_tp(tp)
        return rank * self.vocab_size // tp, (rank + 1) * self.vocab_size // tp

    def linear_shapes(self, tp: int = 1) -> dict[str, tuple[int, int]]:
        """Return (out, in) of each of the seven linears on one GPU, in elements."""
        queries = self.heads_per_rank(tp) * self.head_dim
        keys = self.kv_heads_per_rank(tp) * self.head_dim
        width = self.intermediate_size // tp
        return {
            "q_proj": (queries, self.hidden_size),
            "k_proj": (keys, self.hidden_size),
            "v_proj": (keys, self.hidden_size),
            "o_proj": (self.hidden_size, queries),
            "gate_proj": (width, self.hidden_size),
            "up_proj": (width, self.hidden_size),
            "down_proj": (self.hidden_size, width),
        }

    def layer_params(self, tp: int = 1) -> int:
        """Return the parameters of one layer on one GPU, norms and biases included."""
        shapes = self.linear_shapes(tp)
        linears = sum(out * inp for out, inp in shapes.values())
        bias = sum(shapes[module][0] for module in GROUPS[0]) if self.qkv_bias else 0
        return linears + bias + 2 * self.hidden_size

    def weight_bytes(self, tp: int = 1, itemsize: int = 2) -> int:
        """Return the bytes of the weights on the fullest GPU, embedding and head cut over the vocabulary."""
        vocab_rows = -(-self.vocab_size // tp) * (1 if self.tie_word_embeddings else 2)
        params = self.num_layers * self.layer_params(tp) + vocab_rows * self.hidden_size + self.hidden_size
        return params * itemsize

    def kv_bytes_per_token(self, tp: int = 1, itemsize: int = 2) -> int:
        """Return the bytes of one token's K and V over all layers on one GPU."""
        return self.num_layers * 2 * self.kv_heads_per_rank(tp) * self.head_dim * itemsize


_SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_layers",
    "num_heads",
    "num_kv_heads",
    "head_dim",
    "vocab_size",
    "max_position_embeddings",
)

_LLAMA_31_ROPE = RopeScaling(kind="llama3", factor=8.0)
_LLAMA_32_ROPE = RopeScaling(kind="llama3", factor=32.0)
_SHAPES = {
    # hidden, intermediate, layers, heads, kv heads, head_dim, vocabulary, positions: from config.json.
    "llama-3.1-8b": (4096, 14336, 32, 32, 8, 128, 128256, 131072),
    "llama-3.1-70b": (8192, 28672, 80, 64, 8, 128, 128256, 131072),
    "llama-3.2-1b": (2048, 8192, 16, 32, 8, 64, 128256, 131072),
    "llama-3.2-3b": (3072, 8192, 28, 24, 8, 128, 128256, 131072),
    "llama-2-7b": (4096, 11008, 32, 32, 32, 128, 32000, 4096),
    "llama-2-13b": (5120, 13824, 40, 40, 40, 128, 32000, 4096),
    "llama-2-70b": (8192, 28672, 80, 64, 8, 128, 32000, 4096),
    "mistral-7b": (4096, 14336, 32, 32, 8, 128, 32768, 32768),  # v0.3: no sliding window
    "qwen2.5-7b": (3584, 18944, 28, 28, 4, 128, 152064, 32768),
}
_EXTRAS: dict[str, dict[str, Any]] = {
    "llama-3.1-8b": {"rope_theta": 500000.0, "rope_scaling": _LLAMA_31_ROPE},
    "llama-3.1-70b": {"rope_theta": 500000.0, "rope_scaling": _LLAMA_31_ROPE},
    "llama-3.2-1b": {"rope_theta": 500000.0, "rope_scaling": _LLAMA_32_ROPE, "tie_word_embeddings": True},
    "llama-3.2-3b": {"rope_theta": 500000.0, "rope_scaling": _LLAMA_32_ROPE, "tie_word_embeddings": True},
    "llama-2-7b": {"dtype": "float16"},
    "llama-2-13b": {"dtype": "float16"},
    "llama-2-70b": {"dtype": "float16"},
    "mistral-7b": {"rope_theta": 1000000.0},
    "qwen2.5-7b": {"rope_theta": 1000000.0, "rms_norm_eps": 1e-6, "qkv_bias": True},
}


def _known_shape(name: str) -> ModelShape:
    fields: dict[str, Any] = dict(zip(_SIZES, _SHAPES[name], strict=True))
    return ModelShape(name=name, **fields, **_EXTRAS[name])


MODEL_CATALOGUE: Mapping[str, ModelShape] = {name: _known_shape(name) for name in _SHAPES}
"""Known models by name."""


def load_model_shape(name_or_path: str | Path) -> ModelShape:
    """Return the shape of a catalogue name, a ``config.json``, or a folder that holds one.

    Raises UserError for an unknown name, an unreadable file, or a model that the engine cannot run.
    """
    known = MODEL_CATALOGUE.get(str(name_or_path).lower())
    if known is not None:
        return known
    path = Path(name_or_path)
    if path.is_dir():
        path = path / "config.json"
        if not path.is_file():
            raise UserError(f"{path.parent}: the folder holds no config.json.")
    elif not path.is_file():
        names = ", ".join(MODEL_CATALOGUE)
        raise UserError(f"model {str(name_or_path)!r} is neither a file nor a known name ({names}).")
    return from_hf_config(read_json(path), name=path.resolve().parent.name, source=str(path))


def from_hf_config(config: Mapping[str, Any], name: str, source: str) -> ModelShape:
    """Return the shape that a Hugging Face config describes, in the style of transformers 4 or 5.

    name: how the model is called from here on. source: the file, for errors. Raises UserError for what the
    engine does not run: other architectures, quantised bases, biases it does not add, activations other than
    SiLU, rotary scalings other than default, linear and llama3.
    """
    if not isinstance(config, Mapping):
        raise UserError(f"{source}: must be a JSON object.")
    model_type = config.get("model_type")
    if model_type not in ("llama", "mistral", "qwen2"):
        raise UserError(f"{source}: model_type (={model_type!r}) must be llama, mistral or qwen2.")
    _refuse_unsupported(config, model_type, source)

    def size(field: str, default: int | None = None) -> int:
        return _integer(config, field, source, default)

    num_heads = size("num_attention_heads")
    hidden_size = size("hidden_size")
    if config.get("head_dim") is None and hidden_size % num_heads:
        raise UserError(
            f"{source}: num_attention_heads (={num_heads}) must divide hidden_size (={hidden_size})."
        )
    theta, scaling = _rope(config, size("max_position_embeddings"), source)
    return ModelShape(
        name=name,
        hidden_size=hidden_size,
        intermediate_size=size("intermediate_size"),
        num_layers=size("num_hidden_layers"),
        num_heads=num_heads,
        # Llama's own default; Mistral and Qwen2 files always say it.
        num_kv_heads=size("num_key_value_heads", num_heads if model_type == "llama" else None),
        head_dim=size("head_dim", hidden_size // num_heads),
        vocab_size=size("vocab_size"),
        max_position_embeddings=_attention_limit(config, model_type, source),
        rms_norm_eps=_number(config, "rms_norm_eps", source),
        rope_theta=theta,
        rope_scaling=scaling,
        tie_word_embeddings=_flag(config, "tie_word_embeddings", source),
        qkv_bias=model_type == "qwen2",
        dtype=_dtype(config, source),
    )


def _refuse_unsupported(config: Mapping[str, Any], model_type: str, source: str) -> None:
    architectures = config.get("architectures")
    wanted = {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM", "qwen2": "Qwen2ForCausalLM"}[
        model_type
    ]
    if architectures and architectures != [wanted]:
        raise UserError(f"{source}: architectures (={architectures!r}) must be [{wanted!r}].")
    if config.get("quantization_config") is not None:
        raise UserError(f"{source}: quantization_config is present; a quantised base is refused.")
    for field in ("attention_bias", "mlp_bias"):
        if config.get(field):
            raise UserError(f"{source}: {field} (={config[field]!r}) is not supported.")
    if config.get("hidden_act", "silu") != "silu":
        raise UserError(f"{source}: hidden_act (={config['hidden_act']!r}) must be 'silu'.")
    if config.get("use_sliding_window"):
        raise UserError(f"{source}: use_sliding_window (=true) is not supported.")
    if set(config.get("layer_types") or ()) - {"full_attention"}:
        raise UserError(f"{source}: layer_types must all be 'full_attention'.")


def _attention_limit(config: Mapping[str, Any], model_type: str, source: str) -> int:
    """Return the longest context for which full attention is exact: Mistral's window never bites below it."""
    positions = _integer(config, "max_position_embeddings", source)
    if model_type != "mistral" or config.get("sliding_window", 4096) is None:
        return positions
    return min(
        positions, _integer(config, "sliding_window", source, 4096)
    )  # absent means 4096 in transformers


def _rope(config: Mapping[str, Any], positions: int, source: str) -> tuple[float, RopeScaling | None]:
    """Return theta and scaling; transformers 5 keeps both in ``rope_parameters``, 4 in two fields."""
    modern = config.get("rope_parameters")
    field = "rope_scaling" if modern is None else "rope_parameters"
    rope = config.get(field)
    if rope is None:
        rope = {}
    if not isinstance(rope, Mapping):
        raise UserError(f"{source}: {field} must be an object.")
    place = f"{source}: {field}"
    theta = _number(rope if "rope_theta" in rope else config, "rope_theta", source, 10000.0)
    partial = rope.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0))
    if partial not in (None, 1.0):
        raise UserError(f"{place}: partial_rotary_factor (={partial!r}) must be 1.")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return theta, None
    if kind == "linear":
        return theta, RopeScaling(kind="linear", factor=_number(rope, "factor", place))
    if kind != "llama3":
        raise UserError(f"{place}: rope_type (={kind!r}) must be default, linear or llama3.")
    low = _number(rope, "low_freq_factor", place)
    high = _number(rope, "high_freq_factor", place)
    if not high > low:
        raise UserError(f"{place}: high_freq_factor (={high}) must be > low_freq_factor (={low}).")
    return theta, RopeScaling(
        kind="llama3",
        factor=_number(rope, "factor", place),
        low_freq_factor=low,
        high_freq_factor=high,
        original_max_position_embeddings=_integer(rope, "original_max_position_embeddings", place, positions),
    )


def _dtype(config: Mapping[str, Any], source: str) -> str:
    value = config.get("dtype") or config.get("torch_dtype") or "float32"
    name = str(value).removeprefix("torch.")
    if name not in DTYPES:
        raise UserError(f"{source}: dtype (={value!r}) must be one of {', '.join(DTYPES)}.")
    return name


def _integer(config: Mapping[str, Any], field: str, source: str, default: int | None = None) -> int:
    value = config.get(field)
    if value is None:
        value = default
    if value is None:
        raise UserError(f"{source}: {field} is missing.")
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UserError(f"{source}: {field} (={value!r}) must be an integer >= 1.")
    return value


def _number(config: Mapping[str, Any], field: str, source: str, default: float | None = None) -> float:
    value = config.get(field)
    if value is None:
        value = default
    if value is None:
        raise UserError(f"{source}: {field} is missing.")
    if (
        not isinstance(value, int | float)
        or isinstance(value, bool)
        or not (math.isfinite(value) and value > 0)
    ):
        raise UserError(f"{source}: {field} (={value!r}) must be a number > 0.")
    return float(value)


def _flag(config: Mapping[str, Any], field: str, source: str) -> bool:
    value = config.get(field, False)
    if not isinstance(value, bool):
        raise UserError(f"{source}: {field} (={value!r}) must be true or false.")
    return value
