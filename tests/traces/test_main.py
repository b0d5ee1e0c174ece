import json
import subprocess
import sys
from pathlib import Path

import pytest

import traces
from traces.__main__ import main
from traces.files import read_text

AZURE = (
    "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46.6805900,374,44\n2023-11-16 18:15:47.6,2,3\n"
)


def test_the_sample_is_made_by_the_command_of_its_readme(tmp_path: Path) -> None:
    readme = (traces.sample_path().parent / "README.md").read_text("utf-8")
    (command,) = (line.split() for line in readme.splitlines() if line.startswith("    python -m traces"))
    arguments = [*command[3:-1], str(tmp_path / "sample.jsonl.gz")]
    assert main(arguments) == 0
    assert read_text(tmp_path / "sample.jsonl.gz") == read_text(traces.sample_path())


def test_import_assign_and_describe_in_a_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, imported, assigned = (tmp_path / name for name in ("a.csv", "a.jsonl", "b.jsonl.gz"))
    source.write_text(AZURE)
    assert main(["import", "azure", str(source), "--out", str(imported)]) == 0
    assert main(["assign", str(imported), "--out", str(assigned), "--ranks", "8,32", "--adapters", "4"]) == 0
    assert capsys.readouterr().out == ""
    assert main(["describe", str(assigned), "--format", "json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert (summary["requests"], summary["prompt_tokens"]["max"]) == (2, 374)
    assert main(["describe", str(assigned)]) == 0
    assert capsys.readouterr().out.startswith("b: 2 requests in 0.9 s\n")


def test_without_an_output_file_the_trace_is_the_output(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["synth", "--requests", "3", "--adapters", "0", "--prompt-range", "5,6"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["prompt_tokens"] for row in rows] == [5, 5, 5]
    assert all("adapter" not in row for row in rows)


def test_duration_times_rate_is_the_number_of_requests(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["synth", "--rate", "4", "--duration-s", "2.6"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 10


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["describe", "none.jsonl"], "none.jsonl: cannot be read: no such file or directory"),
        (["describe", "bad.jsonl"], "bad.jsonl:1: arrival_s is missing"),
        (["describe", "--nonsense"], "No such option: --nonsense"),
        (["nonsense"], "No such command 'nonsense'"),
        (["import", "azure", "bad.jsonl"], "bad.jsonl:1: column TIMESTAMP is missing"),
        (["import", "azure", "a.csv", "--time-unit", "s"], "--time-unit is for mooncake, aiperf and vllm"),
        (
            ["import", "azure", "a.csv", "--out", "here.jsonl"],
            "here.jsonl: already exists; --overwrite replaces it",
        ),
        (
            ["import", "azure", "a.csv", "--out", "none/t.jsonl"],
            "none/t.jsonl: its folder none does not exist",
        ),
        (["assign", "good.jsonl", "--adapters", "0"], "--adapters must be at least 1"),
        (["assign", "good.jsonl", "--rule", "R2"], "good: rule R2 is sticky by session"),
        (
            ["assign", "good.jsonl", "--ranks", "8,x"],
            "--ranks must be one of S1, S2, S4, WIDE, or whole numbers",
        ),
        (["assign", "good.jsonl", "--ranks", "0"], "rank_mix must be ranks in 1..256"),
        (["synth", "--requests", "0"], "requests must be in 1..100000000, not 0"),
        (["synth", "--requests", "1", "--duration-s", "1"], "--requests and --duration-s exclude each other"),
        (["synth", "--duration-s", "nan"], "--duration-s must be above 0"),
        (["synth", "--rate", "-1"], "rate must be above 0"),
        (["synth", "--prompt-range", "5"], "--prompt-range must be LOW,HIGH, not 5"),
        (["synth", "--prompt-range", "5,2"], "lengths must be LOW,HIGH"),
        (["synth", "--seed", "-1"], "Invalid value for '--seed'"),
        (["synth", "--like", "x"], "Invalid value for '--like': 'x' is not one of 'azure-conv'"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a.csv").write_text(AZURE)
    Path("bad.jsonl").write_text("{}\n")
    Path("good.jsonl").write_text('{"arrival_s": 0, "prompt_tokens": 1, "output_tokens": 1}\n')
    Path("here.jsonl").write_text("mine")
    before = sorted(Path().iterdir())
    assert main(arguments) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith(f"error: {message}")
    assert said.err.count("\n") == 1
    assert sorted(Path().iterdir()) == before
    assert Path("here.jsonl").read_text() == "mine"


def test_as_a_program() -> None:
    command = [sys.executable, "-m", "traces"]
    usage = subprocess.run([*command, "--help"], capture_output=True, text=True, check=False)
    assert usage.returncode == 0
    assert all(name in usage.stdout for name in ("import", "synth", "assign", "describe"))
    failed = subprocess.run([*command, "describe", "none"], capture_output=True, text=True, check=False)
    assert (failed.returncode, failed.stdout) == (2, "")
    assert failed.stderr == "error: none: cannot be read: no such file or directory\n"
