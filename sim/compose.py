"""One layer's operators for a model at a TP degree:

measured where they were, else scaled by the bytes and operations that change.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import log2
from typing import TypeVar

from engine.budget import GpuSpec, gpu_spec
from engine.config import ITEMSIZE_BYTES
from engine.errors import UserError
from engine.model_shape import ModelShape
from sim.curve import Curve
from sim.envelope import Envelope
from sim.fit import LoraRegime, OperatorFits
from sim.profile import Profile

T = TypeVar("T")

LAYER_LINEARS = ("qkv", "o", "gate_up", "down")
_MODULES = {
    "qkv": ("q_proj", "k_proj", "v_proj"),
    "o": ("o_proj",),
    "gate_up": ("gate_proj", "up_proj"),
    "down": ("down_proj",),
}
# A sampled row's best token and its logit cross the link, where the vocabulary is cut over GPUs.
SAMPLE_BYTES = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """Microseconds of one layer (head and collectives:

    of the whole step). measured: of this model at TP 1, the only degree at which whole steps were measured.
    """

    dense_us: Callable[[int], float]
    head_us: Callable[[int], float]
    collectives_us: Callable[[int, int], float]
    attention_decode: Envelope
    attention_prefill: Envelope
    lora: tuple[LoraRegime, ...]
    measured: bool


def layer_of(fits: OperatorFits, profile: Profile, model: ModelShape, tp: int) -> Layer:
    """Compose.

    Raises UserError where the model cannot be cut over `tp` GPUs or nothing is known of collectives.
    """
    model.validate_tp(tp)
    same = model == profile.model
    heads = _ratio(
        model.heads_per_rank(tp) * model.head_dim, profile.model.num_heads * profile.model.head_dim
    )
    kv_heads = _ratio(
        model.kv_heads_per_rank(tp) * model.head_dim, profile.model.num_kv_heads * profile.model.head_dim
    )
    known = [tp in fits.additive[name] for name in ("attention_decode", "attention_prefill")]
    known.append(tp in fits.lora)
    known.append(all((tp, linear) in fits.matmul for linear in (*LAYER_LINEARS, "head")))
    known.append(tp in fits.elementwise)
    return Layer(
        dense_us=_dense(fits, profile, model, tp),
        head_us=_head(fits, profile, model, tp),
        collectives_us=_collectives(fits, profile, model, tp),
        attention_decode=_attention(fits.additive["attention_decode"], tp, same, (1.0, kv_heads, 1.0)),
        attention_prefill=_attention(
            fits.additive["attention_prefill"], tp, same, (heads, 1.0, heads, kv_heads)
        ),
        lora=_nearest(fits.lora, tp),
        measured=same and tp == 1 and all(known),
    )


def _dense(fits: OperatorFits, profile: Profile, model: ModelShape, tp: int) -> Callable[[int], float]:
    matmuls = [_linear(fits, profile, model, tp, linear) for linear in LAYER_LINEARS]
    elementwise = _nearest(fits.elementwise, tp)
    measured = tp in fits.elementwise
    width = (
        _ratio(model.hidden_size, profile.model.hidden_size) if measured else _width(profile.model, model, tp)
    )
    return lambda tokens: sum(matmul(tokens) for matmul in matmuls) + width * elementwise(tokens)


def _width(profiled: ModelShape, model: ModelShape, tp: int) -> float:
    """Return how much wider the elementwise operators are:

    norms see the whole hidden state, the rest its share.
    """

    def elements(shape: ModelShape, ranks: int) -> int:
        shapes = shape.linear_shapes(ranks)
        return 4 * shape.hidden_size + sum(
            shapes[name][0] for name in ("q_proj", "k_proj", "gate_proj", "up_proj")
        )

    return _ratio(elements(model, tp), elements(profiled, 1))


def _head(fits: OperatorFits, profile: Profile, model: ModelShape, tp: int) -> Callable[[int], float]:
    product = _linear(fits, profile, model, tp, "head")
    vocabulary = _ratio(-(-model.vocab_size // tp), profile.model.vocab_size)
    return lambda rows: product(rows) + vocabulary * fits.sample(rows)


def _linear(
    fits: OperatorFits, profile: Profile, model: ModelShape, tp: int, linear: str
) -> Callable[[int], float]:
    """Return a product's microseconds by rows:

    as measured, times how its roofline changes where it is another one.
    """
    measured_tp = tp if (tp, linear) in fits.matmul else 1
    curve = fits.matmul.get((measured_tp, linear))
    if curve is None:
        raise UserError(f"{profile.source}: operators.matmul has no {linear!r} at tp=1")
    size, measured_size = _sizes(model, tp, linear), _sizes(profile.model, measured_tp, linear)
    if size == measured_size:
        return curve
    gpu, itemsize = gpu_spec(profile.gpu), ITEMSIZE_BYTES[profile.dtype]

    def scaled(rows: int) -> float:
        ratio = _roofline_s(size, rows, gpu, itemsize) / _roofline_s(measured_size, rows, gpu, itemsize)
        return curve(rows) * ratio

    return scaled


def _sizes(model: ModelShape, tp: int, linear: str) -> tuple[int, int]:
    """Return (out, in) of a fused linear on one GPU."""
    if linear == "head":
        return -(-model.vocab_size // tp), model.hidden_size
    shapes = [model.linear_shapes(tp)[module] for module in _MODULES[linear]]
    return sum(out for out, _ in shapes), shapes[0][1]


def _roofline_s(size: tuple[int, int], rows: int, gpu: GpuSpec, itemsize: int) -> float:
    out, inner = size
    moved_s = itemsize * (out * inner + rows * (out + inner)) / gpu.memory_bandwidth_bytes_per_s
    return max(moved_s, 2.0 * out * inner * rows / gpu.bf16_flops_per_s)


def _attention(fitted: Mapping[int, Envelope], tp: int, same: bool, factors: tuple[float, ...]) -> Envelope:
    """Return the measured cost where it is of this model and TP degree, else that of TP 1 with fewer or other
    heads.
    """
    if same and tp in fitted:
        return fitted[tp]
    return fitted[1].stretched(factors)


def _nearest(fitted: Mapping[int, T], tp: int) -> T:
    return fitted.get(tp, fitted[min(fitted)])


def _collectives(
    fits: OperatorFits, profile: Profile, model: ModelShape, tp: int
) -> Callable[[int, int], float]:
    """Two all-reduces a layer and one after the embedding, of the hidden states; one of the sampled rows'
    best tokens.
    """
    if tp == 1:
        return lambda tokens, rows: 0.0
    reduce_us = _all_reduce(fits, profile, tp)
    row_bytes = model.hidden_size * ITEMSIZE_BYTES[profile.dtype]
    count = 2 * model.num_layers + 1
    return lambda tokens, rows: count * reduce_us(tokens * row_bytes) + reduce_us(rows * SAMPLE_BYTES)


def _all_reduce(fits: OperatorFits, profile: Profile, ranks: int) -> Callable[[float], float]:
    """Return an all-reduce's microseconds by bytes.

    Between as many GPUs as were measured: as measured. Else from 2: T(n) = α·log2 n + (T(2) − α)·2(n − 1)/n,
    α being T(2) at the fewest bytes: latency grows with the depth of a tree, bytes as a ring moves them.
    Source of the bytes' term: Patarasuk and Yuan, 2009.
    """
    if ranks in fits.collective:
        return fits.collective[ranks]
    two = fits.collective.get(2)
    if two is None:
        raise UserError(
            f"{profile.source}: no all-reduce between 2 GPUs is known, so tp={ranks} cannot be priced"
        )
    known: Curve = two
    alpha_us, moved = float(known.y[0]), 2 * (ranks - 1) / ranks
    return lambda num_bytes: alpha_us * log2(ranks) + (known(num_bytes) - alpha_us) * moved


def _ratio(this: float, that: float) -> float:
    return this / that
