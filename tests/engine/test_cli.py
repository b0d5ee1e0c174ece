"""`python -m engine` as a user meets it: a replay on a CPU from files, and one clear line for everything that is wrong."""

import json

import pytest

from engine.__main__ import main
from engine.adapter import AdapterSpec, load_adapters
from engine.bench import BenchPlan, bench
from engine.config import ServingConfig
from tests.engine.tiny import save_adapter, save_model, tiny_model
from traces.run_record import read_run

CONFIG = {
    "backend": "reference",
    "dtype": "float32",
    "max_num_seqs": 4,
    "max_num_batched_tokens": 64,
    "max_model_len": 256,
    "page_tokens": 64,
    "num_pages": 200,
}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with a model, two PEFT adapters, adapters.jsonl, a trace and a configuration."""
    folder = tmp_path_factory.mktemp("world")
    model = tiny_model()
    save_model(model, folder / "model")
    save_adapter(model, folder / "small", rank=8, targets=("q_proj", "v_proj"))
    save_adapter(model, folder / "large", rank=16)
    (folder / "adapters.jsonl").write_text(
        "".join(json.dumps({"name": name, "path": name}) + "\n" for name in ("small", "large"))
    )
    names = ["small", "large", None, "large"]
    rows = [
        {"id": i, "arrival_s": i * 0.05, "prompt_tokens": 20 + i, "output_tokens": 3 + i, "adapter": name}
        for i, name in enumerate(names)
    ]
    (folder / "trace.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "config.json").write_text(json.dumps(CONFIG | {"model": str(folder / "model")}))
    return folder


def command(world, out, **changes):
    flags = {
        "--trace": world / "trace.jsonl",
        "--config": world / "config.json",
        "--adapters": world / "adapters.jsonl",
        "--out": out,
    }
    flags |= {f"--{key}": value for key, value in changes.items()}
    return ["replay", *(str(part) for pair in flags.items() for part in pair)]


def test_a_replay_writes_a_record_and_prints_metrics(world, tmp_path, capsys):
    out = tmp_path / "run"
    assert main([*command(world, out), "--format", "json"]) == 0
    totals = json.loads(capsys.readouterr().out)
    assert (totals["requests"], totals["adapter_loads"], totals["preemptions"]) == (4, 2, 0)
    record = read_run(out)
    assert record.run["config"]["backend"] == "reference"
    assert [spec["name"] for spec in record.run["adapters"]] == ["small", "large"]
    assert record.requests["rank"].tolist()[:2] == [8, 16]
    assert (record.requests.first_token_s >= record.requests.arrival_s).all()
    assert (record.requests.finish_s > record.requests.first_token_s).all()
    decoded = record.steps.decode_rows.sum() + record.steps.prefill_chunks.sum()
    assert decoded >= record.requests.output_tokens.sum()


def fails(capsys, arguments, message):
    assert main(arguments) == 2
    captured = capsys.readouterr()
    lines = captured.err.strip().splitlines()
    assert lines[-1].startswith("error: ")
    assert message in lines[-1]
    assert captured.out == ""


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_num_seqs": 0}, "max_num_seqs=0 must be in 1..4096"),
        ({"max_num_seqs": 2.5}, "max_num_seqs=2.5 must be a whole number"),
        ({"speed": 9}, "unknown key 'speed'"),
        ({"backend": "cuda"}, "backend='cuda' must be one of triton, reference"),
        ({"tp": 3}, "tp (=3) must divide num_heads (=4)"),
        ({"gpu": "tpu"}, "gpu 'tpu' is not known"),
        ({"model": "llama-9"}, "llama-9"),
        ({"page_tokens": 1, "num_pages": 400}, "page_tokens must be at least"),
        ({"num_pages": 3}, "num_pages=3 must be at least 4"),
        ({"max_model_len": 4096}, "max_model_len=4096 exceeds"),
        ({"merge": "hot", "merge_adapter": "x"}, "merge_adapter='x' is not among the adapters given"),
        ({"host_memory_bytes": 1000}, "host_memory_bytes=1000"),
    ],
)
def test_a_bad_configuration_is_one_line(world, tmp_path, capsys, changes, message):
    config = tmp_path / "config.json"
    config.write_text(json.dumps(CONFIG | {"model": str(world / "model")} | changes))
    fails(capsys, command(world, tmp_path / "run", config=config), message)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("flag", "text", "message"),
    [
        ("config", "{", "not JSON"),
        ("config", "[]", "must be a JSON object"),
        ("config", "[" * 100_000, "not JSON"),
        ("config", '{"tp": ' + "9" * 5000 + "}", "not JSON"),
        ("adapters", "[" * 100_000, ":1"),
        ("trace", "", "trace"),
        ("trace", "[1]\n", ":1"),
        ("adapters", '{"name": "small"}\n', "'large'"),
        ("adapters", '{"name": "small", "rank": 0}\n', ":1"),
        ("adapters", '{"name": "small", "path": "nowhere"}\n', ":1"),
    ],
)
def test_a_bad_file_is_one_line_that_names_it(world, tmp_path, capsys, flag, text, message):
    path = tmp_path / f"bad-{flag}"
    path.write_text(text)
    fails(capsys, command(world, tmp_path / "run", **{flag: path}), message)
    assert not (tmp_path / "run").exists()


def test_missing_files_unknown_flags_and_a_full_folder_are_one_line(world, tmp_path, capsys):
    fails(capsys, command(world, tmp_path / "run", trace=tmp_path / "none"), "none")
    fails(capsys, command(world, tmp_path / "run", config=tmp_path / "none"), "none")
    fails(capsys, [*command(world, tmp_path / "run"), "--speed", "9"], "--speed")
    full = tmp_path / "full"
    full.mkdir()
    (full / "kept").write_text("x")
    fails(capsys, command(world, full), "not empty")
    assert [item.name for item in full.iterdir()] == ["kept"]


@pytest.mark.parametrize(
    ("flag", "value"), [("seed", -1), ("seed", 2**40), ("load-level", -1), ("load-level", "nan")]
)
def test_a_bad_number_is_told_before_anything_is_built(world, tmp_path, capsys, flag, value):
    fails(capsys, command(world, tmp_path / "run", **{flag: value}), f"--{flag}")
    assert not (tmp_path / "run").exists()


def test_an_output_that_cannot_be_written_is_told_before_anything_is_served(world, tmp_path, capsys):
    (tmp_path / "file").write_text("x")
    fails(capsys, command(world, tmp_path / "file" / "run"), "is not a folder")
    assert "replaying" not in capsys.readouterr().err


def test_a_record_keeps_what_its_adapters_are(world, tmp_path):
    save_adapter(tiny_model(), tmp_path / "patterned", rank=8, rank_pattern={"q_proj": 16})
    (tmp_path / "adapters.jsonl").write_text(json.dumps({"name": "p", "path": "patterned"}) + "\n")
    (tmp_path / "trace.jsonl").write_text(
        json.dumps({"arrival_s": 0.0, "prompt_tokens": 9, "output_tokens": 2, "adapter": "p"}) + "\n"
    )
    flags = {"trace": tmp_path / "trace.jsonl", "adapters": tmp_path / "adapters.jsonl"}
    assert main(command(world, tmp_path / "run", **flags)) == 0
    (spec,) = read_run(tmp_path / "run").run["adapters"]
    overrides = tuple((module, rank) for module, rank in spec["rank_overrides"])
    kept = AdapterSpec(name="p", rank=spec["rank"], rank_overrides=overrides)
    assert kept.module_ranks == (16, 8, 8, 8, 8, 8, 8)


def test_a_truncated_adapter_is_one_line_that_names_the_file(world, tmp_path, capsys):
    for name in ("small", "large"):
        folder = tmp_path / name
        folder.mkdir()
        for file in (world / name).iterdir():
            (folder / file.name).write_bytes(file.read_bytes())
    weights = tmp_path / "large" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    (tmp_path / "adapters.jsonl").write_text((world / "adapters.jsonl").read_text())
    fails(
        capsys,
        command(world, tmp_path / "run", adapters=tmp_path / "adapters.jsonl"),
        "adapter_model.safetensors",
    )
    assert not (tmp_path / "run").exists()


def test_the_triton_backend_without_a_gpu_says_what_to_do(world, tmp_path, capsys):
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    config = tmp_path / "config.json"
    config.write_text(json.dumps(CONFIG | {"model": str(world / "model"), "backend": "triton"}))
    fails(capsys, command(world, tmp_path / "run", config=config), "use backend 'reference' on a CPU")


def test_bench_measures_decode_and_bursts_without_and_with_adapters(world):
    config = ServingConfig.from_json(CONFIG | {"model": str(world / "model")})
    plan = BenchPlan(
        batches=(1, 4),
        base_requests=2,
        lora_requests=2,
        prompt_tokens=8,
        output_tokens=6,
        burst_tokens=(8, 30),
    )
    adapters = load_adapters(world / "adapters.jsonl")
    rows = list(bench(config, adapters, plan, seed=0, progress=lambda _: None))
    assert [(row["case"], row["batch"], row["adapters"]) for row in rows] == [
        ("decode", 1, 0),
        ("decode", 4, 0),
        ("burst", 4, 0),
        ("decode", 1, 1),
        ("decode", 4, 2),
        ("burst", 4, rows[-1]["adapters"]),
    ]
    assert all(row["tpot_ms"] > 0 for row in rows)
    assert [row["rps"] is None for row in rows] == [True, True, False, True, True, False]
    assert (rows[3]["rank"], rows[4]["rank"]) == (8, None)


def test_bench_says_what_it_cannot_do_before_anything_is_built(world, tmp_path, capsys):
    arguments = ["bench", "--config", str(world / "config.json"), "--adapters", str(world / "adapters.jsonl")]
    (tmp_path / "there").write_text("{}")
    fails(capsys, [*arguments, "--out", str(tmp_path / "there")], "is there already")
    fails(capsys, [*arguments, "--out", str(tmp_path / "new")], "max_model_len=256 must be at least 1024")
    fails(capsys, [*arguments, "--out", str(tmp_path / "new"), "--batches", "many"], "--batches")
    assert not (tmp_path / "new").exists()


def test_a_profile_is_not_made_under_another_gpus_name(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: "NVIDIA A100-SXM4-80GB")
    assert main(["profile", "--out", str(tmp_path)]) == 2
    assert "--gpu h200: the GPU here is 'NVIDIA A100-SXM4-80GB'" in capsys.readouterr().err
    assert main(["profile", "--out", str(tmp_path), "--gpu", "nobody"]) == 2
    assert "gpu 'nobody' is not known" in capsys.readouterr().err
