"""Every decode path of a dynamic adapter against one dense fp32 computation, on tiny models."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from engine.dynamic_adapter import DynamicAdapterSpec
from engine.dynamic_adapter_files import random_dynamic_adapter
from engine.expert_merge import ExpertMerge
from engine.expert_pools import expert_pools
from engine.model_shape import MODULES, ModelShape
from engine.ops import ops_for
from engine.rotary import cos_sin_table
from engine.switch_ops import switch_ops_for
from engine.switch_paths import MERGED, PATHS, SwitchDecoder
from engine.weights import LayerWeights, random_weights

SHAPE = ModelShape(
    name="tiny", hidden_size=64, intermediate_size=96, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=16,
    vocab_size=97, max_position_embeddings=64,
)  # fmt: skip
RELATIVE_ERROR = 2e-5  # fp32, two layers: the order of sums differs from path to path, nothing else
STEPS = 5


def tiny_weights(seed=0):
    """Base weights large enough that layers do something."""
    weights = random_weights(SHAPE, torch.float32, "cpu", seed)
    scaled = [
        LayerWeights(
            qkv=layer.qkv * 6, qkv_bias=None, o=layer.o * 8, gate_up=layer.gate_up * 6, down=layer.down * 8,
            input_norm=layer.input_norm, post_norm=layer.post_norm,
        )
        for layer in weights.layers
    ]  # fmt: skip
    return replace(weights, layers=scaled, embed=weights.embed * 20, lm_head=weights.lm_head * 5)


def tiny_adapter(targets=MODULES, router="switch", renormalise=False, experts=4, rank=8, top_k=2):
    spec = DynamicAdapterSpec(
        name="d", num_experts=experts, top_k=top_k, rank=rank, target_modules=targets, router=router,
        renormalise=renormalise,
    )  # fmt: skip
    adapter = random_dynamic_adapter(spec, SHAPE, seed=3, dtype=torch.float32)
    tensors = {key: (a * 8, b * 8) for key, (a, b) in adapter.tensors.items()}
    return replace(adapter, tensors=tensors, routers=tuple(router * 2 for router in adapter.routers))


class Dense:
    """The whole computation of a sequence at once, as the formulas say it; adapter None: the base alone."""

    def __init__(self, weights, adapter):
        self.weights, self.adapter, self.gates = weights, adapter, None

    def routed(self, x, layer, module):
        spec = self.adapter.spec
        if module == spec.targets[0] and (layer == 0 or spec.router == "layerwise"):
            p = torch.softmax(x @ self.adapter.routers[0 if spec.router == "switch" else layer].T, dim=-1)
            kept = p >= p.sort(dim=-1, descending=True).values[:, spec.top_k - 1, None]
            self.gates = torch.where(kept, p, 0.0)
            if spec.renormalise:
                self.gates = self.gates / self.gates.sum(dim=-1, keepdim=True)

    def linear(self, x, weight, layer, module):
        y = x @ weight.T
        if self.adapter is None:
            return y
        self.routed(x, layer, module)
        if (layer, module) in self.adapter.tensors:
            a, b = self.adapter.tensors[layer, module]
            y = y + torch.einsum("te,eor,eri,ti->to", self.gates, b, a, x)
        return y

    def norm(self, x, weight):
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + SHAPE.rms_norm_eps) * weight

    def rotate(self, heads, cos_sin):
        cos, sin = (part[:, None].repeat(1, 1, 2) for part in cos_sin.chunk(2, dim=1))
        first, second = heads.chunk(2, dim=-1)
        return heads * cos + torch.cat([-second, first], dim=-1) * sin

    def attention(self, x, layer, index):
        d, tokens = SHAPE.head_dim, len(x)
        q_out, kv_out = SHAPE.num_heads * d, SHAPE.num_kv_heads * d
        parts = zip(layer.qkv.split([q_out, kv_out, kv_out]), ("q_proj", "k_proj", "v_proj"), strict=True)
        q, k, v = (self.linear(x, weight, index, name).view(tokens, -1, d) for weight, name in parts)
        table = cos_sin_table(SHAPE, tokens)
        q, k = self.rotate(q, table), self.rotate(k, table)
        q, k, v = (part.transpose(0, 1)[None] for part in (q, k, v))
        return (
            F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)[0]
            .transpose(0, 1)
            .flatten(1)
        )

    def logits(self, ids):
        x = self.weights.embed[ids]
        for index, layer in enumerate(self.weights.layers):
            attended = self.attention(self.norm(x, layer.input_norm), layer, index)
            x = x + self.linear(attended, layer.o, index, "o_proj")
            normed = self.norm(x, layer.post_norm)
            gate, up = layer.gate_up.chunk(2)
            hidden = F.silu(self.linear(normed, gate, index, "gate_proj"))
            hidden = hidden * self.linear(normed, up, index, "up_proj")
            x = x + self.linear(hidden, layer.down, index, "down_proj")
        return self.norm(x, self.weights.norm) @ self.weights.lm_head.T


def decode(path, adapter, ids, backend="reference"):
    """Return the logits [sequences, tokens, vocabulary] of given tokens, decoded one by one along a path."""
    weights = tiny_weights()
    ops = replace(switch_ops_for(backend), base=ops_for("reference"))  # others test those
    pools = expert_pools(adapter, SHAPE, dtype=torch.float32, device="cpu")
    merge = ExpertMerge(pools, weights, ops, in_place=path != "sgmm_pristine") if path in MERGED else None
    decoder = SwitchDecoder(SHAPE, weights, pools, ops, batch=len(ids), max_tokens=32, merge=merge)
    found = []
    for column in ids.T:
        decoder.sequences.ids.copy_(column)
        found.append(decoder.forward(path).clone())
        decoder.sequences.positions.add_(1)
    return torch.stack(found, dim=1)


def ids_of(batch, steps=STEPS):
    return torch.randint(0, SHAPE.vocab_size, (batch, steps), generator=torch.Generator().manual_seed(batch))


def assert_same(found, adapter, ids):
    expected = torch.stack([Dense(tiny_weights(), adapter).logits(row) for row in ids])
    assert ((found - expected).norm() / expected.norm()).item() < RELATIVE_ERROR


TARGETS = [MODULES, ("q_proj", "v_proj"), ("gate_proj", "down_proj"), ("o_proj",)]


@pytest.mark.parametrize("targets", TARGETS, ids="-".join)
@pytest.mark.parametrize("path", PATHS)
def test_a_path_is_the_dense_computation(path, targets):
    adapter, ids = tiny_adapter(targets), ids_of(1)
    assert_same(decode(path, adapter, ids), None if path == "base" else adapter, ids)


def test_the_adapter_matters():
    ids = ids_of(1)
    base, adapted = (decode(path, tiny_adapter(), ids) for path in ("base", "unmerged"))
    assert ((base - adapted).norm() / base.norm()).item() > 0.05


@pytest.mark.parametrize("renormalise", [False, True])
@pytest.mark.parametrize("path", ["layerwise", "layerwise_loop", "unmerged"])
def test_a_router_a_layer_and_a_batch(path, renormalise):
    adapter, ids = tiny_adapter(router="layerwise", renormalise=renormalise), ids_of(3)
    assert_same(decode(path, adapter, ids), adapter, ids)


@pytest.mark.parametrize("path", ["sgmm_in_place", "sgmm_pristine", "unmerged"])
def test_a_path_by_the_kernels(path):
    adapter, ids = tiny_adapter(("k_proj", "v_proj", "down_proj"), rank=16), ids_of(1, steps=2)
    assert_same(decode(path, adapter, ids, "triton"), adapter, ids)


def test_experts_of_a_batch_by_the_kernels():
    adapter, ids = tiny_adapter(("q_proj", "up_proj"), rank=5), ids_of(4, steps=2)
    assert_same(decode("unmerged", adapter, ids, "triton"), adapter, ids)


def test_restore_gives_the_base_back_and_drift_is_small():
    weights, ops = tiny_weights(), switch_ops_for("reference")
    pools = expert_pools(tiny_adapter(), SHAPE, dtype=torch.float32, device="cpu")
    before = [layer.qkv.clone() for layer in weights.layers]
    merge = ExpertMerge(pools, weights, ops, in_place=True)
    decoder = SwitchDecoder(SHAPE, weights, pools, ops, batch=1, max_tokens=32, merge=merge)
    for _ in range(4):
        decoder.step("sgmm_in_place")
    assert not torch.equal(weights.layers[0].qkv, before[0])
    assert 0 < merge.drift(decoder.route) < 1e-6
    merge.restore()
    assert all(torch.equal(layer.qkv, old) for layer, old in zip(weights.layers, before, strict=True))


@pytest.mark.parametrize(
    ("path", "batch", "router", "message"),
    [
        ("sgmm_pristine", 2, "switch", "a batch takes 'unmerged'"),
        ("simple", 1, "layerwise", "needs one route"),
        ("sgmm_in_place", 1, "switch", "needs an ExpertMerge"),
        ("fast", 1, "switch", "must be one of"),
    ],
)
def test_refuses_what_a_path_cannot_do(path, batch, router, message):
    pools = expert_pools(tiny_adapter(router=router), SHAPE, dtype=torch.float32, device="cpu")
    decoder = SwitchDecoder(
        SHAPE, tiny_weights(), pools, switch_ops_for("reference"), batch=batch, max_tokens=16
    )
    with pytest.raises(ValueError, match=message):
        decoder.forward(path)
