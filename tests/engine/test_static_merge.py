"""An ordinary adapter out of the pool, merged and taken out."""

import pytest
import torch

from engine.errors import UserError
from engine.model_shape import GROUPS, MODULES, ModelShape
from engine.static_merge import PackedAdapter, StaticMerge, update_norm
from engine.switch_ops import switch_ops_for
from engine.weights import random_weights
from kernels.lora_pack import pack_random
from kernels.lora_plan import TABLE_UNIT

SHAPE = ModelShape(
    name="tiny", hidden_size=64, intermediate_size=96, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=16,
    vocab_size=97, max_position_embeddings=64,
)  # fmt: skip
RANKS = ((4, 0, 8, 3, 0, 16, 1), (0, 5, 0, 0, 0, 0, 7), (8, 8, 8, 8, 8, 8, 8))


@pytest.fixture
def packed():
    shapes = [SHAPE.linear_shapes()[module][::-1] for module in MODULES]
    return pack_random(RANKS, shapes=shapes, num_layers=2, dtype=torch.float32, page_bytes=16384, scale=0.03)


def adapter(packed, index):
    unit = int(packed.adapter_meta[index, TABLE_UNIT])
    return PackedAdapter(pool=packed.pool, table_unit=unit, ranks=RANKS[index])


def matrices(weights):
    return [matrix for layer in weights.layers for matrix in (layer.qkv, layer.o, layer.gate_up, layer.down)]


def dense(weights, packed, index):
    """All matrices with the adapter added, in fp32."""
    found = []
    for layer in range(SHAPE.num_layers):
        for matrix, names in zip(matrices(weights)[4 * layer :], GROUPS, strict=False):
            rows = []
            for name, part in zip(
                names, matrix.split([SHAPE.linear_shapes()[n][0] for n in names]), strict=True
            ):
                module = MODULES.index(name)
                rows.append(part + packed.b(index, layer, module).T @ packed.a(index, layer, module))
            found.append(torch.cat(rows))
    return found


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_merges_one_after_the_other_and_takes_out(packed, backend):
    weights = random_weights(SHAPE, torch.float32, "cpu", 0)
    before = [matrix.clone() for matrix in matrices(weights)]
    wanted = [dense(weights, packed, index) for index in range(2)]
    merge = StaticMerge(weights, SHAPE, switch_ops_for(backend))
    for index in (0, 1):  # other targets: those of the first must be gone
        merge.merge_(adapter(packed, index), "x")
        for found, want in zip(matrices(weights), wanted[index], strict=True):
            torch.testing.assert_close(found, want, rtol=1e-5, atol=1e-6)
    assert merge.merged == {1, 6}
    merge.unmerge_()
    assert merge.merged == frozenset()
    assert all(torch.equal(a, b) for a, b in zip(matrices(weights), before, strict=True))
    assert merge.pristine_bytes == sum(matrix.numel() * 4 for matrix in before)


def test_what_is_prepared_changes_nothing(packed):
    weights = random_weights(SHAPE, torch.float32, "cpu", 0)
    before = [matrix.clone() for matrix in matrices(weights)]
    merge = StaticMerge(weights, SHAPE, switch_ops_for("reference"))
    for ranks in RANKS:
        merge.prepare(ranks)
    assert all(torch.equal(a, b) for a, b in zip(matrices(weights), before, strict=True))
    wanted = dense(weights, packed, 0)
    merge.merge_(adapter(packed, 0), "x")
    for found, want in zip(matrices(weights), wanted, strict=True):
        torch.testing.assert_close(found, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("bad", [1e4, float("nan"), float("inf")])
def test_an_adapter_that_would_ruin_the_base_is_refused(packed, bad):
    weights = random_weights(SHAPE, torch.float32, "cpu", 0)
    before = [matrix.clone() for matrix in matrices(weights)]
    merge = StaticMerge(weights, SHAPE, switch_ops_for("reference"))
    a = packed.a(2, 1, 3)
    packed.pool[packed.pool == a[2, 5]] = bad
    with pytest.raises(UserError, match=r"adapter 'bad': its update is .* times a weight"):
        merge.merge_(adapter(packed, 2), "bad")
    assert all(torch.equal(a, b) for a, b in zip(matrices(weights), before, strict=True))


def test_norm_of_an_update():
    a, b = torch.randn(5, 33), torch.randn(5, 20)
    torch.testing.assert_close(update_norm(a, b), (b.T @ a).norm(), rtol=1e-5, atol=1e-5)
