"""Norms, activation, rotary embedding with the KV write, and the token gather, against their references."""

import pytest
import torch

from kernels import gather_tokens as gather
from kernels import gather_tokens_ref as gather_ref
from kernels import rms_norm as norm
from kernels import rms_norm_ref as norm_ref
from kernels import rotary_write_kv as rotary
from kernels import rotary_write_kv_ref as rotary_ref
from kernels import silu_mul as silu
from kernels import silu_mul_ref as silu_ref
from tests.kernels.tolerances import assert_close

EPS = 1e-5


def normal(*shape, target, seed=0):
    device, dtype = target
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def poisoned(*shape, target):
    device, dtype = target
    return torch.full(shape, float("nan"), device=device, dtype=dtype)


SHAPES = [(1, 64), (3, 5120), (5, 4096), (2, 8192), (4, 96), (0, 64)]


@pytest.mark.parametrize(("tokens", "hidden"), SHAPES)
def test_rms_norm(target, tokens, hidden):
    x, weight = normal(tokens, hidden, target=target), normal(hidden, target=target, seed=1)
    out = poisoned(tokens, hidden, target=target)
    assert norm.rms_norm(x, weight, EPS, out=out) is out
    assert_close(out, norm_ref.rms_norm(x.float(), weight.float(), EPS), x.dtype)
    torch.testing.assert_close(norm.rms_norm(x, weight, EPS), out, rtol=0, atol=0)


@pytest.mark.parametrize(("tokens", "hidden"), SHAPES)
def test_add_rms_norm_changes_the_residual_in_place(target, tokens, hidden):
    x, residual = normal(tokens, hidden, target=target), normal(tokens, hidden, target=target, seed=1)
    weight = normal(hidden, target=target, seed=2)
    out, expected_residual = poisoned(tokens, hidden, target=target), residual.clone()
    expected = norm_ref.add_rms_norm_(x, expected_residual, weight, EPS)
    norm.add_rms_norm_(x, residual, weight, EPS, out=out)
    assert torch.equal(residual, expected_residual)
    assert_close(out, expected)


def test_rms_norm_of_strided_rows_in_place(target):
    buffer = normal(4, 200, target=target)
    x, weight = buffer[:, :96], normal(96, target=target, seed=1)
    expected, beside = norm_ref.rms_norm(x, weight, EPS), buffer[:, 96:].clone()
    norm.rms_norm(x, weight, EPS, out=x)
    assert_close(x, expected)
    assert torch.equal(buffer[:, 96:], beside)


def test_rms_norm_reference_is_hugging_faces():
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    x, module = torch.randn(3, 64), llama.LlamaRMSNorm(64, eps=EPS)
    torch.nn.init.normal_(module.weight)
    assert_close(norm_ref.rms_norm(x, module.weight.detach(), EPS), module(x))


@pytest.mark.parametrize(("tokens", "width"), [(1, 96), (3, 1500), (2, 14336), (5, 64), (0, 64)])
def test_silu_mul(target, tokens, width):
    gate_up, out = normal(tokens, 2 * width, target=target), poisoned(tokens, width, target=target)
    assert silu.silu_mul(gate_up, out=out) is out
    gate, up = gate_up.float().split(width, dim=1)
    assert_close(out, torch.nn.functional.silu(gate) * up, gate_up.dtype)
    assert_close(silu_ref.silu_mul(gate_up), out)


def test_silu_mul_of_large_gates_is_finite(target):
    gate_up = torch.tensor([[-300.0, 300.0, 2.0, 2.0]]).to(*target)
    assert silu.silu_mul(gate_up).tolist() == [[0.0, 600.0]]


def cos_sin_table(max_pos, head_dim, device):
    inverse = 10000.0 ** (-torch.arange(0, head_dim, 2) / head_dim)
    angle = torch.arange(max_pos)[:, None] * inverse
    return torch.cat((angle.cos(), angle.sin()), dim=1).to(device)


# (Hq, Hkv, D, page_tokens); 9 + 2·3 heads do not fill blocks of eight.
GEOMETRIES = [(8, 2, 64, 16), (4, 4, 128, 16), (8, 1, 64, 8), (9, 3, 16, 4)]


@pytest.mark.parametrize(("heads", "kv_heads", "head_dim", "page_tokens"), GEOMETRIES)
def test_rotary_write_kv(target, heads, kv_heads, head_dim, page_tokens):
    device, _ = target
    layers, layer, pages = 3, 1, 12
    slots = torch.tensor([2, 0, 0, -1, 1, 1, -1], dtype=torch.int32, device=device)
    positions = torch.tensor(
        [0, page_tokens - 1, page_tokens, 7, 2 * page_tokens + 1, 2 * page_tokens + 2, 10**6],
        dtype=torch.int32,
        device=device,
    )
    table = torch.randperm(pages, generator=torch.Generator().manual_seed(3))[:9]
    table = table.view(3, 3).to(device, torch.int32)
    qkv = normal(7, (heads + 2 * kv_heads) * head_dim, target=target)
    pool = poisoned(pages, layers * 2 * kv_heads * page_tokens * head_dim, target=target)
    shape = dict(layer=layer, num_heads=heads, num_kv_heads=kv_heads, head_dim=head_dim)
    shape |= dict(page_tokens=page_tokens, num_layers=layers)
    arguments = (cos_sin_table(4 * page_tokens, head_dim, device), positions, slots, table)
    qkv_want, pool_want, before = qkv.clone(), pool.clone(), qkv.clone()
    rotary_ref.rotary_write_kv_(qkv_want, *arguments, pool_want, **shape)
    rotary.rotary_write_kv_(qkv, *arguments, pool, **shape)

    assert_close(qkv, qkv_want)
    assert torch.equal(qkv[slots < 0], before[slots < 0])
    written = ~pool_want.isnan()
    assert torch.equal(~pool.isnan(), written)
    assert written.sum() == 5 * 2 * kv_heads * head_dim
    assert_close(pool[written], pool_want[written])


def test_rotary_at_the_ends_of_its_tables():
    """The last position, slot, page and layer are reached, past 2**31 elements; where padding claims to be is not read."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    pages, layers, page_tokens, head_dim = 17, 2**18, 16, 16
    table = torch.zeros(2, 3, device=device, dtype=torch.int32)
    table[-1, -1] = pages - 1
    ends = torch.iinfo(torch.int32)
    positions = torch.tensor([ends.max, 47, ends.min, -1], dtype=torch.int32, device=device)
    slots = torch.tensor([-1, 1, -1, -1], dtype=torch.int32, device=device)
    arguments = (cos_sin_table(48, head_dim, device), positions, slots, table)
    shape = dict(layer=layers - 1, num_layers=layers, num_heads=2, num_kv_heads=1)
    shape |= dict(head_dim=head_dim, page_tokens=page_tokens)
    qkv = normal(4, 4 * head_dim, target=(device, torch.float16))
    pool = torch.empty(pages, layers * 2 * page_tokens * head_dim, dtype=torch.float16, device=device)
    place = pool.view(pages, layers, 2, page_tokens, head_dim)[-1, -1]
    found = []
    for rotate in (rotary_ref.rotary_write_kv_, rotary.rotary_write_kv_):
        place.fill_(7.0)
        rotated = qkv.clone()
        rotate(rotated, *arguments, pool, **shape)
        found.append((rotated, place.clone()))
    (qkv_want, place_want), (qkv_got, place_got) = found
    assert place.storage_offset() > 2**31 and (place_got[:, :-1] == 7.0).all()
    assert_close(place_got, place_want)
    assert_close(qkv_got, qkv_want)
    assert torch.equal(qkv_got[slots < 0], qkv[slots < 0])


def test_rotary_reference_is_hugging_faces():
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    heads, kv_heads, head_dim, tokens = 4, 2, 16, 6
    qkv = torch.randn(tokens, (heads + 2 * kv_heads) * head_dim)
    cos_sin = cos_sin_table(tokens, head_dim, "cpu")
    q, k, v = qkv.clone().view(1, tokens, -1, head_dim).transpose(1, 2).split((heads, kv_heads, kv_heads), 1)
    cos, sin = (half.repeat(1, 2)[None] for half in cos_sin.chunk(2, dim=1))
    q_want, k_want = llama.apply_rotary_pos_emb(q, k, cos, sin)
    pool = torch.zeros(2, 2 * kv_heads * 4 * head_dim)
    positions, slots = torch.arange(tokens, dtype=torch.int32), torch.zeros(tokens, dtype=torch.int32)
    table = torch.tensor([[1, 0]], dtype=torch.int32)
    rotary_ref.rotary_write_kv_(
        qkv, cos_sin, positions, slots, table, pool,
        layer=0, num_heads=heads, num_kv_heads=kv_heads, head_dim=head_dim, page_tokens=4, num_layers=1,
    )  # fmt: skip
    assert_close(qkv, torch.cat((q_want, k_want, v), dim=1)[0].transpose(0, 1).flatten(1))
    kv = pool.view(2, 2, kv_heads, 4, head_dim)[[1, 0]].permute(1, 2, 0, 3, 4).flatten(2, 3)[:, :, :tokens]
    assert_close(kv, torch.cat((k_want, v)))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("tokens", [1, 7, 300])
def test_gather_tokens(target, tokens, dtype):
    device, _ = target
    generator = torch.Generator().manual_seed(tokens)
    host = torch.randint(-1, 2, (tokens,), generator=generator, dtype=torch.int32) * 1000
    host = host.clamp(min=-1).to(device)
    slots = torch.randint(-1, 5, (tokens,), generator=generator, dtype=torch.int32).to(device)
    last = torch.randint(0, 128256, (5,), generator=generator).to(device, dtype)
    out, expected = torch.full((2, tokens), -7, device=device, dtype=torch.int32)
    gather.gather_tokens(host, last, slots, out=out)
    gather_ref.gather_tokens(host, last, slots, out=expected)
    pairs = zip(host.tolist(), slots.tolist(), strict=True)
    assert out.tolist() == expected.tolist()
    assert out.tolist() == [
        sent if sent >= 0 else int(last[slot]) if slot >= 0 else 0 for sent, slot in pairs
    ]


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda x: norm.rms_norm(x, x.new_empty(3), EPS), "weight"),
        (lambda x: norm.rms_norm(x.t(), x.new_empty(2), EPS), "x"),
        (lambda x: norm.rms_norm(x.long(), x.new_empty(4), EPS), "x"),
        (lambda x: norm.add_rms_norm_(x, x.double(), x.new_empty(4), EPS), "residual"),
        (lambda x: silu.silu_mul(x, out=x), "out"),
        (lambda x: silu.silu_mul(x[:, :3].contiguous()), "gate_up"),
        (lambda x: gather.gather_tokens(x[0].int(), x[0].long(), x[0], out=x[0].int()), "sequence_slots"),
    ],
)
def test_a_wrong_argument_is_named(target, call, name):
    with pytest.raises(ValueError, match=rf"^{name} must"):
        call(normal(2, 4, target=target))
