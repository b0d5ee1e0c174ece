"""One layer's operators for a model at a TP degree:

measured where they were, else scaled by the bytes and operations that change.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeVar

from engine.budget import GpuSpec, gpu_spec
from engine.config import ITEMSIZE_BYTES
from engine.errors import UserError
from engine.model_shape import ModelShape
from sim.envelope import Envelope
from sim.exchange import Exchange, Exchanges, exchanges_of
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """Microseconds of one layer (head and exchanges: of the whole step). measured: of this model, all operators at this TP degree."""

    dense_us: Callable[[int], float]
    head_us: Callable[[int], float]
    exchanges: Exchanges
    attention_decode: Envelope
    attention_prefill: Envelope
    lora: tuple[LoraRegime, ...]
    measured: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Slower:
    """How many times as long another kind of GPU takes for bytes of memory, for operations, for bytes to other GPUs and from the host."""

    memory: float
    matrix: float
    link: float
    host: float

    @classmethod
    def of(cls, measured: GpuSpec, other: GpuSpec) -> Slower:
        """Compare by specification."""
        return cls(
            memory=measured.memory_bandwidth_bytes_per_s / other.memory_bandwidth_bytes_per_s,
            matrix=measured.bf16_flops_per_s / other.bf16_flops_per_s,
            link=measured.link_bandwidth_bytes_per_s / other.link_bandwidth_bytes_per_s,
            host=measured.host_bandwidth_bytes_per_s / other.host_bandwidth_bytes_per_s,
        )


def layer_of(
    fits: OperatorFits,
    profile: Profile,
    model: ModelShape,
    tp: int,
    exchange: Exchange = "local",
    collectives: str = "fast",
    gpu: str | None = None,
) -> Layer:
    """Compose. exchange, collectives: how much LoRA exchanges between the GPUs, and by what. gpu: another kind than the profiled one.

    Raises UserError where the model cannot be cut over `tp` GPUs or nothing is known of collectives.
    """
    model.validate_tp(tp)
    there = profile.gpu_spec if gpu is None else gpu_spec(gpu)
    slower = Slower.of(profile.gpu_spec, there)
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
        dense_us=_dense(fits, profile, model, tp, there, slower),
        head_us=_head(fits, profile, model, tp, there, slower),
        exchanges=exchanges_of(
            fits.collective,
            model,
            tp,
            exchange,
            collectives,
            ITEMSIZE_BYTES[profile.dtype],
            profile.source,
            slower.link,
        ),
        attention_decode=_attention(
            fits.additive["attention_decode"], tp, same, (1.0, kv_heads, 1.0)
        ).stretched((1.0, slower.memory, slower.memory)),
        attention_prefill=_attention(
            fits.additive["attention_prefill"], tp, same, (heads, heads, 1.0)
        ).stretched((slower.memory, slower.matrix, slower.memory)),
        lora=tuple(
            LoraRegime(
                regime.most_tokens,
                regime.envelope.stretched((1.0, 1.0, slower.memory, slower.memory, slower.memory)),
            )
            for regime in _nearest(fits.lora, tp)
        ),
        measured=same and tp == 1 and all(known) and there == profile.gpu_spec,
    )


def _dense(
    fits: OperatorFits, profile: Profile, model: ModelShape, tp: int, gpu: GpuSpec, slower: Slower
) -> Callable[[int], float]:
    matmuls = [_linear(fits, profile, model, tp, linear, gpu) for linear in LAYER_LINEARS]
    elementwise = _nearest(fits.elementwise, tp)
    measured = tp in fits.elementwise
    width = (
        _ratio(model.hidden_size, profile.model.hidden_size) if measured else _width(profile.model, model, tp)
    )
    width *= max(1.0, slower.memory)  # mostly latency, which a faster memory does not shorten
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


def _head(
    fits: OperatorFits, profile: Profile, model: ModelShape, tp: int, gpu: GpuSpec, slower: Slower
) -> Callable[[int], float]:
    product = _linear(fits, profile, model, tp, "head", gpu)
    # Every GPU draws from all logits.
    vocabulary = _ratio(model.vocab_size, profile.model.vocab_size) * max(1.0, slower.memory)
    return lambda rows: product(rows) + vocabulary * fits.sample(rows)


def _linear(
    fits: OperatorFits, profile: Profile, model: ModelShape, tp: int, linear: str, gpu: GpuSpec
) -> Callable[[int], float]:
    """Return a product's microseconds by rows:

    as measured, times how its roofline changes where it is another one.
    """
    measured_tp = tp if (tp, linear) in fits.matmul else 1
    curve = fits.matmul.get((measured_tp, linear))
    if curve is None:
        raise UserError(f"{profile.source}: operators.matmul has no {linear!r} at tp=1")
    size, measured_size = _sizes(model, tp, linear), _sizes(profile.model, measured_tp, linear)
    if size == measured_size and gpu == profile.gpu_spec:
        return curve
    here, there, itemsize = profile.gpu_spec, gpu, ITEMSIZE_BYTES[profile.dtype]

    def scaled(rows: int) -> float:
        ratio = _roofline_s(size, rows, there, itemsize) / _roofline_s(measured_size, rows, here, itemsize)
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


def _ratio(this: float, that: float) -> float:
    return this / that
