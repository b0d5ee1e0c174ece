"""The loads' benchmark runs on a CPU with a tiny model, so that nothing but the numbers waits for the GPU."""

from engine.adapter import AdapterSpec
from engine.build import build_runner
from engine.load_bench import bench_loads
from tests.engine.test_profiler import CONFIG, SHAPE


def test_rows_are_of_loads_and_of_decodes_without_and_with_them():
    specs = {f"a{number}": AdapterSpec(name=f"a{number}", rank=8) for number in range(12)}
    runner = build_runner(CONFIG, specs, shape=SHAPE)
    rows = bench_loads(runner, loads=4, steps=3)
    assert [(row["case"], row.get("pages"), row.get("loads")) for row in rows] == [
        ("loads", "neighbours", None),
        ("loads", "scattered", None),
        ("decode", None, False),
        ("decode", None, True),
    ]
    for row in rows[:2]:
        assert row["bytes"] == 4 * runner.blueprint.footprints["a0"].copy_bytes
        assert row["gb_per_s"] > 0 and row["seconds"] > 0
    assert rows[3]["gb_per_s"] > 0 and rows[2]["median_ms"] > 0
    assert runner.loader.num_loading == 0
    runner.store.check_integrity()
