import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.adapter import AdapterSpec, adapters_of_trace, load_adapters
from engine.errors import UserError
from engine.layout import ROW_ALIGN_BYTES, adapter_layout, page_geometry, row_counts, row_lengths
from engine.model_shape import MODEL_CATALOGUE, MODULES, ROW_PARALLEL, ModelShape, load_model_shape
from traces.assign import RANK_MIXES

EIGHT_B = load_model_shape("llama-3.1-8b")


def model(head_dim=16, kv_heads=2, layers=2, groups=2, width=3):
    heads = kv_heads * groups
    return ModelShape(
        name="m",
        hidden_size=heads * head_dim,
        intermediate_size=width * heads * head_dim // 2 * 2,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        vocab_size=64,
        max_position_embeddings=128,
    )


def row_bytes(layout):
    """Each row's bytes, in table order, spelt out as docs/design.md says it."""
    sizes = []
    for _ in range(layout.geometry.num_layers):
        for side in (0, 1):
            for module in range(7):
                sizes += [layout.lengths[module][side] * layout.geometry.itemsize] * layout.counts[module][
                    side
                ]
    return np.array(sizes)


@settings(deadline=None)
@given(
    ranks=st.tuples(*[st.integers(0, 40)] * 7).filter(any),
    head_dim=st.sampled_from([2, 8, 16, 64]),
    kv_heads=st.integers(1, 3),
    layers=st.integers(1, 5),
    width=st.integers(1, 5),
    page_tokens=st.integers(1, 64),
    itemsize=st.sampled_from([2, 4]),
)
def test_rows_are_aligned_apart_and_inside_pages(
    ranks, head_dim, kv_heads, layers, width, page_tokens, itemsize
):
    shape = model(head_dim, kv_heads, layers, width=width)
    try:
        geometry = page_geometry(shape, 1, page_tokens * 64, itemsize)
        layout = adapter_layout(shape, ranks, geometry)
    except UserError as error:
        assert "page_tokens must be at least" in str(error)
        needed = int(str(error).rstrip(".").split()[-1])
        assert needed > page_tokens * 64
        adapter_layout(shape, ranks, page_geometry(shape, 1, needed, itemsize))
        return
    sizes = row_bytes(layout)
    starts = layout.row_units * ROW_ALIGN_BYTES
    ends = starts + sizes
    assert layout.num_rows == 2 * sum(ranks) * layers == len(sizes)
    assert starts[0] >= layout.table_bytes >= 4 * layout.num_rows
    assert (starts[1:] >= ends[:-1]).all()
    assert (starts // geometry.page_bytes == (ends - 1) // geometry.page_bytes).all()
    assert layout.num_pages == ends[-1] // geometry.page_bytes + bool(ends[-1] % geometry.page_bytes)
    assert layout.payload_bytes == sizes.sum()
    # Nothing is lost but alignment and, at each page's end, less than the row that did not fit.
    aligned = -(-sizes // ROW_ALIGN_BYTES) * ROW_ALIGN_BYTES
    last_page = layout.num_pages - 1
    assert last_page * (geometry.page_bytes - aligned.max()) <= layout.table_bytes + aligned.sum()


@settings(deadline=None)
@given(data=st.data(), ranks=st.tuples(*[st.integers(0, 20)] * 7).filter(any))
def test_table_maps_rows_to_the_pages_given(data, ranks):
    shape = model(layers=3)
    layout = adapter_layout(shape, ranks, page_geometry(shape, 1, 16, 4))
    numbers = st.integers(0, 10_000)
    pages = data.draw(st.lists(numbers, min_size=layout.num_pages, max_size=layout.num_pages, unique=True))
    units = layout.geometry.units_per_page
    expected = [pages[unit // units] * units + unit % units for unit in layout.row_units.tolist()]
    table = layout.table(pages)
    assert table.dtype == np.int32 and table.tolist() == expected


def test_row_indices_follow_the_design():
    ranks = (8, 0, 16, 4, 0, 2, 64)
    layout = adapter_layout(EIGHT_B, ranks, page_geometry(EIGHT_B, 1, 16, 2))
    total = sum(ranks)
    for layer in (0, 1, 31):
        for module in range(7):
            first = layer * 2 * total + sum(ranks[:module])
            assert layout.rows(layer, module, "a") == slice(first, first + ranks[module])
            assert layout.rows(layer, module, "b") == slice(first + total, first + total + ranks[module])


def test_llama_8b_rank_16_takes_41_pages_and_wastes_under_3_percent():
    layout = adapter_layout(EIGHT_B, (16,) * 7, page_geometry(EIGHT_B, 1, 16, 2))
    assert layout.geometry.page_bytes == 2 * 2**20
    assert layout.payload_bytes == 80 * 2**20
    assert layout.num_pages <= 41
    assert 1 - layout.payload_bytes / layout.total_bytes <= 0.03
    assert layout is adapter_layout(EIGHT_B, [16] * 7, page_geometry(EIGHT_B, 1, 16, 2))


@pytest.mark.parametrize("rank", range(16, 257))
def test_adapters_on_all_linears_waste_at_most_3_percent(rank):
    layout = adapter_layout(EIGHT_B, (rank,) * 7, page_geometry(EIGHT_B, 1, 16, 2))
    assert 1 - layout.payload_bytes / layout.total_bytes <= 0.03


@pytest.mark.parametrize("mix", RANK_MIXES.items(), ids=lambda item: item[0])
def test_rank_mixes_on_all_linears_waste_at_most_3_percent(mix):
    """Held against used over one adapter of each rank; S1 is rank 8 alone, for which the table and the last page's rest weigh more."""
    name, ranks = mix
    layouts = [adapter_layout(EIGHT_B, (rank,) * 7, page_geometry(EIGHT_B, 1, 16, 2)) for rank in ranks]
    used, held = (
        sum(getattr(layout, size) for layout in layouts) for size in ("payload_bytes", "total_bytes")
    )
    assert 1 - used / held <= (0.05 if name == "S1" else 0.03)


def test_replicated_rows_at_tp_2():
    lengths = dict(zip(MODULES, row_lengths(EIGHT_B, 2), strict=True))
    assert lengths["q_proj"] == (4096, 2048)
    assert lengths["k_proj"] == (4096, 512)
    assert lengths["o_proj"] == (2048, 4096)
    assert lengths["down_proj"] == (7168, 4096)
    assert row_counts((3, 0, 16, 1, 8, 64, 5), 2) == tuple((r, r) for r in (3, 0, 16, 1, 8, 64, 5))


def test_block_diagonal_rows_are_the_replicated_ones_of_a_part_of_the_rank():
    assert row_lengths(EIGHT_B, 2, "block_diagonal") == row_lengths(EIGHT_B, 2)
    assert row_counts((16,) * 7, 2, "block_diagonal") == ((8, 8),) * 7


def test_slora_cuts_ranks_of_column_modules_and_outputs_of_all():
    lengths = dict(zip(MODULES, row_lengths(EIGHT_B, 2, "slora"), strict=True))
    assert lengths["q_proj"] == (4096, 2048)
    assert lengths["o_proj"] == (2048, 2048)
    assert lengths["down_proj"] == (7168, 2048)
    counts = dict(zip(MODULES, row_counts((16, 16, 16, 16, 3, 3, 3), 2, "slora"), strict=True))
    assert counts["q_proj"] == (8, 16)
    assert counts["o_proj"] == (16, 16)
    assert counts["gate_proj"] == (2, 3)
    assert counts["down_proj"] == (3, 3)


@pytest.mark.parametrize("sharding", ["replicated", "block_diagonal", "slora"])
def test_on_one_gpu_every_sharding_is_the_same(sharding):
    assert row_lengths(EIGHT_B, 1, sharding) == row_lengths(EIGHT_B)
    assert row_counts((16, 0, 3, 1, 8, 64, 5), 1, sharding) == row_counts((16, 0, 3, 1, 8, 64, 5))


def test_pages_that_do_not_fit():
    with pytest.raises(UserError, match="page_tokens must be a multiple of 4"):
        page_geometry(model(head_dim=2, kv_heads=1, layers=2), 1, 2, 4)
    with pytest.raises(UserError, match=r"row table of 114688 rows .* page_tokens must be at least 28"):
        adapter_layout(EIGHT_B, (256,) * 7, page_geometry(EIGHT_B, 8, 16, 2), tp=8)
    with pytest.raises(UserError, match="longest row"):
        adapter_layout(EIGHT_B, (0,) * 6 + (1,), page_geometry(model(layers=2), 1, 1, 4))
    with pytest.raises(UserError, match="at least one linear"):
        adapter_layout(EIGHT_B, (0,) * 7, page_geometry(EIGHT_B, 1, 16, 2))


def test_table_wants_the_right_pages():
    layout = adapter_layout(EIGHT_B, (16,) * 7, page_geometry(EIGHT_B, 1, 16, 2))
    with pytest.raises(ValueError, match="needed"):
        layout.table([1, 2])
    with pytest.raises(ValueError, match="beyond"):
        layout.table([2**17] * layout.num_pages)


def write(path, *records):
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in records))
    return path


def test_adapters_file(tmp_path):
    path = write(
        tmp_path / "adapters.jsonl",
        {"name": "a", "rank": 64},
        "",
        {
            "name": "b",
            "kind": "bd_lora",
            "rank": 32,
            "nblocks": 2,
            "target_modules": ["v_proj", "q_proj"],
            "path": None,
        },
    )
    adapters = load_adapters(path)
    assert list(adapters) == ["a", "b"]
    assert adapters["a"] == AdapterSpec(name="a", rank=64)
    assert adapters["a"].module_ranks == (64,) * 7
    assert adapters["b"].module_ranks == (32, 0, 32, 0, 0, 0, 0)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ("[1]", "JSON object"),
        ("{", "not JSON"),
        ({"rank": 8}, "name is missing"),
        ({"name": ""}, "name"),
        ({"name": 3}, "name"),
        ({"name": "a", "colour": 1}, "unknown key 'colour'"),
        ({"name": "a", "rank": 0}, r"rank \(=0\)"),
        ({"name": "a", "rank": 257}, "rank"),
        ({"name": "a", "rank": 8.5}, "rank"),
        ({"name": "a", "rank": True}, "rank"),
        ({"name": "a", "kind": "qlora"}, "kind"),
        ({"name": "a", "nblocks": 2}, "nblocks"),
        ({"name": "a", "kind": "bd_lora", "rank": 8, "nblocks": 3}, "nblocks"),
        ({"name": "a", "target_modules": ["lm_head"]}, "lm_head"),
        ({"name": "a", "target_modules": []}, "target_modules"),
        ({"name": "a", "target_modules": "q_proj"}, "target_modules"),
        ({"name": "a", "target_modules": ["q_proj", "q_proj"]}, "twice"),
        ({"name": "ok"}, "used twice"),
        ({"name": "a", "path": 3}, "path"),
        ({"name": "a", "path": "nowhere"}, r"no adapter_config\.json"),
    ],
)
def test_bad_adapter_lines_name_file_and_line(tmp_path, record, message):
    path = write(tmp_path / "adapters.jsonl", {"name": "ok"}, record)
    with pytest.raises(UserError, match=message) as refusal:
        load_adapters(path)
    assert str(refusal.value).startswith(f"{path}:2: ") and "\n" not in str(refusal.value)


def test_adapters_file_missing_or_empty(tmp_path):
    with pytest.raises(UserError, match="cannot be read"):
        load_adapters(tmp_path / "none.jsonl")
    with pytest.raises(UserError, match="holds no adapter"):
        load_adapters(write(tmp_path / "empty.jsonl"))


def test_adapters_of_a_trace():
    assumed = adapters_of_trace({"b": 64, "a": None})
    assert [(spec.name, spec.rank, spec.kind) for spec in assumed.values()] == [
        ("b", 64, "lora"),
        ("a", 16, "lora"),
    ]
    given_specs = {"a": AdapterSpec(name="a", rank=8), "unused": AdapterSpec(name="unused")}
    assert adapters_of_trace({"a": 8}, given_specs) == {"a": given_specs["a"]}
    with pytest.raises(UserError, match="rank 16 in the trace"):
        adapters_of_trace({"a": 16}, given_specs)
    with pytest.raises(UserError, match="not among"):
        adapters_of_trace({"c": None}, given_specs)
    with pytest.raises(UserError, match="rank"):
        adapters_of_trace({"c": 300})


@pytest.mark.parametrize(
    ("model", "factor", "ratio"),
    [
        ("llama-3.1-8b", 2, 0.8625),
        ("llama-3.1-70b", 2, 0.870),
        ("llama-3.1-8b", 4, 1.725),
        ("llama-3.1-70b", 4, 1.740),
    ],
)
def test_block_diagonal_adapters_have_the_papers_parameters(model, factor, ratio):
    """Over 8 GPUs, against dense LoRA: a layer has Σ r(in + out/N) for column-parallel and Σ r(in/N + out) for row-parallel linears."""
    shape, rank, gpus = MODEL_CATALOGUE[model], 16, 8
    geometry = page_geometry(shape, gpus, 64, 2)
    blocks = adapter_layout(shape, (factor * rank,) * 7, geometry, tp=gpus, sharding="block_diagonal")
    dense = adapter_layout(shape, (rank,) * 7, page_geometry(shape, 1, 64, 2))
    assert gpus * blocks.payload_bytes / dense.payload_bytes == pytest.approx(ratio, abs=1e-3)
    full = shape.linear_shapes(1)
    column = sum(full[name][1] + full[name][0] / gpus for name in full if name not in ROW_PARALLEL)
    row = sum(full[name][1] / gpus + full[name][0] for name in ROW_PARALLEL)
    expected = factor * rank * (column + row) * shape.num_layers * 2
    assert gpus * blocks.payload_bytes == pytest.approx(expected)
